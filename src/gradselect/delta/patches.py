"""Patches of a training run: applying them to a copy of the model, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradselect.core import Entries, Patch, can_train, places_of
from gradselect.files import writing_aside
from gradselect.parallel import is_dtensor, unwrapped
from gradselect.usage import UsageError, check_is, nearest

from .checkpoint import SafetensorsFile
from .write import free_file

FORMAT = "gradselect-patch"
VERSION = "1"

Target: TypeAlias = nn.Module | Mapping[str, Tensor]


@torch.no_grad()
def apply_patch(target: Target, patch: Patch) -> None:
    """Write the weights of a patch into a copy of the model, in place.

    A copy that holds the weights after `patch.from_step` steps then holds those after `patch.to_step` steps, bit for
    bit, if its dtype is that of the trained model; a copy in another floating dtype holds them rounded to it. All of it
    is checked before the first weight is written.

    Args:
        target: the model (wrappers of torch.compile, DDP and PEFT do not matter), or a state dict.
        patch: of `optimizer.changed_entries()` or `read_patch`.

    Raises:
        UsageError: the target lacks a tensor of the patch, or has it in another shape, quantised or sharded; or one of
            the two is something else.

    Example:
        >>> import copy, gradselect as gs
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> served = copy.deepcopy(model)
        >>> optimizer = gs.BlockOptimizer(model, policy=gs.Uniform(count=1), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> apply_patch(served, optimizer.changed_entries())
        >>> all(map(torch.equal, served.parameters(), model.parameters()))
        True
    """
    check_is(patch, Patch, name="patch", example='patch=gs.delta.read_patch("step-1.safetensors")')
    tensors = _tensors_of(target)
    writes = [(tensor, name) for name in patch for tensor in _written(tensors, patch, name)]
    for tensor, name in writes:
        _write(tensor, patch[name])


def write_patch(patch: Patch, path: str | Path) -> None:
    """Write a patch to a new safetensors file. docs/delta.md describes the format.

    Raises:
        UsageError: something is at `path`, or the disk is full.

    Example:
        >>> patch = Patch(changes={"w": torch.ones(2)}, shapes={"w": (2,)}, from_step=0, to_step=1, model_bytes=8)
        >>> write_patch(patch, "step-1.safetensors")
        >>> read_patch("step-1.safetensors")
        Patch(steps 0 to 1: 1 tensors whole, 0 by entries, 8 of 8 bytes, 100.00%)
    """
    check_is(patch, Patch, name="patch", example="patch=optimizer.changed_entries()")
    target = free_file(Path(path))
    tensors = {}
    for name, change in patch.items():
        if isinstance(change, Tensor):
            tensors[f"whole:{name}"] = change
        else:
            tensors |= {f"index:{name}": change.indices, f"value:{name}": change.values}
    manifest = {
        "from_step": patch.from_step,
        "to_step": patch.to_step,
        "model_bytes": patch.model_bytes,
        "shapes": dict(patch.shapes),
        "tied": dict(patch.tied),
    }
    with writing_aside(target) as aside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            aside,
            metadata={"format": FORMAT, "version": VERSION, "manifest": json.dumps(manifest)},
        )


def read_patch(path: str | Path) -> Patch:
    """Return the patch in a file that `write_patch` wrote, on the CPU.

    Raises:
        UsageError: it is missing, damaged or no patch.

    Example:
        >>> patch = Patch(changes={"w": torch.ones(2)}, shapes={"w": (2,)}, from_step=3, to_step=4, model_bytes=8)
        >>> write_patch(patch, "step-4.safetensors")
        >>> read_patch("step-4.safetensors")["w"]
        tensor([1., 1.])
    """
    file = SafetensorsFile(Path(path))
    found = file.metadata.get("format"), file.metadata.get("version")
    if found != (FORMAT, VERSION):
        raise UsageError(
            f"{path} is no patch that this gradselect reads: its format and version are {found[0]!r} and {found[1]!r} "
            f"instead of {FORMAT!r} and {VERSION!r}"
        )
    try:
        manifest = json.loads(file.metadata["manifest"])
        shapes = {str(name): tuple(map(int, shape)) for name, shape in manifest["shapes"].items()}
        return Patch(
            changes={name: _read(file, name) for name in shapes},
            shapes=shapes,
            tied={str(alias): str(name) for alias, name in manifest["tied"].items()},
            from_step=int(manifest["from_step"]),
            to_step=int(manifest["to_step"]),
            model_bytes=int(manifest["model_bytes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is a damaged patch ({error!r}); write it again") from None


def _read(file: SafetensorsFile, name: str) -> Entries | Tensor:
    if f"whole:{name}" in file.names:
        return file.tensor(f"whole:{name}")
    for key in (f"index:{name}", f"value:{name}"):
        file.layout(key)
    return Entries(file.tensor(f"index:{name}"), file.tensor(f"value:{name}"))


def _tensors_of(target: Target) -> dict[str, Tensor]:
    """Return the tensors that a patch may name, by all of their names."""
    if not isinstance(target, nn.Module):
        check_is(target, Mapping, name="target", example="target=model, or target=model.state_dict()")
        return dict(target)
    tensors: dict[str, Tensor] = {}
    for place in places_of(unwrapped(target)):
        if place.attribute is not None and place.region is None:
            raise UsageError(
                f"{type(place.module).__name__} stores {place.name!r} in another basis, and a patch holds the plain "
                "weight; apply it to the plain model, or after gs.sparsegrad.fold(model)"
            )
        tensors[place.name] = place.parameter if place.region is None else place.tensor()
    return tensors


def _written(tensors: Mapping[str, Tensor], patch: Patch, name: str) -> list[Tensor]:
    """Return the tensors that take one tensor of the patch: a copy may have untied what was tied.

    Raises:
        UsageError: there is none, or it cannot take the change.
    """
    names = [known for known in patch.names_of(name) if known in tensors]
    if not names:
        raise UsageError(
            f"the patch has a tensor {name!r}, and what it is applied to has none; nearest: "
            f"{nearest(name, list(tensors)) or 'there is none'}. Names are those of the trained model; a checkpoint "
            "that transformers saved under other names, or fused weights of an inference engine, have to be mapped"
        )
    for known in names:
        _check(known, tensors[known], patch[name], patch.shapes[name])
    found = {tensors[known].data_ptr(): tensors[known] for known in names}
    return list(found.values())


def _check(name: str, tensor: Tensor, change: Entries | Tensor, shape: tuple[int, ...]) -> None:
    check_is(tensor, Tensor, name=name, example="target=model.state_dict()")
    values = change if isinstance(change, Tensor) else change.values
    if is_dtensor(tensor):
        raise UsageError(f"{name!r} is sharded; apply the patch to a whole copy of the model, before fully_shard")
    if not can_train(tensor) or is_traceable_wrapper_subclass(tensor):
        raise UsageError(
            f"{name!r} is quantised or holds integers ({tensor.dtype}); apply the patch to the plain weights"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise UsageError(f"{name!r} has the shape {tuple(shape)} in the patch and {tuple(tensor.shape)} here")
    if isinstance(change, Tensor):
        fits = change.shape == tensor.shape
    else:
        indices = change.indices
        fits = indices.shape == values.shape and indices.dtype in (torch.int32, torch.int64) and indices.ndim == 1
        fits = fits and (not len(indices) or (int(indices.min()) >= 0 and int(indices.max()) < tensor.numel()))
    if not fits or not can_train(values):
        raise UsageError(f"the change of {name!r} in the patch does not fit its shape {tuple(shape)}: it is damaged")


def _write(tensor: Tensor, change: Entries | Tensor) -> None:
    tensor = tensor.detach()
    if isinstance(change, Tensor):
        tensor.copy_(change)
        return
    indices, values = change.indices.to(tensor.device, torch.int64), change.values.to(tensor.device, tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, indices, values)
    else:
        tensor.copy_(tensor.reshape(-1).index_copy(0, indices, values).view(tensor.shape))
