"""BlockOptimizer in a Trainer that accelerate shards with FSDP2: stops and resumes bitwise."""

from __future__ import annotations

import os

import accelerate
import pytest
import torch
from checkpoint_support import WAYS
from distributed_support import succeed, succeed_each, tiny, train, whole
from packaging import version
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import gradselect as gs

STEPS = 6
POLICIES = {
    # Explores and exploits; state stays on the host.
    "adagradselect": (gs.AdaGradSelect(count=2, delta=9.0, explore_steps=2), gs.Offload(), torch.bfloat16),
    # No parameter has state at a save: torch would take a step to create it.
    "cyclic": (gs.Cyclic(every=1), gs.Drop(), torch.float32),
}


def build(folder, **settings):
    from tiny_models import tiny_llama
    from transformers import Trainer, TrainingArguments

    from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

    policy, residency, dtype = POLICIES["adagradselect"]
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        max_steps=STEPS,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        fsdp=True,
        fsdp_config={
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
        **settings,
    )
    return Trainer(
        model=tiny_llama(layers=3, dtype=dtype),
        args=args,
        train_dataset=examples(8),
        optimizer_cls_and_kwargs=(
            SelectiveOptimizerFactory,
            {"policy": policy, "residency": residency, "args": args},
        ),
        callbacks=[SelectionCallback()],
    )


def examples(count):
    from tiny_models import tiny_batch, tiny_llama

    model = tiny_llama(layers=1)
    batches = (tiny_batch(model, seed=seed, batch=1) for seed in range(count))
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def shard_on_cpu():
    """Accelerate enables its FSDP plugin only on accelerators, but the plugin works on the CPU too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def begin_sharded(self, *args, fsdp_plugin=None, **settings):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = begin_sharded


def stop_and_resume(rank, *, folder):
    """Return the end of an uninterrupted run, and of one resumed from its checkpoint at step 3."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    shard_on_cpu()
    trainer = build(folder, save_strategy="steps", save_steps=3)
    trainer.train()
    resumed = build(folder / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return [
        (whole(each.model), each.optimizer.optimizer.update_counts, each.optimizer.optimizer.num_steps)
        for each in (trainer, resumed)
    ]


@pytest.mark.skipif(
    version.parse(accelerate.__version__) < version.parse("1.13"), reason="it cannot read its own FSDP2 checkpoints"
)
def test_stopped_and_resumed_it_ends_bitwise_equal(tmp_path):
    for (weights, counts, steps), (others, other_counts, other_steps) in succeed(
        stop_and_resume, world=2, timeout=150, folder=tmp_path
    ):
        assert steps == other_steps == STEPS
        assert counts == other_counts
        assert all(parameter.dtype == torch.bfloat16 for parameter in weights.values())
        for name, weight in weights.items():
            assert torch.equal(weight, others[name]), name


# Models that an optimizer is built on --------------------------------------------------------------------------------


def block_optimizer(model):
    return gs.BlockOptimizer(model, gs.Uniform(count=1))


def sparse_optimizer(model):
    return gs.SparseOptimizer(model, gs.ID3(budget=10, steps=5))


class DeepSpeedEngine(nn.Module):
    """Same name as DeepSpeed's engine, which holds the model in its attribute `module`."""

    def __init__(self):
        super().__init__()
        self.module = tiny()


def partitioned():
    """A model as ZeRO-3 leaves it: an empty parameter with a number and its shard."""
    model = tiny()
    weight = model.head.weight
    weight.data = torch.empty(0)
    weight.ds_id, weight.ds_tensor = 7, torch.empty(3)
    return model


@pytest.mark.parametrize("build", [block_optimizer, sparse_optimizer])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (DeepSpeedEngine, "DeepSpeed engine steps an optimizer of its own.*fully_shard"),
        (partitioned, "'head.weight' belongs to DeepSpeed ZeRO-3.*fully_shard"),
        (lambda: tiny().to("meta"), "meta device.*to_empty"),
    ],
    ids=["engine", "zero-3", "meta"],
)
def test_what_hides_its_weights_is_refused(model, message, build):
    with pytest.raises(gs.UsageError, match=message):
        build(model())


@pytest.mark.parametrize("build", [block_optimizer, sparse_optimizer])
def test_a_wrapper_is_taken_off(build):
    optimizer = build(torch.compile(nn.DataParallel(tiny()), backend="eager"))
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert set(names) <= {name for name, _ in tiny().named_parameters()}


# torch.distributed.checkpoint.state_dict, which accelerate calls --------------------------------------------------


def pass_all_whole(rank):
    return {name: pass_whole(rank, name=name) for name in POLICIES}


def pass_whole(rank, *, name):
    """Take three steps, pass on rank 0's whole state dict, as accelerate's FULL_STATE_DICT does, and continue both."""
    options = {"full_state_dict": True, "cpu_offload": True}
    model, optimizer = sharded(name)
    train(model, optimizer, steps=3, rank=rank, world=2)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    weights = get_model_state_dict(model, options=StateDictOptions(**options))
    again, resumed = sharded(name)
    passed = StateDictOptions(**options, broadcast_from_rank0=True)
    set_model_state_dict(again, weights, options=passed)
    set_optimizer_state_dict(again, resumed, saved, options=passed)
    held = [len(each.state) for each in (optimizer, resumed)]
    for each in ((model, optimizer), (again, resumed)):
        train(*each, steps=3, first=3, rank=rank, world=2)
    with pytest.raises((gs.UsageError, RuntimeError), match=r"before the first|single memory location"):
        set_optimizer_state_dict(again, resumed, saved, options=passed)
    refuse_to_cut(rank=rank)
    return whole(model), whole(again), held, resumed.num_steps


def sharded(name):
    policy, residency, dtype = POLICIES[name]
    model = shard(tiny(dtype=dtype))
    return model, gs.BlockOptimizer(model, policy, lr=1e-2, accumulation_steps=2, residency=residency)


def shard(model):
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def refuse_to_cut(*, rank):
    """Refuse a rule without support for shards, also if the model is sharded after the optimizer is built."""
    model = tiny()
    optimizer = gs.BlockOptimizer(model, gs.All(), rule=gs.AdamW8bitRule())
    shards = dict(shard(model).named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[name] for name in group["param_names"]]
    with pytest.raises(gs.UsageError, match=r"AdamW8bitRule .* shards would cut them apart"):
        train(model, optimizer, steps=1, rank=rank, world=2)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """Results of two ranks, by job."""
    return succeed_each({pass_all_whole: {}, pass_flat: {"folder": tmp_path_factory.mktemp("passed")}}, world=2)


@pytest.mark.parametrize("name", POLICIES)
def test_torch_passes_the_whole_state_on_and_makes_none_up(name, passed):
    for weights, others, (held, held_again), steps in (results[name] for results in passed[pass_all_whole]):
        assert steps == 6
        assert held == held_again < len(weights)
        for key, weight in weights.items():
            assert torch.equal(weight, others[key]), key


# State dicts that are flat, or taken apart by other helpers --------------------------------------------------------

MAKES = {
    "explore": lambda model: gs.BlockOptimizer(model, gs.AdaGradSelect(count=2, delta=9.0, explore_steps=2), lr=1e-2),
    "drop": lambda model: gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2, residency=gs.Drop()),
    "growing mask": lambda model: gs.SparseOptimizer(model, gs.ID3(density=0.05, steps=6), lr=1e-2),
    "dense mask": lambda model: gs.SparseOptimizer(model, gs.GMT(fraction=0.2), lr=1e-2),
}
PASSED = [
    ("explore", "by hand, flat"),
    ("explore", "by torch, flat"),
    ("drop", "by files"),
    ("growing mask", "by hand, flat"),
    ("dense mask", "by files"),
    ("dense mask", "by torch, flat"),
]


def pass_flat(rank, *, folder):
    """For each optimizer and way: number of steps, number of states after a save, and both weights at the end."""
    return {pair: pass_one(rank, *pair, folder=folder / " ".join(pair)) for pair in PASSED}


def pass_one(rank, name, way, *, folder):
    pairs = [(model := shard(tiny()), MAKES[name](model)) for _ in range(2)]
    (model, optimizer), (again, resumed) = pairs
    settings = {"rank": rank, "world": 2, "accumulation": 1, "clip": None}
    train(model, optimizer, steps=3, **settings)
    set_model_state_dict(again, get_model_state_dict(model))
    WAYS[way](model, optimizer, again, resumed, folder=folder)
    held = [len(each.state) for each in (optimizer, resumed)]
    steps = resumed.num_steps
    for each in pairs:
        train(*each, steps=3, first=3, **settings)
    return steps, held, whole(model), whole(again)


def test_state_dicts_of_shards_survive_every_helper(passed):
    """Flat helpers lost all states of shards: refused with blocks, and in silence with a dense mask."""
    for results in passed[pass_flat]:
        for found, (steps, (held, held_again), weights, others) in results.items():
            assert steps == 3, found
            assert held == held_again, found
            for key, weight in weights.items():
                assert torch.equal(weight, others[key]), (found, key)


def test_an_accelerate_that_cannot_resume_under_fsdp2_is_said(monkeypatch, caplog):
    from types import SimpleNamespace

    from accelerate.state import AcceleratorState

    from gradselect.integrations.transformers import SelectiveOptimizerFactory, checks

    monkeypatch.setattr(checks, "AcceleratorState", AcceleratorState)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"fsdp_plugin": SimpleNamespace(fsdp_version=2)})
    for installed, is_said in (("1.12.0", True), ("1.13.0", False)):
        caplog.clear()
        monkeypatch.setattr(checks.accelerate, "__version__", installed)
        SelectiveOptimizerFactory()(tiny(), policy=gs.Uniform(count=1), lr=1e-3)
        assert ("update accelerate to 1.13 or newer" in caplog.text) is is_said
