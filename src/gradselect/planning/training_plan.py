"""`gradselect.plan`: bytes and time of a training run, before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradselect.blocks import AbstractPolicy, partition
from gradselect.core import AbstractResidency, AbstractRule, Block, Keep
from gradselect.entries import AbstractMask
from gradselect.usage import UsageError, check_whole

from .blocks_plan import BlockTraining, block_steps
from .bytes import Bytes, largest
from .entries_plan import MaskTraining, mask_step, whole_step
from .forward_pass import ForwardPass
from .meta_forward import on_meta
from .policy_survey import Choices
from .steps import Step
from .tape import Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and time of the steps of a training run.

    Args:
        steps: one for each kind of step, "explore" and "exploit" apart.
        notes: what is an estimate here, in words.
    """

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> Bytes:
        """Of each category the most of all steps; more in sum than any moment holds."""
        return largest(step.bytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """The most that the device holds at one moment."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def relative_time(self) -> float:
        """Of the step that a long run takes nearly always (the last kind), full fine-tuning being 1."""
        return self.steps[-1].relative_time

    @property
    def backward_skipped(self) -> float:
        """Of the same step, the share of a full backward pass that is not computed."""
        return self.steps[-1].backward_skipped

    def step(self, kind: str) -> Step:
        """The kind of step of this name.

        Raises:
            UsageError: there is none in this run.
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
) -> Plan:
    r"""What a training run will hold and how long its steps take, without a single number being computed.

    Weights, gradients, masters and optimizer state are counted, to the byte, at the most that the choice can come to.
    Activations follow a model of the architecture, or are counted by a forward pass without data. Time is in
    floating-point operations against full fine-tuning:

        (2 + 2 d + 2 (1 - s)) / 6       d: share of the layers that the backward pass visits, s: share of weights frozen

    Args:
        model: a model of transformers or any that makes logits of tokens; it is not changed. On the meta device it has
            no weights: `with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)`.
        choice: a policy, a mask, or None: `torch.optim.AdamW(fused=True)` on all that requires a gradient.
        batch_size: rows of a forward pass.
        sequence_length: tokens of a row.
        always: what trains at every step, as for the optimizer.
        residency: as for `BlockOptimizer`. Default `Keep()`.
        master_dtype: as for the optimizers.
        blocks: as for `BlockOptimizer`, of this very model.
        accumulation_steps: backward passes of a step.
        gradient_checkpointing: layers keep their input alone and are computed again.
        rule: as for `BlockOptimizer`.
        update_in_backward: as for `BlockOptimizer`.

    Returns:
        A `Plan`: `.peak_bytes`, `.bytes`, `.relative_time`, `.backward_skipped`, `.steps`, `.notes`.

    Raises:
        UsageError: the policy or mask does not fit the model, or a size is not a whole number.

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
    config = getattr(model, "config", None)
    rows = Rows(batch=batch_size, length=sequence_length, itemsize=next(model.parameters()).element_size())
    meta = on_meta(model)
    forward = ForwardPass(
        meta,
        rows,
        loss="whole",
        checkpointing=gradient_checkpointing,
        # With checkpointing transformers makes no cache.
        keeps_cache=bool(getattr(config, "use_cache", False)) and not gradient_checkpointing,
    )
    steps = plan_steps(
        meta,
        choice,
        forward,
        always=always,
        residency=residency,
        master_dtype=master_dtype,
        blocks=blocks,
        accumulation_steps=accumulation_steps,
        rule=rule,
        update_in_backward=update_in_backward,
    )
    for note in forward.notes:
        logger.warning(note)
    return Plan(steps=steps, notes=forward.notes)


def plan_steps(
    model: nn.Module,
    choice: AbstractPolicy | AbstractMask | None,
    forward: ForwardPass,
    *,
    always: str | Sequence[str] = (),
    residency: AbstractResidency | None = None,
    master_dtype: torch.dtype | None = torch.float32,
    blocks: Sequence[Block] | None = None,
    accumulation_steps: int = 1,
    num_steps: int = 1000,
    rule: AbstractRule | None = None,
    update_in_backward: bool = False,
    choices: Choices | None = None,
) -> tuple[Step, ...]:
    """The kinds of steps of a choice on a model; arguments as for `plan`, and the policy's choices if they are known.

    Raises:
        UsageError: the choice does not fit the model.
    """
    always = (always,) if isinstance(always, str) else tuple(always)
    match choice:
        case AbstractPolicy():
            training = BlockTraining(
                model=model,
                blocks=partition(model) if blocks is None else blocks,
                policy=choice,
                always=always,
                residency=Keep() if residency is None else residency,
                master_dtype=master_dtype,
                accumulation_steps=accumulation_steps,
                rule=rule,
                update_in_backward=update_in_backward,
                choices=choices,
            )
            return tuple(block_steps(training, forward))
        case AbstractMask():
            masked = MaskTraining(
                model=model,
                mask=choice,
                always=always,
                master_dtype=master_dtype,
                accumulation_steps=accumulation_steps,
                num_steps=num_steps,
            )
            return (mask_step(masked, forward),)
        case None:
            return (whole_step(model, forward, accumulation_steps=accumulation_steps),)
        case _:
            raise UsageError(f"choice={choice!r} is neither a policy nor a mask; write gs.AdaGradSelect(fraction=0.2)")
