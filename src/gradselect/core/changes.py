"""Making a patch from the weights that have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradselect.parallel import full_tensor, local_part, local_start, naming_the_collective, shard_groups

from .patch import Entries, Patch, index_dtype, is_smaller_whole
from .saved_names import Place

Moved = Mapping[Tensor, Tensor | None]
"""By parameter: flat indices in its local part of the entries that moved, ascending, int64; None: all may have."""


def make_patch(places: Sequence[Place], moved: Moved, *, from_step: int, to_step: int) -> Patch:
    """Copy the weights that have moved. With shards every rank calls it, and gets the whole patch."""
    firsts: dict[Tensor, Place] = {}
    tied = {}
    for place in places:
        first = firsts.setdefault(place.parameter, place)
        if first.name != place.name:
            tied[place.name] = first.name
    changes, shapes = {}, {}
    parts: dict[str, list[Place]] = {}
    for parameter, place in firsts.items():
        if parameter not in moved:
            continue
        if place.region is not None:
            parts.setdefault(place.name, []).append(place)
        elif (change := _change_of(place, moved[parameter])) is not None:
            changes[place.name] = change
            shapes[place.name] = tuple((change if isinstance(change, Tensor) else parameter).shape)
    for name, several in parts.items():
        changes[name] = _change_of_parts(several)
        shapes[name] = tuple(several[0].tensor().shape)
    return Patch(
        changes=changes,
        shapes=shapes,
        tied={alias: name for alias, name in tied.items() if name in changes},
        from_step=from_step,
        to_step=to_step,
        model_bytes=sum(parameter.numel() * parameter.element_size() for parameter in firsts),
    )


def _change_of(place: Place, indices: Tensor | None) -> Entries | Tensor | None:
    """Return the change of one tensor; None if no entry moved."""
    parameter = place.parameter
    if place.attribute is not None:
        return place.tensor().clone()  # in those coordinates every entry has moved
    entries = None
    if shard_groups(parameter):
        entries = _gathered(place, indices)
    elif indices is not None:
        entries = _taken(local_part(parameter), indices)
    size = parameter.numel()
    if entries is None or is_smaller_whole(entries[0].numel(), size, parameter.element_size()):
        return full_tensor(parameter).clone(memory_format=torch.contiguous_format)
    return Entries(entries[0].to(index_dtype(size)), entries[1]) if entries[0].numel() else None


def _change_of_parts(places: Sequence[Place]) -> Entries | Tensor:
    """Return the change of one tensor, of which these regions may have moved as a whole."""
    whole = places[0].tensor()
    if is_smaller_whole(sum(place.parameter.numel() for place in places), whole.numel(), whole.element_size()):
        return whole.clone(memory_format=torch.contiguous_format)
    regions = [place.region for place in places if place.region is not None]
    indices = torch.cat([region.indices(whole.shape) for region in regions]).sort().values.to(whole.device)
    return Entries(indices.to(index_dtype(whole.numel())), whole.reshape(-1).index_select(0, indices))


def _taken(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return indices, weight.detach().reshape(-1).index_select(0, indices)


def _gathered(place: Place, indices: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Gather the entries of a sharded tensor from all ranks, by index in the whole tensor; None if one rank has all."""
    parameter = place.parameter
    part = None
    if indices is not None:
        local, values = _taken(local_part(parameter), indices)
        part = ((local + local_start(parameter, name=place.name)).cpu(), values.cpu())
    parts = [part]
    for group in shard_groups(parameter):
        everyone: list[list[tuple[Tensor, Tensor] | None]] = [[] for _ in range(group.size())]
        with naming_the_collective(f"gathering the patch of {place.name}"):
            dist.all_gather_object(everyone, parts, group=group)
        parts = [each for several in everyone for each in several]
    present = [each for each in parts if each is not None]
    if len(present) < len(parts):
        return None
    whole, values = (torch.cat(list(several)) for several in zip(*present, strict=True))
    order = whole.argsort()
    return whole[order].to(local_part(parameter).device), values[order].to(local_part(parameter).device)
