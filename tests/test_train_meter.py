"""Measurements of a run: phases of a step, bytes, limit of the speed-up, selections."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import ADAGRADSELECT, build, parse, quiet

import gradselect as gs
from gradselect.app.train import train
from gradselect.app.train.meter import PHASES, Meter, medians, percentile
from gradselect.app.train.run_record import as_json
from gradselect.app.train.stopwatch import AbstractClock, Stopwatch
from gradselect.blocks import StepCost, speed_up_limit
from gradselect.files.checked_json import sealed

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


class Ticks(AbstractClock[int]):
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        return self.now

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)

    def method(self) -> str:
        self.now += 5
        return "done"


# The stopwatch ---------------------------------------------------------------------------------------------------


def test_an_inner_phase_stops_the_one_around_it() -> None:
    ticks = Ticks()
    watch = Stopwatch(ticks)
    watch.start("base")
    ticks.now += 1
    with watch.phase("outer"):
        ticks.now += 2
        with watch.phase("inner"):
            ticks.now += 4
        ticks.now += 8
    ticks.now += 16
    assert watch.read(watch.stop()) == {"base": 17, "outer": 10, "inner": 4}


def test_all_phases_together_are_the_whole_time() -> None:
    ticks = Ticks()
    watch = Stopwatch(ticks)
    watch.start("base")
    for _ in range(3):
        with watch.phase("a"), watch.phase("b"):
            ticks.now += 3
        ticks.now += 1
    assert sum(watch.read(watch.stop()).values()) == ticks.now


def test_nothing_is_counted_before_the_start_and_after_the_end() -> None:
    ticks = Ticks()
    watch = Stopwatch(ticks)
    with watch.phase("early"):
        ticks.now += 1
    watch.start("base")
    marks = watch.stop()
    with watch.phase("late"):
        ticks.now += 1
    assert watch.read(marks) == {"base": 0}


def test_a_wrapped_method_is_counted_and_given_back() -> None:
    ticks = Ticks()
    watch = Stopwatch(ticks)
    watch.wrap(ticks, "method", phase="call")
    watch.start("base")
    assert ticks.method() == "done"
    assert watch.read(watch.stop()) == {"base": 0, "call": 5}
    watch.unwrap()
    assert "method" not in vars(ticks)


def test_an_error_in_a_phase_ends_it() -> None:
    ticks = Ticks()
    watch = Stopwatch(ticks)
    watch.start("base")
    with pytest.raises(KeyError), watch.phase("broken"):
        raise KeyError
    ticks.now += 1
    assert watch.read(watch.stop()) == {"base": 1, "broken": 0}


# Whole runs ------------------------------------------------------------------------------------------------------


def run(place: Path, output: Path, **sections: Any) -> dict[str, Any]:
    settings = {"output": str(output), "steps": 8, **sections.pop("run", {})}
    train(parse(place, run=settings, **sections), console=quiet())
    return json.loads((output / "run.json").read_text())


METHODS = {
    "full": ({"name": "full"}, {"step"}),
    "blocks": (ADAGRADSELECT, {"explore", "exploit"}),
    "entries": ({"name": "id3", "budget": 40}, {"step"}),
    "dense mask": ({"name": "gmt"}, {"step"}),
    "adapter": ({"name": "lora", "rank": 2}, {"step"}),
}
each_method = pytest.mark.parametrize(("method", "kinds"), METHODS.values(), ids=METHODS.keys())


@each_method
def test_the_phases_of_a_step_are_its_whole_time(
    place: Path, tmp_path: Path, method: dict[str, Any], kinds: set[str]
) -> None:
    result = run(place, tmp_path / "out", method=method, run={"accumulation": 2})
    assert result["seconds"]["training"] == result["training_seconds"] > 0
    by_kind = result["seconds"]["by_kind"]
    assert by_kind.keys() == kinds
    assert sum(figures["steps"] for figures in by_kind.values()) == 8
    selects = "name" in method and method["name"] not in ("full", "lora")
    for kind, figures in by_kind.items():
        assert figures["median"] == result["median_step_seconds"][kind]
        assert all(figures[phase] > 0 for phase in PHASES if phase != "selection" or selects)
        assert selects or figures["selection"] == 0


def test_selection_of_a_compact_mask_in_the_backward_pass_counts_as_selection(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as the backward pass: the streaming top-k runs inside it."""
    trainer, _ = build(place, tmp_path, method={"name": "id3", "budget": 40})
    meter = Meter(trainer)
    trainer.add_callback(meter)
    phases: list[str] = []
    selector: Any = trainer.optimizer._selector  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    top = type(selector._top).top
    monkeypatch.setattr(
        type(selector._top), "top", lambda *given: (phases.append(meter._watch.current), top(*given))[1]
    )
    trainer.train()
    assert set(phases) == {"selection"}


def test_medians_are_of_each_phase_apart() -> None:
    steps = [dict.fromkeys(PHASES, 1.0) | {"backward": seconds} for seconds in (1.0, 5.0, 2.0)]
    assert medians(steps) == {
        "steps": 3,
        "median": 5.0,
        "forward": 1.0,
        "backward": 2.0,
        "optimizer": 1.0,
        "selection": 1.0,
    }


@each_method
def test_bytes_are_averaged_over_steps_beside_the_peak(
    place: Path, tmp_path: Path, method: dict[str, Any], kinds: set[str]
) -> None:
    held = run(place, tmp_path / "out", method=method)["bytes"]
    assert held["average"].keys() == held["peak"].keys()
    assert all(0 <= held["average"][name] <= held["peak"][name] for name in held["peak"])
    assert held["average"]["weights"] == held["peak"]["weights"] > 0
    parts = sum(count for name, count in held["average"].items() if name != "together")
    assert held["average"]["together"] == pytest.approx(parts)
    # State is made at the first update, after its bytes were counted.
    assert held["average"]["state_on_device"] < held["peak"]["state_on_device"]
    assert held["process"] > held["peak"]["together"]
    assert held["allocated"] is held["reserved"] is None


def test_a_percentile_is_interpolated() -> None:
    assert percentile([10, 20], 50) == 15
    assert percentile([7], 99) == 7
    assert percentile([], 99) is None


def test_selections_of_all_steps_are_kept(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", method=ADAGRADSELECT)
    selection = result["selection"]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    named = [[selection["blocks"][place] for place in step] for step in selection["selected"]]
    assert named == [record["selected"] for record in records]
    assert selection["explored"] == [int(record["explored"]) for record in records]
    assert selection["explored"][0] == 1
    assert selection["entropy"] == [record["selection_entropy"] for record in records]
    assert selection["updates"] == [sum(name in step for step in named) for name in selection["blocks"]]


def test_a_resumed_run_keeps_the_selections_before_it(place: Path, tmp_path: Path) -> None:
    settings = {"steps": 6, "save_every": 2}
    whole = run(place, tmp_path / "whole", method=ADAGRADSELECT, run=settings)
    stopped = tmp_path / "stopped"
    started = run(place, stopped, method=ADAGRADSELECT, run=settings) | {"status": "started"}
    (stopped / "run.json").write_text(json.dumps(sealed(started)))
    shutil.rmtree(stopped / "checkpoints" / "step-6")
    recipe = parse(place, method=ADAGRADSELECT, run={**settings, "output": str(stopped)})
    train(recipe, resume=True, console=quiet())
    resumed = json.loads((stopped / "run.json").read_text())
    assert resumed["resumed_from"] == "step-4"
    assert resumed["selection"] == whole["selection"]
    assert resumed["flop"] == whole["flop"]


def test_the_limit_is_of_the_blocks_that_had_gradients(place: Path, tmp_path: Path) -> None:
    method = {"name": "adagradselect", "count": 1, "explore_steps": 2, "among": ["layer.*"]}
    result = run(place, tmp_path / "out", method=method)
    model = build(place, tmp_path / "other")[1].model
    cost = StepCost.of_model(model, gs.partition(model))
    selection = result["selection"]
    layers = [name for name in selection["blocks"] if name.startswith("layer.")]
    steps = [
        layers if explored else [selection["blocks"][place] for place in selected]
        for selected, explored in zip(selection["selected"], selection["explored"], strict=True)
    ]
    assert {0, 1} == set(selection["explored"])
    assert result["flop"] == {"limit": pytest.approx(speed_up_limit(steps, cost)), "speed_up": None}


def test_what_selects_no_blocks_has_no_limit(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", method={"name": "lora", "rank": 2})
    assert result["flop"]["limit"] is result["selection"] is None


def test_the_meter_changes_no_weight_and_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    trained = {}
    for metered in (False, True):
        trainer, inputs = build(place, tmp_path / str(metered), method=ADAGRADSELECT)
        if metered:
            trainer.add_callback(Meter(trainer))
        trainer.train()
        trained[metered] = {name: value.clone() for name, value in inputs.model.state_dict().items()}
        optimizer: Any = trainer.optimizer
        for owner in (trainer, trainer.accelerator):
            assert not [name for name, value in vars(owner).items() if getattr(value, "__name__", "") == "counted"]
            assert not {"training_step", "backward"} & vars(owner).keys()
        optimizer.optimizer.phases(nullcontext).remove()  # nobody listens
    assert all(value.equal(trained[True][name]) for name, value in trained[False].items())


def test_lists_of_numbers_stand_in_one_line() -> None:
    value = {"a": [1, 2.5, -3e-7], "b": ["x", "[\n1]"], "c": [], "d": [[1, 2], [], [3]], "e": {"f": None}}
    text = as_json(value)
    assert json.loads(text) == value
    assert '"a": [1, 2.5, -3e-07]' in text
    assert "    [1, 2],\n" in text
