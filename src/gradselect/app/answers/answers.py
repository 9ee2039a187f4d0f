"""Extraction of the answer from a worked solution or from the text of a model.

An answer is a string that math-verify can read, or None if the text holds none.
"""

from __future__ import annotations

import re

# A minus is a sign unless an operand comes right before it: 3 in "8-3", -3 in "(-3", "is -3" and "-$3".
_SIGN = r"(?P<sign>(?<![\w)\]}.%])[-\u2212])?"
_CURRENCY = r"(?:\\?[$€£]\s?)?(?P<inner_sign>(?<=[$€£])[-\u2212])?"
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
# "3 1/2": at most nine digits each, so that the resulting fraction is cheap to compute.
_MIXED = r"(?P<whole>(?<![\d.,])\d{1,9}) +(?P<part>\d{1,9})/(?P<parts>\d{1,9})(?![\d.,]*\d)"
_FRACTION = rf"(?P<number>{_DECIMAL})(?:\s?/\s?(?P<denominator>\d+(?:\.\d+)?))?"
_NUMBER = re.compile(rf"{_SIGN}{_CURRENCY}(?:{_MIXED}|{_FRACTION})(?P<percent>\s?\\?%)?", re.ASCII)

# An escaped brace belongs to the formula, as in \{1, 2\}.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"[^\s$.,;]+")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_STATED = re.compile(r"answer\s+is\s*:?\s*", re.IGNORECASE)
_MATHS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# "**12**" as a whole, or the end of "**The answer is** 12", whose stars say nothing of the answer.
_EMPHASIS = re.compile(r"\A(\*{1,3})(?:(?=\S)(.+?)\1(?!\w)|:?\s*)", re.DOTALL)
# A number, at most two words of a unit, and a reason. Words that may make another value of it are no unit.
_NO_UNIT = (
    "or|and|to|not|is|if|but|than|less|more|plus|minus|times|over|divided|multiplied|squared|cubed|factorial|percent|pi|"
    "mod|modulo|base|hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?|fourths?|fifths?|"
    "sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|score|gross|point|"
    "repeating|recurring|choose|root|sqrt|log|sin|cos|tan|as|since|because"
)
_UNIT = rf"(?!(?:{_NO_UNIT})\b)(?:[A-Za-z]{{3,}}|cm|mm|km|kg|ft|oz|lb|ml)"
_WITH_UNIT = re.compile(
    rf"(-?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?)(?: {_UNIT}){{0,2}}(?:,? (?:as|since|because)\b.*)?",
    re.ASCII | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")


def gsm8k_answer(text: str) -> str | None:
    """Return the number that answers a grade-school problem: the first after the first `####`, else the last one.

    The result has no thousands separators, currency signs or units of measurement. A percent sign stays.

    Example:
        >>> gsm8k_answer("She makes 9 * 2 = $<<9*2=18>>18.\\n#### 18")
        '18'
        >>> gsm8k_answer("So it costs $1,234.50 dollars.")
        '1234.50'
    """
    _, marker, after = text.partition("####")
    first_line = after.lstrip().partition("\n")[0] if marker else ""
    return _first_number(first_line) or last_number(text)


def math_answer(text: str) -> str | None:
    r"""Return the answer to a competition problem: the last `\boxed{...}`, else the text after the last "answer is",
    else the last number.

    Example:
        >>> math_answer(r"Half of it, so $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    return boxed_or_stated(text) or last_number(text)


def boxed_or_stated(text: str) -> str | None:
    r"""Return the last `\boxed{...}` of the text, else the text after its last "answer is"."""
    return last_boxed(text) or last_stated(text)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}` or `\fbox{...}`, with nested braces; 5 for `\boxed 5`."""
    for box in reversed(list(_BOX.finditer(text))):
        inside = _in_braces(text, box.end()) if text.startswith("{", box.end()) else _one_token(text, box.end())
        if inside is not None and trimmed(inside):
            return trimmed(inside)
    return None


def last_stated(text: str) -> str | None:
    """Return the formula after the last "answer is", else the rest of that sentence."""
    ends = [match.end() for match in _STATED.finditer(text)]
    if not ends:
        return None
    line = _EMPHASIS.sub(r"\2", text[ends[-1] :].partition("\n\n")[0])
    formula = _MATHS.match(line)
    if formula is not None:
        return trimmed(next(group for group in formula.groups() if group is not None)) or None
    return trimmed(_SENTENCE_END.split(line, maxsplit=1)[0]) or None


def last_number(text: str) -> str | None:
    """Return the last number of the text, in the form of `gsm8k_answer`."""
    numbers = list(_NUMBER.finditer(_plain_separators(text)))
    return _canonical(numbers[-1]) if numbers else None


def without_unit(answer: str) -> str | None:
    """Return the number of an answer that is a number with a unit or a reason behind it; None for any other answer.

    Example:
        >>> without_unit("1,200 dollars"), without_unit("12, as shown"), without_unit("12 or 13")
        ('1200', '12', None)
    """
    match = _WITH_UNIT.fullmatch(answer)
    return None if match is None else match[1].replace(",", "")


def trimmed(answer: str) -> str:
    """Return the answer without typesetting: outer dollar signs, a final period, space, `\\left`, `\\dfrac`."""
    answer = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\!", "", answer)
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    answer = " ".join(answer.split()).rstrip(". ")
    return answer.strip("$").strip()


def _first_number(text: str) -> str | None:
    number = _NUMBER.search(_plain_separators(text))
    return None if number is None else _canonical(number)


def _canonical(number: re.Match[str]) -> str:
    sign = "-" if number["sign"] or number["inner_sign"] else ""
    percent = "%" if number["percent"] else ""
    if number["whole"]:
        numerator = int(number["whole"]) * int(number["parts"]) + int(number["part"])
        return f"{sign}{numerator}/{number['parts']}{percent}"
    value = number["number"].replace(",", "")
    value = f"0{value}" if value.startswith(".") else value
    return f"{sign}{value}/{number['denominator']}{percent}" if number["denominator"] else f"{sign}{value}{percent}"


def _plain_separators(text: str) -> str:
    r"""Return the text with LaTeX's 1{,}234 and 1,\!234 written as 1,234."""
    return text.replace("{,}", ",").replace("\\!", "")


def _in_braces(text: str, start: int) -> str | None:
    """Return the text between the brace at `start` and its closing brace; None if it is never closed."""
    depth = 0
    for token in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start + 1 : token.start()]
    return None


def _one_token(text: str, start: int) -> str | None:
    token = _TOKEN.match(text, start)
    return None if token is None else token.group()
