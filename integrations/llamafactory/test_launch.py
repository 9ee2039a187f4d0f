"""`gradselect launch` on LLaMA-Factory's own command, which knows nothing of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import check_moved, read_records
from test_llamafactory import STEPS, folder, write

__all__ = ["folder"]


def test_its_command_trains_selectively_unchanged() -> None:
    launch = [sys.executable, "-c", "from gradselect.app.cli import main; main()", "launch"]
    method = ["adagradselect", "fraction=0.3", "jsonl=records.jsonl"]
    command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", write()]
    done = subprocess.run([*launch, *method, "--", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("gradselect launch: 1 training with adagradselect\n")
    records = read_records(Path("records.jsonl"))
    assert len(records) == STEPS
    check_moved(records[1:], [Path(f"whole/checkpoint-{step}") for step in range(1, STEPS + 1)])
