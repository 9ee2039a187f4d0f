"""Attention projections of a model: which layer, matrix and heads each one has in a tensor of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradselect.usage import UsageError


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Place of one projection in the tensor.

    Args:
        layer: row of its layer.
        matrix: row of its kind: query, key, value or output.
        heads_on_inputs: True for an output projection, which reads the heads. The others write them.
        num_heads: heads of this projection. Fewer than the model's for keys and values that heads share.
    """

    layer: int
    matrix: int
    heads_on_inputs: bool
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class Projections:
    """All adapted projections of a model, and the sizes of their tensor.

    Args:
        width: inputs of a query projection.
        head_dim: numbers of one head.
        num_heads: heads of a query projection.
        num_layers, num_matrices: rows of the layers and of the kinds of projection.
        places: by path of the layer in the model.
    """

    width: int
    head_dim: int
    num_heads: int
    num_layers: int
    num_matrices: int
    places: Mapping[str, Projection]


@dataclass(frozen=True)
class Heads:
    """Number of heads of a model, and numbers of one head."""

    number: int
    size: int


def heads_of(model: nn.Module, *, num_heads: int | None, head_dim: int | None) -> Heads:
    """Return the attention heads of a model, from its configuration where they are not given.

    Raises:
        UsageError: its configuration does not say.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    number = num_heads or getattr(config, "num_attention_heads", None)
    size = head_dim or getattr(config, "head_dim", None)
    width = getattr(config, "hidden_size", None)
    if number and not size and width:
        size = width // number
    if not isinstance(number, int) or not isinstance(size, int):
        raise UsageError(
            f"the configuration of {type(model).__name__} does not say how many attention heads it has and how large "
            "they are; write LortaConfig(num_heads=12, head_dim=64)"
        )
    return Heads(number, size)


def is_named(path: str, names: Iterable[str]) -> bool:
    """Check that a path ends with one of the names."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def find_projections(
    layers: Mapping[str, tuple[int, int]], *, heads: Heads, on_outputs: Iterable[str], on_inputs: Iterable[str]
) -> Projections:
    """Return the place of each layer in one tensor over width, head size, heads, layers and matrices.

    The layer of a projection is its path up to the last number in it, its kind the rest: "model.layers.3" and
    "self_attn.q_proj".

    Args:
        layers: (inputs, outputs) by path, in model order.
        heads: of the model.
        on_outputs, on_inputs: ends of the names of projections that write and read heads.

    Raises:
        UsageError: a layer is no known projection, or widths or heads differ.
    """
    rows: dict[str, int] = {}
    kinds: dict[str, int] = {}
    places: dict[str, Projection] = {}
    widths: dict[int, str] = {}
    for path, (inputs, outputs) in layers.items():
        heads_on_inputs = is_named(path, on_inputs)
        if not heads_on_inputs and not is_named(path, on_outputs):
            raise UsageError(_unknown(path))
        side, width = (inputs, outputs) if heads_on_inputs else (outputs, inputs)
        widths.setdefault(width, path)
        layer, kind = _split(path)
        places[path] = Projection(
            layer=rows.setdefault(layer, len(rows)),
            matrix=kinds.setdefault(kind, len(kinds)),
            heads_on_inputs=heads_on_inputs,
            num_heads=_num_heads(path, side, heads),
        )
    if len(widths) > 1:
        (one, path), (other, different) = list(widths.items())[:2]
        raise UsageError(
            f"LoRTA puts all projections into one tensor, so they must have one width, but that of {path!r} is {one} "
            f"and that of {different!r} is {other}; name those of one part of the model in target_modules, e.g. as a "
            "regular expression"
        )
    return Projections(
        width=next(iter(widths)),
        head_dim=heads.size,
        num_heads=heads.number,
        num_layers=len(rows),
        num_matrices=len(kinds),
        places=places,
    )


def _num_heads(path: str, side: int, heads: Heads) -> int:
    number, remainder = divmod(side, heads.size)
    if remainder or not number or heads.number % number:
        raise UsageError(
            f"{path!r} has {side} numbers on the side of the heads, which are not 1 to {heads.number} heads of "
            f"{heads.size} numbers, of a number that divides {heads.number}. Query, key and value in one layer are "
            "not known to LoRTA: take a LoRA there. If the model's heads are others, write e.g. "
            f"LortaConfig(num_heads={heads.number}, head_dim={heads.size})"
        )
    return number


def _split(path: str) -> tuple[str, str]:
    """Return the path of a layer of the model, and the rest."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    end = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[:end]), ".".join(parts[end:])


def _unknown(path: str) -> str:
    last = path.rpartition(".")[2]
    return (
        f"LoRTA adapts attention projections, and {path!r} has the name of none. If it is one, say where its heads "
        f"are: LortaConfig(heads_on_outputs=[{last!r}]) if it writes them as a query projection does, heads_on_inputs "
        "if it reads them as an output projection does. Leave it out otherwise"
    )
