"""chrF and BLEU of texts against references, by sacrebleu, which is an optional package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from gradselect.usage import UsageError

MEAN_CHRF = "mean_chrf"
"""Mean of the chrF of each text: the score that is compared text by text."""


def check_text_scores() -> None:
    """Check that sacrebleu can be used.

    Raises:
        UsageError: it is not installed.
    """
    _metrics()


def chrf(text: str, references: Sequence[str]) -> float:
    """Return the chrF of one text against the nearest of its references, 0 to 100.

    Reference: M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015; here with character
    n-grams up to 6 and beta 2, sacrebleu's defaults.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    return float(_metrics().CHRF().sentence_score(text, list(references)).score)


def corpus_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return chrF and BLEU of all texts together, as publications give them, 0 to 100.

    Args:
        texts: texts of a model.
        references: references of each text; their number may differ.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    metrics = _metrics()
    # The first references of all texts, then their second ones: None where a text has no second one.
    streams = [list(stream) for stream in zip_longest(*references)]
    scorers = {
        "chrf": metrics.CHRF(),
        "bleu": metrics.BLEU(force=True),
    }  # force: data that is split into words is meant
    return {name: float(scorer.corpus_score(list(texts), streams).score) for name, scorer in scorers.items()}


def _metrics() -> Any:
    try:
        from sacrebleu import metrics  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"task=generation is scored by sacrebleu, which cannot be used ({error}); run: "
            "pip install 'gradselect[generation]'"
        ) from None
    return metrics
