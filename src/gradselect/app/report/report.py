"""Report of a folder of results: one page and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradselect.app.results import Skipped
from gradselect.files import make_folder, write_atomically
from gradselect.usage import UsageError

from .page import render
from .read_results import read_results
from .sections import build_page

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """Files written, and runs left out.

    Args:
        page: the HTML file.
        pictures: PNG files; the page contains them too.
        num_runs: number of runs in the report.
        num_failed: number of failed runs, which the page lists.
        num_dirty: number of runs of a tree with uncommitted changes, left out.
        skipped: damaged files and files that are no results.
    """

    page: Path
    pictures: tuple[Path, ...]
    num_runs: int
    num_failed: int
    num_dirty: int
    skipped: tuple[Skipped, ...]


def write_report(
    results: str | Path, *, output: str | Path | None = None, include_dirty: bool = False
) -> ReportSummary:
    """Write one page about all results in a folder. The same results give the same bytes.

    Args:
        results: folder with the result files of one suite.
        output: folder for `report.html` and its pictures; by default `report` inside `results`.
        include_dirty: include runs of a tree with uncommitted changes.

    Raises:
        UsageError: no results, or results of several protocols.
    """
    folder = Path(results)
    target = folder / "report" if output is None else Path(output)
    if target.exists() and not target.is_dir():
        raise UsageError(f"output={str(target)!r} is a file; name a folder for the page and its pictures")
    found = read_results(folder, include_dirty=include_dirty)
    page = build_page(found)
    make_folder(target, name="output")
    pictures = tuple(_write(target / f"{chart.name}.png", chart.png) for chart in page.charts)
    return ReportSummary(
        page=_write(target / PAGE, render(page).encode()),
        pictures=pictures,
        num_runs=len(found.runs),
        num_failed=len(found.failed),
        num_dirty=len(found.dirty),
        skipped=found.skipped,
    )


def _write(path: Path, content: bytes) -> Path:
    write_atomically(path, content)
    return path
