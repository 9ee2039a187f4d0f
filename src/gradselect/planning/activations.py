"""Bytes that autograd saves in a forward pass, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from gradselect.blocks import Layout, module_of_getter

from .meta_forward import Rows, run_on_meta


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Saved bytes of a forward pass, without weights and without what the loss saves.

    Args:
        whole: without gradient checkpointing.
        checkpointed: with it: inputs of layers, and all that is saved outside them.
        recomputed: most that one layer adds while it is computed again.
        in_flight: gradients of activations while the backward pass is in a layer; an estimate.
        hidden: width of the last layer's input.
        vocabulary: numbers in a row of logits.
        num_rows: rows of logits, one for each token, or for each example of a classifier.
        head_trains: True if the output embedding has a gradient.
        reaches_head: True if the logits have a gradient.
    """

    whole: int
    checkpointed: int
    recomputed: int
    in_flight: int
    hidden: int
    vocabulary: int
    num_rows: int
    head_trains: bool
    reaches_head: bool


class ActivationCounter:
    """Runs a model on the meta device and counts. Results are kept: a run takes about 0.1 seconds.

    Args:
        model: on the meta device, as it will be trained: in training mode, with its adapter if it gets one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers = [model.get_submodule(path) for path in Layout(model, matrices=None).layers]
        self._known: dict[tuple[frozenset[str], Rows], Activations] = {}

    def count(self, trained: Collection[str], rows: Rows) -> Activations:
        """Count for the case that the parameters of these names have a gradient.

        Raises:
            UsageError: the model does not run on the meta device.
        """
        key = frozenset(trained), rows
        if key not in self._known:
            with _only_training(self.model, key[0]):
                self._known[key] = self._count(rows)
        return self._known[key]

    def _count(self, rows: Rows) -> Activations:
        saved = _SavedTensors(self.model)
        with saved.collecting(self._layers):
            logits = run_on_meta(self.model, rows)
        head = module_of_getter(self.model, "get_output_embeddings")
        itemsize = next(self.model.parameters()).element_size()
        passes = [layer for layer in saved.layers if layer.has_gradient]
        kept = saved.outside | {key: tensor for layer in passes for key, tensor in layer.inputs.items()}
        inside = {key: tensor for layer in saved.layers for key, tensor in layer.saved.items()}
        added = [{key: layer.saved[key] for key in layer.saved.keys() - kept.keys()} for layer in passes]
        return Activations(
            whole=_num_bytes(saved.outside | inside),
            checkpointed=_num_bytes(kept),
            recomputed=max(map(_num_bytes, added), default=0),
            in_flight=max((layer.in_flight(itemsize) for layer in passes), default=0),
            hidden=saved.layers[-1].stream.shape[-1] if saved.layers else 0,
            vocabulary=logits.shape[-1],
            num_rows=logits.numel() // logits.shape[-1],
            head_trains=head is not None and any(parameter.requires_grad for parameter in head.parameters()),
            reaches_head=logits.requires_grad,
        )


Storages = dict[int, Tensor]
"""One tensor of each storage. It holds the storage, so that no other tensor gets the same key."""


@dataclass(kw_only=True)
class _LayerPass:
    """One call of a layer: its inputs by storage, and what it saves."""

    inputs: Storages
    saved: Storages = field(default_factory=dict)
    has_gradient: bool = False

    @property
    def stream(self) -> Tensor:
        """The residual stream, which layers take first."""
        return next(iter(self.inputs.values()))

    def in_flight(self, itemsize: int) -> int:
        """Three gradients of the widest tensor and two of the input, or four of the input in float32 in a norm."""
        width = self.stream.shape[-1]
        tokens = self.stream.numel() // width
        # Masks have four axes; scores of attention have more rows than there are tokens.
        widths = [x.shape[-1] for x in self.saved.values() if x.ndim in (2, 3) and x.numel() == tokens * x.shape[-1]]
        return tokens * max((3 * max(widths, default=0) + 2 * width) * itemsize, 4 * width * 4)


class _SavedTensors:
    """Collects what autograd saves, inside layers and outside them.

    Args:
        model: its parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outside: Storages = {}
        self.layers: list[_LayerPass] = []
        self._open: list[_LayerPass] = []
        self._weights = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @contextmanager
    def collecting(self, layers: Collection[nn.Module]) -> Iterator[None]:
        """Collect while the context is open."""
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._leave))
            stack.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._weights:
            storages = self._open[-1].saved if self._open else self.outside
            storages.setdefault(_key(tensor), tensor)
        return tensor

    def _enter(self, layer: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        self._open.append(_LayerPass(inputs={_key(tensor): tensor for tensor in _tensors((arguments, options))}))

    def _leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        ended = self._open.pop()
        ended.has_gradient = any(tensor.requires_grad for tensor in _tensors(output))
        self.layers.append(ended)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _num_bytes(storages: Storages) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@contextmanager
def _only_training(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Give these parameters alone a gradient, and put it back."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        _set_trainable(model, names.__contains__)
        yield
    finally:
        _set_trainable(model, before.__getitem__)


def _set_trainable(model: nn.Module, trains: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
