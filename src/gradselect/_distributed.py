"""Several processes: what an optimizer must know of shards and replicas. On one process nothing of this runs.

A *shard* is the part of a tensor that this process holds (FSDP2's DTensor); a *replica* is a copy of the whole tensor
that the processes keep alike (`replicate`, DistributedDataParallel). Three rules make selection right on both:

* **Rules see what this process holds.** Weights, gradients and states are taken apart by `held` and put together again
  by `spread` for a checkpoint.
* **Every process decides alike.** Sums of squares are added up over the shards once a decision; where there are
  replicas, which might round differently, rank 0's numbers count. `check_alike` compares what decides.
* **Nothing is frozen before the model is wrapped.** Data parallel wrappers look at `requires_grad` when they wrap
  (DDP), or in the first forward pass (FSDP2): what is frozen then is never synchronised, or of the wrong dtype. So the
  first selection comes into force within the first forward pass.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ._errors import UsageError

RELATIVE_TOLERANCE = 1e-5
"""Averaged gradients are the same bits everywhere; their sums may differ by rounding between unlike devices."""

Owner = TypeVar("Owner")

Groups = tuple[Any, ...]
"""The process groups over which a tensor is sharded; empty for a replica."""


def is_running() -> bool:
    """Whether this process is one of several, or of one under torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def is_one_of_many() -> bool:
    """Whether there are other processes."""
    return is_running() and dist.get_world_size() > 1


# Shards ----------------------------------------------------------------------------------------------------------


def is_spread(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor: this process may hold a part of it only."""
    if type(tensor) in (Tensor, Parameter):
        return False
    # Whoever made a DTensor has imported its module, which is slow to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor, without a copy and without a gradient: its shard, or all of it."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def spread(part: Tensor, *, like: Tensor) -> Tensor:
    """The DTensor of which every process holds a `part`, laid out as `like`; plain tensors stay as they are."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    mesh, device = like.device_mesh, part.device
    whole = DTensor.from_local(
        part.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.to(device)


def share(value: Tensor, *, like: Tensor) -> Tensor:
    """This process' part of a saved tensor, which is whole or laid out as `like`.

    Raises:
        UsageError: it is spread over other processes than `like`.
    """
    if not is_spread(value):
        if not is_spread(like) or value.shape != like.shape:
            return value
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        mesh = like.device_mesh
        # None: every process has the whole value and takes its own part, without a word to the others.
        return held(distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None))
    if not is_spread(like) or value.placements != like.placements:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError(
            "the saved state is sharded otherwise than the model; save and load it with "
            "gradselect.integrations.distributed.save and .load, which reshard"
        )
    return held(value)


def shard_groups(tensor: Tensor) -> Groups:
    """The process groups over which the tensor is sharded, one per dimension of its mesh that shards it."""
    if not is_spread(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())


def first_index(tensor: Tensor, *, name: str) -> int:
    """Flat index in the whole tensor of the first entry that this process holds; the others follow it.

    Raises:
        UsageError: it holds no such piece, because the tensor is sharded in another dimension than its first.
    """
    if not shard_groups(tensor):
        return 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    for placement in placements:
        if not placement.is_replicate() and (type(placement) is not Shard or placement.dim != 0):
            raise UsageError(
                f"{name!r} is placed as {placement}, and single weights are selected in tensors that are sharded by "
                "rows; leave shard_placement_fn and tensor parallelism out"
            )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return min(offset[0], tensor.shape[0]) * (tensor.numel() // max(1, tensor.shape[0]))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, without a gradient; every process calls it."""
    if not is_spread(tensor):
        return tensor.detach()
    with torch.no_grad(), speaking("gathering a weight"):
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def is_averaged_in_hooks(parameter: Tensor) -> bool:
    """Whether hooks on its accumulated gradient see what the processes have averaged: those of a DTensor do.

    DistributedDataParallel averages later; what FSDP2 offloads may still be on its way.
    """
    return is_spread(parameter) and collective_device(parameter).type == parameter.device.type


# Decisions -------------------------------------------------------------------------------------------------------


class SquareSums:
    """Sums of squares of the gradients of named sets of parameters: of what this process holds, then of the whole.

    Args:
        norm: L2 norm, of shape (), of the gradients of some parameters as far as this process holds them.
    """

    def __init__(self, norm: Callable[[Sequence[Parameter]], Tensor]) -> None:
        self._norm = norm
        self._sums: dict[str, dict[Groups, Tensor]] = {}

    def measure(self, name: str, parameters: Sequence[Parameter], *, scale: float) -> None:
        """Sum of squares of the gradients divided by `scale`, instead of an earlier one of this name."""
        apart: dict[Groups, list[Parameter]] = {}
        for parameter in parameters:
            apart.setdefault(shard_groups(parameter), []).append(parameter)
        # In fp64 the root gives back the very norm that one process would have found.
        self._sums[name] = {
            groups: (self._norm(several).to(collective_device(several[0])).double() / scale).square()
            for groups, several in apart.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def clear(self) -> None:
        """Forget all."""
        self._sums = {}

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Norms of the whole tensors, the same number on every process: one all-reduce, and a broadcast to replicas."""
        if not names:
            return {}
        kinds = dict.fromkeys(groups for name in names for groups in self._sums[name])
        some = next(iter(self._sums[names[0]].values()))
        totals = torch.zeros(len(names), dtype=torch.float64, device=some.device)
        with speaking("adding up gradient norms"):
            for groups in kinds:
                zero = torch.zeros_like(some)
                sums = torch.stack([self._sums[name].get(groups, zero) for name in names])
                for group in groups:
                    dist.all_reduce(sums, group=group)
                totals += sums
            if any(_size(groups) < dist.get_world_size() for groups in kinds):
                dist.broadcast(totals, src=0)
        return dict(zip(names, totals.sqrt().float().tolist(), strict=True))


def add_up(parts: Mapping[Groups, Tensor], *, device: torch.device) -> Tensor:
    """The sum of what all processes hold. On the CPU.

    Args:
        parts: of the tensors that are sharded over the same groups, what this process holds; everywhere the same keys
            in the same order.
        device: where the processes' backend works.
    """
    totals = []
    for groups, part in parts.items():
        total = part.to(device, copy=True) if groups else part
        with speaking("adding up"):
            for group in groups:
                dist.all_reduce(total, group=group)
        totals.append(total.cpu())
    return torch.stack(totals).sum(0)


def total(numbers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of numbers (shape ()) of what all processes hold, in fp64, on the CPU.

    Args:
        numbers: each with a tensor that is sharded as what the number was taken from; everywhere as many.
    """
    apart: dict[Groups, list[Tensor]] = {}
    for tensor, number in numbers:
        apart.setdefault(shard_groups(tensor), []).append(number.cpu().double())
    sums = {groups: torch.stack(several).sum() for groups, several in apart.items()}
    return add_up(sums, device=collective_device(numbers[0][0]))


def collective_device(tensor: Tensor) -> torch.device:
    """Where the backend of the tensor's processes works; FSDP2 can offload shards elsewhere."""
    kind = tensor.device_mesh.device_type if is_spread(tensor) else tensor.device.type  # pyright: ignore
    here = tensor.device.type == kind
    return tensor.device if here else torch.device(kind, torch.accelerator.current_device_index())


def _size(groups: Groups) -> int:
    size = 1
    for group in groups:
        size *= group.size()
    return size


# One run of several processes ------------------------------------------------------------------------------------


class Together:
    """Keeps the processes of a run together, for one optimizer on each of them.

    Args:
        model: what the optimizer trains; it may be wrapped until its first forward pass that trains.
        owner: the optimizer; it may be dropped before.
        begin: called with `owner` within that pass: after FSDP2's own initialisation, inside DDP's forward pass,
            before the pass records anything. It calls `check_start`.

    Attributes:
        has_begun: whether that pass has come.
        agreement_steps: how often `check_step` compares everything, >= 1.
    """

    def __init__(self, model: nn.Module, owner: Owner, begin: Callable[[Owner], None]) -> None:
        self.has_begun = False
        self.agreement_steps = 100
        self._is_due = True
        self._compared: set[str] = set()
        self._model = model
        reference = weakref.ref(owner)

        def before_forward(module: nn.Module, _: Any) -> None:
            alive = reference()
            if alive is None or self.has_begun:
                handle.remove()
            elif module.training and torch.is_grad_enabled():
                handle.remove()
                begin(alive)

        hook: Any = torch.compiler.disable(before_forward)
        handle = model.register_forward_pre_hook(hook)

    def check_start(
        self, parameters: Mapping[str, Sequence[Parameter]], facts: Mapping[str, Any], *, trains_everything: bool
    ) -> None:
        """Before the first step: the same run on every process, on a model that is wrapped as it has to be.

        Args:
            parameters: the optimizer's, by block.
            facts: plain values that decide what is trained.
            trains_everything: whether every parameter of `parameters` gets a gradient in every step.

        Raises:
            UsageError: what differs, and what to write instead.
        """
        self.has_begun = True
        check_alike(facts, moment="before the first step")
        check_data_parallel(trains_everything=trains_everything)
        replicas = {
            name: [held(parameter) for parameter in several if not shard_groups(parameter)]
            for name, several in parameters.items()
        }
        check_same_weights({name: several for name, several in replicas.items() if several})

    def check_step(
        self, step: int, parameters: Mapping[str, Sequence[Parameter]], facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Before an update: every so many steps all of `facts`; of a block that has come new, that it was averaged.

        Args:
            step: number of the step.
            parameters: those that are about to be updated, by block.
            facts: gives plain values that decide what is trained, e.g. the selection.

        Raises:
            UsageError: what differs, and what to write instead.
        """
        if self._is_due or step % self.agreement_steps == 0:
            self._is_due = False
            self._compared.clear()
            check_alike({"step": step, **facts()}, moment=f"at step {step}")
        new = {
            # An engine that shards or replicates DTensors also averages what it gives.
            name: [parameter for parameter in several if not is_spread(parameter)]
            for name, several in parameters.items()
            if name not in self._compared
        }
        self._compared.update(new)
        check_averaged({name: several for name, several in new.items() if several}, step=step)

    def check_soon(self) -> None:
        """Compare everything at the next step: a checkpoint was loaded."""
        self._is_due = True

    def carry_over(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """What FSDP2 has gathered already in this forward pass is frozen as its shard is.

        Raises:
            UsageError: the model was wrapped after the optimizer was built, which does not hold its parameters.
        """
        current = dict(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            stand_in = current.get(name, parameter)
            if stand_in is not parameter and not is_spread(parameter):
                raise UsageError(
                    f"the model computes with another tensor than the optimizer holds for {name!r}: it was wrapped "
                    "afterwards; write fully_shard(model) or replicate(model) first, then build the optimizer"
                )
            stand_in.requires_grad_(parameter.requires_grad)


# Agreement -------------------------------------------------------------------------------------------------------


def check_alike(facts: Mapping[str, Any], *, moment: str) -> None:
    """Every process holds the same plain values.

    Raises:
        UsageError: on all processes; names the first rank that differs from rank 0, and what differs.
    """
    digests = {name: sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    everyone = _gather(digests, moment=moment)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            values = _gather(dict(facts), moment=moment)
            what, ours, other = _first_difference("", values[0], values[rank])
            raise UsageError(
                f"the processes do not agree {moment}: {what} is {ours} on rank 0 and {other} on rank {rank}; start "
                "every rank with the same recipe, seed and checkpoint"
            )


def _first_difference(what: str, one: Any, other: Any) -> tuple[str, str, str]:
    """The path to the first plain values that differ within two nested ones, and both in words."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in (*one, *other):
            if repr(one.get(key)) != repr(other.get(key)):
                return _first_difference(f"{what}.{key}" if what else str(key), one.get(key), other.get(key))
    return what, _short(one), _short(other)


def check_averaged(parameters: Mapping[str, Sequence[Parameter]], *, step: int) -> None:
    """Gradients of replicas, by block, are the same on every process: something has averaged them.

    Raises:
        UsageError: on all processes; names the first block of which they differ.
    """
    gradients = {name: [each.grad for each in several if each.grad is not None] for name, several in parameters.items()}
    if not parameters:
        return
    device = next(iter(parameters.values()))[0].device
    for name in _unlike(gradients, moment=f"at step {step}", device=device):
        raise UsageError(
            f"gradients of block {name!r} differ between the processes at step {step}: nothing has averaged them. "
            "Wrap the model before its first training step and while all of it is trainable: fully_shard or replicate "
            "of torch.distributed before the optimizer is built, or "
            "DistributedDataParallel(model, find_unused_parameters=True); the last backward pass of a step must not "
            "stand in no_sync()"
        )


def check_same_weights(weights: Mapping[str, Sequence[Tensor]]) -> None:
    """Replicas start alike. Shards cannot be compared: each process holds another part.

    Raises:
        UsageError: on all processes; names the first block that differs.
    """
    if not weights:
        return
    device = collective_device(next(iter(weights.values()))[0])
    for name in _unlike(weights, moment="before the first step", device=device):
        raise UsageError(
            f"weights of block {name!r} differ between the processes before the first step; load the same checkpoint "
            "on every rank, or call torch.manual_seed(0) on every rank before the model is built"
        )


def _unlike(tensors: Mapping[str, Sequence[Tensor]], *, moment: str, device: torch.device) -> list[str]:
    """The names of which the processes hold different tensors."""
    marks = torch.stack([_mark(several, device=device) for several in tensors.values()])
    others = [torch.empty_like(marks) for _ in range(dist.get_world_size())]
    with speaking(f"comparing the processes {moment}"):
        dist.all_gather(others, marks)
    everyone = torch.stack(others)  # (2, 30, 2) - ranks, blocks, marks
    difference = (everyone - everyone[0]).abs().amax(dim=(0, 2))
    # False for NaN, which is no matter of averaging.
    differs = difference > RELATIVE_TOLERANCE * everyone[:, :, 0].amax(0)
    return [name for name, differs in zip(tensors, differs.tolist(), strict=True) if differs]


def _mark(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """(L1 norm, sum) of the tensors: clipping can make L2 norms alike, not these. Shape (2,)."""
    mark = torch.zeros(2, device=device)
    for tensor in tensors:
        mark[0] += tensor.abs().sum(dtype=torch.float32)
        mark[1] += tensor.sum(dtype=torch.float32)
    return mark


def _gather(value: Any, *, moment: str) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    with speaking(f"comparing the processes {moment}"):
        dist.all_gather_object(values, value)
    return values


@contextmanager
def speaking(doing: str) -> Iterator[None]:
    """Around a collective: says what it was when another process has ended, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} could not go on {doing}: another process has ended or does not answer; the first "
            f"error is in its output ({error})"
        ) from error


def _short(value: Any, *, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


# The model -------------------------------------------------------------------------------------------------------


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The module and, one after the other, what is inside DistributedDataParallel, DataParallel and torch.compile."""
    yield model
    inner = model._modules.get("_orig_mod")  # of torch.compile, whose own class is slow to import
    if isinstance(model, DistributedDataParallel | DataParallel):
        inner = model.module
    if inner is not None:
        yield from unwrapping(inner)


def unwrapped(model: nn.Module) -> nn.Module:
    """The innermost of them."""
    *_, innermost = unwrapping(model)
    return innermost


def check_placement(model: nn.Module) -> None:
    """The model's parameters are materialised, on one device, and not in the hands of a wrapper that hides them.

    Raises:
        UsageError: they are not.
    """
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        raise UsageError(
            "a DeepSpeed engine steps an optimizer of its own and hides gradients from others; train the model itself, "
            "wrapped in DistributedDataParallel(model, find_unused_parameters=True), or sharded with "
            "torch.distributed.fsdp.fully_shard(model) (in Accelerate: fsdp_version: 2)"
        )
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if getattr(parameter, "ds_id", None) is not None:
            raise UsageError(
                f"{name!r} belongs to DeepSpeed ZeRO-3, which hides weights and gradients from other optimizers; shard "
                "with torch.distributed.fsdp.fully_shard(model) instead (in Accelerate: fsdp_version: 2)"
            )
        if parameter.is_meta:
            raise UsageError(
                f"{name!r} is on the meta device and has no values; materialise the model first: "
                "model.to_empty(device=...), then load its weights, then build the optimizer"
            )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UsageError(
            "FullyShardedDataParallel flattens parameters across blocks; shard with FSDP2 instead: "
            "torch.distributed.fsdp.fully_shard(model) (in Accelerate: fsdp_version: 2)"
        )
    trained = {name: parameter.device for name, parameter in parameters.items() if parameter.requires_grad}
    first = next(iter(trained.items()), None)
    for name, device in trained.items():
        if first is not None and device != first[1]:
            raise UsageError(
                f"the model is on two devices: {first[0]!r} on {first[1]}, {name!r} on {device}; load it onto one, "
                'without device_map="auto", and use fully_shard to spread it over several'
            )


def check_data_parallel(*, trains_everything: bool) -> None:
    """Within a forward pass: DistributedDataParallel, if it is what runs, can bear parameters without a gradient.

    Raises:
        UsageError: it cannot.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or trains_everything:
        return
    if not wrapper.find_unused_parameters or wrapper.static_graph:
        raise UsageError(
            f"DistributedDataParallel(find_unused_parameters={wrapper.find_unused_parameters}, "
            f"static_graph={wrapper.static_graph}) does not average the gradients of blocks that change; write "
            "DistributedDataParallel(model, find_unused_parameters=True), in TrainingArguments "
            "ddp_find_unused_parameters=True"
        )
