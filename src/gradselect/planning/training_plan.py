"""`gradselect.plan`: bytes and time of a training run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradselect.blocks import AbstractPolicy, Borders
from gradselect.core import AbstractResidency, AbstractRule, Block, default_residency, device_of_run
from gradselect.entries import AbstractMask
from gradselect.usage import UsageError, check_whole

from .activations import ActivationCounter
from .blocks_plan import block_steps
from .bytes import Bytes, largest
from .entries_plan import adamw_step, looks, mask_step
from .forward_pass import ForwardPass
from .meta_forward import Rows, meta_copy
from .steps import Step
from .training import Training


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and time of the steps of a training run.

    Args:
        steps: one for each kind of step, "explore" before "exploit".
        notes: assumptions, as sentences.
    """

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> Bytes:
        """Maximum of each category over all steps; its sum can exceed every single moment."""
        return largest(step.bytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the device holds at one moment."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def relative_time(self) -> float:
        """Time of the last kind of step, which a long run takes nearly always, with its share of the refreshes.

        Full fine-tuning is 1.
        """
        return self.steps[-1].relative_time + sum(step.relative_time / step.every for step in self.steps if step.every)

    @property
    def backward_skipped(self) -> float:
        """Share of a full backward pass that the same step does not compute."""
        return self.steps[-1].backward_skipped

    def step(self, kind: str) -> Step:
        """Return the step of this kind.

        Raises:
            UsageError: the run has no such step.
        """
        for step in self.steps:
            if step.kind == kind:
                return step
        raise UsageError(f"this plan has no step {kind!r}; it has {', '.join(step.kind for step in self.steps)}")


def plan(
    model: nn.Module,
    choice: AbstractPolicy | AbstractMask | None = None,
    *,
    batch_size: int,
    sequence_length: int,
    always: str | Sequence[str] = (),
    residency: AbstractResidency | None = None,
    master_dtype: torch.dtype | None = torch.float32,
    blocks: Sequence[Block] | None = None,
    accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    rule: AbstractRule | None = None,
    update_in_backward: bool = False,
    borders: Borders | None = None,
) -> Plan:
    r"""Return the bytes that a training run will hold, and the time of its steps, without computing a number.

    Weights, gradients, masters and optimizer state are exact, for the largest selection that the policy or mask can
    make. Activations are counted: the model runs on the meta device. Time is in floating-point operations, relative to
    full fine-tuning:

        2 N in the forward pass, 2 for each entry of matrices above the lowest selected one, 2 for each selected entry;
        6 N in full fine-tuning. N: entries in matrices that are multiplied, so not those of a lookup.

    A selection changes from step to step, so the time is a mean: over all sets of as many blocks, or, for a policy that
    prefers some, over steps that it draws with equal gradients.

    Args:
        model: a model of transformers, or any module that takes tokens and returns logits; it is not changed. It may be
            on the meta device, without weights:
            `with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)`.
        choice: a policy, a mask, or None: `torch.optim.AdamW(fused=True)` on all that requires a gradient.
        batch_size: rows of a forward pass.
        sequence_length: tokens of a row.
        always: what trains at every step, as for the optimizer.
        residency: as for `BlockOptimizer`. None: its default on the model's device; for a model on the meta device,
            on the accelerator of this machine, or else on its CPU.
        master_dtype: as for the optimizers.
        blocks: as for `BlockOptimizer`, of this model.
        accumulation_steps: micro-batches of a step.
        gradient_checkpointing: layers keep only their inputs and are computed again.
        rule: as for `BlockOptimizer`.
        update_in_backward: as for `BlockOptimizer`.
        borders: as for `BlockOptimizer`. Every selection of which blocks coast counts as a different one.

    Returns:
        A `Plan`: `.peak_bytes`, `.bytes`, `.relative_time`, `.backward_skipped`, `.steps`, `.notes`.

    Raises:
        UsageError: the policy or mask does not fit the model, a size is not a whole number, or the model does not run
            on the meta device.

    Example:
        >>> import torch, gradselect as gs
        >>> layers = (torch.nn.Linear(8, 8) for _ in range(4))
        >>> model = torch.nn.Sequential(torch.nn.Embedding(16, 8), *layers)
        >>> found = gs.plan(model, gs.Cyclic(every=1), batch_size=2, sequence_length=4)
        >>> found.bytes.weights, found.bytes.state_on_device
        (1664, 3328)
    """
    check_whole("batch_size", batch_size)
    check_whole("sequence_length", sequence_length)
    check_whole("accumulation_steps", accumulation_steps)
    device = device_of_run(next((each.device for each in model.parameters()), torch.device("cpu")))
    meta = meta_copy(model, checkpointing=gradient_checkpointing)
    rows = Rows(batch=batch_size, length=sequence_length)
    forward = ForwardPass(ActivationCounter(meta), rows, loss="whole", checkpointing=gradient_checkpointing)
    training = Training(
        model=meta,
        always=(always,) if isinstance(always, str) else tuple(always),
        residency=default_residency(device) if residency is None else residency,
        master_dtype=master_dtype,
        blocks=blocks,
        accumulation_steps=accumulation_steps,
        rule=rule,
        update_in_backward=update_in_backward,
        borders=Borders() if borders is None else borders,
    )
    return Plan(steps=plan_steps(training, choice, forward))


def plan_steps(
    training: Training, choice: AbstractPolicy | AbstractMask | None, forward: ForwardPass
) -> tuple[Step, ...]:
    """Return the kinds of steps of a policy, a mask, or torch's AdamW.

    Raises:
        UsageError: the policy or mask does not fit the model.
    """
    match choice:
        case AbstractPolicy():
            return block_steps(training, choice, forward)
        case AbstractMask():
            step = mask_step(training, choice, forward)
            return (*looks(training, choice, forward, step=step), step)
        case None:
            return (adamw_step(training, forward),)
        case _:
            raise UsageError(f"choice={choice!r} is neither a policy nor a mask; write gs.AdaGradSelect(fraction=0.2)")
