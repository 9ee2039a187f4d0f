"""The moments of a step, their bytes, and the time that the step takes against one of full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gradselect.blocks import FULL_STEP, step_time

from .bytes import Bytes, largest
from .forward_pass import Kept

StepKind = Literal["step", "explore", "exploit"]
BACKWARD = 4.0
"""Units of parameters x tokens in a full backward pass: two for activations, two for weights."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes.

    Args:
        depth: share of the layers that the backward pass visits.
        frozen: share of the weights without a gradient.
        growth: weights with an adapter, relative to those without.
        checkpointing: the layers that the backward pass visits are computed again.
    """

    depth: float
    frozen: float
    growth: float = 1.0
    checkpointing: bool = False

    @property
    def relative_time(self) -> float:
        """Operations against those of full fine-tuning, which are 6: forward 2, backward 2 and 2."""
        again = 2 * self.depth if self.checkpointing else 0.0
        return self.growth * (step_time(depth=self.depth, frozen=self.frozen) + again) / FULL_STEP

    @property
    def backward_skipped(self) -> float:
        """Share of a full backward pass that is not computed."""
        return 1 - (2 * self.depth + 2 * (1 - self.frozen)) / BACKWARD


@dataclass(frozen=True, kw_only=True)
class Step:
    """A kind of step, at its most expensive.

    Args:
        kind: "explore" looks at all gradients, "exploit" trains what was chosen before; "step" where there is no such
            difference.
        moments: bytes held when the loss is there ("loss"), when the backward pass comes to the layers ("layers"), when
            it ends ("backward"), and in the update ("update").
        relative_time: mean time against a step of full fine-tuning without checkpointing, in operations.
        backward_skipped: mean share of a full backward pass that is not computed.
    """

    kind: StepKind
    moments: Mapping[str, Bytes]
    relative_time: float
    backward_skipped: float

    @property
    def bytes(self) -> Bytes:
        """Of each category the most of all moments."""
        return largest(self.moments.values())

    @property
    def peak_bytes(self) -> int:
        """The most that the device holds at one moment."""
        return max(moment.device for moment in self.moments.values())


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes of gradients in the course of a step.

    Args:
        before: of earlier forward passes of the step, where they add up.
        most: in the backward pass.
        after: at the update.
    """

    before: int
    most: int
    after: int


def moments(held: Bytes, kept: Kept, gradients: Gradients, *, workspace: int) -> dict[str, Bytes]:
    """The four moments of a step.

    Args:
        held: weights, masters and state, which stay.
        kept: what the forward pass leaves.
        gradients: of the weights.
        workspace: of the update.
    """
    layer = kept.recomputed + kept.in_flight
    return {
        "loss": held + Bytes(activations=kept.activations, logits=kept.logits, gradients=gradients.before),
        "layers": held + Bytes(activations=kept.activations, workspace=layer, gradients=gradients.before),
        "backward": held + Bytes(workspace=layer, gradients=gradients.most),
        "update": held + Bytes(gradients=gradients.after, workspace=workspace),
    }
