"""`gradselect plan`: bytes against those of runs, levers, `--fit`, and refused mistakes."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_fixtures import NUM_LAYERS, parse, quiet, write_model, write_recipe, write_sums
from transformers import AutoModelForCausalLM

import gradselect as gs
from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.recipe_planning import show
from gradselect.app.recipe_planning.planner import RecipePlanner, meta_model
from gradselect.app.recipe_planning.tables import FULL
from gradselect.app.recipe_planning.variants import RecipePlan, Setting, changed, find_best, plan_recipe, sparing_levers
from gradselect.app.runtime import Memory, device_memory
from gradselect.app.train import train
from gradselect.core import MEMORY_CATEGORIES
from gradselect.planning import Bytes, Plan
from gradselect.sparsegrad import choose_layers
from gradselect.usage.byte_sizes import read_fractions, read_size, smallest_text, write_size

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SHARED = Path(os.environ.get("GRADSELECT_SHARED", Path(__file__).parents[2] / "shared"))
CATEGORIES = [name for name in MEMORY_CATEGORIES if name != "state_on_host"]
LAYERS = {"among": ["layer.*"], "residency": "keep"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plan")
    write_model(place / "model")
    write_sums(place / "sums.jsonl")
    return place


@pytest.fixture(scope="module")
def planner() -> RecipePlanner:
    return RecipePlanner()


def measured(output: Path) -> dict[str, int]:
    """Return the most that the meter saw before updates."""
    return json.loads((output / "run.json").read_text("utf-8"))["bytes"]["peak"]


def saved_by(model: Any, **batch: Any) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without weights and buffers."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    assert output.logits.requires_grad  # its graph holds the tensors until here, so no address is used twice
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def at_update(found: gs.planning.Plan, category: str) -> int:
    return max(getattr(step.moments["update"], category) for step in found.steps)


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"name": "full"}, "float32"),
    "full in bfloat16": ({"name": "full"}, "bfloat16"),
    "uniform": ({"name": "uniform", "count": 2, **LAYERS}, "float32"),
    "badam": ({"name": "badam", "every": 2}, "bfloat16"),
    "lisa": ({"name": "lisa", "count": 2, "every": 1}, "float32"),
    "last": ({"name": "last", "count": 2}, "bfloat16"),
    "lora": ({"name": "lora", "rank": 4}, "bfloat16"),
    "lora with embedding": ({"name": "lora", "rank": 4, "train_embedding": True}, "bfloat16"),
    "etherplus": ({"name": "etherplus"}, "bfloat16"),
    "lorta": ({"name": "lorta", "rank": 4}, "bfloat16"),
    "static": ({"name": "static", "density": 0.05}, "bfloat16"),
    "lift": ({"name": "lift", "density": 0.05, "always": ["*.embed_tokens.weight"]}, "float32"),
    "static on lora": ({"name": "static", "density": 0.5, "adapter": {"rank": 4}}, "float32"),
}


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_a_run(name: str, folder: Path, planner: RecipePlanner, tmp_path: Path) -> None:
    """Weights, gradients and masters are exact. State is within 5 %: a mask's bookkeeping depends on the run."""
    method, dtype = METHODS[name]
    run = {"output": str(tmp_path / "out"), "steps": 10}
    recipe = parse(folder, method=method, model={"dtype": dtype}, run=run)
    found = planner.plan(recipe)
    train(recipe, console=quiet())
    seen = measured(tmp_path / "out")
    for category in CATEGORIES:
        assert at_update(found, category) == pytest.approx(seen[category], rel=0.05), category
        if "state" not in category:
            assert at_update(found, category) == seen[category], category


def test_the_look_of_a_static_mask_at_its_batches_is_counted(folder: Path, planner: RecipePlanner) -> None:
    method = {"name": "static", "salience": "snip", "density": 0.01}
    first_step, batches = (planner.plan(parse(folder, method=method | {"calibration_batches": n})) for n in (None, 4))
    assert [step.kind for step in first_step.steps] == ["step"]
    look, step = batches.steps
    assert (look.kind, step) == ("look", first_step.step("step"))
    num_entries = sum(parameter.numel() for parameter in meta_model(parse(folder)).parameters())
    assert look.moments["update"].gradients == 2 * 4 * num_entries


def test_refreshes_of_a_static_mask_are_counted_and_said(folder: Path, planner: RecipePlanner) -> None:
    method = {"name": "static", "salience": "snip", "density": 0.01, "calibration_batches": 4, "refresh_every": 5}
    found = planner.plan(parse(folder, method=method, run={"steps": 20}))
    look, refresh, step = found.steps
    assert (look.kind, refresh.kind, refresh.every) == ("look", "refresh", 5)
    assert refresh.peak_bytes > look.peak_bytes
    assert found.relative_time == pytest.approx(step.relative_time + refresh.relative_time / 5)
    dearer = replace(refresh, moments={"update": Bytes(gradients=found.peak_bytes + 1)})
    planned = RecipePlan(own=Setting(name="static", plan=Plan(steps=(look, dearer, step))), methods=(), levers=())
    text = " ".join(shown(planned, width=200, in_full=False, memory=Memory(name="a card", num_bytes=2**30)))
    share = f"{refresh.relative_time / 5:.2f} of it for the look at batches every 5 steps"
    assert f"time: {found.relative_time:.2f} of full fine-tuning, {share}" in text
    assert "at the peak, the look at batches every 5 steps: gradients" in text
    short = planner.plan(parse(folder, method=method, run={"steps": 4}))
    assert [step.kind for step in short.steps] == ["look", "step"]


def test_what_grasp_keeps_of_the_backward_pass_is_said_not_to_be_counted(folder: Path, planner: RecipePlanner) -> None:
    method = {"name": "static", "salience": "grasp", "density": 0.1, "calibration_batches": 2}
    found = planner.plan(parse(folder, method=method))
    assert any("method.salience=grasp" in note and "more than the plan says" in note for note in found.notes)


def test_sparsegrad_is_refused_with_the_bytes_to_add_to_the_plan_of_meprop(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"plan method.name=meprop") as caught:
        RecipePlanner().plan(parse(folder, method={"name": "sparsegrad"}))
    saved, batch = [], {"input_ids": torch.ones(4, 60, dtype=torch.long)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    for is_rotated in (False, True):
        weights = [layer.weight_name for layer in choose_layers(model, layers=None, every=1)]
        if is_rotated:
            gs.sparsegrad.convert(model, [batch | {"labels": batch["input_ids"]}])
            weights = [name for name, _ in model.named_parameters() if name.endswith("rotated_weight")]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in weights)
        saved.append(saved_by(model, **batch))
    bases = sum(each.numel() * 4 for name, each in model.named_buffers() if ".shared_bases." in name)
    copies = sum(each.numel() * 4 for each in model.parameters() if each.requires_grad)
    assert 0 < saved[1] - saved[0] <= copies
    assert f"add {write_size(bases)} for the bases and up to {write_size(copies)} for plain" in str(caught.value)


SPT = {"name": "spt", "budget": 3000, "rank": 2, "calibration_batches": 2}


@pytest.mark.parametrize("shares", [{"matrix_share": 1e-3}, {"rank": 64, "vector_share": 1.0}], ids=str)
def test_what_spt_may_choose_is_within_its_plan(shares: dict[str, float], folder: Path, tmp_path: Path) -> None:
    recipe = parse(folder, method=SPT | shares, run={"output": str(tmp_path / "out"), "steps": 2})
    found = RecipePlanner().plan(recipe)
    train(recipe, console=quiet())
    run, seen = json.loads((tmp_path / "out" / "run.json").read_text("utf-8")), measured(tmp_path / "out")
    planned = found.step("step").moments["update"]
    assert (run["selection"]["whole_entries"] > 1000) == ("matrix_share" in shares)
    names = [name for name in CATEGORIES if name != "state_on_device"]
    assert sum(seen[name] for name in names) <= sum(getattr(planned, name) for name in names)
    assert seen["state_on_device"] <= 1.01 * planned.state_on_device


def test_the_plan_of_spt_says_what_its_batches_decide_and_counts_the_look_at_them(folder: Path) -> None:
    found = RecipePlanner().plan(parse(folder, method=SPT, model={"dtype": "bfloat16"}))
    note = found.notes[-1]
    assert re.search(r"2 batches decide what trains, .* adapters where the budget pays them \(\d+\), ", note)
    assert re.search(r" and masks alone, .* The look at them before the first step is counted: ", note)
    look, step = found.steps
    assert (look.kind, step.kind) == ("look", "step")
    model = meta_model(parse(folder))
    scored = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "layers" in name or "norm" in name
    )
    assert look.moments["update"].gradients == scored * (4 + 4 + 2)
    assert found.peak_bytes == max(look.peak_bytes, step.peak_bytes)
    assert found.relative_time == step.relative_time < look.relative_time / SPT["calibration_batches"] <= 1
    dearer = replace(step, moments={"update": Bytes(gradients=look.peak_bytes - 1)})
    planned = RecipePlan(own=Setting(name="spt", plan=Plan(steps=(look, dearer))), methods=(), levers=())
    text = " ".join(shown(planned, width=80, in_full=True, memory=Memory(name="a card", num_bytes=2**30)))
    assert (
        f"time: {step.relative_time:.2f} of full fine-tuning at the peak, the look at batches before the first" in text
    )


@pytest.mark.parametrize("method", [{"name": "adagradselect", "fraction": 0.5, "explore_steps": 2, **LAYERS}])
def test_bytes_are_those_of_a_run_on_real_rows(method: dict[str, Any], tmp_path: Path) -> None:
    model, rows = SHARED / "models/llama-3.5M-tinystories", SHARED / "data/gsm8k/train.jsonl"
    if not (model.is_dir() and rows.is_file()):
        pytest.skip(f"no real model and rows in {SHARED}; set GRADSELECT_SHARED")
    data = {
        "format": "prompt-completion",
        "path": str(rows),
        "prompt": "{question}",
        "completion": " {answer}",
        "limit": 16,
        "max_length": 64,
    }
    run = {"output": str(tmp_path / "out"), "steps": 4, "batch_size": 2}
    recipe = parse(tmp_path, model={"path": str(model)}, data=data, method={**method, "residency": "offload"}, run=run)
    found = RecipePlanner().plan(recipe)
    train(recipe, console=quiet())
    seen = measured(tmp_path / "out")
    for category in CATEGORIES:
        assert at_update(found, category) == pytest.approx(seen[category], rel=0.05), category


def test_no_weight_and_no_row_is_read(folder: Path, planner: RecipePlanner, tmp_path: Path) -> None:
    """A folder with a configuration is enough; the data file need not exist."""
    (tmp_path / "config.json").write_text((folder / "model/config.json").read_text("utf-8"), "utf-8")
    recipe = parse(folder, model={"path": str(tmp_path)}, data={"path": "nowhere.jsonl"})
    assert planner.plan(recipe).bytes == planner.plan(parse(folder)).bytes
    with_random = parse(folder, model={"path": str(tmp_path), "random_weights": True})
    assert planner.plan(with_random).bytes == planner.plan(parse(folder)).bytes


def test_packed_rows_are_one_long_row_with_a_mask(folder: Path, planner: RecipePlanner) -> None:
    data = {"format": "text", "path": "nowhere.txt", "max_length": 32}
    padded, packed = (planner.plan(parse(folder, data={**data, "packing": choice})) for choice in (False, True))
    # A layer's mask has 4 x 32 x 32 numbers, or 128 x 128. Sines and cosines of heads of 8 go up to 32, or to 128.
    grown = packed.bytes.activations - padded.bytes.activations
    assert grown == NUM_LAYERS * 4 * (128 * 128 - 4 * 32 * 32) + 2 * 4 * 8 * (128 - 32)


def test_levers_save_what_they_should(folder: Path) -> None:
    recipe = parse(folder, method={"name": "uniform", "count": 1, "residency": "keep"}, run={"batch_size": 8})
    found = plan_recipe(recipe)
    assert found.own.plan is not None
    own = found.own.plan.bytes
    levers = {setting.name: setting.plan.bytes for setting in found.levers if setting.plan is not None}
    assert levers["gradient checkpointing on"].activations < own.activations
    offload = levers["residency offload"]
    assert 0 < offload.state_on_device < own.state_on_device
    assert own.state_on_device - offload.state_on_device <= offload.state_on_host < own.state_on_device
    assert levers["residency drop"].state_on_host == 0
    assert levers["micro-batches of one row"].activations < own.activations / 7
    assert levers["weights in bfloat16"].weights == own.weights / 2


def test_the_grid_has_every_method_and_the_reason_why_one_does_not_fit(folder: Path) -> None:
    found = plan_recipe(parse(folder), fractions=(0.5,))
    plans = {setting.name: setting.plan for setting in found.methods}
    assert list(plans)[:4] == ["full", "adagradselect 50% + embedding", "adagradselect 50%", "lora rank 16"]
    assert {"id3 0.01", "static 0.01", "lift 0.01", "gmt 0.2", "meprop 0.01"} <= set(plans)
    (bitfit,) = [setting for setting in found.methods if setting.name == "bitfit"]
    assert bitfit.plan is None
    assert bitfit.fault is not None
    assert "biases" in bitfit.fault


def test_changes_of_a_setting_are_what_the_command_line_takes(folder: Path) -> None:
    recipe = parse(folder, method={"name": "adagradselect", "count": 2})
    for setting in plan_recipe(recipe).methods:
        assert changed(recipe, setting.changes).method.name == setting.name.split()[0]


# --fit --------------------------------------------------------------------------------------------------------------


def card(num_bytes: int) -> Memory:
    return Memory(name="a card", num_bytes=num_bytes)


def test_the_best_setting_is_within_the_limit_and_the_fastest(folder: Path, planner: RecipePlanner) -> None:
    recipe = parse(folder, method={"name": "uniform", "count": 1, "residency": "keep"}, run={"batch_size": 4})
    own = planner.plan(recipe)
    as_written = find_best(planner, recipe, fractions=(0.5,), memory=card(own.peak_bytes))
    assert as_written.changes == ()
    best = find_best(planner, recipe, fractions=(0.5,), memory=card(own.peak_bytes - 1))
    assert best.plan is not None
    assert best.plan.peak_bytes < own.peak_bytes
    assert best.name == "uniform, as written"
    for levers in sparing_levers(recipe, card(1)):
        other = planner.plan(changed(recipe, levers))
        fits = other.peak_bytes < own.peak_bytes
        assert not fits or other.relative_time >= best.plan.relative_time


def test_levers_of_a_fit_leave_the_batch_as_it_is(folder: Path) -> None:
    recipe = parse(folder, run={"batch_size": 12, "accumulation": 3})
    for levers in sparing_levers(recipe, card(1)):
        run = changed(recipe, levers).run
        assert run.batch_size * run.accumulation == 36


def test_on_a_cpu_a_fit_counts_state_on_the_host_and_does_not_move_it_there(
    folder: Path, planner: RecipePlanner
) -> None:
    """It proposed residency=offload, which moves state from one place in memory to another."""
    recipe = parse(folder, method={"name": "uniform", "count": 1, "residency": "keep"}, run={"batch_size": 4})
    memory = Memory(name="--fit", num_bytes=planner.plan(recipe).peak_bytes - 1, is_host=True)
    best = find_best(planner, recipe, fractions=(0.5,), memory=memory)
    assert best.name == "uniform, as written"
    assert best.plan is not None
    assert best.plan.bytes.state_on_host == 0
    offloaded = changed(recipe, ["method.residency=offload"])
    plan = planner.plan(offloaded)
    assert plan.bytes.state_on_host > 0
    memory = Memory(name="--fit", num_bytes=plan.peak_bytes, is_host=True)
    assert find_best(planner, offloaded, fractions=(0.5,), memory=memory).changes


def test_rows_of_random_tokens_are_shortened_by_their_own_key(folder: Path, planner: RecipePlanner) -> None:
    recipe = parse(folder, data={"format": "random", "length": 32})
    with pytest.raises(gs.UsageError, match=r"or shorter rows, e\.g\. data\.length=16"):
        find_best(planner, recipe, fractions=(0.5,), memory=card(1))


def test_if_nothing_fits_the_message_has_the_smallest_size_that_does(folder: Path) -> None:
    recipe = parse(folder, model={"dtype": "bfloat16"}, run={"batch_size": 2})
    with pytest.raises(gs.UsageError, match="nothing fits 1 B; the smallest is") as refused:
        plan_recipe(recipe, fit=1, fractions=(0.5,))
    size = str(refused.value).partition("write --fit ")[2].partition(",")[0]
    assert plan_recipe(recipe, fit=read_size(size), fractions=(0.5,)).best is not None


# The command --------------------------------------------------------------------------------------------------------


def test_json_holds_every_setting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(folder, folder / "recipe.yaml")
    with pytest.raises(SystemExit):
        main(["plan", str(path), "method.name=full", "--json", "--fractions", "0.5", "--fit", "1GiB"])
    found = json.loads(capsys.readouterr().out)
    assert found["own"]["peak_bytes"] == max(
        sum(count for name, count in moment.items() if name != "state_on_host")
        for step in found["own"]["steps"].values()
        for moment in step["moments"].values()
    )
    assert found["best"]["name"] == "full, as written"
    assert found["levers"][0]["name"] == "gradient checkpointing on"


def test_tables_name_the_best_setting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(folder, folder / "recipe.yaml")
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--fit", "1 GiB"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "best that fits: full, as written" in shown
    assert "best: the first method that fits" in shown


def shown(found: RecipePlan, *, width: int, in_full: bool, memory: Memory) -> list[str]:
    file = io.StringIO()
    show(found, Console(file=file, width=width), memory=memory, in_full=in_full)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.fixture(scope="module")
def planned(folder: Path) -> RecipePlan:
    method = {"name": "adagradselect", "fraction": 0.5, "residency": "keep"}
    return plan_recipe(parse(folder, method=method, run={"batch_size": 2}), fractions=(0.5,), fit=2**30)


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("in_full", [False, True])
def test_the_answer_comes_first_and_no_line_is_wider_than_the_terminal(
    planned: RecipePlan, width: int, in_full: bool
) -> None:
    """In 80 columns, numbers were cut to "4.…" and a method's name took nine lines."""
    lines = shown(planned, width=width, in_full=in_full, memory=Memory(name="a card", num_bytes=2**30))
    answer = " ".join(lines[:7])
    assert answer.startswith("adagradselect, as written: peak ")
    assert "fits into 1.00 GiB of a card time: 0.90 in explore steps, 0." in answer
    assert "at the peak, " in answer
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    rows, tables = (sum(line.startswith(start) for line in lines) for start in ("lora rank 16", "method "))
    assert rows == tables >= 1


def test_state_in_host_memory_is_said_beside_the_peak(folder: Path) -> None:
    """It needs room too, though not on the card."""
    found = RecipePlanner().plan(
        parse(folder, method={"name": "adagradselect", "fraction": 0.5, "residency": "offload"})
    )
    planned = RecipePlan(own=Setting(name="ours", plan=found), methods=(), levers=())
    text = " ".join(shown(planned, width=80, in_full=False, memory=Memory(name="a card", num_bytes=2**30)))
    assert f"in host memory, beside the peak: {write_size(found.bytes.state_on_host)} of moments and masters" in text
    assert found.bytes.state_on_host > 0


@pytest.mark.parametrize(("more", "verdict"), [(0, "fits into"), (-1, "DOES NOT FIT into")])
def test_on_a_cpu_state_on_the_host_is_in_the_same_memory(more: int, verdict: str, folder: Path) -> None:
    found = RecipePlanner().plan(
        parse(folder, method={"name": "adagradselect", "fraction": 0.5, "residency": "offload"})
    )
    planned = RecipePlan(own=Setting(name="ours", plan=found), methods=(), levers=())
    host = found.bytes.state_on_host
    memory = Memory(name="this machine's memory", num_bytes=found.peak_bytes + host + more, is_host=True)
    text = " ".join(shown(planned, width=80, in_full=False, memory=memory))
    assert (
        f"peak {write_size(found.peak_bytes)} and {write_size(host)} of state that waits beside it, {verdict}" in text
    )


def test_the_short_form_has_peak_time_and_state_and_names_the_rest(planned: RecipePlan) -> None:
    lines = shown(planned, width=80, in_full=False, memory=Memory(name="a card", num_bytes=2**30))
    (heading,) = [line for line in lines if line.startswith("method ")]
    assert heading.split() == ["method", "peak", "time", "state", "on", "host"]
    (row,) = [line for line in lines if line.startswith("adagradselect, as written  ")]
    assert planned.own.plan is not None
    assert row.split()[3:5] == write_size(planned.own.plan.peak_bytes).split()
    assert not any(line.startswith("in host memory") for line in lines), "residency: keep"
    assert not any(line.startswith(("levers", "residency")) for line in lines)
    assert any(line.startswith("more: --all") for line in lines)
    assert any(line.startswith("best that fits: ") for line in lines)


def test_every_category_is_in_the_full_form_at_any_width(planned: RecipePlan) -> None:
    for width in (70, 200):
        lines = shown(planned, width=width, in_full=True, memory=Memory(name="a card", num_bytes=2**30))
        headings = [line.split() for line in lines if line.startswith("levers of adagradselect")]
        names = " ".join(name for heading in headings for name in heading[3:])
        assert names == " ".join(FULL)
        assert (len(headings) == 1) == (width == 200)
        assert any(line.startswith("residency drop") for line in lines)


def test_what_does_not_fit_is_said_with_what_to_type(planned: RecipePlan) -> None:
    assert planned.own.plan is not None
    memory = Memory(name="a card", num_bytes=planned.own.plan.peak_bytes - 1)
    text = " ".join(shown(planned, width=80, in_full=False, memory=memory))
    assert "DOES NOT FIT into" in text
    advice = f"--fit {smallest_text(memory.num_bytes * 9 // 10)} looks for a setting that does"
    assert advice in text
    assert "run.device=cpu" not in text
    memory = Memory(name="this machine's memory", num_bytes=memory.num_bytes, is_host=True)
    assert f"run.device=cpu {advice}" in " ".join(shown(planned, width=80, in_full=False, memory=memory))


def test_the_size_of_a_fit_is_that_of_a_card_unless_the_recipe_trains_on_the_cpu() -> None:
    assert [device_memory(device, fit=1000).is_host for device in ("auto", "cpu")] == [False, True]


def test_masks_and_levers_are_planned_on_demand(folder: Path) -> None:
    found = plan_recipe(parse(folder), fractions=(0.5,), in_full=False)
    assert [setting.name for setting in found.methods] == [
        "full",
        "adagradselect 50% + embedding",
        "adagradselect 50%",
        "lora rank 16",
    ]
    assert found.levers == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "12 parsecs"], "is no size"),
        (["--fractions", "0.1,2"], "fractions='0.1,2'"),
        (["data.max_length=999"], "more than the model's 64 positions"),
        (["model.path=./nowhere"], "no configuration"),
        (["method={name: sparsegrad}"], "cannot be planned"),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(folder, folder / "recipe.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("800 MB", 800 * 10**6), ("1.5kib", 1536), ("2e3", 2000), ("7B", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0GiB", "-1GiB", "1.2.3GiB", "12GiBs", "1e999GiB", "nan"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(gs.UsageError, match="is no size"):
        read_size(text)


@pytest.mark.parametrize("size", [1, 1023, 2**20 + 1, 5 * 2**30 - 1, 123_456_789_012])
def test_a_size_to_type_is_never_too_small(size: int) -> None:
    assert size <= read_size(smallest_text(size)) <= size + 2**30 // 100 + 1
    assert write_size(size)


@pytest.mark.parametrize("text", ["", "a", "0", "1.5", "0.1,,0.2"])
def test_an_invalid_fraction_is_refused(text: str) -> None:
    with pytest.raises(gs.UsageError, match="fractions"):
        read_fractions(text)
