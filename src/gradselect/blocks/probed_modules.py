"""Modules on whose outputs probes see whether the loss reaches a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gradselect.usage import parent

from .structure import module_of_getter


def blocks_by_module(model: nn.Module, members: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the blocks that are reached if the output of a module is, by path of the module.

    A module counts if it holds weights of the block itself, and no module in it holds any: then its output depends on
    these weights. An embedding other than that of the inputs does not count: one of positions may be added to the
    scores of attention, and torch takes another kernel, which rounds otherwise, where those require a gradient. A block
    of such embeddings alone is reached if a module beside them is.

    Args:
        model: holds the blocks.
        members: parameter names of each block.
    """
    inputs = module_of_getter(model, "get_input_embeddings")
    modules = dict(model.named_modules())
    plain = {
        path: any(True for _ in module.parameters(recurse=False))
        and not any(True for child in module.children() for _ in child.parameters())
        for path, module in modules.items()
    }
    counting = {
        path
        for path, module in modules.items()
        if plain[path] and (inputs is None or module is inputs or not isinstance(module, nn.Embedding))
    }
    found: dict[str, list[str]] = {}
    for block, names in members.items():
        homes = dict.fromkeys(map(parent, names))
        own = [path for path in homes if path in counting]
        if not own and any(plain[path] for path in homes):
            own = _beside(next(path for path in homes if plain[path]), counting)
        for path in own:
            found.setdefault(path, []).append(block)
    return found


def _beside(path: str, counting: set[str]) -> list[str]:
    """Paths of the modules that count, within the nearest module around `path` that holds any."""
    around = parent(path)
    while True:
        beside = [each for each in sorted(counting) if not around or each.startswith(f"{around}.")]
        if beside or not around:
            return beside
        around = parent(around)
