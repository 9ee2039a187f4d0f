"""BlockOptimizer: the main path of block-wise selective fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from gradselect.core import (
    SELECTION,
    AbstractResidency,
    AbstractRule,
    Block,
    Drop,
    SelectiveOptimizer,
    StepRecord,
    UpdateSettings,
    check_shards,
    in_phase,
)
from gradselect.usage import UsageError

from . import checkpoint
from .borders import BorderRules, Borders
from .partitioning import check_partition, resolve_names, whole_layers
from .pass_hooks import PassHooks
from .policy import AbstractPolicy
from .selection import StepSelection
from .set_up import bind_policy, check_borders, check_model, check_window, warn_of_dropped_masters


class BlockOptimizer(SelectiveOptimizer[StepRecord]):
    r"""Trains, at each step, only the blocks that a policy selects.

    With selection S_t of step t, block b and rule R (AdamW by default):

        (w_b, s_b) <- R(w_b, g_b, s_b)   for b in S_t
        (w_b, s_b) unchanged             otherwise: bit-identical, no decay, no momentum drift

    The one exception is asked for: `Borders(coasting=...)` lets blocks that have just left move on by their momentum.

    Unselected blocks have `requires_grad=False` during forward and backward: no weight gradient is computed for them,
    and the backward pass stops below the lowest selected block. When the policy asks for gradient norms (an *explore*
    step), every block takes part and the selection is made from the norms. docs/training-loops.md says how it behaves
    with schedulers, gradient accumulation, clipping, checkpointing, scalers and several processes.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, policy=gs.Cyclic(every=1, order="ascending"), lr=1e-2)
        >>> for _ in range(2):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.last_record.selected
        ('layer.1',)

    Reference:
        Kumar, Gupta, Chawla: AdaGradSelect, arXiv 2512.15764, for the idea.
    """

    _checkpoint = checkpoint

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the selected blocks once, then select those of the next step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            UsageError: a newer optimizer owns the model; a gradient is sparse; a block of a compiled model never gets
                one; the state of the selection exceeds `max_device_bytes`.
        """
        loss = self._evaluate(closure)
        self._watch.check()
        if not self._pass_hooks.saw_gradients():
            if self._pass_hooks.learns_reach(self.trainable):
                self._select_anew()
            return loss
        if self._is_skipped():
            return loss
        norms = self._pass_hooks.observer.norms()
        selected = self._decide(norms)  # 1
        if selected is None:
            return loss
        self._pass_hooks.check_compiled(selected, norms)
        coasting = self._borders.coasting(selected)
        self._states.admit((*selected, *coasting))  # 2
        self._updates.follow_weights((*selected, *coasting))
        self._update(selected, coasting)  # 3
        self._release(selected)  # 4
        record = self._commit(selected, coasting, norms)
        self._propose()  # 5
        self._report(record)  # 6
        return loss

    @in_phase(SELECTION)
    def _decide(self, norms: Mapping[str, float]) -> tuple[str, ...] | None:
        """Return the selection of this step: as proposed, or from the norms; `always` blocks included.

        Blocks that turn out to be unreached are left out; None if no other was selected.
        """
        selected = self._selection.decide(self._step, norms)
        self._check_ranks(lambda: self._parameters_by_block(selected), lambda: {"selection": selected, **self._facts()})
        if not self._pass_hooks.learns_reach(selected):
            return selected
        reached = self._selection.with_always(selected)
        if selected and not reached:
            self._select_anew()
            return None
        return reached

    def _select_anew(self) -> None:
        """Count the step as lost, and ask for another selection."""
        self._pass_hooks.reach.lose(self._step)
        self.zero_grad()
        self._propose()

    def _update(self, selected: Sequence[str], coasting: Sequence[str]) -> None:
        """Apply the rule, block by block."""
        for name in selected:
            for group, parameters in self._table.by_group(name):
                self._updates.update(parameters, self._borders.group_of(name, group))
        for name in coasting:
            for group, parameters in self._table.by_group(name):
                exits = self._borders.settings.exit_step
                self._updates.coast(parameters, self._borders.coasting_group_of(name, group), is_all=exits)

    @in_phase(SELECTION)
    def _commit(self, selected: tuple[str, ...], coasted: tuple[str, ...], norms: Mapping[str, float]) -> StepRecord:
        """Count the step: in the policy, in the update counts and as a record."""
        self._selection.commit(self._step, selected, norms)
        record = StepRecord(
            step=self._step,
            selected=selected,
            explored=self._selection.proposal is None,
            state_bytes=sum(map(self._states.num_bytes, self._states.resident)),
            moved_bytes=self._states.moved_bytes,
            selection_entropy=self._selection.entropy,
            norms=norms,
            measure=self.policy.measured(),
            refreshed=self._updates.take_refreshed(),
            coasted=coasted,
            rates=self._borders.commit(selected),
        )
        self._step += 1
        self._states.moved_bytes = 0
        return record

    @in_phase(SELECTION)
    def _propose(self) -> None:
        """Ask for the next selection; freeze, thaw and observe accordingly; state begins to move."""
        self._selection.propose(self._step)
        hooks, proposal, proposed = self._pass_hooks, self._selection.proposal, self._selection.proposed
        self._borders.expect(self._step, self._selection.candidate_counts)
        self._set_trainable({*self.trainable, *hooks.reach.watched})
        hooks.reach.expect(self.trainable)
        hooks.observer.prepare(self.policy, self._step, proposal)
        if proposal is not None:
            self._states.prefetch((*proposed, *self._borders.coasting(proposed)))
        hooks.updates.expect(proposed)

    def __init__(
        self,
        model: nn.Module,
        policy: AbstractPolicy,
        *,
        always: str | Sequence[str] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        no_decay: str | Sequence[str] | None = None,
        rule: AbstractRule | None = None,
        residency: AbstractResidency | None = None,
        master_dtype: torch.dtype | None = torch.float32,
        blocks: Sequence[Block] | None = None,
        borders: Borders | None = None,
        accumulation_steps: int = 1,
        grad_scaler: GradScaler | None = None,
        update_in_backward: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        """Freeze what the policy does not select at the first step.

        Args:
            model: its trainable parameters are partitioned into blocks; those that are frozen already stay frozen.
            policy: selects blocks, e.g. `AdaGradSelect(fraction=0.2, explore_steps=len(loader) // 4)`. It is copied.
            always: names or globs of blocks that train at every step too, e.g. `("embedding",)`.
            lr: learning rate, >= 0. Default 1e-3, as torch's AdamW.
            betas: decay rates of the moments, each in [0, 1).
            eps: added to the root of the second moment, >= 0.
            weight_decay: decay of the decay group, >= 0. Default 0.01.
            no_decay: globs of parameters that are not decayed. None: biases and norms (fewer than two dimensions).
            rule: update formula: `AdamWRule()` (bitwise `torch.optim.AdamW(foreach=False)`), `AdamWRule(fused=True)`,
                `AdamW8bitRule()`, `SGDRule()`. None: AdamW, fused for weights on an accelerator, the loop on a CPU.
            residency: where the state of unselected blocks lives: `Keep()`, `Offload()` or `Drop()`. None: `Offload()`
                for weights on an accelerator, `Keep()` on a CPU.
            master_dtype: of masters and moments of a bf16 or fp16 model. None: no masters, as `torch.optim.AdamW`.
            blocks: the partition, e.g. `partition(model, by="matrix")`. Default `partition(model)`.
            borders: rules for blocks that leave the selection or return, e.g. `Borders(coasting=5)`. None: no rules.
            accumulation_steps: backward passes per step, >= 1.
            grad_scaler: the `torch.amp.GradScaler` of the loop, if there is one; it needs fp32 weights under autocast.
            update_in_backward: in steps that do not look at all gradients, update within the backward pass.
            skip_nonfinite: skip steps whose gradients hold NaN or infinity. It reads every gradient once more.

        Raises:
            UsageError: a value outside its range, a pattern that matches nothing, a policy that does not fit.
        """
        update = UpdateSettings.of(locals())
        check_window(accumulation_steps, grad_scaler, in_backward=update_in_backward, skips=skip_nonfinite)
        borders = check_borders(borders, update.rule)
        model = check_model(model, update.rule)
        blocks = whole_layers(model) if blocks is None else check_partition(model, blocks)
        warn_of_dropped_masters(blocks, update)
        self._always = resolve_names(blocks, always)
        self.policy = bind_policy(policy, model, blocks, always=self._always)
        super().__init__(model, blocks, update)
        self._borders = BorderRules(borders, self.blocks, drops=isinstance(residency, Drop))
        self._set_trainable(self.blocks)  # hooks are registered while everything is
        self._pass_hooks = PassHooks(self, accumulation_steps, grad_scaler, update_in_backward=update_in_backward)
        self._hooks = self._pass_hooks.observer
        self._selection = StepSelection(self.policy, self.blocks, self._always, self._pass_hooks.reach)
        self._propose()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks in model order."""
        return self._table.blocks

    @property
    def always_trained(self) -> tuple[str, ...]:
        """Names of the parameters that train at every step, whatever the policy selects."""
        return tuple(name for block in self._always for name in self._table.members[block])

    @property
    def never_trained(self) -> dict[str, int]:
        """Number of weights of each block that is neither a candidate of the policy nor trained at every step."""
        left_out = [name for name in self.blocks if name not in {*self.policy.names, *self._always}]
        return {name: sum(weight.numel() for weight in self._table.of(name)) for name in left_out}

    @property
    def update_counts(self) -> dict[str, int]:
        """Number of updates of each block."""
        return dict(self._selection.update_counts)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Blocks that take part in the coming backward pass.

        The selection and what the policy observes beside it, or every candidate in an explore step.
        """
        return self._selection.trainable

    @property
    def unreached(self) -> tuple[str, ...]:
        """Blocks of which the loss was found to reach no weight, in model order: they are no candidates.

        A vision tower on batches of text, an unused pooler, experts that get no tokens. The first step finds them, and
        a warning names them. A block that a later backward pass reaches is a candidate again from the next step on.
        """
        return tuple(name for name in self.blocks if name in self._pass_hooks.reach.unreached)

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The gradient scaler of the loop; may be set between steps."""
        return self._pass_hooks.observer.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, value: GradScaler | None) -> None:
        check_window(self.accumulation_steps, value, in_backward=self.update_in_backward, skips=self.skip_nonfinite)
        self._pass_hooks.observer.grad_scaler = value

    @property
    def borders(self) -> dict[str, Any]:
        """Settings of the border rules; empty if none is on."""
        return self._borders.identity()

    @property
    def update_in_backward(self) -> bool:
        """True if weights move within the backward pass in steps whose selection is known beforehand."""
        return self._pass_hooks.updates.is_active

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients and begin a new accumulation window.

        Args:
            set_to_none: False fills the gradients of blocks that train at the next step with zeros instead.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._release(self.trainable)
        self._pass_hooks.restart()

    def close(self) -> None:
        self._pass_hooks.close()
        super().close()

    def _continue(self) -> None:
        try:
            self._pass_hooks.reach.look_for_frozen()
        except UsageError:
            self.close()
            raise
        self._borders.frozen = self._pass_hooks.reach.frozen
        self._pass_hooks.open()
        self._propose()

    def _is_idle(self) -> bool:
        return super()._is_idle() and not self._pass_hooks.has_worked

    def _facts(self) -> dict[str, Any]:
        states = {"policy_state": self.policy.state(), "border_state": self._borders.state()}
        return {
            **super()._facts(),
            **states,
            "unreached": self.unreached,
            "frozen": sorted(self._pass_hooks.reach.frozen),
        }

    @torch.no_grad()
    def _begin_training(self) -> None:
        assert self._agreement is not None
        check_shards(self._table.all(), self.rule)  # Accelerate shards later, and puts others into the groups
        self._ownership.take(self._table.all())
        parameters = self._parameters_by_block()
        self._pass_hooks.follow(parameters)
        is_full = self._selection.proposal is not None and self._selection.proposed == self.blocks
        self._agreement.check_start(parameters, self._facts(), trains_everything=is_full)
        self._set_trainable({*self.trainable, *self._pass_hooks.reach.watched})
        self._agreement.carry_over(self._table.named())

    def _check_window(self, accumulation_steps: int, *, skips: bool) -> None:
        check_window(accumulation_steps, self.grad_scaler, in_backward=self.update_in_backward, skips=skips)
