"""Loss of given text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .language_model import LanguageModel
from .tokens import Segment, longest_first, pad


@dataclass(frozen=True, kw_only=True)
class SegmentLoss:
    """Summed loss of a segment's scored tokens, in nats."""

    index: int
    loss: float


def score_all(
    scored: Sequence[Segment], *, language_model: LanguageModel, batch_size: int
) -> Iterator[list[SegmentLoss]]:
    """Yield batches of losses, longest segments first. In exact arithmetic a loss does not depend on its batch."""
    for batch in longest_first([len(segment.ids) for segment in scored], batch_size=batch_size):
        losses = _score_batch([scored[index] for index in batch], language_model=language_model)
        yield [SegmentLoss(index=index, loss=loss) for index, loss in zip(batch, losses, strict=True)]


@torch.inference_mode()
def _score_batch(batch: Sequence[Segment], *, language_model: LanguageModel) -> list[float]:
    ids, mask = pad([segment.ids for segment in batch], token=language_model.pad_token, left=False)
    ids = ids.to(language_model.device)  # (16, 180)
    outputs = language_model.model(input_ids=ids, attention_mask=mask.to(language_model.device), use_cache=False)
    losses = []
    for row, segment in enumerate(batch):
        begin, end = segment.start, len(segment.ids)
        # Row by row, so that only one row of logits is in float32 at a time.
        logits = outputs.logits[row, begin - 1 : end - 1].float()  # (60, 32000)
        losses.append(functional.cross_entropy(logits, ids[row, begin:end], reduction="sum").item())
    return losses
