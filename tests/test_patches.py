"""Live patches: a second copy of the model follows the training bit for bit, and gets no byte more than it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_support
import pytest
import test_mask_contract
import test_policy_contract
import torch
from policy_support import through_torch
from safetensors.torch import load_file
from tiny_models import (
    HIDDEN,
    VOCABULARY,
    Output,
    seeded,
    tiny_bart,
    tiny_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    tiny_plain,
    tiny_qwen2,
    tiny_t5,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import gradselect as gs
from gradselect import UsageError
from gradselect.core import Entries, index_dtype

NUM_STEPS = 50
RUNS = {
    "fp32, keep, in backward": (torch.float32, gs.Keep(), {"update_in_backward": True}),
    "bf16, offload": (torch.bfloat16, gs.Offload(), {}),
    "bf16, drop, no masters": (torch.bfloat16, gs.Drop(), {"master_dtype": None}),
}


class Layer(nn.Module):
    """A residual MLP, named as the rows of the mask table expect."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp_up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.mlp_down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp_down(torch.relu(self.mlp_up(self.norm(hidden))))


class Net(nn.Module):
    """Tied embedding, two layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.out.weight = self.tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(
        self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, **_: Tensor | None
    ) -> Output | Tensor:
        hidden = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.out(self.norm(hidden))
        if input_ids is None:
            return logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return Output(logits=logits, loss=loss)


def small_sequential() -> nn.Sequential:
    """Embedding, five layers, norm, head."""
    layers = (nn.Linear(4, 4) for _ in range(5))
    return seeded(lambda: nn.Sequential(nn.Embedding(8, 4), *layers, nn.LayerNorm(4), nn.Linear(4, 8)))


def assert_same(copy_: nn.Module, model: nn.Module) -> None:
    for (name, ours), theirs in zip(copy_.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def step_of(model: nn.Module, optimizer: Any, seed: int) -> None:
    if isinstance(model, nn.Sequential):
        tokens = torch.randint(8, (2, 4), generator=torch.Generator().manual_seed(seed))
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
    else:
        model(**tiny_batch(model, seed=seed, length=4)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def follow(model: nn.Module, optimizer: Any, *, steps: int = NUM_STEPS) -> list[gs.Patch]:
    """Train, and let a copy follow by patches alone; it must be equal after each step."""
    follower, patches = copy.deepcopy(model), []
    for seed in range(steps):
        step_of(model, optimizer, seed)
        patches.append(optimizer.changed_entries())
        gs.delta.apply_patch(follower, patches[-1])
        assert_same(follower, model)
    return patches


# Every policy and every mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("make", test_policy_contract.TABLE.values(), ids=test_policy_contract.TABLE)
def test_a_copy_follows_every_policy(make: Callable[[int], gs.AbstractPolicy], run: Any) -> None:
    dtype, residency, options = run
    model = small_sequential().to(dtype)
    optimizer = gs.BlockOptimizer(
        model, make(3), always="head", lr=1e-2, weight_decay=0.1, residency=residency, **options
    )
    records: list[gs.StepRecord] = []
    optimizer.add_record_hook(records.append)
    patches = follow(model, optimizer, steps=NUM_STEPS if isinstance(residency, gs.Offload) else 6)
    members = optimizer._table.members
    for patch, record in zip(patches, records, strict=True):
        assert set(patch) == {name for block in record.selected for name in members[block]}
        assert all(isinstance(each, Tensor) for each in patch.values())


MASKS = {name: make for name, (make, _) in test_mask_contract.TABLE.items()}
for of_names in ("fixed entries", "fixed entries, none in one", "sparta"):
    del MASKS[of_names]  # rows that name tensors of another model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_copy_follows_every_mask(make: Callable[[], gs.AbstractMask], dtype: torch.dtype) -> None:
    model = seeded(Net).to(dtype)
    options = {"master_dtype": None} if dtype == torch.bfloat16 else {}
    optimizer = gs.SparseOptimizer(
        model, make(), always="layers.1.norm.bias", lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, **options
    )
    num_entries = []
    optimizer.add_record_hook(lambda record: num_entries.append(record.num_entries))
    patches = follow(model, optimizer, steps=NUM_STEPS if dtype == torch.bfloat16 else 6)
    is_gradient = isinstance(optimizer.mask, gs.GMT) and optimizer.mask.mask == "gradient"
    for patch, counts in list(zip(patches, num_entries, strict=True))[1:]:
        for name, count in counts.items():
            change = patch[name]
            whole = isinstance(change, Tensor)
            size = model.get_parameter(name).numel()
            assert whole == (is_gradient or count * (4 + dtype.itemsize) >= size * dtype.itemsize), name
            if not whole:
                assert len(change.indices) == count
                assert change.indices.dtype == torch.int32
                assert bool((change.indices.diff() > 0).all())


def test_half_precision_weights_with_masters_travel_rounded() -> None:
    for mask in (gs.ID3(budget=60, steps=4), gs.GMT(fraction=0.2, mask="update"), gs.TopGradient(density=0.1)):
        model = seeded(Net).bfloat16()
        patches = follow(model, gs.SparseOptimizer(model, mask, lr=1e-3), steps=8)
        assert {each.values.dtype for patch in patches[1:] for each in patch.values() if isinstance(each, Entries)} == {
            torch.bfloat16
        }


def test_8_bit_moments_change_nothing_about_patches() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).bfloat16()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), rule=gs.AdamW8bitRule(), residency=gs.Offload(), lr=1e-2)
    follower = copy.deepcopy(model)
    for _ in range(4):
        model(torch.ones(2, 64, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gs.delta.apply_patch(follower, optimizer.changed_entries())
        assert_same(follower, model)


# Several steps, skipped steps, resumed runs ------------------------------------------------------------------------

MASKS: dict[str, Callable[[], gs.AbstractMask]] = {
    "static, refreshed": lambda: gs.StaticMask(density=0.02, refresh_every=2),
    "top gradient": lambda: gs.TopGradient(density=0.02),
    "id3": lambda: gs.ID3(budget=60, steps=9),
    "gmt, update": lambda: gs.GMT(fraction=0.02, mask="update"),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_patch_covers_all_steps_since_the_last_one(make: Callable[[], gs.AbstractMask]) -> None:
    model = seeded(Net)
    optimizer = gs.SparseOptimizer(model, make(), lr=1e-2)
    follower, last = copy.deepcopy(model), 0
    for seed, end in enumerate((3, 4, 4, 9, 16)):
        for step in range(last, end):
            step_of(model, optimizer, step)
        patch = optimizer.changed_entries()
        assert (patch.from_step, patch.to_step) == (last, end)
        before = copy.deepcopy(follower.state_dict())
        gs.delta.apply_patch(follower, patch)
        assert_same(follower, model)
        if last == end:
            assert len(patch) == 0
        elif seed:  # the first may hold more than has moved
            for name, change in patch.items():
                if isinstance(change, Entries):
                    moved = (model.state_dict()[name] != before[name]).flatten().nonzero().flatten()
                    assert set(moved.tolist()) <= set(change.indices.tolist())
                    assert len(moved) >= 0.9 * len(change.indices)
        last = end


def test_memory_for_entries_that_left_the_set_is_bounded_by_the_weights() -> None:
    model = seeded(Net)
    optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.1), lr=1e-2)
    optimizer.changed_entries()
    for step in range(40):
        step_of(model, optimizer, step)
        for store in optimizer._entries.stores:
            for name, left in store._moved._left.items():
                assert left is None or 8 * len(left) < 4 * model.get_parameter(name).numel()
    follower = seeded(Net)
    patch = optimizer.changed_entries()
    gs.delta.apply_patch(follower, patch)
    assert_same(follower, model)
    assert patch.num_bytes <= patch.model_bytes


def test_nobody_who_asks_for_no_patch_keeps_lists() -> None:
    model = seeded(Net)
    optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.1), lr=1e-2)
    for step in range(5):
        step_of(model, optimizer, step)
    assert all(left is None for store in optimizer._entries.stores for left in store._moved._left.values())


def test_steps_that_change_nothing_give_an_empty_patch() -> None:
    for build in (
        lambda model: gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-2, skip_nonfinite=True),
        lambda model: gs.SparseOptimizer(model, gs.ID3(budget=9, steps=2), lr=1e-2, skip_nonfinite=True),
    ):
        model = tiny_plain()
        optimizer = build(model)
        assert len(optimizer.changed_entries()) == 0
        (model(**tiny_batch(model, seed=0)).loss * torch.inf).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.num_skipped == 1
        optimizer.step()  # without gradients
        patch = optimizer.changed_entries()
        assert (len(patch), patch.num_bytes, patch.num_entries) == (0, 0, 0)


def test_a_resumed_run_goes_on_with_patches() -> None:
    for build in (
        lambda model: gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-2),
        lambda model: gs.SparseOptimizer(model, gs.StaticMask(density=0.02, refresh_every=2), lr=1e-2),
    ):
        model = seeded(Net)
        optimizer = build(model)
        for seed in range(3):
            step_of(model, optimizer, seed)
        saved, state = copy.deepcopy(model.state_dict()), through_torch(optimizer.state_dict())
        resumed, follower = seeded(Net), seeded(Net)
        again = build(resumed)
        resumed.load_state_dict(saved)
        follower.load_state_dict(saved)
        again.load_state_dict(state)
        for seed in range(3, 6):
            step_of(resumed, again, seed)
            patch = again.changed_entries()
            assert (patch.from_step, patch.to_step) == (seed, seed + 1)
            gs.delta.apply_patch(follower, patch)
            assert_same(follower, resumed)


def test_loading_a_state_loses_nothing_that_has_moved_before() -> None:
    model, follower = seeded(Net), seeded(Net)
    optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.02), lr=1e-2)
    optimizer.changed_entries()
    early = copy.deepcopy(optimizer.state_dict())
    for seed in range(3):
        step_of(model, optimizer, seed)
    optimizer.load_state_dict(early)
    gs.delta.apply_patch(follower, optimizer.changed_entries())
    assert_same(follower, model)


def test_a_patch_is_a_copy_that_later_steps_leave_alone() -> None:
    model = tiny_plain()
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    step_of(model, optimizer, 0)
    after = copy.deepcopy(model)
    patch, follower = optimizer.changed_entries(), tiny_plain()
    step_of(model, optimizer, 1)
    gs.delta.apply_patch(follower, patch)
    assert_same(follower, after)


def test_a_copy_follows_a_trainer_through_a_callback(tmp_path: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gradselect.integrations.transformers import SelectiveTraining

    model = tiny_llama(layers=2)
    served, patches = copy.deepcopy(model), []

    class Send(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
            patches.append(optimizer.optimizer.changed_entries())
            gs.delta.apply_patch(served, patches[-1])
            assert_same(served, model)

    batch = tiny_batch(model, seed=0, batch=8)
    rows = [{key: values[row] for key, values in batch.items()} for row in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    selection = SelectiveTraining(policy=gs.Cyclic(every=1))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[selection, Send()])  # type: ignore[arg-type]
    trainer.train()
    assert [patch.to_step for patch in patches] == [1, 2, 3]


# Names and shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_bert_classifier, tiny_t5, tiny_bart],
    ids=lambda each: each.__name__,
)
def test_names_and_values_are_those_of_a_saved_checkpoint(build: Callable[..., Any], tmp_path: Path) -> None:
    model = build()
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    batch = tiny_batch(model, seed=0)
    if model.config.is_encoder_decoder is False and "Classification" in type(model).__name__:
        batch["labels"] = torch.tensor([0, 1])
    model(**batch).loss.backward()
    optimizer.step()
    patch = optimizer.changed_entries()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(patch) <= set(saved)
    assert all(torch.equal(saved[name], patch[name]) for name in patch)
    assert patch.model_bytes == sum(each.nbytes for name, each in saved.items() if "final_logits_bias" not in name)


def test_tied_weights_travel_once_and_reach_copies_that_have_them_twice() -> None:
    model = tiny_qwen2(layers=1, tied=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untied = tiny_qwen2(layers=1, tied=False)
    untied.load_state_dict(state)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    step_of(model, optimizer, 0)
    patch = optimizer.changed_entries()
    assert "lm_head.weight" not in patch
    assert patch.names_of("model.embed_tokens.weight") == ("model.embed_tokens.weight", "lm_head.weight")
    gs.delta.apply_patch(state, patch)
    gs.delta.apply_patch(untied, patch)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(untied.state_dict()[name], tensor)


def test_weights_of_an_adapter_have_the_names_of_its_file() -> None:
    import peft

    model, follower = (tiny_lora(layers=2, modules_to_save=("lm_head",)) for _ in range(2))
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    step_of(model, optimizer, 0)
    patch = optimizer.changed_entries()
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(patch) == set(saved)
    assert all(torch.equal(patch[name], saved[name]) for name in patch)
    gs.delta.apply_patch(follower, patch)
    assert_same(follower, model)
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(UsageError, match="keep one adapter"):
        optimizer.changed_entries()


def test_wrappers_leave_no_trace_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, model = tiny_plain(), tiny_plain()
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    step_of(model, optimizer, 0)
    patch = optimizer.changed_entries()
    assert set(patch) == set(tiny_plain().state_dict())
    gs.delta.apply_patch(torch.compile(plain, backend="eager"), patch)
    assert_same(plain, model)


def test_a_rotated_weight_travels_whole_and_unrotated() -> None:
    model = tiny_llama(layers=2)
    follower = copy.deepcopy(model)
    mask = gs.sparsegrad.convert(model, [tiny_batch(model, seed=9)], density=0.01)
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
    step_of(model, optimizer, 0)
    patch = optimizer.changed_entries()
    assert set(patch) == {name.replace("rotated_weight", "weight") for name in optimizer.mask.names}
    with pytest.raises(UsageError, match="another basis"):
        gs.delta.apply_patch(model, patch)
    gs.delta.apply_patch(follower, patch)
    optimizer.close()
    gs.sparsegrad.fold(model)
    for name in patch:
        assert torch.equal(follower.get_parameter(name), model.get_parameter(name))


def test_indices_are_int32_up_to_two_to_the_31() -> None:
    assert index_dtype(2**31) == torch.int32
    assert index_dtype(2**31 + 1) == torch.int64


# Several ranks -----------------------------------------------------------------------------------------------------


def shard(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


SHARDED: dict[str, Callable[[nn.Module], Any]] = {
    "blocks": lambda model: gs.BlockOptimizer(
        model, gs.Uniform(count=1), lr=1e-2, accumulation_steps=2, rule=gs.TorchRule(torch.optim.RAdam)
    ),
    **{
        name: lambda model, make=make: gs.SparseOptimizer(model, make(), lr=1e-2, accumulation_steps=2)
        for name, make in MASKS.items()
        if name in ("id3", "top gradient")
    },
}


def follow_on_a_rank(rank: int) -> dict[str, list[gs.Patch]]:
    """Train sharded models, and let a whole copy on each rank follow."""
    patches: dict[str, list[gs.Patch]] = {}
    for name, build in SHARDED.items():
        model, follower = shard(distributed_support.tiny()), distributed_support.tiny()
        optimizer = build(model)
        for step in range(3):
            distributed_support.train(model, optimizer, steps=1, first=step, rank=rank, world=2, clip=None)
            patch = optimizer.changed_entries()
            gs.delta.apply_patch(follower, patch)
            for known, weight in distributed_support.whole(model).items():
                assert torch.equal(follower.get_parameter(known), weight), (name, step, known)
            patches.setdefault(name, []).append(patch)
        with pytest.raises(UsageError, match="sharded"):
            gs.delta.apply_patch(model, patch)
    return patches


def test_every_rank_gets_the_whole_patch_of_a_sharded_model() -> None:
    first, second = distributed_support.succeed(follow_on_a_rank, world=2)
    for name, patches in first.items():
        for ours, theirs in zip(patches, second[name], strict=True):
            assert len(ours)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(a, b) for key in ours for a, b in zip(ours[key], theirs[key], strict=True))
            assert ours.model_bytes == sum(each.nbytes for each in distributed_support.tiny().parameters())
    assert any(isinstance(each, Entries) for patch in first["id3"] for each in patch.values())


# Applying and files ------------------------------------------------------------------------------------------------


def entries_patch(**changes: Any) -> gs.Patch:
    values = {"changes": {"weight": Entries(torch.tensor([1, 5], dtype=torch.int32), torch.tensor([7.0, 8.0]))}}
    values |= {"shapes": {"weight": (2, 3)}, "from_step": 0, "to_step": 1, "model_bytes": 24}
    return gs.Patch(**values | changes)


def test_a_copy_may_be_in_another_dtype_or_layout() -> None:
    half = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    gs.delta.apply_patch(half, entries_patch())
    assert half.weight.flatten()[[1, 5]].tolist() == [7.0, 8.0]
    turned = {"weight": torch.zeros(3, 2).T}
    gs.delta.apply_patch(turned, entries_patch())
    assert turned["weight"].flatten().tolist() == [0, 7, 0, 0, 0, 8]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"other": torch.zeros(2, 3)}, "nearest: 'other'"),
        ({"weight": torch.zeros(3, 3)}, r"shape \(2, 3\) in the patch and \(3, 3\) here"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int8)}, "quantised"),
        ({"weight": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, "quantised"),
    ],
)
def test_what_does_not_fit_is_refused(target: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gs.delta.apply_patch(target, entries_patch())


@pytest.mark.parametrize(
    ("target", "patch", "message"),
    [
        (
            {},
            "step-1.safetensors",
            r"patch='step-1\.safetensors' is no Patch object; write patch=gs\.delta\.read_patch",
        ),
        ("model", None, "patch=None is no Patch object"),
        ("model", entries_patch(), "target='model' is no Mapping object; write target=model, or"),
        ({"weight": [1.0]}, entries_patch(), "is no Tensor object"),
    ],
)
def test_something_else_in_place_of_a_patch_or_a_model_is_refused(target: Any, patch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gs.delta.apply_patch(target, patch)


def test_a_refused_patch_changes_nothing() -> None:
    whole = torch.ones(2)
    patch = entries_patch(changes={"a": whole, "b": whole}, shapes={"a": (2,), "b": (2,)})
    target = {"a": torch.zeros(2)}
    with pytest.raises(UsageError, match="'b'"):
        gs.delta.apply_patch(target, patch)
    assert not target["a"].any()


@pytest.mark.parametrize("indices", [[1, 6], [-1, 2]])
def test_indices_outside_the_tensor_are_refused(indices: list[int]) -> None:
    change = Entries(torch.tensor(indices, dtype=torch.int32), torch.zeros(2))
    with pytest.raises(UsageError, match="damaged"):
        gs.delta.apply_patch({"weight": torch.zeros(2, 3)}, entries_patch(changes={"weight": change}))


def test_a_patch_survives_its_file(tmp_path: Path) -> None:
    model, follower = seeded(Net).bfloat16(), seeded(Net).bfloat16()
    optimizer = gs.SparseOptimizer(model, gs.ID3(budget=40, steps=2), always="norm.*", lr=1e-2)
    step_of(model, optimizer, 0)
    patch = optimizer.changed_entries().to("cpu")
    gs.delta.write_patch(patch, tmp_path / "1.safetensors")
    read = gs.delta.read_patch(tmp_path / "1.safetensors")
    assert (read.from_step, read.to_step, read.num_bytes, read.model_bytes) == (
        0,
        1,
        patch.num_bytes,
        patch.model_bytes,
    )
    assert (read.shapes, read.tied) == (patch.shapes, patch.tied)
    assert str(read) == str(patch)
    gs.delta.apply_patch(follower, read)
    assert_same(follower, model)
    with pytest.raises(UsageError, match="exists already"):
        gs.delta.write_patch(patch, tmp_path / "1.safetensors")
    with pytest.raises(UsageError, match="no patch that this gradselect reads"):
        gs.delta.read_patch(_other_file(tmp_path))
    with pytest.raises(UsageError, match="whole safetensors file"):
        gs.delta.read_patch(tmp_path / "missing.safetensors")


def _other_file(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder / "other.safetensors"
