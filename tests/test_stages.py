"""Stages: live lines in a terminal, plain lines elsewhere, and the time left."""

from __future__ import annotations

import io
import time
from itertools import pairwise

import pytest
from rich.console import Console

from gradselect.app.progress import Stage, Stages, clock
from gradselect.app.train.time_left import Calendar, TimeLeft


class Watch:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_lines(stage: Stage, watch: Watch, *, seconds: int) -> list[int]:
    """Return the seconds at which plain lines come."""
    shown = []
    for second in range(seconds + 1):
        watch.now = second
        if stage.is_line_due():
            stage.line_is_shown()
            shown.append(second)
    return shown


# Text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (12.4, "0:12"), (129, "2:09"), (3729, "1:02:09")])
def test_a_time_is_written_as_a_clock_shows_it(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_has_the_numbers_and_the_time_left() -> None:
    watch = Watch()
    stage = Stage("tokenizing", total=4000, seconds=watch)
    watch.now = 3
    assert stage.line() == "progress   tokenizing  0/4,000  0:03"
    stage.advance(1000)
    assert stage.line() == "progress   tokenizing  1,000/4,000  about 0:09 left"


def test_other_work_in_the_same_stage_counts_from_its_own_start() -> None:
    watch = Watch()
    stage = Stage("preparing", seconds=watch)
    watch.now = 100
    stage.become("calibrating", total=4)
    watch.now = 102
    stage.advance()
    assert stage.line() == "progress   calibrating  1/4  about 0:06 left"
    stage.become("evaluating", total=12, done=2)
    assert stage.line() == "progress   evaluating  2/12  1:42"
    watch.now = 105
    stage.advance(2)
    assert stage.line() == "progress   evaluating  4/12  about 0:12 left"


def test_counted_items_are_done_when_the_next_is_asked_for() -> None:
    stage = Stage("reading")
    assert [stage.done for _ in stage.count([7, 8, 9])] == [0, 1, 2]
    assert stage.numbers() == "3/3"


# Plain lines -----------------------------------------------------------------------------------------------------


def test_plain_lines_come_after_two_seconds_then_less_and_less_often() -> None:
    watch = Watch()
    shown = plain_lines(Stage("evaluating", seconds=watch), watch, seconds=3600)
    assert shown[:4] == [2, 12, 22, 32]
    gaps = [later - earlier for earlier, later in pairwise(shown)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 60


def test_a_line_of_the_run_itself_puts_the_plain_line_off() -> None:
    shown = io.StringIO()
    stages = Stages(Console(file=shown))
    with stages.open("train", total=9, first_line_seconds=0) as stage:
        assert stage.is_line_due()
        stages.say("step 1/9  loss 1.0000")
        assert not stage.is_line_due()
    assert "step 1/9  loss 1.0000\n" in shown.getvalue()


def test_a_stage_that_takes_long_leaves_plain_lines_without_control_characters() -> None:
    shown = io.StringIO()
    with Stages(Console(file=shown)).open("loading a[b]", total=3, first_line_seconds=0) as stage:
        stage.advance()
        while not shown.getvalue():  # the thread that prints comes twice a second
            time.sleep(0.05)
    assert shown.getvalue().startswith("progress   loading a[b]  1/3  about ")
    assert all(sign.isprintable() for sign in shown.getvalue().rstrip("\n"))


def test_a_stage_that_ends_soon_leaves_no_plain_line() -> None:
    shown = io.StringIO()
    with Stages(Console(file=shown)).open("loading"):
        pass
    assert shown.getvalue() == ""


# Live lines ------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_every_open_stage_in_its_width() -> None:
    shown = io.StringIO()
    stages = Stages(Console(file=shown, force_terminal=True, width=60))
    with stages.open("train", total=20) as training, stages.open("evaluating", total=149) as evaluation:
        training.note = "[embedding layers.0 layers.1 layers.2 layers.3 layers.4] explored"
        evaluation.advance(12)
    last = shown.getvalue()
    assert "12/149" not in last  # the inner stage has ended before the picture changed
    stages._open[:] = [training, evaluation]
    picture = io.StringIO()
    Console(file=picture, width=60).print(stages._drawn())
    lines = picture.getvalue().splitlines()
    assert [line[2:].split()[0] for line in lines] == ["train", "evaluating"]
    assert "12/149" in lines[1]
    assert all(len(line) <= 60 for line in lines)


def test_the_live_lines_are_gone_after_an_error() -> None:
    shown = io.StringIO()
    stages = Stages(Console(file=shown, force_terminal=True, width=60))
    with pytest.raises(ZeroDivisionError), stages.open("loading"):
        _ = 1 / 0
    assert stages._live is None
    assert shown.getvalue().endswith("\x1b[2K")  # the line is erased


def test_a_quiet_console_shows_nothing() -> None:
    shown = io.StringIO()
    stages = Stages(Console(file=shown, quiet=True, force_terminal=True))
    with stages.open("loading"):
        assert stages._live is stages._ticker is None
        stages.say("step 1/2")
    assert shown.getvalue() == ""


# Time left of a training -----------------------------------------------------------------------------------------


def after_steps(calendar: Calendar, count: int, *, evaluations: int | None = None, checkpoints: int = 0) -> TimeLeft:
    """Return the estimate after `count` steps of 10 s; `evaluations` of 100 s and `checkpoints` of 5 s came between."""
    watch = Watch()
    left = TimeLeft(calendar, seconds=watch)
    for step in range(1, count + 1):
        left.begin_step()
        watch.now += 10
        is_evaluated = evaluations is not None and calendar.evaluate_every and step % calendar.evaluate_every == 0
        left.end_step(before="evaluation" if is_evaluated else "checkpoint" if step <= checkpoints else None)
        watch.now += 100 if is_evaluated else 5 if step <= checkpoints else 0
    left.begin_step()
    return left


def test_before_the_first_step_nothing_is_known() -> None:
    assert TimeLeft(Calendar(last_step=20)).text_after(0) == ""


def test_steps_alone_take_as_long_as_those_before() -> None:
    assert after_steps(Calendar(last_step=20), 4).text_after(4) == "about 2:40 left"


def test_evaluations_that_nothing_has_measured_are_named() -> None:
    calendar = Calendar(last_step=20, evaluate_every=10, evaluates_last=True)
    assert after_steps(calendar, 4).text_after(4) == "about 2:40 + 2 evaluations left"


def test_the_estimate_goes_on_after_an_evaluation() -> None:
    calendar = Calendar(last_step=20, evaluate_every=10, evaluates_last=True)
    assert after_steps(calendar, 10, evaluations=1).text_after(10) == "about 3:20 left"  # 10 steps, one evaluation


def test_checkpoints_count_too() -> None:
    assert after_steps(Calendar(last_step=4, save_every=1), 2, checkpoints=2).text_after(2) == "about 0:30 left"


@pytest.mark.parametrize(
    ("every", "last", "after", "count"),
    [(10, 20, 0, 2), (10, 20, 10, 1), (10, 25, 10, 2), (None, 25, 10, 1), (10, 20, 20, 0)],
)
def test_the_last_evaluation_is_counted_once(every: int | None, last: int, after: int, count: int) -> None:
    calendar = Calendar(last_step=last, evaluate_every=every, evaluates_last=True)
    assert calendar.evaluations_after(after) == count
