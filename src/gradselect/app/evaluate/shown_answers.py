"""Some answers of an evaluation as lines for people: question, expected, given, right or wrong."""

from __future__ import annotations

from collections.abc import Iterator

from gradselect.usage import shortened

from .results import EvaluationResult, Item

NUM_SHOWN = 5
"""Answers that are shown on a terminal."""


def answer_lines(result: EvaluationResult, *, count: int = NUM_SHOWN) -> Iterator[str]:
    """Yield lines about up to `count` items, spread over the data. A loss has no answers, so no line.

    Example:
        >>> from gradselect.app.evaluate.results import EvaluationResult
        >>> item = {"index": 0, "question": "2+3?", "reference": "5", "prediction": " 6", "extracted": "6"}
        >>> item |= {"correct": False, "finished": True}
        >>> numbers = {"num_items": 1, "num_truncated": 0, "seconds": 1.0, "data": {}, "settings": {}, "versions": {}}
        >>> print("\\n".join(answer_lines(EvaluationResult(task="gsm8k", items=[item], **numbers))))
        answers    1 of 1
          item 1      2+3?
            expected  5
            given     6: wrong; the whole answer: 6
    """
    items = [item for item in result.items if "prediction" in item]
    shown = _spread(items, count)
    if shown:
        spread = ", spread over the data" if len(shown) < len(items) else ""
        yield f"answers    {len(shown)} of {len(items):,}{spread}"
    for item in shown:
        yield f"  item {item['index'] + 1:<6,} {_question(item)}"
        yield f"    expected  {_expected(item)}"
        yield f"    given     {_given(item)}"


def _spread(items: list[Item], count: int) -> list[Item]:
    """Return up to `count` items, evenly spaced."""
    last, steps = len(items) - 1, max(1, min(count, len(items)) - 1)
    return [items[round(place * last / steps)] for place in range(min(count, len(items)))]


def _question(item: Item) -> str:
    parts = [item["question"]] if "question" in item else [item["text"], item.get("text_pair") or ""]
    return " | ".join(shortened(str(part)) for part in parts if part)


def _expected(item: Item) -> str:
    if "references" not in item:
        return shortened(str(item["reference"]))
    first, *others = item["references"]
    return f"{shortened(first)}{f' (and {len(others)} more)' if others else ''}"


def _given(item: Item) -> str:
    if "references" in item:
        cut = "" if item["finished"] else " (cut off by max_new_tokens)"
        return f"{shortened(item['prediction'])}: chrF {item['score']:.1f}{cut}"
    if "correct" not in item:  # a score
        return f"{item['prediction']:.4g}"
    verdict = "right" if item["correct"] else "wrong"
    if "extracted" not in item:
        return f"{shortened(str(item['prediction']))}: {verdict}"
    found = "no answer" if item["extracted"] is None else shortened(str(item["extracted"]))
    cut = "" if item["finished"] else " (cut off by max_new_tokens)"
    return f"{found}: {verdict}; the whole answer{cut}: {shortened(item['prediction'])}"
