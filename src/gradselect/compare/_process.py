"""Other processes: the commands that prepare a suite, and one for each run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import UsageError
from ._suite import Preparation


def prepare(preparations: Sequence[Preparation], *, say: Callable[[str], None]) -> None:
    """Run the commands whose product is not there yet.

    Raises:
        UsageError: one fails, or does not make what it should.
    """
    for preparation in preparations:
        if preparation.makes is None or not Path(preparation.makes).exists():
            say(f"prepare    {preparation.command}")
            _run_preparation(preparation)


def run_job(job_file: Path, log: Path) -> str | None:
    """Carry out a job in a process of its own; what it says goes to `log`.

    Returns:
        Why it failed; None if it did not.
    """
    words = [sys.executable, "-m", "gradselect.compare._child", str(job_file)]
    with log.open("wb") as output:
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode
    return None if code == 0 else failure_in(log.read_text("utf-8", errors="replace"), code)


def failure_in(text: str, code: int) -> str:
    """Why a process failed, from what it said last: its message to the user, or the end of its traceback."""
    if code < 0:
        return f"the process was ended by signal {-code} (9: often too little memory)"
    _, is_message, message = f"\n{text.strip()}".rpartition("\nerror: ")
    last_line = (text.strip().splitlines() or ["it said nothing"])[-1]
    return message if is_message else f"{last_line} (exit code {code})"


def _run_preparation(preparation: Preparation) -> None:
    program, *arguments = shlex.split(preparation.command)
    words = [sys.executable if program == "python" else program, *arguments]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"prepare: {preparation.command!r} cannot be run: {error}") from None
    if done.returncode != 0:
        raise UsageError(f"prepare: {preparation.command!r} failed: {failure_in(done.stderr, done.returncode)}")
    if preparation.makes is not None and not Path(preparation.makes).exists():
        raise UsageError(f"prepare: {preparation.command!r} did not make {preparation.makes}; correct the key makes")
