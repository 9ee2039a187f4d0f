"""`gradselect launch` on ms-swift's own command, which replaces the Trainer's list of default callbacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import check_moved, read_records
from test_swift import STEPS, arguments, checkpoints, folder

__all__ = ["folder"]


def test_its_command_trains_selectively_unchanged() -> None:
    launch = [sys.executable, "-c", "from gradselect.app.cli import main; main()", "launch"]
    method = ["id3", "density=0.01", "jsonl=records.jsonl"]
    command = [str(Path(sys.executable).with_name("swift")), "sft", *arguments("whole")]
    done = subprocess.run([*launch, *method, "--", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("gradselect launch: 1 training with id3\n")
    records = read_records(Path("records.jsonl"))
    assert len(records) == STEPS
    check_moved(records[1:], checkpoints())
