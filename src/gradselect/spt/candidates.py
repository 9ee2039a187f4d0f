"""The tensors of a model that SPT may train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradselect.blocks import Layout
from gradselect.entries import MaskTensor, matching_tensors
from gradselect.parallel import is_dtensor
from gradselect.slices import check_whole_layers
from gradselect.usage import UsageError, parent

from .choice import Candidate


def candidates_of(
    model: nn.Module, *, among: Sequence[str] | None, rank: int, matrix_share: float, vector_share: float
) -> list[Candidate]:
    """Return the candidates in model order; `convert` explains the arguments.

    Raises:
        UsageError: there is none, a pattern matches nothing or another kind of tensor, or the model cannot
            be converted.
    """
    tensors = _trainable(model)
    if among is None:
        layout = Layout(model, matrices=None)
        selected = [tensor for tensor in tensors if _is_default(layout, tensor)]
    else:
        selected = list(matching_tensors(tensors, among))
        if unknown := [tensor for tensor in selected if not (_is_matrix(tensor) or _is_vector(tensor))]:
            first = unknown[0]
            raise UsageError(
                f"among: {first.name!r}, of shape {tuple(first.parameter.shape)} in a {type(first.module).__name__}, "
                "is neither the matrix of a linear layer nor a vector; leave it out, or train it whole with the "
                f"optimizer's always=({first.name!r},)"
            )
    if not selected:
        raise UsageError(
            f"SPT finds no linear layer and no vector in repeated layers of {type(model).__name__}; name some, e.g. "
            'among=("encoder.up.weight",)'
        )
    return [_candidate(tensor, rank=rank, shares=(matrix_share, vector_share)) for tensor in selected]


def candidate_names(model: nn.Module, *, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the candidates, of which `convert` takes the gradients.

    Example:
        >>> candidate_names(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))))
        ('0.weight', '1.weight')
    """
    found = candidates_of(model, among=among, rank=1, matrix_share=1.0, vector_share=1.0)
    return tuple(candidate.tensor.name for candidate in found)


def _trainable(model: nn.Module) -> list[MaskTensor]:
    check_whole_layers(model, to="gs.spt.convert")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        if is_dtensor(parameter):
            raise UsageError(
                f"{name!r} is sharded, and SPT runs the model outside training; call gs.spt.convert before fully_shard"
            )
        if getattr(parameter, "gradselect_owner", None) is not None:
            raise UsageError(
                f"{name!r} is trained by an optimizer; call gs.spt.convert before building one, or close() that one"
            )
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UsageError(
            f"{type(model).__name__} holds a LoRA already, and SPT adds its own; merge that one first, e.g. "
            "model = model.merge_and_unload(), or gs.spt.fold(model)"
        )
    return [MaskTensor(name, parameter, model.get_submodule(parent(name))) for name, parameter in named]


def _is_default(layout: Layout, tensor: MaskTensor) -> bool:
    if layout.component(tensor.name) in layout.layers:
        return _is_matrix(tensor) or _is_vector(tensor)
    # Outside the layers only norms: the bias of a patch embedding or of a head is no candidate.
    weight = getattr(tensor.module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def _is_matrix(tensor: MaskTensor) -> bool:
    # Conv1D is GPT-2's linear layer, by name because the library does not import transformers.
    is_linear = isinstance(tensor.module, nn.Linear) or type(tensor.module).__name__ == "Conv1D"
    return tensor.parameter.ndim == 2 and is_linear


def _is_vector(tensor: MaskTensor) -> bool:
    return tensor.parameter.ndim == 1


def _candidate(tensor: MaskTensor, *, rank: int, shares: tuple[float, float]) -> Candidate:
    matrix_share, vector_share = shares
    if _is_vector(tensor):
        return Candidate(tensor=tensor, form="whole", cost=tensor.numel, share=vector_share)
    cost = rank * sum(tensor.parameter.shape)
    # A subclass may use its weight without calling forward, as torch's attention does with out_proj: an adapter beside
    # it would do nothing.
    is_plain = type(tensor.module) is nn.Linear or type(tensor.module).__name__ == "Conv1D"
    form = "adapter" if is_plain and cost < tensor.numel else None
    return Candidate(tensor=tensor, form=form, cost=cost, share=matrix_share)
