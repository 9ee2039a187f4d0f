"""Bytes of the logits and of what a loss makes of them."""

from __future__ import annotations

from typing import Literal

from ._tape import Rows

Loss = Literal["whole", "chunked", "none"]
"""How the loss is computed: from "whole" logits in float32, as models of transformers do; in tiles of tokens and
vocabulary, "chunked", as TRL does; "none": from one number a class, which is nothing."""

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Of TRL's chunked loss."""


def saved_logits(rows: Rows, *, vocabulary: int, loss: Loss) -> int:
    """What the loss keeps for the backward pass: whole logarithms of probabilities, or two numbers a token."""
    return {"whole": 4 * rows.tokens * vocabulary, "chunked": 8 * rows.tokens, "none": 0}[loss]


def peak_logits(rows: Rows, *, vocabulary: int, hidden: int, loss: Loss, head_trains: bool) -> int:
    r"""The most that a loss holds at once.

    Whole: tokens x vocabulary in float32 three times over: the logarithms of the probabilities, the gradient with
    respect to them and that with respect to the logits. Chunked: one tile of logits, the gradient of the head's input
    in float32, and that of the head in float32 where it trains.
    """
    if loss == "none":
        return 0
    kept = saved_logits(rows, vocabulary=vocabulary, loss=loss)
    if loss == "whole":
        return 3 * kept
    tile = min(rows.tokens, TILE_TOKENS) * TILE_WORDS * rows.itemsize
    return kept + tile + 4 * rows.tokens * hidden + (4 * vocabulary * hidden if head_trains else 0)
