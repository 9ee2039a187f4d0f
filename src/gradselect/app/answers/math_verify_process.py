"""Program that reads pairs of answers, one JSON list per line, and writes true or false for each.

Answers come from a model: `9^{9^{9^9}}` or a thousand nested roots can keep a computer algebra system busy for hours or
take all memory. Only killing the process stops every such case. So `answer_judge.py` runs this file, which exits when a
pair takes too long. It does not import gradselect, so a new process is ready within a second.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 << 30


def are_equal(reference: str, prediction: str) -> bool:
    r"""Return True if both are the same value, as 1/2, 0.5, 50\% and \frac{1}{2} are."""
    # `main` has the timeout: math-verify's own cannot stop a long computation in C.
    expected = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    given = parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(expected, given, timeout_seconds=None)


def main() -> None:
    """Answer lines `[reference, prediction, seconds]` until the input ends. Writes "ready" after the imports."""
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    are_equal("1", "2")
    _write("ready")
    for line in sys.stdin:
        reference, prediction, seconds = json.loads(line)
        # A watchdog thread in C ends the process, whatever the interpreter is doing.
        faulthandler.dump_traceback_later(seconds, exit=True)
        verdict = are_equal(reference, prediction)
        faulthandler.cancel_dump_traceback_later()
        _write(verdict)


def _write(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
