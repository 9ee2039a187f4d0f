"""SparseOptimizer: the main path of entry-wise selective fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.core import (
    HALF,
    SELECTION,
    AbstractRule,
    Keep,
    MaskRecord,
    MemoryBytes,
    SelectiveOptimizer,
    State,
    UpdateSettings,
    freeze,
    in_phase,
)
from gradselect.parallel import check_alike, collective_device, total
from gradselect.usage import UsageError, matching

from . import checkpoint
from .dense_tensors import DenseTensors
from .entry_states import EntryStates
from .gradient_reader import GradientReader
from .mask import AbstractDenseMask, AbstractMask, MaskTensor
from .reach import EntryReach
from .selector import EntrySelector
from .set_up import (
    bind_mask,
    blocks_of,
    check_arguments,
    check_lean,
    check_model,
    check_not_replaced,
    marks_of_replicas,
    trainable_tensors,
)
from .shards import Shards


class SparseOptimizer(SelectiveOptimizer[MaskRecord]):
    r"""Trains only the entries of weights that a mask selects.

    With the set S_t of step t and rule R (AdamW by default), t_i counting the updates of entry i:

        (w_i, s_i) <- R(w_i, g_i, s_i, t_i)   for i in S_t
        w_i unchanged                         otherwise: bit-identical, no decay, no momentum

    State exists for the entries of S_t only: with AdamW 12 bytes an entry (int32 index, two fp32 moments), 16 with the
    fp32 master of a half-precision model. Each gradient is reduced to what the mask needs in its backward hook and
    freed. A **dense** mask (`GMT`) has state for every weight instead. docs/training-loops.md says how it behaves with
    clipping, gradient accumulation, schedulers and several processes.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = gs.SparseOptimizer(model, mask=gs.ID3(budget=6, steps=3), lr=1e-2)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sum(len(indices) for indices in optimizer.entries.values())
        6

    Reference:
        Agarwal et al., arXiv 2408.14470, for the idea.
    """

    _checkpoint = checkpoint

    # Tells torch's GradScaler to leave gradients to `step`, which then can say what to do instead.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the entries of the set once, those that join at this step among them.

        Returns the loss of `closure`, which evaluates the model again, or None without one.

        Raises:
            UsageError: a newer optimizer owns the model, a gradient is sparse, or a GradScaler is used.
        """
        loss = self._evaluate(closure)
        self._check_use()
        self._reader.read_rest()
        self._reach.look(self.mask, self._selector.planned(), {*self._reader.taken, *self._dense.with_gradients})
        if not (self._entries.has_gradients or self._dense.has_gradients) or self._is_skipped():
            return loss
        self._entries.follow_model()
        reader = self._reader
        change = self._selector.select_by_gradient(is_whole=reader.saw_all, is_in_parts=reader.is_in_parts)
        self._change = change or self._change  # 1
        masks = self._dense.select()
        grad_norm = self._clip()  # 2
        self._updates.follow_weights(self._dense.names)
        self._entries.update()  # 3
        masks = self._dense.update(masks)
        record = self._describe(grad_norm, masks)
        self._step += 1
        self._propose()  # 4
        self._report(record)  # 5
        return loss

    def _read(self, name: str, gradient: Tensor, decisive: bool) -> None:
        """In the backward pass: take from a whole gradient, which is freed after this, what the mask needs of it."""
        if not self._has_rate():
            self._saw_nonzero = self._saw_nonzero or bool(gradient.any())
        # An entry without a gradient does not join, so one that has joined does not join again.
        self._entries.read(name, gradient, clear=decisive and self._selector.only_adds)
        if decisive:
            if self._selector.can_select(name):
                self._entries.inspect(name, gradient)
            self._selector.see(name, gradient)

    def _clip(self) -> float:
        """Scale all gradients down to `max_grad_norm`, as `clip_grad_norm_`; return their norm before that."""
        norm = total(self._squared_norms()).sqrt()
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            self._entries.scale_gradients(factor)
            self._dense.scale_gradients(factor)
        return float(norm)

    @in_phase(SELECTION)
    def _propose(self) -> None:
        """Ask the mask what the coming step selects; freeze what cannot train in it."""
        self._selector.ask(self._step)
        self._change = self._selector.select_by_weights(self._step, self._model)
        self._prepare()

    def __init__(
        self,
        model: nn.Module,
        mask: AbstractMask,
        *,
        always: str | Sequence[str] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        no_decay: str | Sequence[str] | None = None,
        rule: AbstractRule | None = None,
        max_grad_norm: float | None = None,
        master_dtype: torch.dtype | None = torch.float32,
        accumulation_steps: int = 1,
        lean_accumulation: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        """Select the entries of the first step, and freeze tensors in which none can be.

        Args:
            model: with its weights loaded: masks that look at weights look now. Frozen parameters stay frozen.
            mask: selects entries, e.g. `ID3(budget=320_000, steps=1000)`. It is copied.
            always: names or globs of parameters that train whole at every step too, with dense state, e.g.
                `("classifier.*",)`.
            lr: learning rate, >= 0. Default 1e-3, as torch's AdamW.
            betas: decay rates of the moments, each in [0, 1).
            eps: added to the root of the second moment, >= 0.
            weight_decay: decay of the decay group, >= 0; it touches entries of the set only. Default 0.01.
            no_decay: globs of parameters that are not decayed. None: biases and norms (fewer than two dimensions).
            rule: update formula: `AdamWRule(fused=None)` (default) or `SGDRule()`.
            max_grad_norm: the gradients that are applied are scaled down to this L2 norm of all together. None: never.
            master_dtype: of master values of bf16 and fp16 weights; None: none, weights are rounded at every step.
            accumulation_steps: backward passes per step, >= 1.
            lean_accumulation: reduce the gradient of each pass at once: less memory; a selection by gradient is made
                from the first pass alone, and entries that join in this window move by its gradient only.
            skip_nonfinite: skip steps whose gradients hold NaN or infinity.

        Raises:
            UsageError: a value outside its range, a pattern that matches nothing, a mask that does not fit the model.
        """
        update = UpdateSettings.of({**locals(), "residency": Keep()})
        check_arguments(mask, update.rule, max_grad_norm=max_grad_norm, accumulation_steps=accumulation_steps)
        model = check_model(model, update.rule)
        tensors = trainable_tensors(model)
        self._always = matching([t.name for t in tensors], always, kind="parameter that trains", key="always")
        self.mask = bind_mask(mask, tensors, model, always=self._always)
        blocks = blocks_of(tensors, {*self._always, *self.mask.names})
        super().__init__(model, blocks, update, owned=[tensor.parameter for tensor in tensors])
        self.max_grad_norm = max_grad_norm
        self._start(tensors, update, accumulation_steps, lean=lean_accumulation)

    def _start(
        self, tensors: Sequence[MaskTensor], update: UpdateSettings, accumulation_steps: int, *, lean: bool
    ) -> None:
        """Make the state, register hooks while everything is trainable, then select and freeze."""
        self._saw_nonzero = False
        is_dense = isinstance(self.mask, AbstractDenseMask)
        dense = [name for name in self._table.blocks if is_dense or name in self._always]
        compact = [name for name in self._table.blocks if name not in dense]
        phases, masked = self._phases, {tensor.name: tensor.parameter for tensor in self.mask.tensors}
        self._dense = DenseTensors(dense, self._table, self._states, self._updates, mask=self.mask, phases=phases)
        self._entries = EntryStates(self.param_groups, compact, rule=update.rule, master_dtype=update.master_dtype)
        self._shards = Shards(masked)
        self._selector = EntrySelector(self.mask, self._entries, masked, self._shards, phases=phases)
        self._states.admit(dense)
        parameters = {tensor.name: tensor.parameter for tensor in tensors}
        for parameter in parameters.values():
            freeze(parameter, False)
        self._hooks = self._reader = GradientReader(
            parameters,
            self._read,
            self._ownership,
            accumulation_steps=accumulation_steps,
            lean=lean,
            passes=self._passes,
        )
        first, ownership = self._table.all()[0], self._ownership
        if self._agreement is not None:
            check_lean(lean, self._reader.late)
            check_alike(self._facts(), moment="when the optimizer is built", device=collective_device(first))
        self._reach = EntryReach(self._model, lambda: ownership.covers(first))
        self._propose()

    @property
    def entries(self) -> dict[str, Tensor]:
        """Flat indices of the selected entries, ascending, int64, by tensor name; tensors without any are left out.

        Indices are those in the whole tensor; of one that is sharded, entries of this rank's local part.
        """
        found = {name: self._entries.indices(name) for name, count in self._entries.num_entries().items() if count}
        return {
            name: self._shards.to_whole(name, found[name]).sort().values for name in self.mask.names if name in found
        }

    @property
    def always_trained(self) -> tuple[str, ...]:
        """Names of the parameters that train whole at every step."""
        return tuple(self._always)

    @property
    @torch.no_grad()
    def grad_norm(self) -> float:
        unread = self._entries.squared_norms_of(self._reader.unread, decides=self._selector.can_select)
        return float(total([*unread, *self._squared_norms()]).sqrt())

    def fill_steps(self, num_steps: int) -> None:
        """Tell the mask the optimizer steps of the whole training, if its settings left them open.

        They are part of the state: after a resume, those of the first session hold.
        """
        before = self.mask.filled_steps
        self.mask.fill_steps(num_steps)
        if self.mask.filled_steps != before:
            self._continue()

    @torch.no_grad()
    def refresh_masters(self) -> None:
        self._entries.refresh_masters()
        super().refresh_masters()

    def memory(self) -> MemoryBytes:
        held, (masters, others) = super().memory(), self._entries.num_bytes()
        held["gradients"] += self._reader.waiting_bytes + self._entries.gradient_bytes
        held["masters"] += masters
        held["state_on_device"] += others
        return held

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those that were read too, and begin a new accumulation window."""
        super().zero_grad(set_to_none=set_to_none)
        self._saw_nonzero = False
        self._selector.restart()
        self._reader.drop_window()
        self._entries.restart()

    @property
    def _is_half(self) -> bool:
        """True if weights are in half precision, as they are now."""
        return any(parameter.dtype in HALF for parameter in self._table.all())

    def _squared_norms(self) -> list[tuple[Tensor, Tensor]]:
        """Sums of squares of the gradients that are applied, each with a tensor that is sharded as they are."""
        return [*self._entries.squared_norms(), *self._dense.squared_norms()]

    def _take_moved(self) -> dict[Tensor, Tensor | None]:
        return {**self._dense.take_moved(), **self._entries.take_moved()}

    def _is_idle(self) -> bool:
        # Before a selection nothing is applied, and the norm of what is applied is 0.0.
        return super()._is_idle() and not self._saw_nonzero

    def _shown_states(self) -> dict[Parameter, State]:
        named = self._table.named()
        return {parameter: self._entries.state(name) for name, parameter in named if name in self._entries.names}

    def close(self) -> None:
        self._reach.end()
        super().close()

    def _continue(self) -> None:
        # The entries already hold what the mask selected by weights for the coming step.
        self._selector.ask(self._step)
        self._prepare()

    def _prepare(self) -> None:
        """Freeze what cannot train in the coming step, and watch the rest."""
        names = self._entries.names
        watched = {name for name in names if self._selector.sizes[name] or self._selector.can_select(name)}
        for name, parameter in self._reader.parameters.items() if self._ownership.is_held else ():
            freeze(parameter, self._may_freeze() and name not in watched and name not in self._dense.names)
        self._saw_nonzero = False
        self._reader.watch(frozenset(watched))
        self._reader.restart()
        self._entries.restart()

    @in_phase(SELECTION)
    def _describe(self, grad_norm: float, masks: Mapping[str, Tensor]) -> MaskRecord:
        kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        sizes = self._selector.sizes | (self._shards.total(kept) if kept else {})
        change = self._change
        return MaskRecord(
            step=self._step,
            num_entries={name: sizes[name] for name in self.mask.names if sizes.get(name)},
            num_new=change.num_new,
            overlap=change.num_kept / change.num_previous if change.num_previous else 1.0,
            grad_norm=grad_norm,
            state_bytes=sum(self._entries.num_bytes()) + self._dense.num_bytes(),
            refreshed=(*self._entries.refreshed, *self._updates.take_refreshed()),
        )

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "num_entries": self._selector.sizes, "max_grad_norm": self.max_grad_norm}

    def _all_facts(self) -> dict[str, Any]:
        """The facts, and marks of the entries of tensors that every rank holds whole."""
        return {**self._facts(), "entries": marks_of_replicas(self.entries, self._reader.parameters)}

    @torch.no_grad()
    def _begin_training(self) -> None:
        assert self._agreement is not None
        check_not_replaced(self._table.named(), self._reader.parameters)
        parameters = {name: [parameter] for name, parameter in self._reader.parameters.items()}
        trains_everything = len(self._dense.names) == len(parameters)
        self._agreement.check_start(parameters, self._all_facts(), trains_everything=trains_everything)
        self._prepare()
        self._agreement.carry_over(self._reader.parameters.items())

    def _check_use(self) -> None:
        self.mask.check_ready()
        # A scaler leaves this here during its step, also after `unscale_`, which found no gradients.
        if vars(self).pop("found_inf", None) is not None:
            delattr(self, "grad_scale")
            raise UsageError(
                "SparseOptimizer works without a GradScaler; train in bfloat16: torch.autocast or the model"
            )
        self._watch.check()
        self._ownership.check(self._table.all())
        self._check_ranks(lambda: {name: [p] for name, p in self._table.named() if p.requires_grad}, self._all_facts)
