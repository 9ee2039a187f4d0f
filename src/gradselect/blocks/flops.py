"""Cost of a step in floating-point operations, and the upper limit of the speed-up that follows from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from torch import nn
from torch.nn import Parameter

from gradselect.core import QUERIES_KEYS_VALUES, Block
from gradselect.usage import beginnings, parent

from .structure import KINDS, Layout

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2.0, 2.0, 2.0
"""FLOPs of a matrix product per entry of the matrix and token."""

FULL_STEP = FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT

_LAYER = re.compile(r"^(.*?\.)?layer\.\d+")  # the first: T5's layers hold a list called "layer" themselves

_INPUT_SIDE = frozenset(
    {*QUERIES_KEYS_VALUES, "wq", "wk", "wv"}
    | {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"}
    | {"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "wi_0", "wi_1"}
)
"""Names of modules that read the input of attention or of an MLP: side by side, none of them lies above another, and
all lie below the other modules there."""


class Depth(NamedTuple):
    """Depth at which a tensor is used: tensors of a larger one are nearer to the loss.

    Args:
        unit: stack, kind and number of a layer or of a component around the layers, as `Layout` orders them.
        stage: order within the unit. 0: before its first matrix.
    """

    unit: tuple[int, int, int]
    stage: int = 0

    @property
    def is_in_layer(self) -> bool:
        """True inside the layers."""
        return self.unit[1] == KINDS.index("layer")


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step, per token, for a given selection of blocks.

        2 N                  forward pass: N entries in matrices that are multiplied
        2 (entries above)    gradients of inputs: every matrix above the lowest selected tensor, the head among them
        2 (entries selected) gradients of weights

    A lookup (an `nn.Embedding`) costs nothing, a 1-D tensor nothing. An embedding that is tied to the head is
    multiplied there: selected, it costs the head's weight gradient, and its lookup forces the backward pass through all
    layers. Of a sliced linear layer the selected slices cost their own entries. Full fine-tuning costs 6 N.

    Factors that layers share, as LoRTA's, cost what each layer multiplies with them.

    Left out: attention's own products, elementwise work, the optimizer. In a layer norms count as used before its first
    matrix. Matrices lie above each other as they are registered, but for names that are known to read the same input
    ("q_proj" and "k_proj"). Experts count as if every token visited all of them.

    Figures of older result files follow 2 + 2 d + 2 (1 - s) instead, with d a share of layers and 1 - s a share of all
    weights: there an embedding counted as much as a layer of its size, and the head only through its weight gradient.

    Args:
        products: entries of each matrix that is multiplied, by depth; adapters included.
        depths: depth of the lowest tensor of each block.
        weights: entries of each block's matrices that are multiplied.
        num_adapted: entries of adapters among the products, which full fine-tuning would not have.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> cost = StepCost.of_model(model, gs.partition(model))
        >>> cost.relative_time(["layer.2"]), cost.relative_time(["layer.0", "layer.1", "layer.2"])
        (0.44..., 0.88...)
    """

    products: Mapping[Depth, int]
    depths: Mapping[str, Depth]
    weights: Mapping[str, int]
    num_adapted: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.products.values()))

    @classmethod
    def of_model(cls, model: nn.Module, blocks: Sequence[Block] | Mapping[str, Collection[str]]) -> Self:
        """Cost of a model's steps; parameters that no block holds take part in the forward pass.

        Args:
            model: any module, also on the meta device.
            blocks: blocks, or the names of the parameters of each, by name.
        """
        members = blocks if isinstance(blocks, Mapping) else {block.name: block.parameter_names for block in blocks}
        named = dict(model.named_parameters(remove_duplicate=False))
        modules = dict(model.named_modules(remove_duplicate=False))
        lookups = {name for name in named if isinstance(modules[parent(name)], nn.Embedding)}
        depths = _depths(model, named)
        shared = _shared_products(modules, depths)
        own = [name for name in _products(named, lookups) if named[name] not in shared]
        products = Counter[Depth]()
        for name in own:
            products[depths[name]] += _num_entries(named[name], modules[parent(name)])
        for uses in shared.values():
            products.update(uses)
        lowest: dict[Parameter, Depth] = {parameter: min(uses) for parameter, uses in shared.items()}
        for name, parameter in named.items():
            if parameter not in shared:
                lowest[parameter] = min(depths[name], lowest.get(parameter, depths[name]))
        entries = {named[name]: named[name].numel() for name in own}
        entries |= {parameter: uses.total() for parameter, uses in shared.items()}
        return cls(
            products=dict(products),
            depths={block: min(lowest[named[name]] for name in names) for block, names in members.items() if names},
            weights={block: sum(entries.get(named[name], 0) for name in names) for block, names in members.items()},
            num_adapted=sum(entries.get(each, 0) for each in _of_adapters(named, modules)),
        )

    @classmethod
    def of_blocks(cls, blocks: Sequence[Block]) -> Self:
        """Cost of the steps of a model that consists of these blocks, as far as their names and order tell it.

        "embedding" is a lookup unless it has the alias "head"; a block is one stage of its layer.
        """
        layers = list(dict.fromkeys(layer for block in blocks if (layer := layer_of(block.name)) is not None))
        depths: dict[str, Depth] = {}
        products: dict[Depth, int] = {}
        weights: dict[str, int] = {}
        for position, block in enumerate(blocks):
            layer = layer_of(block.name)
            kind = "layer" if layer else "embedding" if block.name.endswith("embedding") else "head"
            depths[block.name] = Depth((0, KINDS.index(kind), layers.index(layer) if layer else position))
            is_lookup = kind == "embedding" and "head" not in block.aliases
            weights[block.name] = 0 if is_lookup else sum(each.numel() for each in block.parameters if each.ndim > 1)
            unit = (1, 0, 0) if kind == "embedding" else depths[block.name].unit  # a tied head lies above all
            used = Depth(unit, stage=1)
            products[used] = products.get(used, 0) + weights[block.name]
        return cls(products=products, depths=depths, weights=weights)

    def input_gradients(self, trained: Collection[str], *, lowest: Depth | None = None) -> float:
        """FLOPs of the gradients of inputs if these blocks are trained, or if `lowest` is the lowest trained tensor."""
        if lowest is None:
            if not trained:
                return 0.0
            lowest = min(self.depths[name] for name in trained)
        return INPUT_GRADIENT * sum(entries for depth, entries in self.products.items() if depth > lowest)

    def weight_gradients(self, trained: Collection[str]) -> float:
        """FLOPs of the gradients of weights of these blocks."""
        return WEIGHT_GRADIENT * sum(self.weights[name] for name in trained)

    def backward(self, trained: Collection[str]) -> float:
        """FLOPs of the backward pass if these blocks are trained."""
        return self.input_gradients(trained) + self.weight_gradients(trained)

    def recomputed(self, lowest: Depth | None) -> float:
        """FLOPs of the layers that gradient checkpointing computes again: from that of `lowest` upwards."""
        if lowest is None:
            return 0.0
        above = [entries for depth, entries in self.products.items() if depth.is_in_layer and depth.unit >= lowest.unit]
        return FORWARD * sum(above)

    def relative(self, backward: float) -> float:
        """Time of a step with a backward pass of so many FLOPs, in units of a full step; 1 for a model of no matrix."""
        return (FORWARD * self.total + backward) / self.full if self.full else 1.0

    def relative_time(self, trained: Collection[str]) -> float:
        """Time of a step that trains these blocks, in units of a step of full fine-tuning."""
        return self.relative(self.backward(trained))

    @property
    def full(self) -> float:
        """FLOPs of a step of full fine-tuning, without adapters."""
        return FULL_STEP * (self.total - self.num_adapted)


def speed_up_limit(steps: Iterable[Collection[str]], cost: StepCost) -> float | None:
    """Upper limit of the speed-up over full fine-tuning: the inverse of the mean time of a step.

    Averages times and not speed-ups, as a clock does: a step of time 1 and one of time 0.5 give 1 / 0.75.

    Args:
        steps: blocks that had gradients in each step: the selected ones, or all in an explore step.
        cost: of the model and its blocks.

    Returns:
        The limit; None without a step.
    """
    times = [cost.relative_time(trained) for trained in steps]
    return len(times) / sum(times) if times else None


def layer_of(block: str) -> str | None:
    """Return the layer of a block: "layer.3" for "layer.3.self_attn.q_proj"; None outside the layers."""
    match = _LAYER.match(block)
    return None if match is None else match.group()


def _depths(model: nn.Module, named: Mapping[str, Parameter]) -> dict[str, Depth]:
    """Return the depth of each name of a parameter; a tied one has several."""
    layout = Layout(model, matrices=None)
    linears = {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}
    num_matrices = Counter(parent(name) for name, parameter in named.items() if parameter.ndim > 1)
    places: dict[str, tuple[str, str]] = {}
    for name, parameter in named.items():
        is_alone = num_matrices[parent(name)] == 1 or parent(name) in linears  # a sliced linear holds several
        if parameter.ndim > 1 or is_alone:
            places[name] = _place_in_layer(parent(name) if is_alone else name)
    above = {place[0]: -position for position, place in reversed([*enumerate(places.values())])}
    ordered = sorted(dict.fromkeys(places.values()), key=lambda place: (-above[place[0]], place[1] != ""))
    stages = {place: stage for stage, place in enumerate(ordered, start=1)}
    return {
        name: Depth(layout.place(name).rank[:3], stage=stages[places[name]] if name in places else 0) for name in named
    }


def _place_in_layer(path: str) -> tuple[str, str]:
    """Return the module that holds a matrix's module, and its own name; "" for all that read the input there.

    An adapter of a module stands where the module does.
    """
    for place in beginnings(path):
        above, _, name = place.rpartition(".")
        if name in _INPUT_SIDE:
            return above, ""
    above, _, name = path.rpartition(".")
    return above, name


def _products(named: Mapping[str, Parameter], lookups: Collection[str]) -> list[str]:
    """Return a name of each parameter that is multiplied; of a tied one, the last."""
    found = {parameter: name for name, parameter in named.items() if parameter.ndim > 1 and name not in lookups}
    return list(found.values())


def _shared_products(modules: Mapping[str, nn.Module], depths: Mapping[str, Depth]) -> dict[Parameter, Counter[Depth]]:
    """Return the entries of the matrices that parameters outside of a layer are multiplied as in it, by its depth."""
    found: dict[Parameter, Counter[Depth]] = {}
    for path, module in modules.items():
        # By attribute: the library does not import PEFT.
        if (products := getattr(module, "shared_products", None)) is None:
            continue
        depth = next(depth for name, depth in depths.items() if name.startswith(f"{path}."))
        for parameter, entries in products().items():
            found.setdefault(parameter, Counter())[depth] += entries
    return found


def _of_adapters(named: Mapping[str, Parameter], modules: Mapping[str, nn.Module]) -> set[Parameter]:
    """Return what PEFT has added to a model: what its layers and tuners hold beside the module that they wrap."""
    # By class name: the library does not import PEFT.
    kinds = {path: {kind.__name__ for kind in type(module).__mro__} for path, module in modules.items()}
    inner = {path: {"base_layer"} for path, kind in kinds.items() if "BaseTunerLayer" in kind}
    inner |= {path: {"model"} for path, kind in kinds.items() if "BaseTuner" in kind}
    return {
        parameter
        for name, parameter in named.items()
        if any(
            path in inner and name[len(path) + 1 :].partition(".")[0] not in inner[path]
            for path in beginnings(parent(name))
        )
    }


def _num_entries(parameter: Parameter, module: nn.Module) -> int:
    if not parameter.is_floating_point() and isinstance(module, nn.Linear):
        return module.in_features * module.out_features  # a quantised weight packs several entries into one number
    return parameter.numel()
