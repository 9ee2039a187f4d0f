"""Get the files of four tasks of GLUE, as suites/glue and suites/seeds read them: data/glue/<task>/train.tsv, dev.tsv.

    python benchmarks/glue_tasks.py --out data/glue
    GRADSELECT_GLUE=~/glue python benchmarks/glue_tasks.py --out data/glue --task rte

If $GRADSELECT_GLUE names a folder, the files are copied from its subfolders (rte, glue_rte or RTE, and so on).
Otherwise they are written from nyu-mll/glue on the hub. Copies of GLUE differ: some hold back a part of the training
rows. Results name the files by their digests.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.files import write_atomically, writing_aside

VARIABLE = "GRADSELECT_GLUE"
HUB_ID = "nyu-mll/glue"
SPLITS = {"train": "train", "dev": "validation"}
"""Splits on the hub, by name of the file."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Form of a task.

    Args:
        folders: names of its folder in copies of GLUE.
        cells: returns the cells of a line from a row of the hub.
        header: first line; none in most of the files.
    """

    folders: tuple[str, ...]
    cells: Callable[[Mapping[str, Any]], Sequence[object]]
    header: tuple[str, ...] = ()


TASKS = {
    "rte": Task(
        folders=("rte", "glue_rte", "RTE"),
        cells=lambda row: (
            row["idx"],
            row["sentence1"],
            row["sentence2"],
            ("entailment", "not_entailment")[row["label"]],
        ),
    ),
    "mrpc": Task(
        folders=("mrpc", "glue_mrpc", "MRPC"),
        cells=lambda row: (row["label"], row["idx"], row["idx"], row["sentence1"], row["sentence2"]),
        header=("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    ),
    "cola": Task(
        folders=("cola", "glue_cola", "CoLA"),
        cells=lambda row: ("hub", row["label"], "", row["sentence"]),
    ),
    "stsb": Task(
        folders=("stsb", "glue_stsb", "STS-B"),
        cells=lambda row: (row["idx"], *[""] * 6, row["sentence1"], row["sentence2"], row["label"]),
    ),
}


def text_of(task: Task, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a file of tab-separated values."""
    lines = [task.header] if task.header else []
    lines += [[" ".join(str(cell).split()) for cell in task.cells(row)] for row in rows]
    return "".join("\t".join(cells) + "\n" for cells in lines)


def copy(name: str, folder: Path, out: Path) -> None:
    """Copy the files of a task from a copy of GLUE.

    Raises:
        SystemExit: they are not there.
    """
    places = [folder / each for each in TASKS[name].folders if (folder / each / "dev.tsv").is_file()]
    if not places or not (places[0] / "train.tsv").is_file():
        raise SystemExit(f"{VARIABLE}={folder} has no {name}/train.tsv and {name}/dev.tsv")
    with writing_aside(out) as aside:
        aside.mkdir(exist_ok=True)
        for split in SPLITS:
            shutil.copyfile(places[0] / f"{split}.tsv", aside / f"{split}.tsv")


def write(name: str, out: Path) -> None:
    """Write the files of a task from the hub."""
    from datasets import load_dataset

    with writing_aside(out) as aside:
        aside.mkdir(exist_ok=True)
        for file, split in SPLITS.items():
            rows: Any = load_dataset(HUB_ID, name, split=split)
            write_atomically(aside / f"{file}.tsv", text_of(TASKS[name], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Get the files of the tasks that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--task", choices=TASKS, action="append", help="a task; may be repeated; default: all")
    options = parser.parse_args(arguments)
    folder = os.environ.get(VARIABLE)
    for name in options.task or TASKS:
        out = options.out / name
        if out.exists():
            print(f"{out} is there already")
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            copy(name, Path(folder), out)
        else:
            write(name, out)
        print(f"{out} made from {folder or HUB_ID}")


if __name__ == "__main__":
    main()
