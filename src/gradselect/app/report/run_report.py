"""Report of one run: one page and its pictures, and the main figures as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradselect.files import make_folder, write_atomically
from gradselect.usage import UsageError

from .page import render
from .read_run import method_words, read_training_run
from .run_findings import run_findings
from .run_sections import build_run_page
from .training_run import TrainingRun

PAGE = "report.html"
COLUMNS = 80


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Files written, and the main figures.

    Args:
        page: the HTML file.
        pictures: PNG files; the page contains them too.
        lines: the main figures in lines of at most 80 letters.
    """

    page: Path
    pictures: tuple[Path, ...]
    lines: tuple[str, ...]


def write_run_report(
    run: str | Path,
    *,
    output: str | Path | None = None,
    records: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
) -> RunReport:
    """Write one page about a training run, finished or not. The same files give the same bytes.

    Args:
        run: folder of `gradselect train` or of a transformers Trainer, or a file of selection records.
        output: folder for `report.html` and its pictures; by default `report` inside `run`.
        records: file of the selection records, if it is not in the folder.
        evaluations: output folders of `gradselect evaluate`, beside those in the folder and beside it.

    Raises:
        UsageError: a file is missing or damaged; names it.

    Example:
        >>> write_run_report("runs/smol").page  # doctest: +SKIP
        PosixPath('runs/smol/report/report.html')
    """
    path = Path(run)
    folder = path if path.is_dir() else path.with_suffix("")
    target = folder / "report" if output is None else Path(output)
    if target.exists() and not target.is_dir():
        raise UsageError(f"output={str(target)!r} is a file; name a folder for the page and its pictures")
    if records is not None and not Path(records).is_file():
        raise UsageError(f"records={str(records)!r}: no such file")
    found = read_training_run(
        path, records=None if records is None else Path(records), evaluations=[Path(folder) for folder in evaluations]
    )
    page = build_run_page(found)
    make_folder(target, name="output")
    pictures = tuple(_write(target / f"{chart.name}.png", chart.png) for chart in page.charts)
    written = _write(target / PAGE, render(page).encode())
    return RunReport(page=written, pictures=pictures, lines=tuple(describe(found)))


def describe(run: TrainingRun) -> list[str]:
    """Return the main figures as lines for a terminal."""
    heads = [("run", f"{run.folder}")]
    if run.record is not None:
        heads.append(("model", str(run.record.recipe.get("model", {}).get("path", ""))))
        heads += [
            (name, f"{data.get('path')}, {data.get('rows_used', 0):,} rows") for name, data in run.record.data.items()
        ]
    heads.append(("method", "  ".join([run.method_name, *method_words(run.method)])))
    if run.trainer:
        heads.append(("trainer", "  ".join([run.trainer_name, *method_words(run.trainer)])))
    return [line for key, text in (*heads, *run_findings(run)) for line in _wrapped(key, text)]


def _wrapped(key: str, text: str) -> list[str]:
    start = f"{key:<10} "
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    return textwrap.wrap(
        plain, COLUMNS, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    ) or [start]


def _write(path: Path, content: bytes) -> Path:
    write_atomically(path, content)
    return path
