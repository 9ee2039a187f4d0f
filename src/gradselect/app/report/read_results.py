"""Results of a folder: the runs that a report may use, and what it leaves out and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gradselect.app.results import (
    CALIBRATION,
    NO_RESULT,
    Calibration,
    ComparedRun,
    Result,
    SampledAnswers,
    Skipped,
    read_calibration,
    read_result,
    read_samples,
    result_paths,
)
from gradselect.usage import UsageError, find_differences

from . import number_format as words


@dataclass(frozen=True, kw_only=True)
class Results:
    """Contents of a folder of results.

    Args:
        runs: successful runs.
        failed: failed runs.
        dirty: runs of a library with uncommitted changes, if these are left out.
        skipped: files that are damaged or no results.
        calibration: cost of the steps, if the runs had a budget.
        samples: answers of the base model and of trained models to a few prompts.
    """

    runs: tuple[Result, ...]
    failed: tuple[Result, ...]
    dirty: tuple[Result, ...]
    skipped: tuple[Skipped, ...]
    calibration: Calibration | None = None
    samples: SampledAnswers = field(default_factory=SampledAnswers)


def read_results(folder: Path, *, include_dirty: bool) -> Results:
    """Read all results in the folder, in the order of their file names.

    Raises:
        UsageError: the folder does not exist, or holds no usable result or results of several protocols.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder; give that of a run, or of results, made with: gradselect compare suites/quick.yaml"
        )
    runs, skipped = _read_all(result_paths(folder))
    dirty = () if include_dirty else tuple(run for run in runs if run.record.dirty)
    kept = [run for run in runs if include_dirty or not run.record.dirty]
    _check_one_protocol(kept)
    good = tuple(run for run in kept if run.succeeded)
    calibration = _read_calibration(folder, skipped)
    samples = read_samples(folder)
    results = Results(
        runs=good,
        failed=tuple(run for run in kept if not run.succeeded),
        dirty=dirty,
        skipped=(*skipped, *samples.skipped),
        calibration=calibration,
        samples=samples,
    )
    if not good:
        raise UsageError(_nothing_to_report(folder, results))
    return results


def _read_calibration(folder: Path, skipped: list[Skipped]) -> Calibration | None:
    try:
        return read_calibration(folder)
    except UsageError as error:
        skipped.append(Skipped(file=CALIBRATION, reason=str(error).removeprefix(f"{CALIBRATION}: ")))
        return None


def _read_all(files: Sequence[Path]) -> tuple[list[Result], list[Skipped]]:
    runs: dict[tuple[str, float, int, str, float], Result] = {}
    skipped = []
    for path in files:
        try:
            result = read_result(path)
        except UsageError as error:
            skipped.append(Skipped(file=path.name, reason=str(error).removeprefix(f"{path.name}: ")))
            continue
        record = result.record
        first = runs.setdefault((record.method, record.lr, record.seed, record.role, record.share), result)
        if first is not result:
            skipped.append(Skipped(file=path.name, reason=f"the same run as {first.path.name}"))
    return list(runs.values()), skipped


def _check_one_protocol(runs: Sequence[Result]) -> None:
    for other in runs[1:]:
        if other.record.protocol != runs[0].record.protocol:
            raise UsageError(_mixed(runs[0], other))


def _mixed(first: Result, other: Result) -> str:
    names = (f"{run.path.name} (suite {run.record.suite!r})" for run in (first, other))
    return "\n".join(
        [
            "these results were made under different protocols and cannot stand in one table:",
            f"  {' and '.join(names)} differ in",
            *(f"  {line}" for line in _differences(first.record, other.record)),
            "move the results of each protocol into a folder of its own and report each",
        ]
    )


def _differences(first: ComparedRun, other: ComparedRun) -> Iterator[str]:
    found = list(find_differences(first.protocol_settings, other.protocol_settings))
    yield from (f"{key}: {one!r} and {two!r}" for key, one, two in found)
    if not found:
        yield f"protocol: {first.protocol!r} and {other.protocol!r}"


def _nothing_to_report(folder: Path, results: Results) -> str:
    others = [skipped for skipped in results.skipped if skipped.reason.startswith(NO_RESULT)]
    damaged = [skipped for skipped in results.skipped if skipped not in others]
    counts = (
        (len(results.failed), "of failed runs"),
        (len(results.dirty), "of a tree with uncommitted changes (--include-dirty takes them in)"),
        (len(damaged), "damaged"),
    )
    found = "; ".join(f"{count} {what}" for count, what in counts if count)
    lines = [
        f"no results in {folder}: its files are {found}" if found else f"no run and no results in {folder}",
        *(f"  {skipped.file}: {skipped.reason}" for skipped in damaged),
        *(f"  {run.path.name}: {run.error or 'failed'}" for run in results.failed),
    ]
    if others:
        files = words.plural(len(others), ".json file")
        lines.append(f"{files} of other kinds: {_few([skipped.file for skipped in others])}")
    return "\n".join(
        [
            *lines,
            "give the folder of a run (it holds run.json, or trainer_state.json of a Trainer), a file of selection "
            "records, or the results of: gradselect compare suites/quick.yaml",
        ]
    )


def _few(names: Sequence[str], *, most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
