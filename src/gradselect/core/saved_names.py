"""Names that the parameters of a model have in a saved checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError, join, parent

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts of names that torch.compile, activation checkpointing and sharding add to those of a submodule."""


@runtime_checkable
class StoresOtherwise(Protocol):
    """Module that trains a parameter in other coordinates than a checkpoint of the plain model holds it.

    Attributes:
        checkpoint_names: by name of such a parameter, that of the attribute that computes the tensor of the checkpoint.
    """

    checkpoint_names: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Part of a tensor of a checkpoint: a range of its rows or columns.

    Attributes:
        tensor: name of the attribute that is the whole tensor, which the checkpoint uses too.
        dim: 0 for a range of rows, 1 for one of columns.
        first, end: the range, without `end`.
    """

    tensor: str
    dim: int
    first: int
    end: int

    def indices(self, shape: Sequence[int]) -> Tensor:
        """Flat indices, in the whole matrix of this shape, of the entries of the region; in the order of the region."""
        rows, columns = (torch.arange(size) for size in shape)
        if self.dim == 0:
            rows = rows[self.first : self.end]
        else:
            columns = columns[self.first : self.end]
        return (rows[:, None] * shape[1] + columns).flatten()


@runtime_checkable
class StoresInParts(Protocol):
    """Module that trains parts of a tensor that a checkpoint holds whole.

    Attributes:
        checkpoint_regions: by name of such a parameter, its part.
    """

    @property
    def checkpoint_regions(self) -> Mapping[str, Region]: ...


@dataclass(frozen=True)
class Place:
    """Place of a parameter in a checkpoint.

    Attributes:
        name: in the checkpoint.
        parameter: the parameter itself.
        module: that it belongs to.
        attribute: of the module, which computes the tensor of the checkpoint; None: the parameter is that tensor.
        region: part of that tensor that the parameter is; None: all of it.
    """

    name: str
    parameter: Parameter
    module: nn.Module
    attribute: str | None
    region: Region | None = None

    def tensor(self) -> Tensor:
        """Return what the checkpoint holds."""
        return (self.parameter if self.attribute is None else getattr(self.module, self.attribute)).detach()


def places_of(model: nn.Module) -> list[Place]:
    """Return the place of every parameter of a model without wrappers, one for each of its names, in model order.

    What wrappers of submodules add to names is left out. Weights of a PEFT adapter have the names of its own file.

    Raises:
        UsageError: two parameters would have one name, as those of two adapters.
    """
    adapters: set[str] = set(getattr(model, "peft_config", ()))
    # By class name: the library does not import PEFT.
    kinds = {path: {kind.__name__ for kind in type(module).__mro__} for path, module in model.named_modules()}
    places = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, own = parent(name), name.rpartition(".")[2]
        module = model.get_submodule(path)
        attribute = module.checkpoint_names.get(own) if isinstance(module, StoresOtherwise) else None
        region = module.checkpoint_regions.get(own) if isinstance(module, StoresInParts) else None
        if region is not None:
            attribute = region.tensor
        plain = (
            _without_adapter(join(path, attribute or own), adapters, kinds)
            if adapters
            else join(path, attribute or own)
        )
        places.append(Place(_without_wrappers(plain), parameter, module, attribute, region))
    _check_distinct(places)
    return places


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_adapter(name: str, adapters: set[str], kinds: Mapping[str, set[str]]) -> str:
    """Return the name in the file of the adapter, which leaves out what the adapter is called."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        kind, inside = kinds.get(".".join(parts[:end]), set()), parts[end:]
        if inside[1] not in adapters:
            continue
        if "AuxiliaryTrainingWrapper" in kind and inside[0] == "modules_to_save":
            return ".".join([*parts[:end], *inside[2:]])
        # A tuner itself has the weights that its layers share.
        if not kind.isdisjoint(("BaseTunerLayer", "BaseTuner")) and inside[0] != "base_layer":
            return ".".join([*parts[:end], inside[0], *inside[2:]])
    return name


def _check_distinct(places: list[Place]) -> None:
    by_name: dict[str, set[int]] = defaultdict(set)
    for place in places:
        by_name[place.name].add(id(place.parameter if place.region is None else place.module))
    shared = [name for name, parameters in by_name.items() if len(parameters) > 1]
    if shared:
        raise UsageError(
            f"{len(shared)} names of a checkpoint stand for several parameters of the model, {shared[0]!r} first, as "
            "where it has several adapters, which are saved to one file each; keep one adapter: "
            "model.delete_adapter(name)"
        )
