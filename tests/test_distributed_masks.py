"""Entries on several ranks: the same as on one, and wrong set-ups refused.

As for blocks, in fp64: one process sees the global batch, several see their rows of it. Sets of entries are compared
exactly, parameters to 1e-12.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_support import HIDDEN, rows, succeed, succeed_each, tiny, train, whole
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gradselect as gs
from gradselect.entries.shards import Shards, ordered_bits
from gradselect.entries.top_k import StreamingTopK
from gradselect.integrations import distributed

STEPS = 8
ID3 = gs.ID3(budget=90, steps=6)
STATIC = gs.StaticMask(budget=40)
MASKS = {
    "id3": (ID3, {}),
    "static": (STATIC, {}),
    "always": (gs.ID3(budget=50, steps=4), {"always": ("norm.*", "head.*")}),
    "no accumulated copy": (ID3, {"lean_accumulation": True, "accumulation_steps": 1}),
    "refreshed": (gs.StaticMask(salience=gs.salience.force, budget=30, refresh_every=2), {}),
    "by tensor": (gs.StaticMask(density=0.1, scope="tensor", refresh_every=3), {}),
    "magnitude": (gs.StaticMask(salience=gs.salience.magnitude, budget=40), {}),
    "random": (gs.StaticMask(salience=gs.salience.random, budget=40, refresh_every=4, seed=3), {}),
    "top_gradient": (gs.TopGradient(density=0.05), {}),
    "lift": (gs.LIFT(rank=1, refresh_every=4), {}),
    "bitfit": (gs.BitFit(), {}),
    "gmt": (gs.GMT(fraction=0.2), {}),
    "gmt global": (gs.GMT(fraction=0.3, scope="global", mask="update"), {}),
    "mofo": (gs.MoFO(fraction=0.2), {}),
    "sparta": (gs.SpaRTA(density=0.1, seed=3, among="*"), {}),
}
WRAPPED = [
    *(("fully_shard", mask) for mask in MASKS),
    ("replicate", "id3"),
    ("ddp", "id3"),
    ("ddp", "static"),
    ("ddp", "gmt"),
    ("ddp afterwards", "refreshed"),
]


def wrap(model, wrapper, *, of_model=None, **settings):
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=True)
    apply = {"fully_shard": fully_shard, "replicate": replicate}[wrapper]
    for layer in model.layers:
        apply(layer, **settings)
    return apply(model, **settings, **of_model or {})


def build(mask, *, wrapper=None, dtype=torch.float64, settings=None, **options):
    """Wrapped model, and its optimizer."""
    options = {"lr": 1e-2, "accumulation_steps": 2, "max_grad_norm": 0.3, **options}
    model = tiny(dtype=dtype)
    if wrapper is None:
        return model, gs.SparseOptimizer(model, mask, **options)
    if wrapper.endswith("afterwards"):
        optimizer = gs.SparseOptimizer(model, mask, **options)
        return wrap(model, wrapper), optimizer
    model = wrap(model, wrapper, **settings or {})
    return model, gs.SparseOptimizer(model, mask, **options)


def run(mask, *, rank=0, world=1, **options):
    model, optimizer = build(mask, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DDP: unused parameters
        records = train(
            model,
            optimizer,
            steps=STEPS,
            rank=rank,
            world=world,
            clip=None,
            accumulation=options.get("accumulation_steps", 2),
        )
    left = grads(model)
    model(rows(0, rank=rank, world=world)).backward()
    waiting = grads(model)
    optimizer.zero_grad()
    return {
        "parameters": whole(model),
        "records": records,
        "entries": optimizer.entries,
        "memory": optimizer.memory(),
        "left": left,
        "waiting": waiting,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


def grads(model):
    return sum(parameter.grad is not None for parameter in model.parameters())


def run_all(rank, *, runs):
    return {key: run(rank=rank, world=dist.get_world_size(), **options) for key, options in runs.items()}


@pytest.fixture(scope="module")
def pair():
    """Results of two ranks, for every mask sharded, and for some under other wrappers."""
    runs = {
        (wrapper, name): {"mask": MASKS[name][0], "wrapper": wrapper, **MASKS[name][1]} for wrapper, name in WRAPPED
    }
    runs["bf16"] = {"mask": ID3, "wrapper": "fully_shard", "dtype": torch.bfloat16}
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs["mixed"] = {"mask": ID3, "wrapper": "fully_shard", "dtype": torch.float32, "settings": {"mp_policy": mixed}}
    cast = MixedPrecisionPolicy(output_dtype=torch.float32)
    runs["cast"] = {"mask": ID3, "wrapper": "fully_shard", "settings": {"of_model": {"mp_policy": cast}}}
    return succeed(run_all, world=2, runs=runs, timeout=120)


@pytest.fixture(scope="module")
def alone():
    return {name: run(mask, **options) for name, (mask, options) in MASKS.items()}


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def united(several):
    """Entries of all ranks."""
    return {
        name: torch.cat([entries[name] for entries in several if name in entries]).unique().tolist()
        for name in dict.fromkeys(name for entries in several for name in entries)
    }


# the same as one process -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", WRAPPED, ids="-".join)
def test_two_processes_train_as_one_does(key, pair, alone):
    expected = alone[key[1]]
    for of_rank in (results[key] for results in pair):
        assert distance(of_rank["parameters"], expected["parameters"]) < 1e-12
        assert of_rank["left"] == 0
        for record, same in zip(of_rank["records"], expected["records"], strict=True):
            assert record.num_entries == same.num_entries
            assert (record.num_new, record.overlap) == (same.num_new, same.overlap)
            assert record.grad_norm == pytest.approx(same.grad_norm, rel=1e-6)
    assert united([results[key]["entries"] for results in pair]) == united([expected["entries"]])


def test_a_loss_that_the_wrapper_casts_changes_nothing(pair, alone):
    """The pass then begins before the wrapper hears of it: what the wrapper does at its end came after our end."""
    for results in pair:
        assert results["cast"]["records"] == results["fully_shard", "id3"]["records"]
        assert distance(results["cast"]["parameters"], alone["id3"]["parameters"]) < 1e-12


def test_sets_change_and_tensors_freeze(alone, pair):
    """Otherwise the comparison would be empty."""
    assert [record.num_new for record in alone["id3"]["records"]] == [15] * 6 + [0] * 2
    assert any(record.overlap < 1 for record in alone["refreshed"]["records"])
    assert alone["lift"]["frozen"]
    assert pair[0]["fully_shard", "lift"]["frozen"] == alone["lift"]["frozen"]


def test_entries_are_held_once(pair):
    first, second = (results["fully_shard", "id3"] for results in pair)
    assert sum(len(indices) for entries in (first["entries"], second["entries"]) for indices in entries.values()) == 90
    both = first["memory"]["state_on_device"] + second["memory"]["state_on_device"]
    assert 90 * (4 + 8 + 8) <= both < 90 * (4 + 8 + 8) + 100  # and a bit for each tensor and update


def test_sharded_gradients_go_in_the_backward_pass(pair):
    """Those of DDP are averaged after it."""
    assert pair[0]["fully_shard", "no accumulated copy"]["waiting"] == 0
    assert pair[0]["ddp", "id3"]["waiting"] > 0


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("mixed", torch.float32)])
def test_half_precision_trains_the_budget_alike(name, dtype, pair):
    """Rounding decides which entry is the last winner, so results differ from one process. bf16 has fp32 masters."""
    results = [each[name] for each in pair]
    assert distance(results[0]["parameters"], results[1]["parameters"]) == 0.0
    assert sum(results[0]["records"][-1].num_entries.values()) == 90
    assert sum(each["memory"]["masters"] for each in results) == (4 * 90 if name == "bf16" else 0)
    start = tiny(dtype=dtype)
    moved = sum(int((results[0]["parameters"][name] != value).sum()) for name, value in start.named_parameters())
    assert 0 < moved <= 90


def train_on_four(rank):
    """Two replicas of two shards, and four shards, some of them empty. All ranks see the same rows."""
    results = {}
    for shape in MESHES:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for name in ON_FOUR:
            model, optimizer = build(MASKS[name][0], wrapper="fully_shard", settings={"mesh": mesh}, **MASKS[name][1])
            train(model, optimizer, steps=4, clip=None)
            results[shape, name] = whole(model), num_saved(optimizer)
    return results


def num_saved(optimizer):
    states = optimizer.state_dict()["state"]
    return {number: len(state["indices"]) for number, state in states.items() if "indices" in state}


MESHES = [(2, 2), (4,)]
ON_FOUR = ["id3", "refreshed", "always", "random", "gmt global"]


@pytest.fixture(scope="module")
def four():
    return succeed(train_on_four, world=4)


@pytest.mark.parametrize("name", ON_FOUR)
def test_replicas_count_once_and_empty_shards_nothing(name, four):
    mask, options = MASKS[name]
    model, optimizer = build(mask, **options)
    train(model, optimizer, steps=4, clip=None)
    for of_rank in four:
        for shape in MESHES:
            parameters, saved = of_rank[shape, name]
            assert distance(parameters, whole(model)) < 1e-12
            assert saved == num_saved(optimizer)


def compare_top_k(rank):
    """Scores with many ties, NaN, both zeros and infinities; k up to more entries than there are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randint(-2, 3, shape, generator=generator).float()
        for name, shape in {"a": (7, 3), "b": (2,)}.items()
    }
    scores["a"][0, 1], scores["a"][5, 0], scores["a"][6, 2], scores["b"][0] = torch.nan, torch.inf, -torch.inf, -0.0
    shards = Shards({name: distribute_tensor(values, mesh, [Shard(0)]) for name, values in scores.items()})
    found = []
    for count in (1, 4, 9, 15, 30):
        expected, mine = StreamingTopK(count), StreamingTopK(count)
        for position, values in enumerate(scores.values()):
            part = distribute_tensor(values, mesh, [Shard(0)]).to_local().reshape(-1)
            expected.add(values.reshape(-1), position=position)
            mine.add(part, position=position)
        positions, indices, _ = expected.result()
        ((_, keys, _),) = shards.global_top_k([mine.candidates()], [count])
        names = list(scores)
        ours = [
            (key >> 40, int(shards.to_whole(names[key >> 40], torch.tensor(key & (1 << 40) - 1))))
            for key in keys.tolist()
        ]
        found.append((sorted(ours), list(zip(positions.tolist(), indices.tolist(), strict=True))))
    return found


def test_best_of_all_shards_are_those_of_one_sorted_list(three):
    for several in zip(*three[compare_top_k], strict=True):
        assert sorted(entry for ours, _ in several for entry in ours) == several[0][1]


def test_ordered_bits_order_as_the_scores():
    scores = torch.tensor([-torch.inf, -3.5, -1e-300, -0.0, 0.0, 1e-300, 2.0, torch.inf], dtype=torch.float64)
    codes = [code % 2**64 for code in ordered_bits(scores).tolist()]
    assert codes == sorted(codes)
    assert len(set(codes)) == len(codes) - 1  # the zeros are equal


# resuming --------------------------------------------------------------------------------------------

RESUMED = {
    "id3": (ID3, {"always": ("norm.*",)}),
    "refreshed": (gs.StaticMask(budget=40, refresh_every=2), {}),
    "bitfit": (gs.BitFit(), {}),
}


def train_part(rank, *, folder, first, steps):
    world = dist.get_world_size() if dist.is_initialized() else 1
    results = {}
    for name, (mask, options) in RESUMED.items():
        model, optimizer = build(mask, wrapper="fully_shard" if dist.is_initialized() else None, **options)
        if first:
            distributed.load(f"{folder}/{name}-{first}", model=model, optimizer=optimizer)
        train(model, optimizer, steps=steps, rank=rank, world=world, first=first, clip=None)
        distributed.save(f"{folder}/{name}-{first + steps}", model=model, optimizer=optimizer)
        results[name] = whole(model)
    return results


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Results of three ranks, by job. What they resume comes from two ranks, then one process without groups."""
    folder = tmp_path_factory.mktemp("resumed")
    succeed(train_part, world=2, folder=folder, first=0, steps=3)
    train_part(0, folder=folder, first=3, steps=2)
    return succeed_each({train_part: {"folder": folder, "first": 5, "steps": 3}, compare_top_k: {}}, world=3)


@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_reshard(name, three):
    """Two ranks, then one process without torch.distributed, then three ranks; compared with a single process."""
    mask, options = RESUMED[name]
    expected = run(mask, **options)
    assert distance(three[train_part][0][name], expected["parameters"]) < 1e-12


# wrong set-ups ---------------------------------------------------------------------------------------


def without_wrapper(rank):
    return build(ID3)


def other_mask(rank):
    return build(gs.StaticMask(salience=gs.salience.random, budget=9, seed=rank), wrapper="fully_shard")


def other_clipping(rank):
    return build(ID3, wrapper="replicate", max_grad_norm=1.0 + rank)


def other_weights(rank):
    model = wrap(tiny(seed=rank), "ddp")
    model.module.head.weight.data += rank
    return model, gs.SparseOptimizer(model, ID3, accumulation_steps=2)


def plain_ddp(rank):
    model = DistributedDataParallel(tiny())
    return model, gs.SparseOptimizer(model, ID3, accumulation_steps=2)


def lean_ddp(rank):
    return build(ID3, wrapper="ddp", lean_accumulation=True)


def sharded_afterwards(rank):
    model = tiny()
    optimizer = gs.SparseOptimizer(model, ID3, accumulation_steps=2)
    return wrap(model, "fully_shard"), optimizer


def swapped(rank):
    """As in Accelerate's prepare."""
    model = tiny()
    optimizer = gs.SparseOptimizer(model, ID3, accumulation_steps=2)
    wrap(model, "fully_shard")
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[name] for name in group["param_names"]]
    return model, optimizer


def other_dimension(rank):
    model = tiny()
    fully_shard(
        model,
        shard_placement_fn=lambda parameter: (
            Shard(1) if parameter.shape[-1] == 2 * HIDDEN and parameter.ndim == 2 else None
        ),
    )
    return model, gs.SparseOptimizer(model, ID3, accumulation_steps=2)


def from_batches(rank):
    model = wrap(tiny(), "fully_shard")
    batches = [{"tokens": rows(0, rank=0, world=1)}]
    return model, gs.SparseOptimizer(model, gs.StaticMask(budget=9, batches=batches), accumulation_steps=2)


def other_batches(rank):
    model = wrap(tiny(), "ddp")
    batches = [{"tokens": rows(0, rank=rank, world=2)}]
    mask = gs.StaticMask(budget=20, batches=batches, loss=lambda model, batch: model(**batch))
    return model, gs.SparseOptimizer(model, mask, accumulation_steps=2)


def rule_of_8_bits(rank):
    """Refused before a step."""
    gs.SparseOptimizer(wrap(tiny(), "fully_shard"), gs.GMT(fraction=0.3), rule=gs.AdamW8bitRule())
    raise AssertionError("it was built")


def silent(rank):
    """DDP whose last backward pass averages nothing."""
    model, optimizer = build(ID3, wrapper="ddp")
    model.require_backward_grad_sync = False
    return model, optimizer


WRONG = {
    without_wrapper: "gradients of block '.*' differ between the processes at step 0: nothing has averaged them",
    other_mask: "do not agree when the optimizer is built: mask_settings.seed is 0 on rank 0 and 1 on rank 1",
    other_clipping: "max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1",
    other_weights: "weights of block 'head.weight' differ",
    plain_ddp: r"write DistributedDataParallel\(model, find_unused_parameters=True\)",
    lean_ddp: "lean_accumulation=True needs fully_shard or replicate",
    sharded_afterwards: r"write fully_shard\(model\) or replicate\(model\) first",
    swapped: r"shard first, with fully_shard\(model\), then build SparseOptimizer",
    other_dimension: "sharded by rows; leave shard_placement_fn",
    from_batches: "gradient from batches runs the model outside training",
    other_batches: "do not agree before the first step: num_entries",
    silent: "nothing has averaged them",
    rule_of_8_bits: r"AdamW8bitRule .* shards would cut them apart",
}


def try_wrong(rank):
    said = []
    for set_up in WRONG:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, optimizer = set_up(rank)
                train(model, optimizer, steps=2, rank=rank, world=2, clip=None)
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
