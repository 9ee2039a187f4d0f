"""Other processes: the commands that prepare a suite, and one for each run."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradselect import UsageError
from gradselect.app.runtime import Preempted

from .suite import Preparation

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}
"""What this process may be told, and what it tells the run under way."""


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

    A signal to end goes on to the job, which finishes its step and keeps a checkpoint; a second one ends it at once.

    Returns:
        Why it failed; None if it did not.

    Raises:
        Preempted: there was such a signal, and the job has ended.
    """
    words = [sys.executable, "-m", "gradselect.app.compare.worker", str(job_file)]
    job: subprocess.Popen[bytes] | None = None
    told: list[int] = []

    def pass_on(number: int, _: object = None) -> None:
        told.append(number)
        if job is not None:
            job.send_signal(PASSED_ON[signal.Signals(number)])

    with log.open("wb") as output, _handled_by(pass_on):
        # A session of its own: the terminal's Ctrl-C comes to this process alone, and reaches the job once.
        job = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        if told:  # before there was a job
            job.terminate()
        code = job.wait()
    if told:
        raise Preempted(told[0], message=f"{signal.Signals(told[0]).name}: the comparison has stopped")
    return None if code == 0 else failure_in(log.read_text("utf-8", errors="replace"), code)


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Signals to end go to `handler`; what was ignored stays ignored, and in a thread Python tells of none."""
    is_told = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in PASSED_ON if is_told}
    watched = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    try:
        for number in watched:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in watched.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


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
