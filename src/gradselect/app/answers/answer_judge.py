"""Comparison of answers by math-verify, in a process of its own that may crash."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gradselect.usage import UsageError

from .answers import trimmed, without_unit

_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
_PLAIN = re.compile(r"-?\d[\d,]*(?:\.\d+)?", re.ASCII)


class Judge:
    """Context manager that compares answers, one pair at a time.

    A pair stays undecided if math-verify hangs or crashes; the evaluation continues. Equal strings and whole numbers
    skip math-verify.

    Args:
        timeout_seconds: limit for one pair.

    Raises:
        UsageError: math-verify is not installed.

    Example:
        >>> with Judge() as judge:
        ...     judge.equal("1234", "1,234.00")
        True
    """

    def __init__(self, *, timeout_seconds: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UsageError("comparing answers needs math-verify; run: pip install math-verify")
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def equal(self, reference: str, prediction: str) -> bool | None:
        """Return True if both are the same value; None if math-verify did not decide in time.

        Of a prediction like "5 dollars" the number alone is right too, where the reference is a plain number.
        """
        one, other = trimmed(reference), trimmed(prediction)
        verdict = self._equal(one, other)
        number = without_unit(other) if verdict is False and _PLAIN.fullmatch(one) else None
        return verdict if number is None or number == other else self._equal(one, number)

    def _equal(self, one: str, other: str) -> bool | None:
        if one == other:
            return True
        if _WHOLE.fullmatch(one) and _WHOLE.fullmatch(other):
            return int(one) == int(other)
        pair = json.dumps([one, other, self._timeout_seconds])
        verdict = _exchange(self._running(), pair)
        if not verdict:
            self._stop()
            return None
        return bool(json.loads(verdict))

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            program = Path(__file__).with_name("math_verify_process.py")
            # -P keeps this folder off the module path: its files must not shadow the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if not _exchange(self._process, None):
                self._stop()
                raise RuntimeError(f"math-verify does not start; see: {sys.executable} -P {program}")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _exchange(process: subprocess.Popen[str], line: str | None) -> str:
    """Send a line, if any, and read one. Returns "" if the process has ended."""
    try:
        if line is not None:
            _pipe(process.stdin).write(line + "\n")
            _pipe(process.stdin).flush()
        return _pipe(process.stdout).readline()
    except BrokenPipeError:
        return ""


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
