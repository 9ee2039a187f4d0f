"""A folder of result files -> the runs that a report may use, and what it leaves out and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gradselect.files import read_sealed
from gradselect.usage import UsageError

from .result_schema import FORMAT, Record, ResultFile

SUCCESS = "success"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One result file that could be read."""

    file: str
    result: ResultFile

    @property
    def record(self) -> Record:
        return self.result.gradselect

    @property
    def succeeded(self) -> bool:
        return self.result.train_info.status == SUCCESS

    @property
    def identity(self) -> tuple[str, float, int, str]:
        """What no two runs of a comparison share."""
        return self.record.method, self.record.lr, self.record.seed, self.record.role


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that is no result, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a folder holds.

    Args:
        runs: runs that ended well.
        failed: runs that did not.
        dirty: runs of a tree with changes that are in no commit, where these are left out.
        skipped: files that are damaged or no results.
    """

    runs: tuple[Run, ...]
    failed: tuple[Run, ...]
    dirty: tuple[Run, ...]
    skipped: tuple[Skipped, ...]


def read_results(folder: Path, *, include_dirty: bool) -> Results:
    """All results in the folder, in the order of their file names.

    Raises:
        UsageError: there is no such folder, it holds no usable result, or results of several protocols.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; make results with: gradselect compare suites/quick.yaml")
    runs, skipped = _read_all(sorted(folder.glob("*.json")))
    dirty = () if include_dirty else tuple(run for run in runs if run.record.dirty)
    kept = [run for run in runs if include_dirty or not run.record.dirty]
    _check_one_protocol(kept)
    good = tuple(run for run in kept if run.succeeded)
    results = Results(
        runs=good, failed=tuple(run for run in kept if not run.succeeded), dirty=dirty, skipped=tuple(skipped)
    )
    if not good:
        raise UsageError(_nothing_to_report(folder, results))
    return results


def _read_all(files: Sequence[Path]) -> tuple[list[Run], list[Skipped]]:
    runs: dict[tuple[str, float, int, str], Run] = {}
    skipped = []
    for path in files:
        read = _read(path)
        if isinstance(read, Run) and read.identity in runs:
            read = Skipped(file=path.name, reason=f"the same run as {runs[read.identity].file}")
        if isinstance(read, Run):
            runs[read.identity] = read
        else:
            skipped.append(read)
    return list(runs.values()), skipped


def _read(path: Path) -> Run | Skipped:
    try:
        values = read_sealed(path, name=path.name)
    except UsageError as error:
        return Skipped(file=path.name, reason=str(error).removeprefix(f"{path.name}: "))
    if not isinstance(values.get("gradselect"), dict):
        return Skipped(file=path.name, reason="no result of gradselect compare: it has no part 'gradselect'")
    version = values["gradselect"].get("format")
    if version != FORMAT:
        return Skipped(file=path.name, reason=f"format {version!r}; this version reads format {FORMAT}")
    try:
        run = Run(file=path.name, result=ResultFile.model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return Skipped(file=path.name, reason=f"damaged: {place}: {first['msg']}")
    problem = _contradiction(run.record)
    return run if problem is None else Skipped(file=path.name, reason=f"damaged: {problem}")


def _contradiction(record: Record) -> str | None:
    """Lists that belong together and have different lengths."""
    for name, curve in (record.curves or {}).items():
        if not len(curve.step) == len(curve.seconds) == len(curve.loss):
            return f"curve {name!r} has {len(curve.step)} steps, {len(curve.seconds)} times, {len(curve.loss)} losses"
    selection = record.selection
    if selection is None or "blocks" not in type(selection).model_fields:
        return None
    return _selection_contradiction(selection.model_dump())


def _selection_contradiction(selection: Mapping[str, Any]) -> str | None:
    blocks, selected = len(selection["blocks"]), selection["selected"]
    if len(selection["updates"]) != blocks:
        return f"{blocks} blocks, {len(selection['updates'])} update counts"
    if selection["explored"] and len(selection["explored"]) != len(selected):
        return f"{len(selected)} selections, {len(selection['explored'])} explore marks"
    if any(not 0 <= index < blocks for step in selected for index in step):
        return f"a selection names a block beyond the {blocks} there are"
    return None


def _check_one_protocol(runs: Sequence[Run]) -> None:
    if not runs:
        return
    first = runs[0]
    for other in runs[1:]:
        if other.record.protocol != first.record.protocol:
            raise UsageError(_mixed(first, other))


def _mixed(first: Run, other: Run) -> str:
    lines = [f"  {line}" for line in _differences(first.record, other.record)]
    return "\n".join(
        [
            "these results were made under different protocols and cannot stand in one table:",
            f"  {first.file} (suite {first.record.suite!r}) and {other.file} (suite {other.record.suite!r}) differ in",
            *lines,
            "move the results of each protocol into a folder of its own and report each",
        ]
    )


def _differences(first: Record, other: Record) -> Iterator[str]:
    one, two = (dict(_flatten(record.protocol_settings)) for record in (first, other))
    keys = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
    yield from (f"{key}: {one.get(key)!r} and {two.get(key)!r}" for key in keys)
    if not keys:
        yield f"protocol: {first.protocol!r} and {other.protocol!r}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten_settings(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted key and a value, sorted by key."""
    return sorted(_flatten(values), key=lambda pair: pair[0])


def _nothing_to_report(folder: Path, results: Results) -> str:
    counts = (
        (len(results.failed), "of failed runs"),
        (len(results.dirty), "of a tree with uncommitted changes (--include-dirty takes them in)"),
        (len(results.skipped), "damaged or no results"),
    )
    found = "; ".join(f"{count} {what}" for count, what in counts if count)
    return "\n".join(
        [
            f"no results in {folder}: " + (f"its files are {found}" if found else "it has no .json files"),
            *(f"  {skipped.file}: {skipped.reason}" for skipped in results.skipped),
            *(f"  {run.file}: {run.result.run_info.error_msg or 'failed'}" for run in results.failed),
            "make some with: gradselect compare suites/quick.yaml",
        ]
    )
