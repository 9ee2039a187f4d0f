"""Moments of a step, their bytes, and the step's time relative to full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gradselect.blocks import StepCost

from .bytes import Bytes, largest
from .forward_pass import Kept

StepKind = Literal["look", "refresh", "step", "explore", "exploit"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of a step.

    Args:
        cost: of the model's steps.
        backward: operations of the backward pass; a mean over selections.
        recomputed: operations of layers that gradient checkpointing computes again.
    """

    cost: StepCost
    backward: float
    recomputed: float = 0.0

    @property
    def relative_time(self) -> float:
        """Operations divided by those of full fine-tuning."""
        return self.cost.relative(self.backward + self.recomputed)

    @property
    def backward_skipped(self) -> float:
        """Share of a full backward pass that is not computed."""
        full = self.cost.full * 2 / 3  # gradients of inputs and of weights; the forward pass is the other third
        return 1 - self.backward / full if full else 0.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step, at its most expensive.

    Args:
        kind: "explore" computes all gradients; "exploit" trains blocks that were selected before; "step": this method
            makes no such difference; "look": batches that the method looks at before the first step; "refresh": that
            look again, during the training.
        moments: bytes held at the loss ("loss"), when the backward pass reaches the layers ("layers"), at its end
            ("backward"), and in the update ("update").
        relative_time: mean time in operations; full fine-tuning without gradient checkpointing is 1.
        backward_skipped: mean share of a full backward pass that is not computed.
        every: for a refresh, the number of steps between two.
    """

    kind: StepKind
    moments: Mapping[str, Bytes]
    relative_time: float
    backward_skipped: float
    every: int | None = None

    @property
    def bytes(self) -> Bytes:
        """Maximum of each category over all moments."""
        return largest(self.moments.values())

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the device holds at one moment."""
        return max(moment.device for moment in self.moments.values())


def make_step(kind: StepKind, work: Work, kept: Kept, *, held: Bytes, gradients: Gradients, workspace: int = 0) -> Step:
    """Build a step from its four moments.

    Args:
        kind: of step.
        work: operations.
        kept: what the forward pass leaves.
        held: weights, masters and state, which stay through the step.
        gradients: of the weights.
        workspace: temporaries of the update.
    """
    layer = kept.recomputed + kept.in_flight
    return Step(
        kind=kind,
        moments={
            "loss": held + Bytes(activations=kept.activations, logits=kept.logits, gradients=gradients.before),
            "layers": held + Bytes(activations=kept.activations, workspace=layer, gradients=gradients.before),
            "backward": held + Bytes(workspace=layer, gradients=gradients.most),
            "update": held + Bytes(gradients=gradients.after, workspace=workspace),
        },
        relative_time=work.relative_time,
        backward_skipped=work.backward_skipped,
    )


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes of gradients during a step.

    Args:
        before: of earlier micro-batches of the step.
        most: in the backward pass.
        after: at the update.
    """

    before: int
    most: int
    after: int
