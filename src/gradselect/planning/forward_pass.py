"""Bytes that a forward pass leaves for the backward pass, activations and logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .activations import ActivationCounter
from .meta_forward import Rows

Loss = Literal["whole", "chunked", "none", "sum"]
"""Computation of the loss. "whole": from all logits in float32, as in models of transformers; "chunked": in tiles of
tokens and vocabulary, as in TRL; "none": from one number a class, which takes next to nothing; "sum": of all logits."""

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Tile of TRL's chunked loss."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that the backward pass finds.

    Args:
        activations: without logits.
        logits: most that the loss holds at once.
        recomputed: of one layer, with gradient checkpointing.
        in_flight: gradients of activations inside one layer; an estimate.
    """

    activations: int
    logits: int
    recomputed: int
    in_flight: int


class ForwardPass:
    """Bytes that a forward pass keeps, for any set of trained parameters.

    Args:
        counter: of the model.
        rows: tokens of the pass.
        loss: how it is computed.
        checkpointing: True if layers keep only their inputs and are computed again.
    """

    def __init__(self, counter: ActivationCounter, rows: Rows, *, loss: Loss, checkpointing: bool) -> None:
        self.checkpointing = checkpointing
        self._counter = counter
        self._rows = rows
        self._loss: Loss = loss

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass."""
        return self._rows.batch * self._rows.length

    def without_loss(self, rows: Rows | None = None) -> ForwardPass:
        """Return the pass, or that of other rows, whose logits are summed up instead of compared with labels."""
        return ForwardPass(self._counter, rows or self._rows, loss="sum", checkpointing=self.checkpointing)

    def without_checkpointing(self) -> ForwardPass:
        """Return the pass without gradient checkpointing."""
        return ForwardPass(self._counter, self._rows, loss=self._loss, checkpointing=False)

    def kept(self, trained: Collection[str]) -> Kept:
        """Count for the case that the parameters of these names have a gradient.

        Raises:
            UsageError: the model does not run on the meta device.
        """
        counted = self._counter.count(trained, self._rows)
        itemsize = next(self._counter.model.parameters()).element_size()
        activations = counted.checkpointed if self.checkpointing else counted.whole
        if self._loss == "chunked" and counted.reaches_head and not counted.head_trains:
            # The head's input: the loss keeps it, the head itself only where it trains.
            activations += counted.num_rows * counted.hidden * itemsize
        logits = peak_logits(
            counted.num_rows,
            vocabulary=counted.vocabulary,
            hidden=counted.hidden,
            itemsize=itemsize,
            loss=self._loss,
            head_trains=counted.head_trains,
        )
        return Kept(
            activations=activations,
            logits=logits,
            recomputed=counted.recomputed if self.checkpointing else 0,
            in_flight=counted.in_flight,
        )


def saved_logits(num_rows: int, *, vocabulary: int, loss: Loss) -> int:
    """Return the bytes that the loss saves: all log probabilities in float32, or two numbers a row."""
    return {"whole": 4 * num_rows * vocabulary, "chunked": 8 * num_rows, "none": 0, "sum": 0}[loss]


def peak_logits(num_rows: int, *, vocabulary: int, hidden: int, itemsize: int, loss: Loss, head_trains: bool) -> int:
    """Return the most bytes that a loss holds at once.

    Whole: three times rows x vocabulary in float32: log probabilities, the gradient with respect to them, and the
    gradient with respect to the logits. Chunked: one tile of logits, the gradient of the head's input in float32, and
    that of the head in float32 if it trains. Sum: the logits, and in half precision a copy in float32.
    """
    if loss == "none":
        return 0
    if loss == "sum":
        return num_rows * vocabulary * (itemsize + (4 if itemsize < 4 else 0))
    saved = saved_logits(num_rows, vocabulary=vocabulary, loss=loss)
    if loss == "whole":
        return 3 * saved
    tile = min(num_rows, TILE_TOKENS) * TILE_WORDS * itemsize
    return saved + tile + 4 * num_rows * hidden + (4 * vocabulary * hidden if head_trains else 0)
