"""Blocks on several ranks: the same as on one, and wrong set-ups refused.

One process sees the global batch, several see their rows of it, so gradients differ by the order in which they are
added up. In fp64 that is around 1e-16 of a gradient: parameters are compared to 1e-12 and selections exactly.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed_support import (
    Failure,
    TinyModel,
    launch,
    rows,
    succeed,
    succeed_each,
    tiny,
    train,
    whole,
)
from policy_support import Measured
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradselect as gs
from gradselect.integrations import distributed
from gradselect.parallel import check_alike
from gradselect.parallel.wrappers import check_placement

STEPS = 12


POLICIES = {
    "all": gs.All(),
    "fixed": gs.Fixed(("layer.1", "norm")),
    "cyclic": gs.Cyclic(every=2),
    "uniform": gs.Uniform(count=2),
    "grad_norm": gs.GradNormTopK(count=2),
    "adagradselect": gs.AdaGradSelect(count=2, explore_steps=15, delta=5.0, rank_by="step"),
    "misa": gs.MISA(share=0.5, every=3),
    "l1": Measured("l1"),
    "taylor": Measured("taylor"),
    "strata": gs.Stratified(by="category", count=1, order="norm", every=3),
    "losia": gs.LoSiA(by="category", count=1, every=3),
}
BORDERS = {
    "borders": gs.Borders(coasting=2, rewarm_steps=3, rewarm_after=2, rate_by_visits=0.5),
    "residency": gs.Drop(),
}
WRAPPED = [
    *(("fully_shard", policy) for policy in POLICIES),
    ("replicate", "adagradselect"),
    ("replicate", "cyclic"),
    ("ddp", "adagradselect"),
    ("ddp", "cyclic"),
    ("ddp", "taylor"),
    ("ddp", "losia"),
    ("ddp afterwards", "uniform"),
]
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def wrap(model, wrapper, **settings):
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=True)
    apply = {"fully_shard": fully_shard, "replicate": replicate}[wrapper]
    for layer in model.layers:
        apply(layer, **settings)
    return apply(model, **settings)


def build(policy, *, wrapper=None, dtype=torch.float64, settings=None, **options):
    """Wrapped model, and its optimizer."""
    options = {"lr": 1e-2, "accumulation_steps": 2, **options}
    model = tiny(dtype=dtype)
    if wrapper is None:
        return model, gs.BlockOptimizer(model, policy, **options)
    if wrapper.endswith("afterwards"):
        optimizer = gs.BlockOptimizer(model, policy, **options)
        return wrap(model, wrapper), optimizer
    model = wrap(model, wrapper, **settings or {})
    return model, gs.BlockOptimizer(model, policy, **options)


def selections(records):
    return [record.selected for record in records]


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_ranks_are_compared_through_the_gpu_of_the_model(monkeypatch):
    """NCCL sends plain values through the current GPU. In a script that never sets it that is GPU 0 on every rank."""
    current = []

    @contextmanager
    def using(device):
        current.append(device)
        yield
        current.pop()

    def gather(values, value):
        assert current == [torch.device("cuda", 1)]
        values[:] = [value, {**value, "seed": "other"}]

    monkeypatch.setattr(torch.cuda, "device", using)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(gs.UsageError, match="seed is 1 on rank 0"):
        check_alike({"seed": 1}, moment="now", device=torch.device("cuda", 1))
    assert not current


# the same as one process -----------------------------------------------------------------------------


def train_all(rank, *, runs):
    results = {}
    for key, options in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sync = options.pop("sync", "every")
            model, optimizer = build(**options)
            records = train(model, optimizer, steps=STEPS, rank=rank, world=dist.get_world_size(), sync=sync)
        results[key] = whole(model), records, optimizer.memory()
    return results


@pytest.fixture(scope="module")
def pair():
    """Results of two ranks, for every policy under every wrapper."""
    runs = {key: {"policy": POLICIES[key[1]], "wrapper": key[0]} for key in WRAPPED}
    for wrapper in ("ddp", "fully_shard"):
        runs["borders", wrapper] = {"policy": POLICIES["uniform"], "wrapper": wrapper, **BORDERS}
    runs["sync last"] = {**runs["fully_shard", "adagradselect"], "sync": "last", "accumulation_steps": 1}
    runs["fp32"] = {**runs["fully_shard", "adagradselect"], "dtype": torch.float32}
    for name, dtype, settings in (
        ("bf16", torch.bfloat16, {}),
        ("mixed", torch.float32, {"mp_policy": MIXED}),
    ):
        runs[name] = {"policy": POLICIES["cyclic"], "wrapper": "fully_shard", "dtype": dtype, "settings": settings}
    return succeed(train_all, world=2, runs=runs, timeout=120)


@pytest.fixture(scope="module")
def alone():
    """Results of one process, for every policy, and the initial weights."""
    results = {}
    for name, policy in POLICIES.items():
        model, optimizer = build(policy)
        results[name] = whole(model), train(model, optimizer, steps=STEPS), whole(model)
    return results


@pytest.fixture(scope="module")
def small_jobs():
    """Results of two ranks, by job. The last of them counts calls of torch.distributed, and would in others too."""
    jobs = (swap_as_accelerate, evaluate_first, train_all_partly_used, count_traffic)
    return succeed_each({job: {} for job in jobs}, world=2)


@pytest.mark.parametrize("key", WRAPPED, ids="-".join)
def test_two_processes_train_as_one_does(key, pair, alone):
    _, expected_records, expected = alone[key[1]]
    for rank in range(2):
        parameters, records, _ = pair[rank][key]
        assert selections(records) == selections(expected_records)
        assert [record.explored for record in records] == [record.explored for record in expected_records]
        for record, same in zip(records, expected_records, strict=True):
            assert record.norms == pytest.approx(same.norms, rel=1e-6)
        assert distance(parameters, expected) < 1e-12


@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
def test_blocks_coast_and_warm_on_two_processes_as_on_one(wrapper, pair):
    model, optimizer = build(POLICIES["uniform"], **BORDERS)
    expected = train(model, optimizer, steps=STEPS)
    for rank in range(2):
        parameters, records, _ = pair[rank]["borders", wrapper]
        for record, same in zip(records, expected, strict=True):
            assert (record.selected, record.coasted, record.rates) == (same.selected, same.coasted, same.rates)
        assert distance(parameters, whole(model)) < 1e-12
    assert any(record.coasted for record in expected)


def test_reducing_only_the_last_micro_batch_changes_nothing(pair, alone):
    _, records, expected = alone["adagradselect"]
    parameters, others, _ = pair[0]["sync last"]
    assert selections(others) == selections(records)
    assert distance(parameters, expected) < 1e-12


def test_policies_explore_and_exploit(alone):
    """Otherwise the comparison would be empty."""
    explored = [record.explored for record in alone["adagradselect"][1]]
    assert any(explored)
    assert not all(explored)
    assert len(set(selections(alone["adagradselect"][1]))) > 2


def test_fp32_differs_by_rounding(pair, alone):
    """Adam divides by the root of the second moment: of an entry whose gradient is near 0, rounding is all that is
    left, so a single entry may go another way by up to lr a step. On average that is nothing.
    """
    start, _, expected = alone["adagradselect"]
    parameters, _, _ = pair[0]["fp32"]
    moved = sum(float((expected[name] - start[name]).abs().sum()) for name in start)
    apart = sum(float((expected[name] - parameters[name]).abs().sum()) for name in start)
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("name", ["bf16", "mixed"])
def test_half_precision_follows_one_process(name, pair, alone):
    """Selections are equal; weights agree within the precision of bf16 gradients."""
    start, records, expected = alone["cyclic"]
    parameters, others, _ = pair[0][name]
    assert selections(others) == selections(records)
    moved = sum(float((expected[key] - start[key]).abs().sum()) for key in start)
    apart = sum(float((expected[key] - parameters[key].double()).abs().sum()) for key in start)
    assert apart < 0.1 * moved
    assert distance(parameters, pair[1][name][0]) == 0.0


def test_shards_hold_their_share_of_the_bytes(pair):
    both = [pair[rank]["fully_shard", "all"][2] for rank in range(2)]
    elements = sum(parameter.numel() for parameter in TinyModel().parameters())
    assert sum(memory["weights"] for memory in both) == 8 * elements
    assert sum(memory["state_on_device"] for memory in both) == 2 * 8 * elements
    masters = [pair[rank]["bf16"][2]["masters"] for rank in range(2)]
    assert sum(masters) == 4 * elements


# traffic ---------------------------------------------------------------------------------------------


def count_traffic(rank):
    """Number of entries of every gradient that is reduced, by step."""
    sent = []

    def counted(reduce):
        def call(*arguments, **options):
            sent.append(options["input"].numel())
            return reduce(*arguments, **options)

        return call

    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # torch 2.11 and before, 2.13
        if name in vars(dist):
            setattr(dist, name, counted(getattr(dist, name)))
    model, optimizer = build(gs.Fixed(("layer.1",)), wrapper="fully_shard")
    train(model, optimizer, steps=3, rank=rank, world=2)
    return sent


def test_frozen_blocks_cost_no_gradient_traffic_from_the_first_step_on(small_jobs):
    layer = sum(parameter.numel() for parameter in TinyModel().layers[1].parameters())
    for sent in small_jobs[count_traffic]:
        assert sent == [layer] * 6  # three steps of two backward passes


# resuming --------------------------------------------------------------------------------------------


RESIDENCIES = {"keep": gs.Keep(), "drop": gs.Drop()}


def train_part(rank, *, folder, first, steps):
    """The next steps of a run, for each residency."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    wrapper = "fully_shard" if dist.is_initialized() else None
    weights = {}
    for name, residency in RESIDENCIES.items():
        model, optimizer = build(POLICIES["adagradselect"], wrapper=wrapper, residency=residency)
        if first:
            distributed.load(f"{folder}/{name}-{first}", model=model, optimizer=optimizer)
        assert optimizer.num_steps == first
        train(model, optimizer, steps=steps, rank=rank, world=world, first=first)
        distributed.save(f"{folder}/{name}-{first + steps}", model=model, optimizer=optimizer)
        weights[name] = whole(model)
    return weights


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Weights after 5 steps on 2 processes, 5 on 1 and 4 on 3."""
    folder = tmp_path_factory.mktemp("resumed")
    succeed(train_part, world=2, timeout=120, folder=folder, first=0, steps=5)
    train_part(0, folder=folder, first=5, steps=5)
    return succeed(train_part, world=3, timeout=120, folder=folder, first=10, steps=4)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_resumes_on_another_number_of_processes(residency, resumed):
    """2, then 1, then 3 ranks end with the result of one process that never stops."""
    model, optimizer = build(POLICIES["adagradselect"], residency=RESIDENCIES[residency])
    records = train(model, optimizer, steps=14)
    assert len({record.explored for record in records}) == 2
    for weights in resumed:
        assert distance(weights[residency], whole(model)) < 1e-12


def test_load_refuses_another_folder(tmp_path):
    model, optimizer = build(POLICIES["cyclic"])
    with pytest.raises(gs.UsageError, match="holds no checkpoint"):
        distributed.load(tmp_path, model=model, optimizer=optimizer)


def test_a_checkpoint_is_read_into_host_memory():
    """The state of all blocks at once is as large as AdamW's, and the device holds that of a selection."""
    info = SimpleNamespace(size=torch.Size([4, 4]), properties=SimpleNamespace(dtype=torch.float32))
    weight = torch.empty(4, 4, device="meta", dtype=torch.bfloat16)  # the only other device that is always there
    read = distributed._empty(info, like=weight)
    assert (read.device.type, read.dtype) == ("cpu", torch.float32)


def whole_state(rank, *, state_dict):
    _model, optimizer = build(POLICIES["uniform"], wrapper="fully_shard")
    optimizer.load_state_dict(state_dict)
    state_dict = optimizer.state_dict()
    names = [name for group in state_dict["param_groups"] for name in group["param_names"]]
    return {
        number: state["exp_avg"].full_tensor()
        for number, state in state_dict["state"].items()
        if names[number] in state_dict["selection"]["with_state"]
    }


def test_shards_take_their_part_of_a_state_dict_of_one_process():
    model, optimizer = build(POLICIES["uniform"])
    train(model, optimizer, steps=5)
    state_dict = optimizer.state_dict()
    for result in succeed(whole_state, world=3, state_dict=state_dict):
        assert {number: value.tolist() for number, value in result.items()} == {
            number: state["exp_avg"].tolist() for number, state in state_dict["state"].items()
        }


# what a wrapper does after the optimizer was built -----------------------------------------------------


def swap_as_accelerate(rank):
    """Accelerate's prepare: placeholders in the groups, the model sharded, the shards in their places."""
    model = tiny(dtype=torch.float64)
    optimizer = gs.BlockOptimizer(model, POLICIES["adagradselect"], lr=1e-2, accumulation_steps=2)
    optimizer.load_state_dict(optimizer.state_dict())
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for position in range(len(group["params"])):
            group["params"][position] = torch.empty(1)
    wrap(model, "fully_shard", mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in members]
    records = train(model, optimizer, steps=STEPS, rank=rank, world=2)
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    optimizer.close()
    return whole(model), records, frozen, sum(not parameter.requires_grad for parameter in model.parameters())


def test_follows_parameters_that_accelerate_puts_into_the_groups(alone, small_jobs):
    _, records, expected = alone["adagradselect"]
    for parameters, others, frozen, frozen_after_close in small_jobs[swap_as_accelerate]:
        assert selections(others) == selections(records)
        assert distance(parameters, expected) < 1e-12
        assert frozen
        assert not frozen_after_close


def evaluate_first(rank):
    """Only one rank runs the model before training; nothing may wait for the other."""
    model, optimizer = build(POLICIES["cyclic"], wrapper="ddp")
    if rank == 0:
        with torch.no_grad():
            model.module(rows(0, rank=0, world=1))
        model.module.eval()(rows(0, rank=0, world=1))
        model.module.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, steps=2, rank=rank, world=2)
    return whole(model)


def test_one_rank_may_evaluate_alone(small_jobs):
    first, second = small_jobs[evaluate_first]
    assert distance(first, second) == 0.0


# wrong set-ups ---------------------------------------------------------------------------------------


def without_wrapper(rank):
    return build(POLICIES["cyclic"])


def other_seed(rank):
    return build(gs.Uniform(count=2, seed=rank), wrapper="fully_shard")


def other_policy(rank):
    return build(POLICIES["cyclic" if rank else "uniform"], wrapper="fully_shard")


def other_accumulation(rank):
    return build(POLICIES["cyclic"], wrapper="replicate", accumulation_steps=2 + rank)


def other_weights(rank):
    model = wrap(tiny(seed=rank), "replicate")
    return model, gs.BlockOptimizer(model, POLICIES["cyclic"], accumulation_steps=2)


def plain_ddp(rank):
    model = DistributedDataParallel(tiny())
    return model, gs.BlockOptimizer(model, POLICIES["cyclic"], accumulation_steps=2)


def static_ddp(rank):
    model = DistributedDataParallel(tiny(), find_unused_parameters=True, static_graph=True)
    return model, gs.BlockOptimizer(model, POLICIES["cyclic"], accumulation_steps=2)


def wrapped_while_frozen(rank):
    model = tiny()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="ascending"), accumulation_steps=2)
    model(rows(0, rank=0, world=1))
    return DistributedDataParallel(model, find_unused_parameters=True), optimizer


def sharded_afterwards(rank):
    model = tiny()
    optimizer = gs.BlockOptimizer(model, POLICIES["cyclic"], accumulation_steps=2)
    return wrap(model, "fully_shard"), optimizer


WRONG = {
    without_wrapper: "gradients of block '.*' differ between the processes at step 0: nothing has averaged them",
    other_seed: "do not agree before the first step: policy_settings.seed is 0 on rank 0 and 1 on rank 1",
    other_policy: "do not agree before the first step: policy is 'Uniform' on rank 0 and 'Cyclic' on rank 1",
    other_accumulation: "accumulation_steps is 2 on rank 0 and 3 on rank 1",
    other_weights: "weights of block 'embedding' differ",
    plain_ddp: r"write DistributedDataParallel\(model, find_unused_parameters=True\)",
    static_ddp: "static_graph=True",
    wrapped_while_frozen: "gradients of block 'layer.0' differ between the processes at step 1",
    sharded_afterwards: r"write fully_shard\(model\) or replicate\(model\) first",
}


def try_wrong(rank):
    said = []
    for set_up in WRONG:
        model, optimizer = set_up(rank)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(model, optimizer, steps=8, rank=rank, world=2)
            said.append("nothing")
        except gs.UsageError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def complaints():
    return succeed(try_wrong, world=2)


@pytest.mark.parametrize("set_up", list(WRONG), ids=lambda set_up: set_up.__name__)
def test_wrong_set_up_is_refused_on_every_rank(set_up, complaints):
    for said in complaints:
        assert re.search(WRONG[set_up], said[list(WRONG).index(set_up)])


def test_meta_device_is_refused():
    with torch.device("meta"):
        model = TinyModel()
    with pytest.raises(gs.UsageError, match=r"meta device .*to_empty"):
        gs.BlockOptimizer(model, POLICIES["cyclic"])


def test_two_devices_are_refused():
    here, there = (
        SimpleNamespace(device=torch.device(name), requires_grad=True, is_meta=False) for name in ("cuda:0", "cuda:1")
    )
    model = nn.Module()
    model.named_parameters = lambda: [("a", here), ("b", there)]
    with pytest.raises(gs.UsageError, match="two devices: 'a' on cuda:0, 'b' on cuda:1"):
        check_placement(model)


def test_zero_3_is_refused():
    model = TinyModel()
    model.head.weight.ds_id = 7
    with pytest.raises(gs.UsageError, match=r"'head.weight' belongs to DeepSpeed ZeRO-3.*fully_shard"):
        gs.BlockOptimizer(model, POLICIES["cyclic"])


def test_flat_parameters_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = TinyModel()

    with pytest.raises(gs.UsageError, match="flattens parameters"):
        gs.BlockOptimizer(FullyShardedDataParallel(), POLICIES["cyclic"])


# a process that ends ---------------------------------------------------------------------------------


def end_one(rank, *, wrapper, within_step):
    model, optimizer = build(POLICIES["grad_norm"], wrapper=wrapper, accumulation_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, steps=2, rank=rank, world=2, accumulation=1)
        if rank == 1 and not within_step:
            os._exit(1)
        if within_step:
            optimizer._agreement.check_soon()
            model(rows(9, rank=rank, world=2)).backward()
            if rank == 1:
                os._exit(1)
            optimizer.step()
        train(model, optimizer, steps=5, rank=rank, world=2, accumulation=1)


@pytest.mark.parametrize(
    ("wrapper", "within_step", "message"),
    [
        ("fully_shard", False, "Connection (closed|reset) by peer"),
        ("ddp", True, "rank 0 stopped while comparing the ranks at step 2: another process has ended"),
    ],
)
def test_survivor_of_a_killed_rank_ends_soon_and_says_why(wrapper, within_step, message):
    """`launch` gives them 25 seconds, less than the 30 that a collective waits."""
    survivor, killed = launch(end_one, world=2, wrapper=wrapper, within_step=within_step, timeout=25)
    assert isinstance(killed, Failure)
    assert killed.kind == "Killed"
    assert isinstance(survivor, Failure)
    assert survivor.kind == "RuntimeError"
    assert re.search(message, survivor.message), survivor.trace


PARTLY_USED = [
    (wrapper, policy) for wrapper in ("ddp", "fully_shard", "replicate") for policy in ("uniform", "adagradselect")
]


class PartlyUsed(TinyModel):
    """Layer 1 is used on one rank only, or on none; layer 2 never."""

    def __init__(self) -> None:
        super().__init__(layers=4)
        self.uses = False

    def forward(self, tokens):
        hidden = self.tokens(tokens)
        for number, layer in enumerate(self.layers):
            if number != 2 and (number != 1 or self.uses):
                hidden = layer(hidden)
        return self.head(self.norm(hidden)).square().mean()


def train_all_partly_used(rank):
    return {key: train_partly_used(rank, wrapper=key[0], policy=key[1]) for key in PARTLY_USED}


def train_partly_used(rank, *, wrapper, policy):
    torch.manual_seed(0)
    model = PartlyUsed()
    wrapped = wrap(model, wrapper)
    # Of DistributedDataParallel alone: FSDP2 gathers and reduces on all ranks or on none.
    is_mixed = wrapper == "ddp"
    optimizer = gs.BlockOptimizer(wrapped, POLICIES[policy], lr=1e-2)
    found, norms = [], []
    for step in range(8):
        model.uses = is_mixed and step >= 3 and rank == 1
        wrapped(rows(step, rank=rank, world=2)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        found.append((optimizer.unreached, optimizer.trainable, optimizer.num_steps))
    return found, norms, whole(wrapped)


@pytest.mark.parametrize("key", PARTLY_USED, ids="-".join)
def test_what_no_rank_reaches_is_no_candidate_and_what_one_reaches_is_again(key, small_jobs):
    first, second = (results[key] for results in small_jobs[train_all_partly_used])
    assert first[:2] == second[:2]
    assert all(torch.equal(weight, second[2][name]) for name, weight in first[2].items())
    assert first[0][2][0] == ("layer.1", "layer.2")
    assert first[0][-1][0] == (("layer.2",) if key[0] == "ddp" else ("layer.1", "layer.2"))
    assert first[0][-1][2] >= 6
