"""Subprocesses: the commands that prepare a suite, and one process for each run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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


class Running:
    """Jobs that run now, and the signals for them.

    Attributes:
        received: numbers of the signals so far.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._jobs: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Pass SIGTERM, SIGINT and SIGHUP on to the jobs, from the main thread."""
        with handled_signals(self._pass_on, PASSED_ON):
            yield

    def check(self) -> None:
        """Stop if a signal has come.

        Raises:
            Preempted: it has.
        """
        if self.received:
            number = self.received[0]
            raise Preempted(number, message=f"{signal.Signals(number).name}: the comparison has stopped")

    def wait_for(self, words: Sequence[str], log: Path, *, environment: Mapping[str, str]) -> int:
        """Run a command to its end, with its output in `log`. Return its exit code."""
        with log.open("wb") as output:
            # Its own session: Ctrl-C in the terminal reaches this process only, which passes it on once.
            job = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
            )
            self._jobs.append(job)
            if self.received:  # before there was a job
                job.terminate()
            try:
                return job.wait()
            finally:
                self._jobs.remove(job)

    def _pass_on(self, number: int, _: object = None) -> None:
        # No lock: it would wait for a thread that this handler has interrupted.
        self.received.append(number)
        for job in list(self._jobs):
            job.send_signal(PASSED_ON[signal.Signals(number)])


def run_job(
    job_file: Path,
    log: Path,
    *,
    worker: str = "worker",
    environment: Mapping[str, str] | None = None,
    running: Running | None = None,
) -> str | None:
    """Run a job in its own process; its output goes to `log`. `worker` is the module that carries it out.

    SIGTERM, SIGINT and SIGHUP are passed on to the job, which finishes its step and saves a checkpoint. A second signal
    ends it at once.

    Args:
        job_file: the job.
        log: gets the output.
        worker: module that carries the job out.
        environment: variables of the process, on top of those of this one.
        running: the jobs beside this one, whose owner passes signals on; by default this is the only one.

    Returns:
        Why it failed; None if it did not.

    Raises:
        Preempted: a signal came, and the job has ended.
    """
    words = [sys.executable, "-m", f"gradselect.app.compare.{worker}", str(job_file)]
    jobs = running or Running()
    jobs.check()
    with nullcontext() if running else jobs.passing_signals_on():
        code = jobs.wait_for(words, log, environment=environment or {})
    jobs.check()
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
