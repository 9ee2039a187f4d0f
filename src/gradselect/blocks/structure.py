"""What stands where in a model: its layers, and what is around them.

The structure of the module tree decides, never the class of the model. **Layers** are the children of the outermost
repeated containers; a model may have several such stacks (encoder and decoder). What stands outside the layers is cut
into **units**: the topmost modules that hold no layer. A unit is an embedding, a norm, a head or something else.

    LlamaForCausalLM
      model
        embed_tokens        a unit: "embedding"
        layers              a stack
          0, 1, ...         its layers: "layer.0", "layer.1", ...
        norm                a unit: "norm"
      lm_head               a unit: "head"; where it is tied, the same tensor as embed_tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import nn
from torch.nn import Parameter

from gradselect.usage import beginnings, join, parent

KINDS = ("embedding", "layer", "norm", "head", "other")


class Place(NamedTuple):
    """The block of a parameter, and what orders the blocks."""

    rank: tuple[int, int, int, int]  # the stack, the kind, the number of the layer, whether it is the rest of a layer
    block: str


class Stack(NamedTuple):
    """Repeated layers in one container."""

    path: str
    layers: Mapping[str, int]  # path of a layer -> its number
    composite: bool  # whether the layers consist of modules


class Layout:
    """The stacks and the units of a model, read once.

    Args:
        model: any module.
        matrices: names of the matrices that divide the layers, by the path of the module that holds them itself; None
            leaves the layers whole.
    """

    def __init__(self, model: nn.Module, *, matrices: Mapping[str, Sequence[str]] | None) -> None:
        self.matrices = matrices
        self.stacks = find_stacks(model)
        self.labels = labels_of([stack.path for stack in self.stacks])
        self.layers = {path: index for index, stack in enumerate(self.stacks) for path in stack.layers}
        self.above = {path for layer in self.layers for path in beginnings(layer)[:-1]}
        self.units: dict[str, list[Parameter]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.units.setdefault(self.unit(name), []).append(parameter)
        inputs, outputs = ask(model, "get_input_embeddings"), ask(model, "get_output_embeddings")
        modules = [(self.unit(path), module) for path, module in model.named_modules(remove_duplicate=False)]
        self.embeddings = {unit for unit, module in modules if module is inputs or isinstance(module, nn.Embedding)}
        self.heads = {unit for unit, module in modules if module is outputs} or self.outermost_matrices()

    def place(self, name: str) -> Place:
        """Where the parameter of this name stands."""
        unit = self.unit(name)
        if unit in self.layers:
            return self.place_in_layer(unit, name=name)
        kind, scope = self.kind(unit, name=name), self.scope(unit)
        if kind == "embedding" and any(self.scope(embedding) == "" for embedding in self.embeddings):
            scope = ""  # stacks that share an embedding share all of it: T5, BART
        around = -1 if kind == "embedding" else len(self.stacks)
        index = self.labels.index(scope) if scope in self.labels else around
        own_name = unit.rpartition(".")[2]
        return Place((index, KINDS.index(kind), 0, 0), join(scope, own_name if kind == "other" else kind))

    def place_in_layer(self, layer: str, *, name: str) -> Place:
        """Where a parameter of a layer stands: with all of the layer, or with the one matrix of its module."""
        index = self.layers[layer]
        number = self.stacks[index].layers[layer]
        block = join(self.labels[index], f"layer.{number}")
        if self.matrices is None:
            return Place((index, KINDS.index("layer"), number, 0), block)
        beside = self.matrices.get(parent(name), ())
        if len(beside) != 1 and name not in beside:
            return Place((index, KINDS.index("layer"), number, 1), f"{block}.vectors")
        inside = (parent(name) if len(beside) == 1 else name).removeprefix(layer).removeprefix(".")
        return Place((index, KINDS.index("layer"), number, 0), join(block, inside))

    def unit(self, path: str) -> str:
        """The topmost module or tensor on the way to `path` that holds no layer below it; a layer is its own unit."""
        return next((beginning for beginning in beginnings(path) if beginning not in self.above), "")

    def scope(self, unit: str) -> str:
        """Label of the one stack that the unit stands beside; "" if there are several."""
        stacks = zip(self.stacks, self.labels, strict=True)
        near = [label for stack, label in stacks if parent(unit) in ("", *beginnings(stack.path))]
        return near[0] if len(near) == 1 else ""

    def kind(self, unit: str, *, name: str) -> str:
        """What the unit is. A head is known before the name is looked at: it may be called "unembed"."""
        if unit in self.embeddings:
            return "embedding"
        if unit in self.heads:
            return "head"
        own_name = unit.rpartition(".")[2].lower()
        if "embed" in own_name or "emb" in own_name.split("_"):
            return "embedding"
        if unit != name and all(parameter.ndim <= 1 for parameter in self.units[unit]):
            return "norm"
        return "other"

    def outermost_matrices(self) -> set[str]:
        """Heads by their place: the outermost unit with a matrix, and of several the last; one in each scope.

        What stands before the layers may lead into them, so it is no head. But where an embedding does that, a unit
        outside the layers' own module is one in spite of its place: some classifiers of transformers come first.
        """
        heads: dict[str, str] = {}
        for unit, parameters in self.units.items():
            if unit in self.layers:
                path = self.stacks[self.layers[unit]].path
                inside = (path, parent(path)) if self.embeddings else ("", *beginnings(path))
                heads = {scope: head for scope, head in heads.items() if parent(head) not in inside}
            elif unit not in self.embeddings and any(parameter.ndim > 1 for parameter in parameters):
                scope = self.scope(unit)
                if scope not in heads or unit.count(".") <= heads[scope].count("."):
                    heads[scope] = unit
        return set(heads.values())


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost containers of repeated layers. Lists of bare linears and the like count if there are no others."""
    stacks = list(walk(model, path=""))
    return [stack for stack in stacks if stack.composite] or stacks


def walk(module: nn.Module, *, path: str) -> Iterator[Stack]:
    """The outermost stacks at and below `module`, which stands at `path`."""
    layers = layers_of(module)
    if layers:
        numbers = {join(path, name): number for number, (name, _) in enumerate(layers)}
        yield Stack(path, numbers, composite=any(list(child.children()) for _, child in layers))
    else:
        for name, child in module.named_children():
            yield from walk(child, path=join(path, name))


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers that a container holds; none if it is not a container of layers.

    An `nn.ModuleList` holds peers: all are layers if a class repeats (a hybrid model alternates two) or if there is but
    one. An `nn.Sequential` may begin and end with other things: its layers are the longest run of one class.
    """
    children = [item for item in module.named_modules(remove_duplicate=False) if item[0] and "." not in item[0]]
    classes = [type(child) for _, child in children if holds_parameters(child)]
    if isinstance(module, nn.ModuleList) and len(set(classes)) < max(2, len(classes)):
        return children if classes else []
    if isinstance(module, nn.Sequential):
        runs = [list(run) for _, run in groupby(children, key=lambda item: type(item[1]))]
        longest = max((run for run in runs if any(holds_parameters(child) for _, child in run)), key=len, default=[])
        return longest if len(longest) > 1 else []
    return []


def labels_of(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: of each the shortest beginning that is no other's, less what all share.

    >>> labels_of(["model.encoder.layers", "model.decoder.layers"])
    ['encoder', 'decoder']
    >>> labels_of(["model.layers"])
    ['']
    """
    if len(paths) == 1:
        return [""]
    known = [beginnings(path) for path in paths]
    shared = [beginning for beginning in known[0] if all(beginning in each for each in known)] if known else []
    counts = [[sum(beginning in other for other in known) for beginning in each] for each in known]
    own = [each[count.index(1)] for each, count in zip(known, counts, strict=True)]
    return [label.removeprefix(f"{shared[-1]}." if shared else "") for label in own]


def ask(model: nn.Module, method: str) -> nn.Module | None:
    """What the model's `get_input_embeddings()` or `get_output_embeddings()` answers; None if it has no such method.

    By name, not by class: transformers is not imported here, and PEFT and torch.compile hand the call through.
    """
    getter = getattr(model, method, None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # the answer of transformers for models of images or of speech
        return None


def holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
