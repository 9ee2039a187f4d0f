"""Structure of a model: its layers, and the components around them.

Only the structure of the module tree decides, never the class of the model. **Layers** are the children of the
outermost repeated containers; a model may have several such stacks (encoder and decoder). The rest is divided into
**components**: the topmost modules that hold no layer. A component is an embedding, a norm, a head or something else.

    LlamaForCausalLM
      model
        embed_tokens        a component: "embedding"
        layers              a stack
          0, 1, ...         its layers: "layer.0", "layer.1", ...
        norm                a component: "norm"
      lm_head               a component: "head"; if tied, the same tensor as embed_tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from torch import nn
from torch.nn import Parameter

from gradselect.core import is_list
from gradselect.usage import beginnings, join, parent

KINDS = ("embedding", "layer", "norm", "head", "other")


class Place(NamedTuple):
    """Block of a parameter, and the sort key of the block."""

    rank: tuple[int, int, int, int]  # stack, kind, number of the layer, 1 for the vectors of a layer
    block: str


class Stack(NamedTuple):
    """Repeated layers in one container."""

    path: str
    layers: Mapping[str, int]  # path of a layer -> its number
    composite: bool  # True if the layers consist of modules


class Layout:
    """Stacks and components of a model, found once.

    Args:
        model: any module.
        matrices: names of the matrices that divide the layers, by path of the module that holds them directly; None:
            layers stay whole.
        slices: name of the block inside its layer ("columns.0"), by name of a slice of a linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrices: Mapping[str, Sequence[str]] | None,
        slices: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.matrices = matrices
        self.slices = slices
        self.stacks = find_stacks(model)
        self.labels = labels_of([stack.path for stack in self.stacks])
        self.layers = {path: index for index, stack in enumerate(self.stacks) for path in stack.layers}
        self.above = {path for layer in self.layers for path in beginnings(layer)[:-1]}
        self.components: dict[str, list[Parameter]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.components.setdefault(self.component(name), []).append(parameter)
        inputs, outputs = (
            module_of_getter(model, "get_input_embeddings"),
            module_of_getter(model, "get_output_embeddings"),
        )
        modules = [(self.component(path), module) for path, module in model.named_modules(remove_duplicate=False)]
        self.embeddings = {
            component for component, module in modules if module is inputs or isinstance(module, nn.Embedding)
        }
        self.heads = {component for component, module in modules if module is outputs} or self.outermost_matrices()
        ends = [inputs, outputs] if hasattr(model, "get_output_embeddings") else inner_outputs(model)
        self.vocabulary = {each for module in ends if module is not None for each in module.parameters()}
        self.main = self.main_label(model, inputs)

    def place(self, name: str) -> Place:
        """Return the place of the parameter of this name."""
        component = self.component(name)
        if component in self.layers:
            return self.place_in_layer(component, name=name)
        kind, scope = self.kind(component, name=name), self.scope(component)
        if kind == "embedding" and any(self.scope(embedding) == "" for embedding in self.embeddings):
            scope = ""  # stacks that share one embedding share all of them: T5, BART
        around = -1 if kind == "embedding" else len(self.stacks)
        index = self.labels.index(scope) if scope in self.labels else around
        own_name = component.rpartition(".")[2]
        return Place((index, KINDS.index(kind), 0, 0), join(scope, own_name if kind == "other" else kind))

    def place_in_layer(self, layer: str, *, name: str) -> Place:
        """Return the place of a layer's parameter: in the block of the layer, of a slice, or of a matrix."""
        index = self.layers[layer]
        number = self.stacks[index].layers[layer]
        block = join(self.labels[index], f"layer.{number}")
        if self.matrices is None:
            return Place((index, KINDS.index("layer"), number, 0), block)
        if name in self.slices:
            return Place((index, KINDS.index("layer"), number, 0), f"{block}.{self.slices[name]}")
        beside = self.matrices.get(parent(name), ())
        if len(beside) != 1 and name not in beside:
            return Place((index, KINDS.index("layer"), number, 1), f"{block}.vectors")
        inside = (parent(name) if len(beside) == 1 else name).removeprefix(layer).removeprefix(".")
        return Place((index, KINDS.index("layer"), number, 0), join(block, inside))

    def component(self, path: str) -> str:
        """Return the topmost module or tensor on the way to `path` that holds no layer; for a layer, itself."""
        return next((beginning for beginning in beginnings(path) if beginning not in self.above), "")

    def scope(self, component: str) -> str:
        """Label of the one stack that the component stands beside; "" if there are several."""
        stacks = zip(self.stacks, self.labels, strict=True)
        near = [label for stack, label in stacks if parent(component) in ("", *beginnings(stack.path))]
        return near[0] if len(near) == 1 else ""

    def kind(self, component: str, *, name: str) -> str:
        """Kind of the component. Heads are tested before names, because a head may be called "unembed"."""
        if component in self.embeddings:
            return "embedding"
        if component in self.heads:
            return "head"
        own_name = component.rpartition(".")[2].lower()
        if "embed" in own_name or "emb" in own_name.split("_"):
            return "embedding"
        if component != name and all(parameter.ndim <= 1 for parameter in self.components[component]):
            return "norm"
        return "other"

    def main_label(self, model: nn.Module, inputs: nn.Module | None) -> str:
        """Label of the stack of the language model in a model that holds others too; "" if no single one is it.

        That is the stack nearest to the input embeddings, if the model names them. In an encoder-decoder model both
        stacks are the language model's.
        """
        if inputs is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return ""
        path = next((path for path, module in model.named_modules() if module is inputs), "")
        shared = [len(set(beginnings(path)) & set(beginnings(stack.path))) for stack in self.stacks]
        nearest = [label for label, count in zip(self.labels, shared, strict=True) if count == max(shared, default=0)]
        return nearest[0] if len(nearest) == 1 else ""

    def outermost_matrices(self) -> set[str]:
        """Return heads by their place: the outermost component with a matrix, the last of several; one in each scope.

        A component before the layers may lead into them, so it is no head. But if an embedding leads into them, a
        component outside the layers' own module is a head even there: some classifiers of transformers come first.
        """
        heads: dict[str, str] = {}
        for component, parameters in self.components.items():
            if component in self.layers:
                path = self.stacks[self.layers[component]].path
                inside = (path, parent(path)) if self.embeddings else ("", *beginnings(path))
                heads = {scope: head for scope, head in heads.items() if parent(head) not in inside}
            elif component not in self.embeddings and any(parameter.ndim > 1 for parameter in parameters):
                scope = self.scope(component)
                if scope not in heads or component.count(".") <= heads[scope].count("."):
                    heads[scope] = component
        return set(heads.values())


def find_stacks(model: nn.Module) -> list[Stack]:
    """Return the outermost containers of repeated layers; lists of bare linears count only if there are no others."""
    stacks = list(walk(model, path=""))
    return [stack for stack in stacks if stack.composite] or stacks


def walk(module: nn.Module, *, path: str) -> Iterator[Stack]:
    """Yield the outermost stacks at and below `module`, whose path is `path`."""
    layers = layers_of(module)
    if layers:
        numbers = {join(path, name): number for number, (name, _) in enumerate(layers)}
        yield Stack(path, numbers, composite=any(list(child.children()) for _, child in layers))
    else:
        for name, child in module.named_children():
            yield from walk(child, path=join(path, name))


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers in a container; none if it does not hold layers.

    In an `nn.ModuleList`, or an `nn.ModuleDict` with numbers as keys (torchtitan's), all children are layers if a class
    repeats (a hybrid model alternates two) or if there is only one child. An `nn.Sequential` may begin and end with
    other modules: its layers are the longest run of one class.
    """
    children = [item for item in module.named_modules(remove_duplicate=False) if item[0] and "." not in item[0]]
    classes = [type(child) for _, child in children if holds_parameters(child)]
    if is_list(module) and len(set(classes)) < max(2, len(classes)):
        return children if classes else []
    if isinstance(module, nn.Sequential):
        runs = [list(run) for _, run in groupby(children, key=lambda item: type(item[1]))]
        longest = max((run for run in runs if any(holds_parameters(child) for _, child in run)), key=len, default=[])
        return longest if len(longest) > 1 else []
    return []


def labels_of(paths: Sequence[str]) -> list[str]:
    """Return a label for each path: its shortest beginning that no other path has, without the part that all share.

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


def module_of_getter(model: nn.Module, name: str) -> nn.Module | None:
    """Return the result of `get_input_embeddings()` or `get_output_embeddings()`; None if the model has no such method.

    Called by name, because transformers is not imported here, and PEFT and torch.compile pass the call through.
    """
    getter = getattr(model, name, None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # raised by transformers for models of images or of speech
        return None


def inner_outputs(model: nn.Module) -> list[nn.Module]:
    """Return the output embeddings that models inside a model of the user's own name."""
    found = [module_of_getter(module, "get_output_embeddings") for module in model.modules()]
    return [each for each in found if each is not None]


def holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
