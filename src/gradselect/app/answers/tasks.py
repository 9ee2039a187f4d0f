"""Tasks whose answers a rule can check: the answer in a model's text, and the reference in a worked solution."""

from __future__ import annotations

from collections.abc import Callable

from gradselect.usage import UsageError

from .answers import boxed_or_stated, gsm8k_answer, math_answer, trimmed

FIND_ANSWER: dict[str, Callable[[str], str | None]] = {"gsm8k": gsm8k_answer, "math": math_answer}
"""Return the answer in the text of a model, or None, by task."""


def gsm8k_reference(text: str) -> str:
    """Return the number that answers a worked solution.

    Raises:
        UsageError: there is none.

    Example:
        >>> gsm8k_reference("2 + 3 = 5\\n#### 5")
        '5'
    """
    reference = gsm8k_answer(text)
    if reference is None:
        raise UsageError(f"the answer {text[-60:]!r} holds no number")
    return reference


def math_reference(text: str) -> str:
    """Return the boxed or announced answer, else the whole text if it is one line: a bare answer.

    Raises:
        UsageError: there is none.

    Example:
        >>> math_reference("x + 1"), math_reference("It is $2x$, so the answer is $2x$.")
        ('x + 1', '2x')
    """
    reference = boxed_or_stated(text) or ("" if "\n" in text.strip() else trimmed(text))
    if not reference:
        raise UsageError(f"the answer {text[-60:]!r} holds no \\boxed{{...}}")
    return reference


FIND_REFERENCE: dict[str, Callable[[str], str]] = {"gsm8k": gsm8k_reference, "math": math_reference}
"""Return the reference in a worked solution, or raise, by task."""
