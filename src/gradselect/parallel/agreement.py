"""Agreement of ranks on shards and replicas. Nothing of this runs without torch.distributed.

A *shard* is a rank's local part of a tensor (FSDP2's DTensor). A *replica* is a copy of the whole tensor that all ranks
keep equal (`replicate`, DistributedDataParallel). Selection is right on both because of three rules:

* **Rules see local parts.** `local_part` takes weights, gradients and states apart; `as_dtensor` joins them for a
  checkpoint.
* **All ranks select alike.** Sums of squares are all-reduced over the shards once per decision. Replicas may round
  differently, so their numbers are broadcast from rank 0. `check_alike` compares everything that decides.
* **Nothing is frozen before the model is wrapped.** Data-parallel wrappers read `requires_grad` when they wrap (DDP) or
  in the first forward pass (FSDP2). A parameter frozen by then is never synchronised, or has the wrong dtype. So the
  first selection takes effect in the first forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError

from .tensors import collective_device, is_dtensor, local_part, naming_the_collective, shard_groups
from .wrappers import check_data_parallel

RELATIVE_TOLERANCE = 1e-5
"""Averaged gradients are bitwise equal on all ranks; their sums may round differently on different devices."""

Owner = TypeVar("Owner")


class RankAgreement:
    """Checks that the ranks of a run train the same thing, for one optimizer.

    Args:
        model: trained by the optimizer; may be wrapped until its first training forward pass.
        owner: the optimizer, held by a weak reference.
        begin: called with `owner` in that pass: after FSDP2's own initialisation, inside DDP's forward pass, before the
            pass records anything. It calls `check_start`.

    Attributes:
        has_begun: True once that pass has started.
        agreement_steps: steps between two full comparisons in `check_step`, >= 1.
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
        """Check before the first step that all ranks start the same run, on a correctly wrapped model.

        Args:
            parameters: of the optimizer, by block.
            facts: plain values that decide what is trained.
            trains_everything: True if every parameter of `parameters` gets a gradient in every step.

        Raises:
            UsageError: names what differs, and what to write instead.
        """
        self.has_begun = True
        check_alike(facts, moment="before the first step", device=self._device)
        check_data_parallel(trains_everything=trains_everything)
        replicas = {
            name: [local_part(parameter) for parameter in several if not shard_groups(parameter)]
            for name, several in parameters.items()
        }
        check_same_weights({name: several for name, several in replicas.items() if several})

    def check_step(
        self, step: int, parameters: Mapping[str, Sequence[Parameter]], facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Check before an update that ranks agree.

        Compares all `facts` every `agreement_steps` steps, and the gradients of each block that was not compared since.

        Args:
            step: number of the step.
            parameters: about to be updated, by block.
            facts: returns plain values that decide what is trained, e.g. the selection.

        Raises:
            UsageError: names what differs, and what to write instead.
        """
        if self._is_due or step % self.agreement_steps == 0:
            self._is_due = False
            self._compared.clear()
            check_alike({"step": step, **facts()}, moment=f"at step {step}", device=self._device)
        new = {
            # FSDP2 and replicate average the gradients of their DTensors themselves.
            name: [parameter for parameter in several if not is_dtensor(parameter)]
            for name, several in parameters.items()
            if name not in self._compared
        }
        self._compared.update(new)
        check_averaged({name: several for name, several in new.items() if several}, step=step)

    @property
    def _device(self) -> torch.device:
        return collective_device(next(self._model.parameters()))

    def check_soon(self) -> None:
        """Compare everything at the next step, as after loading a checkpoint."""
        self._is_due = True

    def carry_over(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Freeze the tensors that FSDP2 has gathered already in this forward pass, as their shards are.

        Raises:
            UsageError: the model was wrapped after the optimizer was built, which holds other parameters.
        """
        current = dict(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            stand_in = current.get(name, parameter)
            if stand_in is not parameter and not is_dtensor(parameter):
                raise UsageError(
                    f"the model computes with another tensor than the optimizer holds for {name!r}: it was wrapped "
                    "afterwards; write fully_shard(model) or replicate(model) first, then build the optimizer"
                )
            stand_in.requires_grad_(parameter.requires_grad)


def check_alike(facts: Mapping[str, Any], *, moment: str, device: torch.device) -> None:
    """Check that all ranks hold the same plain values.

    Args:
        facts: the values, by name.
        moment: when, for messages.
        device: of the model's collectives.

    Raises:
        UsageError: on all ranks; names the first rank that differs from rank 0, and what differs.
    """
    digests = {name: sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    everyone = _gather(digests, moment=moment, device=device)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            values = _gather(dict(facts), moment=moment, device=device)
            what, ours, other = _first_difference("", values[0], values[rank])
            raise UsageError(
                f"the processes do not agree {moment}: {what} is {ours} on rank 0 and {other} on rank {rank}; start "
                "every rank with the same recipe, seed and checkpoint"
            )


def _first_difference(what: str, one: Any, other: Any) -> tuple[str, str, str]:
    """Return the path of the first difference between two nested plain values, and both values as text."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in (*one, *other):
            if repr(one.get(key)) != repr(other.get(key)):
                return _first_difference(f"{what}.{key}" if what else str(key), one.get(key), other.get(key))
    return what, _short(one), _short(other)


def check_averaged(parameters: Mapping[str, Sequence[Parameter]], *, step: int) -> None:
    """Check that gradients of replicas, by block, are equal on all ranks: a wrapper has averaged them.

    Raises:
        UsageError: on all ranks; names the first block whose gradients differ.
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
            "DistributedDataParallel(model, find_unused_parameters=True); run the last backward pass of a step outside "
            "no_sync()"
        )


def check_same_weights(weights: Mapping[str, Sequence[Tensor]]) -> None:
    """Check that replicas start equal. Shards cannot be compared: each rank holds another part.

    Raises:
        UsageError: on all ranks; names the first block that differs.
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
    """Return the names whose tensors differ between ranks."""
    marks = torch.stack([_mark(several, device=device) for several in tensors.values()])
    others = [torch.empty_like(marks) for _ in range(dist.get_world_size())]
    with naming_the_collective(f"comparing the ranks {moment}"):
        dist.all_gather(others, marks)
    everyone = torch.stack(others)  # (2, 30, 2) - ranks, blocks, marks
    difference = (everyone - everyone[0]).abs().amax(dim=(0, 2))
    # False for NaN, which says nothing about averaging.
    differs = difference > RELATIVE_TOLERANCE * everyone[:, :, 0].amax(0)
    return [name for name, differs in zip(tensors, differs.tolist(), strict=True) if differs]


def _mark(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """L1 norm and sum of the tensors, shape (2,): clipping can make L2 norms equal, not these."""
    mark = torch.zeros(2, device=device)
    for tensor in tensors:
        mark[0] += tensor.abs().sum(dtype=torch.float32)
        mark[1] += tensor.sum(dtype=torch.float32)
    return mark


def _gather(value: Any, *, moment: str, device: torch.device) -> list[Any]:
    """Gather one plain value of each rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    # NCCL sends objects through the current GPU, which is the same on all ranks where nobody has set it.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with naming_the_collective(f"comparing the ranks {moment}"), current:
        dist.all_gather_object(values, value)
    return values


def _short(value: Any, *, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
