"""The table of benchmarks/results/glue.jsonl, which a training loop of this file's earlier versions measured.

    python benchmarks/glue.py

GLUE is a suite of `gradselect compare` now: suites/glue. Its figures do not continue this table, whose loop chose each
rate by the score on 500 held-out training pairs of STS-B and used it for all tasks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS, markdown_table, read_rows

RESULT = RESULTS / "glue.jsonl"
METRICS = {"CoLA": ("matthews",), "RTE": ("accuracy",), "MRPC": ("f1", "accuracy"), "STS-B": ("spearman",)}
"""Scores of each task; the first one ranks."""

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Return a line a method: rate, entries, for each task the mean over seeds (each seed), times 100."""
    dev = [row for row in rows if row["part"] == "dev"]
    tasks = list(dict.fromkeys(row["task"] for row in dev))
    lines = []
    for method in dict.fromkeys(row["method"] for row in dev):
        own = [row for row in dev if row["method"] == method]
        by_task = {task: [row for row in own if row["task"] == task] for task in tasks}
        means = [statistics.mean(map(main_score, found)) for found in by_task.values() if found]
        mean = f"{100 * statistics.mean(means):.1f}" if len(means) == len(tasks) else ""
        scores = [cell(found, METRICS[task]) for task, found in by_task.items()]
        lines.append([method, f"{own[0]['lr']:g}", f"{own[0]['num_entries']:,}", *scores, mean])
    headings = [f"{task}, {' / '.join(METRICS[task])}" for task in tasks]
    return markdown_table(["method", "rate", "entries", *headings, "mean"], lines)


def cell(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Format the means over seeds, and behind them the first score of each seed."""
    if not rows:
        return ""
    means = " / ".join(f"{100 * statistics.mean(row['scores'][metric] for row in rows):.1f}" for metric in metrics)
    return f"{means} ({', '.join(f'{100 * main_score(row):.1f}' for row in rows)})"


def main_score(row: Row) -> float:
    return row["scores"][METRICS[row["task"]][0]]


if __name__ == "__main__":
    print(table(read_rows(RESULT)))
