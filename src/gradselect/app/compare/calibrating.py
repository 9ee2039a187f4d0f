"""Calibration of a comparison: reuse the file of the folder, measure in a process of its own, write the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gradselect import UsageError
from gradselect.app.progress import Stages
from gradselect.app.results import Calibration, read_calibration, write_calibration
from gradselect.files import locked

from .allotment import allot, check_any_fits
from .calibration import Calibrator, machine_facts
from .calibration_table import show_calibration
from .protocol import protocol_hash
from .results import ResultsFolder
from .run_plan import RunPlan
from .subprocesses import run_job
from .suite import Suite
from .turns import TURN_OF, Turn, Turns, TurnsJob


def calibrated(
    suite: Suite,
    methods: Sequence[str],
    *,
    folder: ResultsFolder,
    protocol: Mapping[str, Any],
    recalibrate: bool,
    console: Console,
    environment: Mapping[str, str],
) -> Calibration:
    """Return the calibration of these methods with the steps of each, and keep it in the folder.

    What an earlier call has measured with the same settings on this machine is not measured again. The process that
    measures has `environment` on top of that of this one.

    Raises:
        UsageError: the calibration failed, the budget is shorter than a step, or the folder holds results of a
            calibration that does not hold here.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def measure(names: Sequence[str], first: int) -> Sequence[Turn]:
        return _measure(suite, names, first=first, folder=folder, console=console, environment=environment)

    calibrator = Calibrator(
        suite,
        measure=measure,
        shared=protocol_hash(protocol["recipe"]),
        machine=machine_facts(suite.recipe.run.device),
        say=say,
    )
    known = None if recalibrate else _known(folder, calibrator, say=say)
    if known is not None:
        _check_steps(suite, known, folder=folder)
    if known is None or calibrator.missing(methods, known):
        calibration = _calibrate(suite, methods, calibrator, folder=folder, recalibrate=recalibrate)
    else:
        say(f"calibrated the calibration of {known.made_at} is used again (--recalibrate measures anew)")
        calibration = allot(suite, known, methods)
        if calibration != known:
            with locked(folder.root, name="--results"):
                write_calibration(folder.root, calibration)
    show_calibration(console, calibration, methods)
    for name in methods:
        if reason := calibration.methods[name].left_out:
            say(f"left out   {name}: {reason} ({calibration.counted})")
    check_any_fits(calibration, methods)
    return calibration


def _calibrate(
    suite: Suite, methods: Sequence[str], calibrator: Calibrator, *, folder: ResultsFolder, recalibrate: bool
) -> Calibration:
    """Measure what is missing, and keep it with the steps of each method."""
    with locked(folder.root, name="--results"):
        # Another comparison may have measured since.
        known = None if recalibrate else _known(folder, calibrator, say=lambda line: None)
        missing = calibrator.missing(methods, known)
        measured = calibrator.calibrate(missing, known) if missing or known is None else known
        # Before the steps: a budget that is too short is corrected without measuring again.
        write_calibration(folder.root, measured)
        calibration = allot(suite, measured, methods)
        write_calibration(folder.root, calibration)
    return calibration


def _known(folder: ResultsFolder, calibrator: Calibrator, *, say: Callable[[str], None]) -> Calibration | None:
    """Return the calibration of the folder; None if there is none that holds here.

    Raises:
        UsageError: it does not hold here, and there are results that have their steps from it.
    """
    known = read_calibration(folder.root)
    if known is None or (difference := calibrator.difference(known)) is None:
        return known
    _check_is_free(folder, difference)
    say(f"note       the calibration in {folder.root} is not used: {difference}")
    return None


def _check_is_free(folder: ResultsFolder, difference: str) -> None:
    """Refuse to calibrate anew beside results that have their steps from another calibration."""
    if folder.read()[0]:
        raise UsageError(
            f"the calibration in {folder.root} cannot be used here: {difference}; equal time holds for one machine and "
            "one calibration. Choose another folder: --results DIR; or measure again with --recalibrate: results with "
            "another number of steps are then moved to work/superseded"
        )


def _check_steps(suite: Suite, known: Calibration, *, folder: ResultsFolder) -> None:
    """Refuse a calibration that gives results of the folder other steps, be their methods in this call or not.

    Raises:
        UsageError: names these methods, with both numbers of steps.
    """
    results = [each for each in folder.read()[0] if each.record.budget is not None and each.record.budget.steps]
    names = {each.record.method for each in results} & suite.methods.keys() & known.methods.keys()
    allotted = allot(suite, known, sorted(names))
    moved = Counter[str]()
    for result in results:
        name, there = result.record.method, result.record.budget
        if name not in names or there is None or (now := allotted.methods[name].steps) in (None, there.steps):
            continue
        then = allotted.methods[name].model_copy(update={"steps": there.steps})
        # Results of other settings go aside anyway, which is said.
        if RunPlan(suite, allotted.model_copy(update={"methods": {name: then}})).why_not(result.record) is None:
            moved[f"{name}: {there.steps} steps then, {now} now"] += 1
    if moved:
        lines = [
            f"the calibration in {folder.root} gives results there other steps than they have: it is that of another "
            "folder, or this version of gradselect expects other explore steps. Choose another folder: --results DIR; "
            "or measure again with --recalibrate: such results are then moved to work/superseded",
            *(f"{line} ({count} result{'s' if count > 1 else ''})" for line, count in moved.items()),
        ]
        raise UsageError("\n  ".join(lines))


def _measure(
    suite: Suite,
    names: Sequence[str],
    *,
    first: int,
    folder: ResultsFolder,
    console: Console,
    environment: Mapping[str, str],
) -> Sequence[Turn]:
    budget = suite.budget
    assert budget is not None
    result, log = folder.work / "calibration.turns.json", folder.work / "calibration.log"
    recipes = {
        name: suite.training_recipe(name, lr=min(suite.methods[name].rates), seed=0, output="-") for name in names
    }
    job = TurnsJob(
        recipes=recipes,
        first=first,
        rounds=budget.rounds,
        steps=budget.round_steps,
        count_flops=budget.flops is not None,
        result=result,
    )
    job_file = folder.work / "calibration.job.json"
    job_file.write_text(job.model_dump_json(indent=1), "utf-8")
    what = f"calibrating {len(names)} method{'s' if len(names) > 1 else ''}"
    with Stages(console).open(f"{what} in {budget.rounds} rounds, in {log}"):
        error = run_job(job_file, log, worker="turns_worker", environment=environment)
    if error is not None:
        raise UsageError(f"the calibration failed{_at_turn(log)}: {error}\n           log: {log}")
    return Turns.model_validate_json(result.read_text("utf-8")).turns


def _at_turn(log: Path) -> str:
    """Return whose turn it was when the process of a calibration ended."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    turns = [line.removeprefix(TURN_OF) for line in lines if line.startswith(TURN_OF)]
    return f" at the turn of {turns[-1]!r}" if turns else ""
