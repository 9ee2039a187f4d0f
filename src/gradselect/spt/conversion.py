"""Conversion of a model to what SPT trains of it, and back."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gradselect.entries import check_size, generator_of, resolve_budget, say_left_out
from gradselect.masks import FixedEntries, estimate_scores, salience
from gradselect.usage import UsageError, check_patterns, check_positive, check_whole, parent

from .candidates import candidates_of
from .choice import Candidate, Choice, choose, possible_choice
from .earlier import ADAPTER, earlier_choice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SPT:
    """Arguments of the optimizer of a converted model.

    Attributes:
        mask: the entries that train by a mask.
        always: names of the parameters that train whole: adapters, and vectors.
        choice: how each tensor trains.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> spt = gs.spt.convert(model, [torch.ones(2, 32)], budget=400, loss=loss, rank=2)
        >>> spt.choice.num_trained
        400
        >>> optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always, lr=1e-3)
    """

    mask: FixedEntries
    always: tuple[str, ...]
    choice: Choice


def convert(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int | None = None,
    density: float | None = None,
    rank: int = 8,
    matrix_share: float = 0.1,
    vector_share: float = 0.2,
    dropout: float = 0.1,
    among: Sequence[str] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    earlier: Mapping[str, Any] | None = None,
) -> SPT:
    r"""Choose what SPT trains of `model`, and put adapters on it, in place. This trains nothing.

    The sensitivity of an entry is its squared gradient, summed over batches:

        s = sum over batches of (dL/dw)^2,    L the mean loss of a batch

    A matrix of shape (m, n) whose most sensitive entries number at least `matrix_share` * r (m + n) gets a LoRA of
    rank r; a vector of n entries of which `vector_share` * n are among them trains whole; of other tensors the
    sensitive entries train. `gradselect.spt.choose` says which entries count as sensitive, so that `budget` entries
    train.

    From the paper and the authors' code: the sensitivity; 16 batches, the default of their script; the two rules and
    their shares; LoRA of rank 8 with B = 0, no scale, and a dropout of 0.1 on its input; frozen embeddings. Our
    choices: evaluation mode; linear layers and vectors of the repeated layers, and norms, as candidates; an exact
    search that stays within the budget, where the authors take the nearest of steps of 20,000 entries; what is left of
    the budget goes to further entries; no adapter that is as large as its matrix; no DropPath on the adapter's output.

    Call `convert` before building the optimizer, with `always=(*spt.always, "classifier.*")` for a new head. Call
    `fold` before using the model as a plain one.

    Args:
        model: with its weights loaded. Frozen parameters stay frozen.
        batches: for `model(**batch).loss`, on the model's device; iterated once.
        budget: number of entries to train, those of adapters included; those that `always` names beside are not.
        density: share of the candidates' entries, instead of `budget`.
        rank: rank of the adapters.
        matrix_share: share of an adapter's entries, in (0, 1]. The authors' 1 / alpha.
        vector_share: share of a vector's entries, in (0, 1]. The authors' 1 / beta.
        dropout: dropout on the input of the adapters, in [0, 1).
        among: names or globs of the candidate parameters. None: linear layers and vectors inside the repeated layers,
            and norms outside of them.
        loss: (model, batch) -> scalar, for other models and batches.
        seed: seed of the adapters' first values.
        earlier: to resume a training: the state_dict of its optimizer. What it trained is chosen again, without a look
            at the batches, even if the shares are others; if it does not tell, or budget, rank or candidates do not
            fit it, the choice is made anew.

    Raises:
        UsageError: PEFT is missing, a value is out of range, no such tensor, a budget of more entries than there are,
            no batch, or a loss that is not finite.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> spt = gs.spt.convert(model, [torch.ones(2, 32)], density=0.1, loss=loss, rank=2)
        >>> optimizer = gs.SparseOptimizer(model, mask=spt.mask, always=spt.always, lr=1e-3)
        >>> optimizer.close()  # after training
        >>> gs.spt.fold(model) == len(spt.choice.adapters)
        True

    Reference: He, Cai, Zhang, Tao, Zhuang, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", arXiv
        2303.08566, and the code of its authors.
    """
    _check_arguments(rank, matrix_share, vector_share, dropout, seed)
    check_size(budget=budget, density=density)
    among = None if among is None else check_patterns("among", among)
    shares = {"matrix_share": matrix_share, "vector_share": vector_share}
    candidates = candidates_of(model, among=among, rank=rank, **shares)
    if among is None:
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        say_left_out(trained, method="SPT")
    tensors = [candidate.tensor for candidate in candidates]
    limit = resolve_budget(tensors, budget=budget, density=density)
    choice = None if earlier is None else earlier_choice(earlier, candidates, budget=limit)
    if choice is None:
        scores = estimate_scores(salience.fisher, model=model, tensors=tensors, batches=batches, loss=loss)
        choice = choose(candidates, scores, budget=limit)
    if choice.num_trained == limit:
        logger.info("%s", choice.describe())
    else:
        logger.warning("%s: nothing else can train; raise rank, or name more tensors in among", choice.describe())
    if choice.adapters:
        _add_adapters(model, choice, rank=rank, dropout=dropout, seed=seed)
    return _parts(model, candidates, choice)


def forecast(
    model: nn.Module,
    *,
    with_adapters: bool,
    budget: int | None = None,
    density: float | None = None,
    rank: int = 8,
    dropout: float = 0.1,
    among: Sequence[str] | None = None,
    **shares: float,
) -> SPT:
    """Convert a model as `convert` might, without a look at batches, to plan its bytes and its time.

    The batches decide which matrices get an adapter. The most expensive case is one of two: as many adapters as the
    budget pays, or none, in which a mask needs the gradient of every candidate.

    Args:
        model: may be on the meta device.
        with_adapters: which of the two.
        budget: as for `convert`, like all that follow.
        density: as for `convert`.
        rank: as for `convert`.
        dropout: as for `convert`.
        among: as for `convert`.
        shares: `matrix_share` and `vector_share`.

    Raises:
        UsageError: as `convert` does.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
        >>> forecast(model, with_adapters=True, budget=400, rank=2).choice.adapters
        ('0.weight', '1.weight', '2.weight')
    """
    matrix_share, vector_share = shares.get("matrix_share", 0.1), shares.get("vector_share", 0.2)
    _check_arguments(rank, matrix_share, vector_share, dropout, 0)
    candidates = candidates_of(model, among=among, rank=rank, matrix_share=matrix_share, vector_share=vector_share)
    limit = resolve_budget([candidate.tensor for candidate in candidates], budget=budget, density=density)
    choice = possible_choice(candidates, budget=limit, with_adapters=with_adapters)
    if choice.adapters:
        _add_adapters(model, choice, rank=rank, dropout=dropout, seed=0)
    return _parts(model, candidates, choice)


def fold(model: nn.Module) -> int:
    """Merge the adapters of `convert` into their matrices, in place: the model is a plain one again.

    Close the optimizer first.

    Returns:
        Number of adapters.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> gs.spt.fold(torch.nn.Linear(4, 4))
        0
    """
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name, module in adapted.items():
        layer: Any = module
        layer.merge()
        layer.get_base_layer().weight.requires_grad_(True)  # only matrices that trained get an adapter
        setattr(model.get_submodule(parent(name)), name.rpartition(".")[2], layer.get_base_layer())
    if adapted and hasattr(model, "peft_config"):
        del model.peft_config
    return len(adapted)


def is_converted(model: nn.Module) -> bool:
    """Return True if `model` holds adapters of `convert`.

    Example:
        >>> is_converted(nn.Linear(4, 4))
        False
    """
    return any(map(_is_adapted, model.modules()))


def _check_arguments(rank: int, matrix_share: float, vector_share: float, dropout: float, seed: int) -> None:
    check_whole("rank", rank)
    check_positive("matrix_share", matrix_share, at_most=1, example=0.1)
    check_positive("vector_share", vector_share, at_most=1, example=0.2)
    check_whole("seed", seed, least=0)
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is outside [0, 1); write dropout=0.1")
    if find_spec("peft") is None:
        raise UsageError("SPT puts a LoRA of PEFT on some matrices, and PEFT is not installed; run pip install peft")


def _add_adapters(model: nn.Module, choice: Choice, *, rank: int, dropout: float, seed: int) -> None:
    """Put PEFT's LoRA layers around the chosen matrices. What trained before trains on, except those matrices."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [parent(name) for name in choice.adapters]
    is_transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, layers)),  # an expression for the whole name: nothing else matches
        fan_in_fan_out=is_transposed,
    )
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    devices = sorted({parameter.device.index for parameter in trainable if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        inject_adapter_in_model(config, model, ADAPTER)
    for parameter in trainable:
        parameter.requires_grad_(True)
    for name in layers:
        _begin(model.get_submodule(name), name, seed=seed)


def _begin(module: nn.Module, name: str, *, seed: int) -> None:
    """Draw A as LoRA does, with a generator of its own. B is zero already."""
    layer: Any = module
    weight = layer.lora_A[ADAPTER].weight
    if not weight.is_meta:
        drawn = torch.empty_like(weight, device="cpu", requires_grad=False)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator_of(seed=seed, step=0, name=name))
        weight.data.copy_(drawn)
    layer.train(layer.get_base_layer().training)
    layer.get_base_layer().weight.requires_grad_(False)


def _parts(model: nn.Module, candidates: Sequence[Candidate], choice: Choice) -> SPT:
    """Return what the optimizer needs, by the names that the parameters have now."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    now = {candidate.tensor.name: names[candidate.tensor.parameter] for candidate in candidates}
    adapters = tuple(name for name in names.values() if f".{ADAPTER}." in name and ".lora_" in name)
    entries = {now[name]: indices for name, indices in choice.entries.items()}
    always = (*adapters, *(now[name] for name in choice.whole))
    return SPT(mask=FixedEntries(entries=entries, about=choice.describe()), always=always, choice=choice)


def _is_adapted(module: nn.Module) -> bool:
    # By its parts, so that PEFT is not imported for a model that has none.
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
