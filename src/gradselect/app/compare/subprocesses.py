"""Subprocesses: the commands that prepare a suite, and one process for each run."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gradselect import UsageError
from gradselect.app.runtime import Preempted, handled_signals

from .suite import Preparation

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT}
if sys.platform != "win32":
    PASSED_ON[signal.SIGHUP] = signal.SIGTERM
"""Signals to this process, and the signal that the running job gets for each."""


def prepare(preparations: Sequence[Preparation], *, say: Callable[[str], None]) -> None:
    """Run each command whose product does not exist yet.

    Raises:
        UsageError: a command fails, or does not make its product.
    """
    for preparation in preparations:
        if preparation.makes is None or not Path(preparation.makes).exists():
            say(f"prepare    {preparation.command}")
            _run_preparation(preparation)


def run_job(job_file: Path, log: Path, *, worker: str = "worker") -> str | None:
    """Run a job in its own process; its output goes to `log`. `worker` is the module that carries it out.

    SIGTERM, SIGINT and SIGHUP are passed on to the job, which finishes its step and saves a checkpoint. A second signal
    ends it at once.

    Returns:
        Why it failed; None if it did not.

    Raises:
        Preempted: a signal came, and the job has ended.
    """
    words = [sys.executable, "-m", f"gradselect.app.compare.{worker}", str(job_file)]
    job: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, _: object = None) -> None:
        received.append(number)
        if job is not None:
            job.send_signal(PASSED_ON[signal.Signals(number)])

    with log.open("wb") as output, handled_signals(pass_on, PASSED_ON):
        # Its own session: Ctrl-C in the terminal reaches this process only, which passes it on once.
        job = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        if received:  # before there was a job
            job.terminate()
        code = job.wait()
    if received:
        raise Preempted(received[0], message=f"{signal.Signals(received[0]).name}: the comparison has stopped")
    return None if code == 0 else failure_in(log.read_text("utf-8", errors="replace"), code)


def failure_in(text: str, code: int) -> str:
    """Return why a process failed, from its output: its message to the user, or the last line of its traceback."""
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
