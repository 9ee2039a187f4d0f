"""SparseOptimizer: the main path of element-wise selective fine-tuning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.core import (
    HALF,
    AdamWRule,
    Block,
    BlockStates,
    Keep,
    MaskRecord,
    MemoryBytes,
    ParameterTable,
    SelectiveOptimizer,
    check_same,
    decay_groups,
    dense,
    freeze,
    give_back,
    is_frozen_for_now,
    num_bytes,
)
from gradselect.parallel import (
    RankAgreement,
    check_alike,
    check_placement,
    is_running,
    local_part,
    shard_groups,
    total,
    unwrapped,
)
from gradselect.usage import UsageError, check_hyper_parameters, check_is, check_whole, nearest

from .dense_update import masked_update
from .gradient_reader import GradientReader
from .mask import AbstractDenseMask, AbstractMask, MaskTensor
from .selector import Change, EntrySelector
from .shards import Shards
from .store import EntryStore


class SparseOptimizer(SelectiveOptimizer[MaskRecord]):
    r"""AdamW that trains only the single weights that a mask chooses.

    With the set S_t of step t and AdamW's rule R, t_i counting the updates of entry i:

        (w_i, m_i, v_i) <- R(w_i, g_i, m_i, v_i, t_i)   for i in S_t
        w_i unchanged                                   otherwise: bit-identical, no decay, no momentum

    Optimizer state exists for the entries of S_t only: 12 bytes an entry (int32 index, two fp32 moments), 16 with the
    fp32 master value of a half-precision model. Each gradient is reduced to what the mask needs in its backward hook
    and freed, so no more than one whole gradient is alive, beside small ones that are read together. A **dense** mask
    (`GMT`) has state for every weight instead.

    How it behaves in a training loop:

    * **Gradients** of masked tensors are gone after `backward()`: `parameter.grad` is None. So clip with
      `max_grad_norm`; `torch.nn.utils.clip_grad_norm_` cannot see what was freed.
    * **Gradient accumulation.** Give `accumulation_steps`. The gradients of a window add up densely and are reduced in
      its last pass: exact, with the memory of a whole gradient meanwhile. With `lean_accumulation` each pass is reduced
      at once: entries chosen before get exactly the same sum; a choice by gradient is made from the first pass alone,
      and entries that join in this window move by its gradient only.
    * **Schedulers** see two fixed `param_groups` (decay, no decay). Decay touches entries of the set only.
    * **Freezing.** Parameters that the mask does not use, and tensors in which no entry is chosen and none can be, do
      not require a gradient until `close()`, or until the last reference to the optimizer is dropped.
    * **GradScaler** is not supported: train in bfloat16.
    * A tensor that gets no gradient (an expert without tokens) is left alone: its entries neither move nor age.
      Where a set over all tensors is chosen anew by gradient at that very step, it has none to offer and loses them.
    * Build it after the model's weights are loaded: masks that look at weights look now.
    * **Several processes.** Under `fully_shard`, `replicate` and `DistributedDataParallel(find_unused_parameters=True)`
      the set is that of one process; each holds the entries of its shards. Build it on every process, on the sharded
      model. Nothing freezes before the first forward pass. Wrong set-ups raise: see docs/distributed.md.

    Args:
        model: its trainable parameters are what the mask may choose from; adapters of a PEFT model, for example.
        mask: which weights train, e.g. `ID3(budget=320_000, steps=1000)`. It is copied.
        always: names or globs of parameters that train whole at every step, with dense state, beside the mask: e.g.
            `("classifier.*",)`.
        lr: learning rate, >= 0. Default 1e-3, as torch's AdamW.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay of the decay group, >= 0. Default 0.01.
        no_decay: globs of parameter names that are not decayed. Default None: tensors of fewer than two dimensions.
        max_grad_norm: the gradients that are applied are scaled down to this L2 norm, taken over all of them together.
            Default None: never.
        master_dtype: of master values of bf16 and fp16 weights; None: none, the weights are rounded at every step.
        accumulation_steps: backward passes per step, >= 1.
        lean_accumulation: see above.

    Raises:
        UsageError: a value out of its range, a pattern that matches nothing, a mask that does not fit the model.

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
        Agarwal et al., arXiv 2408.14470, for the idea; the update is Loshchilov, Hutter, arXiv 1711.05101, algorithm 2.
    """

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
        max_grad_norm: float | None = None,
        master_dtype: torch.dtype | None = torch.float32,
        accumulation_steps: int = 1,
        lean_accumulation: bool = False,
    ) -> None:
        check_is(mask, AbstractMask, name="mask", example="mask=gs.ID3(density=0.01, steps=1000)")
        check_hyper_parameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        _check_norm(max_grad_norm)
        check_placement(model)
        model = unwrapped(model)
        tensors = _trainable(model)
        self._always = _matching([tensor.name for tensor in tensors], always)
        self.mask = mask.bind([tensor for tensor in tensors if tensor.name not in self._always])
        self._masked = self.mask.names
        blocks = [
            Block(name=tensor.name, parameters=(tensor.parameter,), parameter_names=(tensor.name,))
            for tensor in tensors
            if tensor.name in self._always or tensor.name in self._masked
        ]
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(decay_groups(blocks, no_decay=no_decay, weight_decay=weight_decay), defaults)

        self.max_grad_norm = max_grad_norm
        is_half = any(block.parameters[0].dtype in HALF for block in blocks)
        self._master_values = str(master_dtype) if is_half else "None"
        self._model = model
        self._table = ParameterTable(self.param_groups, {block.name: block.parameter_names for block in blocks})
        is_dense = isinstance(self.mask, AbstractDenseMask)
        self._dense = tuple(name for name in self._table.blocks if is_dense or name in self._always)
        rule = AdamWRule()
        self._states = BlockStates(self.state, self._table, rule=rule, residency=Keep(), master_dtype=master_dtype)
        self._stores = self._make_stores(master_dtype)
        self._store_of = {name: store for store, _ in self._stores for name in store.names}
        masked = {tensor.name: tensor.parameter for tensor in self.mask.tensors}
        self._shards = Shards(masked)
        self._chooser = EntrySelector(self.mask, [store for store, _ in self._stores], masked, self._shards)
        self._states.admit(self._dense)

        parameters = {tensor.name: tensor.parameter for tensor in tensors}
        for parameter in parameters.values():
            freeze(parameter, False)
        self._reader = GradientReader(parameters, self._read, lean=lean_accumulation)
        self.accumulation_steps = accumulation_steps
        self._give_back = weakref.finalize(self, give_back, list(parameters.values()), owner=id(self._reader))
        self._give_back.atexit = False
        self._together = self._meet(lean_accumulation) if is_running() else None
        self._propose()

    # The main path -----------------------------------------------------------------------------------------------

    # Tells torch's GradScaler to leave gradients to `step`, which then can say what to do instead.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the entries of the set once, those that join at this step among them.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            UsageError: a newer optimizer has taken the model over, a gradient is sparse, or a GradScaler is used.
        """
        loss = self._evaluate(closure)
        self._check_use()
        if self._together is not None:
            self._check_together(self._together)
        self._reader.read_rest()
        if not self._saw_gradients():
            return loss
        self._change = self._chooser.choose_by_gradient() or self._change  # 1
        grad_norm = self._mask_and_clip()  # 2
        self._update()  # 3
        record = self._describe(grad_norm)
        self._step += 1
        self._propose()  # 4
        self._report(record)  # 5
        return loss

    def _read(self, name: str, gradient: Tensor, decisive: bool) -> None:
        """In the backward pass: take from a whole gradient, which is freed after this, what the mask needs of it."""
        # An entry without a gradient does not join, so one that has joined does not join again.
        self._store_of[name].read(name, gradient, clear=decisive and self._chooser.only_adds)
        if decisive:
            self._chooser.offer(name, gradient)

    def _mask_and_clip(self) -> float:
        """Zero what a dense mask leaves out, scale all gradients down to `max_grad_norm`; their norm before that."""
        self._dense_masks = self._mask_dense()
        gradients = [local_part(grad) for name in self._dense if (grad := self._parameter(name).grad) is not None]
        norm = self._norm()
        if self.max_grad_norm is not None:
            # As torch's clip_grad_norm_ has it.
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for store, _ in self._stores:
                store.scale_gradients(factor)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient))
        return float(norm)

    def _norm(self) -> Tensor:
        """L2 norm of the gradients that are applied, of all processes. Shape ()."""
        squares = [(self._parameter(store.names[0]), store.squared_norm()) for store, _ in self._stores]
        for name in self._dense:
            parameter = self._parameter(name)
            if parameter.grad is not None:
                squares.append((parameter, _squared_norm(dense(local_part(parameter.grad)))))
        return total(squares).sqrt()

    def _update(self) -> None:
        """Apply AdamW: to the entries, and to tensors with state for every weight."""
        for store, index in self._stores:
            store.update(self.param_groups[index])
        for name in self._dense:
            for group, parameters in self._table.by_group(name):
                if name in self._dense_masks:
                    assert isinstance(self.mask, AbstractDenseMask)
                    masked_update(self._states, parameters[0], group, self._dense_masks[name], on=self.mask.mask)
                else:
                    self._states.update(parameters, group)
                parameters[0].grad = None

    def _propose(self) -> None:
        """Ask the mask what the coming step chooses; freeze what cannot train in it."""
        self._chooser.ask(self._step)
        self._change = self._chooser.choose_by_weights(self._step, self._model)
        self._prepare()

    # What users ask ----------------------------------------------------------------------------------------------

    @property
    def entries(self) -> dict[str, Tensor]:
        """Flat indices of the chosen entries, ascending, int64, by tensor name; tensors without any are left out.

        Indices are those in the whole tensor; of one that is sharded, entries of this process' part.
        """
        found = {name: store.indices(name) for name, store in self._store_of.items() if store.num_entries(name)}
        return {name: self._shards.in_whole(name, found[name]).sort().values for name in self._masked if name in found}

    @property
    def accumulation_steps(self) -> int:
        """Backward passes per step; may be set between steps."""
        return self._reader.accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        check_whole("accumulation_steps", value)
        self._reader.accumulation_steps = value

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the model's weights as they are now for master values: after something else than `step` set them."""
        for store, _ in self._stores:
            store.refresh_masters()
        self._states.refresh_masters()

    def memory(self) -> MemoryBytes:
        """Bytes held now, exactly, by category.

        Returns:
            `weights`: all of the model's parameters; `gradients`: whole ones, and those of entries until `step`;
            `masters`: master values; `state_on_device`: indices and moments; `state_on_host`: 0.
        """
        masters, on_device, on_host = self._states.memory()
        compact = [store.num_bytes() for store, _ in self._stores]
        parameters = list(self._model.parameters())
        gradients = sum(num_bytes(parameter.grad) for parameter in parameters if parameter.grad is not None)
        return MemoryBytes(
            weights=sum(map(num_bytes, parameters)),
            gradients=gradients + self._reader.waiting_bytes + sum(store.gradient_bytes for store, _ in self._stores),
            masters=masters + sum(of_masters for of_masters, _ in compact),
            state_on_device=on_device + sum(others for _, others in compact),
            state_on_host=on_host,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that were read too, and begin a new accumulation window."""
        super().zero_grad(set_to_none=set_to_none)
        self._chooser.restart()
        self._reader.restart()
        for store, _ in self._stores:
            store.restart()

    def close(self) -> None:
        """Give the model back: hooks removed, what is frozen for the moment trainable again, weights untouched."""
        self._reader.close()
        self._give_back()

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, as tensors and plain values: `torch.load(weights_only=True)` reads it.

        The `state` of a masked tensor holds `indices`, `joined_at`, `num_updates`, `exp_avg`, `exp_avg_sq` and, of a
        half-precision tensor, `master`, in the order in which entries joined. Beside torch's `state` and
        `param_groups` stands `selection`: the step, and the mask's kind and settings.

        With shards every process calls it. Entries of all processes are gathered on each, by their indices in the whole
        tensor; dense state holds DTensors where the weights are DTensors.
        """
        state_dict = super().state_dict()
        state_dict["state"] = self._states.as_dtensors(state_dict["state"])
        for index, name in enumerate(self._table.names):
            if name in self._store_of:
                state_dict["state"][index] = self._shards.gather(name, self._store_of[name].state(name))
        state_dict["selection"] = {**self._identity(), "step": self._step, "change": list(self._change)}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Continue where the optimizer that wrote `state_dict` stood. Tensors are copied and keep their dtype.

        Raises:
            UsageError: written by another optimizer, or for another model or mask; says what differs.
        """
        if "mask" not in state_dict.get("selection", {}):
            raise UsageError(
                "this state_dict was not written by SparseOptimizer: it has no entry 'selection' with a mask"
            )
        selection, saved_groups = state_dict["selection"], state_dict["param_groups"]
        check_same(selection, self._identity())
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        states = {name: state_dict["state"].get(index, {}) for index, name in enumerate(self._table.names)}
        self._states.load(
            {name: {} if name in self._store_of else state for name, state in states.items()}, resident=self._dense
        )
        for store, _ in self._stores:
            store.load({name: self._shards.own(name, states[name]) for name in store.names})
        self._chooser.count()
        self._step = selection["step"]
        self._change = Change(*selection["change"])
        # What the mask took from weights for the coming step stands among the entries already.
        self._chooser.ask(self._step)
        self._prepare()
        if self._together is not None:
            self._together.check_soon()

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that loads it must agree on."""
        return {
            "mask": type(self.mask).__name__,
            "mask_settings": self.mask.settings(),
            "tensors": {tensor.name: list(tensor.parameter.shape) for tensor in self.mask.tensors},
            "always": list(self._always),
            "groups": [list(group["param_names"]) for group in self.param_groups],
            "master_values": self._master_values,
        }

    # Parts -------------------------------------------------------------------------------------------------------

    def _make_stores(self, master_dtype: torch.dtype | None) -> list[tuple[EntryStore, int]]:
        """One store for all masked tensors of one group, device, dtype and kind of shards, and that group's index."""
        apart: dict[Any, dict[str, Parameter]] = {}
        for index, group in enumerate(self.param_groups):
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name not in self._dense:
                    key = (index, parameter.device, parameter.dtype, shard_groups(parameter))
                    apart.setdefault(key, {})[name] = parameter
        return [
            (EntryStore(parameters, master_dtype=master_dtype if dtype in HALF else None), index)
            for (index, _, dtype, _), parameters in apart.items()
        ]

    def _prepare(self) -> None:
        """Freeze what cannot train in the coming step, and watch the rest."""
        self._dense_masks: dict[str, Tensor] = {}
        can_choose = self._chooser.can_choose
        watched = {name for name in self._store_of if self._chooser.sizes[name] or can_choose(name)}
        may_freeze = self._together is None or self._together.has_begun  # before, the model may still be wrapped
        for name, parameter in self._reader.parameters.items():
            freeze(parameter, may_freeze and name not in watched and name not in self._dense)
        self._reader.watch(frozenset(watched))
        self._reader.restart()
        for store, _ in self._stores:
            store.restart()

    def _mask_dense(self) -> dict[str, Tensor]:
        """What a dense mask says of the gradients that are there."""
        if not isinstance(self.mask, AbstractDenseMask):
            return {}
        there = {name: grad for name in self._masked if (grad := self._parameter(name).grad) is not None}
        masks = self.mask.masks([dense(gradient) for gradient in there.values()])
        if self.mask.mask == "gradient":
            for gradient, mask in zip(map(local_part, there.values()), masks, strict=True):
                gradient.masked_fill_(~mask, 0.0)
        return dict(zip(there, masks, strict=True))

    def _describe(self, grad_norm: float) -> MaskRecord:
        kept = {name: int(mask.count_nonzero()) for name, mask in self._dense_masks.items()}
        sizes = self._chooser.sizes | (self._shards.total(kept) if kept else {})
        change = self._change
        return MaskRecord(
            step=self._step,
            num_entries={name: sizes[name] for name in self._masked if sizes.get(name)},
            num_new=change.num_new,
            overlap=change.num_kept / change.num_previous if change.num_previous else 1.0,
            grad_norm=grad_norm,
            state_bytes=self._state_bytes(),
        )

    def _state_bytes(self) -> int:
        return sum(sum(store.num_bytes()) for store, _ in self._stores) + sum(map(self._states.num_bytes, self._dense))

    def _saw_gradients(self) -> bool:
        return any(store.has_gradients for store, _ in self._stores) or any(
            self._parameter(name).grad is not None for name in self._dense
        )

    def _parameter(self, name: str) -> Parameter:
        (parameter,) = self._table.of(name)
        return parameter

    def _meet(self, lean_accumulation: bool) -> RankAgreement:
        """Several processes: what must be alike before they talk of entries."""
        if lean_accumulation and self._reader.late:
            raise UsageError(
                "lean_accumulation=True needs gradients that are averaged as they come, by fully_shard or replicate; "
                "leave it out: under DistributedDataParallel gradients stay until step()"
            )
        check_alike(self._decisive(), moment="when the optimizer is built")
        return RankAgreement(self._model, self, SparseOptimizer._begin_together)

    @torch.no_grad()
    def _begin_together(self) -> None:
        """The first forward pass: the model is as it will be trained; now freeze."""
        assert self._together is not None
        for name, parameter in self._table.named():
            if parameter is not self._reader.parameters[name]:
                raise UsageError(
                    f"another tensor was put into the optimizer's groups for {name!r}, as Accelerate does when it "
                    "shards; shard first, with fully_shard(model), then build SparseOptimizer(model, ...)"
                )
        parameters = {name: [parameter] for name, parameter in self._reader.parameters.items()}
        trains_everything = len(self._dense) == len(parameters)
        facts = {**self._decisive(), **self._replicated_entries()}
        self._together.check_start(parameters, facts, trains_everything=trains_everything)
        self._prepare()
        self._together.carry_over(self._reader.parameters.items())

    def _check_together(self, together: RankAgreement) -> None:
        """Every process is about to do the same; see `RankAgreement`."""
        if not together.has_begun:
            self._begin_together()  # a loop that never calls the model as a whole
        parameters = {name: [parameter] for name, parameter in self._table.named() if parameter.requires_grad}
        together.check_step(self._step, parameters, lambda: {**self._decisive(), **self._replicated_entries()})

    def _decisive(self) -> dict[str, Any]:
        """Plain values that must be alike on all processes."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {
            **self._identity(),
            "num_entries": self._chooser.sizes,
            "param_groups": settings,
            "accumulation_steps": self.accumulation_steps,
            "max_grad_norm": self.max_grad_norm,
        }

    def _replicated_entries(self) -> dict[str, Any]:
        """Marks of the entries of tensors that every process holds whole."""
        found = {name: indices for name, indices in self.entries.items() if not shard_groups(self._parameter(name))}
        return {"entries": {name: [int(i.sum()), int(i.square().sum())] for name, i in found.items()}}

    def _check_use(self) -> None:
        if getattr(self, "grad_scale", None) is not None:
            delattr(self, "grad_scale")  # the scaler leaves it here
            raise UsageError(
                "SparseOptimizer works without a GradScaler; train in bfloat16: torch.autocast or the model"
            )
        if not all(self._reader.owns(parameter) for parameter in self._table.all()):
            raise UsageError("a newer optimizer was built on this model, or this one was closed; step that one")


def _trainable(model: nn.Module) -> list[MaskTensor]:
    """Every tensor that trains, in model order, tied ones once.

    Raises:
        UsageError: there is none, or one does not lie in memory as a flat array.
    """
    tensors = [
        MaskTensor(name=name, parameter=parameter, module=model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_frozen_for_now(parameter)
    ]
    if not tensors:
        raise UsageError(f"no parameter of {type(model).__name__} requires a gradient; call model.requires_grad_(True)")
    for tensor in tensors:
        if not local_part(tensor.parameter).is_contiguous():
            raise UsageError(
                f"{tensor.name} is not contiguous in memory; write parameter.data = parameter.contiguous()"
            )
    return tensors


def _matching(names: Sequence[str], patterns: str | Sequence[str]) -> tuple[str, ...]:
    """The names that match one of `patterns`, in order.

    Raises:
        UsageError: a pattern matches nothing.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"always={pattern!r} matches no parameter that trains; nearest: {nearest(pattern, names)}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _squared_norm(gradient: Tensor) -> Tensor:
    """In float32 at least."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)) ** 2


def _check_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UsageError(
            f"max_grad_norm={max_grad_norm} must be above 0; write max_grad_norm=1.0, or None for no limit"
        )
