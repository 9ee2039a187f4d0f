"""BlockOptimizer: the main path of block-wise selective fine-tuning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter

from gradselect.core import (
    AbstractResidency,
    AbstractRule,
    AdamWRule,
    Block,
    BlockStates,
    Keep,
    MemoryBytes,
    ParameterTable,
    SelectiveOptimizer,
    StateStore,
    StepRecord,
    as_text,
    check_same,
    decay_groups,
    freeze,
    give_back,
    num_bytes,
    selection_entropy,
    selection_of,
    states_by_name,
)
from gradselect.parallel import RankAgreement, check_placement, is_dtensor, is_running, unwrapped
from gradselect.usage import UsageError, check_hyper_parameters, check_is

from .backward_updates import BackwardUpdates, check_update_in_backward
from .compile_check import UnreachedBlocks, has_compiled, warn_of_whole
from .observer import GradientObserver
from .partitioning import check_partition, partition, resolve_names
from .policy import AbstractPolicy


class BlockOptimizer(SelectiveOptimizer[StepRecord]):
    r"""AdamW that trains, at each step, only the blocks that a policy selects.

    With selection S_t of step t, block b and rule R (AdamW):

        (w_b, s_b) <- R(w_b, g_b, s_b)   for b in S_t
        (w_b, s_b) unchanged             otherwise: bit-identical, no decay, no momentum drift

    Unselected blocks have `requires_grad=False` during forward and backward: no weight gradient is computed for them,
    and nothing below the lowest selected block is visited. When the policy asks for gradient norms (an *explore* step),
    every block takes part in the backward pass and the selection is made from its norms.

    How it behaves in a training loop:

    * **Closure.** `step(closure)` evaluates it with gradients enabled, then steps.
    * **Schedulers** see two fixed `param_groups` (decay, no decay) and set their `lr` as usual.
    * **Gradient accumulation.** The selection holds for the whole window. Give `accumulation_steps`, the number of
      backward passes per step: in an explore step the gradients of all blocks add up until the last of them, which then
      releases the losers. Without accumulation losers are released during the backward pass (*streaming top-k*), so at
      most k + 1 blocks' gradients exist beside those of `always`. A second backward pass that was not announced raises;
      a window with fewer passes than announced is decided in `step()`, from the gradients as they are then.
    * **`clip_grad_norm_`** between `backward()` and `step()` sees the gradients of the selected blocks, in explore
      steps too. The policy's norms are taken before clipping.
    * **GradScaler.** Pass it as `grad_scaler`, so that norms of different steps are on one scale. A step that it
      skips counts for nothing; call `optimizer.zero_grad()` after it, as every loop does.
    * **Gradient checkpointing** works, non-reentrant. `model.enable_input_require_grads()`, which transformers calls
      with it, makes the backward pass visit every layer again; the Trainer integration undoes that.
    * **Update in the backward pass.** With `update_in_backward` a step whose selection is known beforehand moves each
      weight as soon as its gradient is whole and frees the gradient: one exists at a time. `step()` then counts,
      records and selects. The numbers are the same. What needs all gradients at once is impossible: accumulation and a
      `grad_scaler` are refused, `clip_grad_norm_` finds nothing to clip, and a step whose gradients are NaN cannot be
      skipped any more; nor can `zero_grad()` before `step()` undo it. See docs/memory.md.
    * **No gradients.** `step()` without any gradient changes nothing and counts for nothing, as in torch. A block that
      the loss never reaches (an unused pooler) is no candidate: keep it out with the policy's `among`, or torch
      says "element 0 of tensors does not require grad" when such a block alone is selected.
    * **Several processes.** Under `fully_shard`, `replicate` and `DistributedDataParallel(find_unused_parameters=True)`
      every process selects alike, from the norms of the whole gradients; each holds the state of its shards, and
      `memory()` and the records count its own bytes. The first selection freezes within the first forward pass that
      trains, when the model is as wrapped as it will be. Wrong set-ups raise: see docs/distributed.md.
    * **The model in between.** Frozen blocks have `requires_grad=False`; what you freeze or thaw yourself during
      training is set back at the next step. Copy the model (`copy.deepcopy`) before, or after `close()`, which makes
      every block trainable again, as dropping the last reference to the optimizer does. After
      `model.load_state_dict(...)` in half precision call `refresh_masters()`.

    Args:
        model: its trainable parameters are partitioned into blocks; parameters that are frozen already stay frozen.
        policy: which blocks train, e.g. `AdaGradSelect(fraction=0.2, explore_steps=len(loader))`. It is copied.
        always: names or globs of blocks that train at every step beside the policy's choice, e.g. `("embedding",)`.
        lr: learning rate, >= 0. Default 1e-3, as torch's AdamW.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay of the decay group, >= 0. Default 0.01.
        no_decay: globs of parameter names that are not decayed. Default None: tensors of fewer than two dimensions
            (biases, norms). `()` decays everything.
        rule: the update formula. Default `AdamWRule()`, bitwise `torch.optim.AdamW(foreach=False)`; on a GPU
            `AdamWRule(fused=True)` is faster and equal to rounding; `AdamW8bitRule()` keeps moments in 8 bits.
        residency: where the state of unselected blocks lives: `Keep()` (default), `Offload()` or `Drop()`.
        master_dtype: dtype of master weights and moments of a bf16 or fp16 model, held for blocks that hold state.
            None: moments in the model's precision and no masters, as `torch.optim.AdamW`.
        blocks: another partition of all that trains, e.g. `partition(model, by="matrix")`. Default `partition(model)`.
        accumulation_steps: backward passes per step, >= 1.
        grad_scaler: the `torch.amp.GradScaler` of the loop, if there is one; it needs fp32 weights under autocast.
        update_in_backward: in steps that do not look at all gradients, update within the backward pass.

    Raises:
        UsageError: a value out of its range, a pattern that matches nothing, a policy that does not fit the blocks.

    Example:
        >>> import torch, gradselect as gs
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = gs.BlockOptimizer(model, policy=gs.Cyclic(every=1, order="ascending"), lr=1e-2)
        >>> for _ in range(2):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.last_record.selected
        ('layer.1',)

    Reference:
        Kumar, Gupta, Chawla: AdaGradSelect, arXiv 2512.15764, for the idea; the update is Loshchilov, Hutter,
        arXiv 1711.05101, algorithm 2.
    """

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
        accumulation_steps: int = 1,
        grad_scaler: GradScaler | None = None,
        update_in_backward: bool = False,
    ) -> None:
        rule = AdamWRule() if rule is None else rule
        residency = Keep() if residency is None else residency
        check_is(policy, AbstractPolicy, name="policy", example="policy=gs.AdaGradSelect(fraction=0.2)")
        check_is(residency, AbstractResidency, name="residency", example="residency=gs.Offload()")
        check_is(rule, AbstractRule, name="rule", example="rule=gs.AdamWRule()")
        check_hyper_parameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        _check_window(accumulation_steps, grad_scaler, update_in_backward=update_in_backward)
        check_placement(model)
        warn_of_whole(model)
        model = unwrapped(model)
        _check_shards(model.parameters(), rule)
        blocks = partition(model) if blocks is None else check_partition(model, blocks)
        self._always = resolve_names(blocks, always)
        self.policy = _bind(policy, blocks, always=self._always)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(decay_groups(blocks, no_decay=no_decay, weight_decay=weight_decay), defaults)

        self.state = StateStore(dict)
        self.rule = rule
        self._table = ParameterTable(self.param_groups, {block.name: block.parameter_names for block in blocks})
        self._states = BlockStates(self.state, self._table, rule=rule, residency=residency, master_dtype=master_dtype)
        self._other_weight_bytes = sum(map(num_bytes, model.parameters())) - sum(map(num_bytes, self._table.all()))
        self._update_counts = dict.fromkeys(self.blocks, 0)

        self._together = RankAgreement(model, self, BlockOptimizer._begin_together) if is_running() else None
        self._set_trainable(self.blocks)
        self._observer = GradientObserver(
            self._parameters_by_block(),
            accumulation_steps=accumulation_steps,
            grad_scaler=grad_scaler,
            is_one_of_many=self._together is not None,
        )
        self._in_backward = BackwardUpdates(self._states, self._table, self._observer) if update_in_backward else None
        self._reach = UnreachedBlocks()
        self._give_back = self._give_back_at_end()
        self._propose()

    # The main path -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the selected blocks once, then select those of the next step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            UsageError: a newer optimizer has taken the model over; a gradient is sparse; a block of a compiled model
                never gets one; the state of the selection exceeds the residency's `max_device_bytes`.
        """
        loss = self._evaluate(closure)
        if not self._saw_gradients():
            return loss
        norms = self._observer.norms()
        selected = self._decide(norms)  # 1
        self._check_reached(selected, norms)
        self._states.admit(selected)  # 2
        self._update(selected)  # 3
        self._release(selected)  # 4
        record = self._commit(selected, norms)
        self._propose()  # 5
        self._report(record)  # 6
        return loss

    def _decide(self, norms: Mapping[str, float]) -> tuple[str, ...]:
        """The selection of this step: what was proposed, or what the norms say; `always` blocks included."""
        self._check_ownership()
        decided = self.policy.decide(self._step, norms) if self._proposal is None else self._proposal
        selected = self._with_always(decided)
        if self._together is not None:
            self._check_together(self._together, selected)
        return selected

    def _update(self, selected: Sequence[str]) -> None:
        """Apply the rule, block by block."""
        for name in selected:
            for group, parameters in self._table.by_group(name):
                self._states.update(parameters, group)

    def _release(self, selected: Collection[str]) -> None:
        """Gradients of all other blocks are gone."""
        for name in self.blocks:
            if name not in selected:
                for parameter in self._table.of(name):
                    parameter.grad = None

    def _commit(self, selected: tuple[str, ...], norms: Mapping[str, float]) -> StepRecord:
        """Count the step: in the policy, in the update counts and as a record."""
        self.policy.commit(self._step, [name for name in selected if name not in self._always], norms)
        for name in selected:
            self._update_counts[name] += 1
        record = StepRecord(
            step=self._step,
            selected=selected,
            explored=self._proposal is None,
            state_bytes=sum(self._states.num_bytes(name) for name in self._states.resident),
            moved_bytes=self._states.moved_bytes,
            selection_entropy=selection_entropy({name: self._update_counts[name] for name in self.policy.names}),
            norms=norms,
        )
        self._step += 1
        self._states.moved_bytes = 0
        return record

    def _propose(self) -> None:
        """Ask for the next selection; freeze, thaw and observe accordingly; state begins to move."""
        self._proposal = self.policy.propose(self._step)
        self._set_trainable(self.trainable)
        if self._proposal is None:
            self._observer.watch(self.policy.names)
            score = partial(self.policy.score, self._step)
            self._observer.stream(keep=self.policy.keep_at(self._step), score=score)
        else:
            self._observer.watch(self._proposal if self.policy.observes_selected(self._step) else ())
            self._states.prefetch(self.trainable)
        if self._in_backward is not None:
            self._in_backward.expect(() if self._proposal is None else self.trainable)

    # What users ask ----------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks in model order."""
        return self._table.blocks

    @property
    def update_counts(self) -> dict[str, int]:
        """How often each block has been updated."""
        return dict(self._update_counts)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Blocks that take part in the coming backward pass: the selection, or every candidate in an explore step."""
        return self._with_always(self.policy.names if self._proposal is None else self._proposal)

    @property
    def accumulation_steps(self) -> int:
        """Backward passes per step; may be set between steps."""
        return self._observer.accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        _check_window(value, self.grad_scaler, update_in_backward=self.update_in_backward)
        self._observer.accumulation_steps = value

    @property
    def grad_scaler(self) -> GradScaler | None:
        """What multiplies the loss; may be set between steps."""
        return self._observer.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, value: GradScaler | None) -> None:
        _check_window(self.accumulation_steps, value, update_in_backward=self.update_in_backward)
        self._observer.grad_scaler = value

    @property
    def update_in_backward(self) -> bool:
        """Whether weights move within the backward pass in steps whose selection is known beforehand."""
        return self._in_backward is not None

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the model's weights as they are now for master weights: after something else than `step` set them."""
        self._states.refresh_masters()

    def memory(self) -> MemoryBytes:
        """Bytes held now, exactly, by category.

        Returns:
            `weights`: all of the model's parameters; `gradients`: those that exist; `masters` and `state_on_device`
            (moments) on the model's device; `state_on_host`: moments and masters of blocks that are offloaded.
        """
        masters, on_device, on_host = self._states.memory()
        return MemoryBytes(
            weights=self._other_weight_bytes + sum(map(num_bytes, self._table.all())),
            gradients=sum(num_bytes(p.grad) for p in self._table.all() if p.grad is not None),
            masters=masters,
            state_on_device=on_device,
            state_on_host=on_host,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients and begin a new accumulation window.

        Args:
            set_to_none: False fills the gradients of blocks that train at the next step with zeros instead.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._release(self.trainable)
        self._observer.restart()
        if self._in_backward is not None:
            self._in_backward.restart()

    def close(self) -> None:
        """Give the model back: hooks removed, what is frozen for the moment trainable again, weights untouched."""
        self._observer.close()
        if self._in_backward is not None:
            self._in_backward.close()
        self._give_back()

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, as tensors and plain values: `torch.load(weights_only=True)` reads it.

        Beside torch's `state` and `param_groups` it holds `selection`: the step, the policy's kind, settings and state,
        the blocks and how often each was updated.

        Of a sharded model every parameter has a state here, zeros where there is none (`selection` lists those that
        have one), and the first group holds `selection` as a text: `torch.distributed.checkpoint.state_dict` passes
        on `state` and `param_groups` alone, and loads what it finds in both the checkpoint and the new optimizer.

        Raises:
            UsageError: within a step, where `update_in_backward` has moved weights already.
        """
        if self._has_moved_in_backward():
            raise UsageError(
                "state_dict() between backward() and step(), where update_in_backward=True has moved the weights and "
                "the step is not counted yet; save after optimizer.step()"
            )
        self._states.wait()
        state_dict = super().state_dict()
        state_dict["state"] = self._states.as_dtensors(state_dict["state"])
        state_dict["selection"] = selection = {
            **self._identity(),
            "step": self._step,
            "policy_state": self.policy.state(),
            "update_counts": dict(self._update_counts),
            "resident": [name for name in self.blocks if name in self._states.resident],
            "moved_bytes": self._states.moved_bytes,
        }
        if any(map(is_dtensor, self._table.all())):
            selection["with_state"] = [
                self._table.names[number] for number, state in state_dict["state"].items() if state
            ]
            is_to_load = self._together is not None and not self._together.has_begun
            state_dict["state"] = self._states.filled(state_dict["state"], is_to_load=is_to_load)
            state_dict["param_groups"][0]["selection"] = as_text(selection)
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Continue where the optimizer that wrote `state_dict` stood. Tensors are copied and keep their dtype.

        Raises:
            UsageError: written by another optimizer, or for another model, partition or policy; says what differs.
        """
        saved_groups = state_dict["param_groups"]
        selection = selection_of(state_dict)
        if "selection" not in state_dict and self._together is not None and self._together.has_begun:
            raise UsageError(
                "torch.distributed.checkpoint passes on the state of what is trainable at the moment only; load "
                "before the first forward pass, as a Trainer does that resumes"
            )
        check_same(selection, self._identity())
        self._states.load(states_by_name(state_dict, selection, self._table.names), resident=selection["resident"])
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            not_ours = ("params", "param_names", "selection")
            group.update({key: value for key, value in saved.items() if key not in not_ours})
        self._step = selection["step"]
        self._update_counts = dict(selection["update_counts"])
        self.policy.load_state(selection["policy_state"])
        self._propose()
        self._states.moved_bytes += selection["moved_bytes"]
        if self._together is not None:
            self._together.check_soon()

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that loads it must agree on."""
        return {
            "policy": type(self.policy).__name__,
            "policy_settings": self.policy.settings(),
            "rule": type(self.rule).__name__,
            "blocks": {name: list(members) for name, members in self._table.members.items()},
            "always": list(self._always),
            "groups": [list(group["param_names"]) for group in self.param_groups],
        }

    # Parts -------------------------------------------------------------------------------------------------------

    def _saw_gradients(self) -> bool:
        # A decision that keeps no block has released all gradients: what the observer saw is what is left of them.
        return (
            self._observer.saw_gradients
            or self._has_moved_in_backward()
            or any(parameter.grad is not None for parameter in self._table.all())
        )

    def _has_moved_in_backward(self) -> bool:
        return self._in_backward is not None and self._in_backward.has_moved

    def _check_reached(self, selected: Sequence[str], norms: Mapping[str, float]) -> None:
        """Where anything was compiled: what took part got a gradient; see `UnreachedBlocks`."""
        if has_compiled():
            reached = {name for name, norm in norms.items() if norm != 0.0}
            reached.update(name for name in selected if any(map(self._has_gradient, self._table.of(name))))
            self._reach.check(reached=reached, missed={*selected, *norms} - reached)

    def _has_gradient(self, parameter: Parameter) -> bool:
        used_up = self._in_backward is not None and self._in_backward.moved(parameter)
        return used_up or parameter.grad is not None

    def _set_trainable(self, names: Collection[str]) -> None:
        if self._together is not None and not self._together.has_begun:
            names = self.blocks  # the model may still be wrapped
        for name in self.blocks:
            for parameter in self._table.of(name):
                freeze(parameter, name not in names)

    def _with_always(self, chosen: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.blocks if name in chosen or name in self._always)

    @torch.no_grad()
    def _begin_together(self) -> None:
        """Several processes, the first forward pass: the model is as it will be trained; now freeze."""
        assert self._together is not None
        # Accelerate shards after it was built.
        _check_shards(self._table.all(), self.rule)
        self._give_back.detach()
        self._observer.follow(self._parameters_by_block())  # a wrapper may have put others in their places
        self._give_back = self._give_back_at_end()
        trains_everything = self._proposal is not None and self.trainable == self.blocks
        self._together.check_start(self._parameters_by_block(), self._decisive(), trains_everything=trains_everything)
        self._set_trainable(self.trainable)
        self._together.carry_over(self._table.named())

    def _check_together(self, together: RankAgreement, selected: Sequence[str]) -> None:
        """Every process is about to do the same; see `RankAgreement`."""
        if not together.has_begun:
            self._begin_together()  # a loop that never calls the model as a whole
        parameters = {name: self._table.of(name) for name in selected}
        together.check_step(self._step, parameters, lambda: {"selection": selected, **self._decisive()})

    def _decisive(self) -> dict[str, Any]:
        """Plain values that must be alike on all processes."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {
            **self._identity(),
            "policy_state": self.policy.state(),
            "param_groups": settings,
            "accumulation_steps": self.accumulation_steps,
        }

    def _parameters_by_block(self) -> dict[str, list[Parameter]]:
        return {name: self._table.of(name) for name in self.blocks}

    def _give_back_at_end(self) -> weakref.finalize[..., Any]:
        """When the last reference to the optimizer goes, the parameters as they are now are given back."""
        finalizer = weakref.finalize(self, give_back, self._table.all(), owner=id(self._observer))
        finalizer.atexit = False
        return finalizer

    def _check_ownership(self) -> None:
        if not all(self._observer.owns(parameter) for parameter in self._table.all()):
            raise UsageError("a newer optimizer was built on this model, or this one was closed; step that one")


def _check_window(accumulation_steps: int, grad_scaler: GradScaler | None, *, update_in_backward: bool) -> None:
    if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise UsageError(f"accumulation_steps={accumulation_steps} must be 1 or more: backward passes per step")
    if update_in_backward:
        check_update_in_backward(accumulation_steps=accumulation_steps, grad_scaler=grad_scaler)


def _check_shards(parameters: Iterable[Parameter], rule: AbstractRule) -> None:
    if not rule.works_on_shards and any(map(is_dtensor, parameters)):
        raise UsageError(
            f"{type(rule).__name__} keeps what belongs to several weights, which shards would cut apart; write "
            "rule=gs.AdamWRule(), or train replicas with DistributedDataParallel"
        )


def _bind(policy: AbstractPolicy, blocks: Sequence[Block], *, always: Sequence[str]) -> AbstractPolicy:
    try:
        return policy.bind([block for block in blocks if block.name not in always])
    except UsageError as error:
        if not always:
            raise
        raise UsageError(f"{error} (blocks in `always` are not the policy's to choose: {', '.join(always)})") from None
