"""What the log has gathered since its last line, kept with a checkpoint: no line tells that a run was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import MaskRecord, StepRecord


def write_window(folder: Path, window: Mapping[str, Any], *, process: int) -> None:
    """Keep what process number `process` has not logged yet, as JSON."""
    _file(folder, process).write_text(json.dumps(window), "utf-8")


def read_window(folder: Path, *, process: int) -> dict[str, Any]:
    """What `write_window` was given."""
    return json.loads(_file(folder, process).read_text("utf-8"))


def last_records(file: Path, count: int) -> list[StepRecord | MaskRecord]:
    """The last `count` records in a file that `JsonlWriter` wrote; none if there is no file."""
    if not file.exists() or count == 0:
        return []
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()[-count:]]
    return [StepRecord(**line) if "selected" in line else MaskRecord(**line) for line in lines]


def _file(folder: Path, process: int) -> Path:
    return folder / f"log_window_{process}.json"
