"""The base of both optimizers: a torch optimizer whose parameters are fixed for life and whose selection changes."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from gradselect.usage import UsageError, check_whole

from .block import Block, num_bytes
from .changes import make_patch
from .checkpoint_identity import SELECTION_KEY, CheckpointFormat, loading, selection_of
from .gradients import total_norm
from .holding import AbstractHoldingOptimizer
from .parameter_groups import ParameterTable, decay_groups
from .patch import Patch
from .phases import SELECTION, Phases, Span, in_phase
from .records import MemoryBytes
from .residency import AbstractResidency
from .rules import AbstractRule, State
from .saved_names import places_of
from .settings import UpdateSettings
from .state import BlockStates
from .state_store import StateStore
from .weight_updates import WeightUpdates

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


class SelectiveOptimizer(AbstractHoldingOptimizer, Generic[Record]):
    """A torch optimizer with fixed groups that trains a selection and reports each step as a record.

    Attributes:
        master_dtype: of masters and moments of bf16 and fp16 weights; None: there are none.
        num_skipped: number of steps skipped so far.
        num_skipped_in_a_row: number of steps skipped since the last one that was taken.
        last_record: what the last step did; None before the first.

    Args:
        model: unwrapped; what it holds beside `blocks` is counted only.
        blocks: parameters that the optimizer may move.
        update: how they move.
        owned: all parameters that the optimizer freezes and thaws; by default those of `blocks`.
    """

    _checkpoint: ClassVar[CheckpointFormat]
    """Module that writes and reads the state_dict."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        update: UpdateSettings,
        *,
        owned: Sequence[Parameter] | None = None,
    ) -> None:
        self._is_built = False
        for block in blocks:
            for name, parameter in zip(block.parameter_names, block.parameters, strict=True):
                update.rule.check_weight(name, parameter)
        groups = decay_groups(blocks, no_decay=update.no_decay, weight_decay=update.weight_decay)
        super().__init__(groups, update.group_options())
        self._is_built = True
        # Helpers that take a state_dict apart keep the keys of the groups that they find in a new optimizer.
        self.param_groups[0][SELECTION_KEY] = ""
        self.state = self._store = StateStore(dict)
        self._rule, self.master_dtype = update.rule, update.master_dtype
        self._skip_nonfinite = update.skip_nonfinite
        self.num_skipped = self.num_skipped_in_a_row = 0
        self.last_record: Record | None = None
        self._step = self._patched_step = 0
        self._phases = Phases()
        self._record_hooks: OrderedDict[int, Callable[[Record], None]] = OrderedDict()
        self._table = ParameterTable(self.param_groups, {block.name: block.parameter_names for block in blocks})
        self._states = BlockStates(self.state, self._table, update, phases=self._phases)
        self._updates = WeightUpdates(self._states, self._table, update.rule)
        self._hold(model, owned)

    # For users -----------------------------------------------------------------------------------------------------

    @property
    def rule(self) -> AbstractRule:
        """The update formula, as it works on the device of the weights."""
        return self._rule.on(self._table.all()[0].device)

    @property
    def residency(self) -> AbstractResidency:
        """Place of the state of unselected blocks; without one given, the device decides until the first update."""
        return self._states.residency

    @property
    def num_steps(self) -> int:
        """Number of steps taken so far, which is the number of the coming one."""
        return self._step

    @property
    def accumulation_steps(self) -> int:
        """Number of backward passes per step; may be set between steps."""
        return self._hooks.accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        check_whole("accumulation_steps", value)
        self._check_window(value, skips=self.skip_nonfinite)
        self._hooks.accumulation_steps = value

    def count_passes_if(self, predicate: Callable[[], bool] | None) -> None:
        """Count only backward passes for which `predicate()` is True toward `accumulation_steps`; None: all of them.

        For a loop that knows in each pass whether a step follows, as Accelerate's `sync_gradients` does.
        """
        self._hooks.is_counted = predicate

    @torch.no_grad()
    def finish_window(self) -> None:
        """Take the backward passes so far as all of the step, and free the gradients that it will not apply.

        For a loop that clips and whose number of passes varies: a step with fewer passes than one before is otherwise
        decided in `step()`, after clipping has seen the gradients of all blocks. On several ranks it stays so.
        """
        self._hooks.finish_window()

    @property
    def skip_nonfinite(self) -> bool:
        """True: a step whose gradients hold NaN or infinity changes nothing; may be set between steps."""
        return self._skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._check_window(self.accumulation_steps, skips=value)
        self._skip_nonfinite = value

    @property
    @torch.no_grad()
    def grad_norm(self) -> float:
        """L2 norm of the gradients that exist now and that `step` would apply, over all ranks; 0.0 without any."""
        return total_norm(self._table.all())

    def memory(self) -> MemoryBytes:
        """Bytes held now, exactly, by category; each rank counts its local parts.

        Returns:
            `weights`: all of the model's parameters; `gradients`: those that exist; `masters` and `state_on_device`
            (moments, indices of entries) on the model's device; `state_on_host`: offloaded moments and masters.
        """
        masters, on_device, on_host = self._states.memory()
        parameters = list(self._model.parameters())
        return MemoryBytes(
            weights=sum(map(num_bytes, parameters)),
            gradients=sum(num_bytes(parameter.grad) for parameter in parameters if parameter.grad is not None),
            masters=masters,
            state_on_device=on_device,
            state_on_host=on_host,
        )

    @torch.no_grad()
    def changed_entries(self) -> Patch:
        """Return the weights that steps have moved since the last call, as they are now, for a copy of the model.

        `gs.delta.apply_patch(copy, patch)` makes the copy bitwise equal. The first call covers all steps since the
        optimizer was built or has loaded a state_dict. Names are those of a saved checkpoint, not those of wrappers.
        With shards every rank calls it and gets the whole patch. docs/delta.md says what a patch holds for each method.

        Returns:
            By tensor, `(flat indices, values)`, or the tensor whole; empty if no step was taken. Only what the
            optimizer moved: neither weights that something else wrote, nor buffers.

        Raises:
            UsageError: two parameters would have one name in a checkpoint.
        """
        places = places_of(self._model)
        patch = make_patch(places, self._take_moved(), from_step=self._patched_step, to_step=self._step)
        self._patched_step = self._step
        return patch

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Go on from the model's weights as they are, and set master weights to them.

        A step finds by itself that something else has changed weights. This call is for a run that continues from a
        state_dict with other weights than those it was saved with, which is refused otherwise.
        """
        self._watch.expect(None)
        self._updates.refresh_masters()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the next step, as tensors and plain values.

        `torch.load(weights_only=True)` reads it. Beside torch's `state` and `param_groups` it holds `selection`. With
        shards every rank calls it.

        Raises:
            UsageError: within a step, where `update_in_backward` has moved weights already.
        """
        return self._checkpoint.write_state_dict(self, super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Continue where the optimizer that wrote `state_dict` stood. Tensors are copied and keep their dtype.

        Raises:
            UsageError: written by another optimizer, or for another model, policy or mask; says what differs.
        """
        with loading(self, state_dict) as given:
            self._checkpoint.read_state_dict(self, given)
            self._patched_step = self._step
            self._store.has_begun = self._step > 0
            self._watch.expect(selection_of(given).get("weights"))
            if self._agreement is not None:
                self._agreement.check_soon()

    def add_record_hook(self, hook: Callable[[Record], None]) -> RemovableHandle:
        """Call `hook(record)` with the record of each step, until the handle that is returned is removed."""
        handle = RemovableHandle(self._record_hooks)
        self._record_hooks[handle.id] = hook
        return handle

    def phases(self, span: Span) -> RemovableHandle:
        """Enter `span(name)` around each phase of a step, until the handle that is returned is removed.

        Phases are "selection" (decisions, gradient norms, freezing, records) and "state" (moves of state between device
        and host), which may begin within a selection. Some of them run during the backward pass. What is in no phase is
        the update itself.

        Args:
            span: returns a context manager, for example one that reads a clock.

        Raises:
            UsageError: somebody listens already.
        """
        return self._phases.listen(span)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse new groups: parameters and groups are fixed for life.

        Raises:
            UsageError: always, once the optimizer is built.
        """
        if self._is_built:
            name = type(self).__name__
            raise UsageError(f"param_groups of {name} are fixed; build a new {name} on the whole model")
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\nrule: {self.rule!r}\nresidency: {self.residency!r}\n)"

    def __getstate__(self) -> NoReturn:
        raise UsageError(f"{type(self).__name__} cannot be copied or pickled whole; save optimizer.state_dict()")

    # For the two optimizers ----------------------------------------------------------------------------------------

    def _check_window(self, accumulation_steps: int, *, skips: bool) -> None:
        """Refuse an accumulation window, or skipping of steps, that does not fit the other settings."""

    def _facts(self) -> dict[str, Any]:
        """Return plain values that must be the same on all ranks."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {
            **self._checkpoint.identity_of(self),
            "param_groups": settings,
            "accumulation_steps": self.accumulation_steps,
            "skip_nonfinite": self.skip_nonfinite,
        }

    def _check_ranks(
        self, parameters: Callable[[], Mapping[str, Sequence[Parameter]]], facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Refuse a step in which ranks would differ; see `RankAgreement`."""
        if self._agreement is None:
            return
        if not self._agreement.has_begun:
            self._begin_training()  # a loop that never calls the model as a whole
        self._agreement.check_step(self._step, parameters(), facts)

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _is_skipped(self) -> bool:
        """Return True if this step must change nothing; its gradients are then gone.

        Raises:
            UsageError: a newer optimizer owns the model.
        """
        if self._is_idle():  # Accelerate asks before the first pass, with shards that are not taken yet
            self._states.show(self._shown_states(), is_to_load=self._step == 0 or not self._may_freeze())
            self.zero_grad()
            return True
        self._ownership.check(self._table.all())
        self._states.hide()
        if not self.skip_nonfinite or math.isfinite(norm := self.grad_norm):
            self.num_skipped_in_a_row = 0
            return False
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        self.zero_grad()
        logger.warning(
            "the gradient norm of step %d is %s: the step is skipped and has changed nothing (%d skipped so far)",
            *(self._step, norm, self.num_skipped),
        )
        return True

    def _is_idle(self) -> bool:
        """True if the step is none: learning rate and gradients are zero, as where state is made before it is loaded.

        `torch.distributed.checkpoint.state_dict` and torchtitan step an optimizer so.
        """
        return not self._has_rate() and self.grad_norm == 0.0

    def _shown_states(self) -> dict[Parameter, State]:
        """Return what else an idle step shows in place of zeros to a loader that learns from it which keys to load."""
        return {}

    def _take_moved(self) -> dict[Tensor, Tensor | None]:
        """Return what moved since the last call, as `make_patch` takes it."""
        moved = dict.fromkeys(self._updates.moved)
        self._updates.moved.clear()
        return moved

    def _has_rate(self) -> bool:
        return any(float(group["lr"]) for group in self.param_groups)

    @in_phase(SELECTION)
    def _release(self, selected: Collection[str]) -> None:
        """Free the gradients of all other blocks."""
        for name in self._table.blocks:
            if name not in selected:
                for parameter in self._table.of(name):
                    parameter.grad = None

    def _parameters_by_block(self, names: Collection[str] | None = None) -> dict[str, list[Parameter]]:
        return {name: self._table.of(name) for name in self._table.blocks if names is None or name in names}

    def _report(self, record: Record) -> None:
        self._store.has_begun = True
        self.last_record = record
        for hook in self._record_hooks.values():
            hook(record)
