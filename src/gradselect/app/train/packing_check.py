"""Check that a model keeps packed examples apart: many architectures ignore the borders between them in silence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from gradselect import UsageError
from gradselect.app.models import at_rest
from gradselect.usage import first_line

from .failures import is_out_of_memory

logger = logging.getLogger(__name__)

LENGTH = 12
"""Tokens of each example of the check: beyond the reach of short convolutions, cheap for every model."""

VISIBLE, VISIBLE_IN_HALF = 1e-4, 5e-3
"""Influence across a border that counts as a leak, as a share of the influence within an example; by precision.

Measured on 45 architectures: 0, or at most 1.5e-7 with experts, where borders hold; 1.4e-3 to 2.9 where they do not.
"""

SHIFTED, SHIFTED_IN_HALF = 0.1, 0.3
"""Difference between an example alone and the same one packed that counts as an error, as a share of the same."""

FLOOR, SHIFTED_FLOOR_IN_HALF = 1e-5, 0.05
"""Rounding of a log-probability, in nats: nothing below it counts, however little a new model sees of its context."""


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Changes of predictions, in nats; each is the largest among the tokens of an example.

    Args:
        within: change after other tokens at the beginning of the same example.
        across: change after other tokens in the packed example before.
        rounding: change after other tokens in the packed example behind, which no causal model can see.
        packed: difference between an example alone and the same one packed behind two others.
        packed_first: difference between an example alone and the same one packed before others.
    """

    within: float
    across: float
    rounding: float
    packed: float
    packed_first: float

    def fault(self, *, in_half: bool) -> str | None:
        """Return what is wrong, or None. `in_half`: the model computes with fewer bits than float32."""
        visible = max(FLOOR, self.within * (VISIBLE_IN_HALF if in_half else VISIBLE))
        # With experts the size of a group decides its kernel, so other neighbours change the rounding.
        noise = max(8 * self.rounding, 2 * self.packed_first)
        shifted = max(SHIFTED_FLOOR_IN_HALF, self.within * SHIFTED_IN_HALF) if in_half else self.within * SHIFTED
        if self.across > max(visible, noise):
            return (
                f"lets packed examples see one another: log-probabilities of an example change by {self.across:.1e} "
                f"when the example before it changes (by {self.within:.1e} when its own beginning does)"
            )
        behind = max(self.rounding, self.packed_first)
        if behind > max(FLOOR, shifted):
            return (
                f"lets packed examples see one another: log-probabilities of an example change by {behind:.1e} with "
                "the examples behind it"
            )
        if self.packed > max(FLOOR, shifted, 8 * self.packed_first):
            return (
                "does not start positions again for each packed example: log-probabilities of an example change by "
                f"{self.packed:.1e} when others stand before it"
            )
        return None


def check_packing(trainer: Any, rows: Sequence[Sequence[int]], *, max_length: int) -> None:
    """Refuse packing if the model of an `SFTTrainer` does not keep the examples of a row apart.

    Four short forward passes without gradients, as in training but without dropout. Random state and modes of modules
    are put back.

    Args:
        trainer: with packing, before its first step.
        rows: token ids of some packed rows; the check uses their tokens, which the model can surely read.
        max_length: tokens of a row.

    Raises:
        UsageError: examples see one another, or the model cannot read a packed row.
    """
    model = trainer.model
    length = max(4, min(LENGTH, max_length // 3))
    one, other, *others = _draw_examples(rows, length=length, num_tokens=model.get_input_embeddings().weight.shape[0])
    try:
        with at_rest(model), torch.no_grad():
            influence = measure(trainer, one, other, others)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"data.packing=true: {_class_name(model)} cannot read packed rows ({type(error).__name__}: "
            f"{first_line(error)}); write data.packing=false"
        ) from error
    in_half = not {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.float64}
    fault = influence.fault(in_half=in_half)
    if fault is None and not influence.within > FLOOR:
        logger.warning(
            "data.packing=true: could not check that packed examples do not see one another, because no prediction of "
            "this %s depends on the tokens before",
            _class_name(model),
        )
    if fault is not None:
        raise UsageError(f"data.packing=true: {_class_name(model)} {fault}; write data.packing=false{_advice(model)}")


def measure(trainer: Any, one: Tensor, other: Tensor, others: Sequence[Tensor]) -> Influence:
    """Measure how far a change of tokens reaches.

    Args:
        trainer: its collator packs, its model predicts.
        one: the example that is watched, (12,).
        other: its packed neighbour, (12,).
        others: examples to put in the neighbour's place.
    """
    half, length = len(one) // 2, len(one)
    beginning_changed = torch.cat([other[:half], one[half:]])
    alone, changed = _predict(trainer, _unpacked(trainer, torch.stack([one, beginning_changed])))
    first, last = slice(0, length - 1), slice(2 * length, 3 * length - 1)
    (before,) = _predict(trainer, _packed(trainer, one, other, one))
    after = [_predict(trainer, _packed(trainer, one, another, one))[0] for another in others]
    return Influence(
        within=_largest(alone[half:] - changed[half:]),
        # A near tie between experts may flip once; a leak shows every time.
        across=min(_largest(before[last] - row[last]) for row in after),
        rounding=max(_largest(before[first] - row[first]) for row in after),
        packed=_largest(alone - before[last]),
        packed_first=_largest(alone - before[first]),
    )


def _predict(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """Return log-probability and entropy of each next token, (rows, tokens - 1, 2), by the path that training takes."""
    outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)
    return torch.stack([outputs.log_probs, outputs.entropy], -1).float()


def _unpacked(trainer: Any, rows: Tensor) -> dict[str, Any]:
    batch = {"input_ids": rows, "labels": rows, "attention_mask": torch.ones_like(rows)}
    return trainer._prepare_inputs(batch)


def _packed(trainer: Any, *examples: Tensor) -> dict[str, Any]:
    """Return the examples in one row, as the trainer's collator packs them."""
    tokens = torch.cat(examples).tolist()
    row = {"input_ids": tokens, "labels": tokens, "seq_lengths": [len(example) for example in examples]}
    return trainer._prepare_inputs(trainer.data_collator([row]))


def _draw_examples(rows: Sequence[Sequence[int]], *, length: int, num_tokens: int) -> Tensor:
    """Draw four examples from the tokens of `rows`, (4, length), the same on every rank."""
    tokens = sorted({token for row in rows for token in row})
    if len(tokens) < length:
        tokens += range(min(length, num_tokens))
    places = torch.randint(len(tokens), (4, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(tokens)[places]


def _largest(differences: Tensor) -> float:
    return differences.abs().max().item()


def _class_name(model: Any) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _advice(model: Any) -> str:
    """Return more advice: flash attention reads the borders itself, also where a model builds a mask without them."""
    is_flash = "flash" in str(model.config._attn_implementation)
    can_change = bool(getattr(model, "_supports_flash_attn", False)) and not is_flash
    return ", or try model.attention=flash_attention_2 (a GPU and the package flash-attn)" if can_change else ""
