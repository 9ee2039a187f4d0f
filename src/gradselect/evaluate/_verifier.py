"""A program of its own: reads pairs of answers, one JSON list a line, and writes whether they are equal.

Answers come from a model, and `9^{9^{9^9}}` or a thousand nested roots keep a computer algebra system busy for hours or
take all memory. Only the end of a process stops every such case, so `_judge.py` runs this file and ends it if need be.
It imports nothing of gradselect, so that a new one is ready within a second.
"""

from __future__ import annotations

import json
import logging
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 << 30


def are_equal(reference: str, prediction: str) -> bool:
    r"""Whether both stand for the same value: 1/2, 0.5, 50\% and \frac{1}{2} do."""
    # The clock is the reader's: math-verify's own needs signals and cannot end a long computation in C.
    expected = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    given = parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(expected, given, timeout_seconds=None)


def main() -> None:
    """Answer until the input ends; the first line says that everything is imported."""
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    are_equal("1", "2")
    _say("ready")
    for line in sys.stdin:
        _say(are_equal(*json.loads(line)))


def _say(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
