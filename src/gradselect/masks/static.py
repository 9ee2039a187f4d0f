"""StaticMask: the entries of largest salience, selected once or every n steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from gradselect.entries import (
    AbstractCompactMask,
    Choice,
    FromWeights,
    GlobalTopK,
    Indices,
    MaskTensor,
    Shards,
    TopOfGradient,
    check_size,
    chunk_length,
    generator_of,
    resolve_budget,
    share_out,
)
from gradselect.parallel import is_dtensor, local_part, local_start
from gradselect.usage import UsageError, check_one_of, check_whole

from . import salience as saliences
from .calibration import Batch, Loss, Probe, Scores, batch_of_ones, model_loss, widened
from .salience import AbstractSalience, GradientSalience, ModelSalience, WeightSalience

logger = logging.getLogger(__name__)

ChunkScores = Callable[[MaskTensor], Iterator[Tensor]]
"""(tensor) -> scores of its entries, flat, in chunks."""


@final
@dataclass(eq=False, kw_only=True)
class StaticMask(AbstractCompactMask):
    r"""Select the B entries of largest salience at step 0, and again every n steps if `refresh_every` is given.

    A salience of gradients reads:

        batches=None    the gradient of the step that selects: no extra cost
        batches=[...]   these batches, before the step: a forward and a backward pass each, with the gradients of all
                        tensors in memory meanwhile; less noise than one batch

    Entries that stay keep their moments and their age. Ties go to the earlier tensor, then to the lower index. A
    refresh scores the current weights; `random` draws again.

    Args:
        salience: one of `gradselect.salience`. Default `gradient`, the best in the paper's comparison.
        budget: number of entries to train, B.
        density: share of the entries, instead of `budget`: B = max(1, round(density * entries)).
        scope: "global": the B best of all tensors together. "tensor": B is split by the sizes of the tensors first, so
            a small tensor may get none. Default "global", our choice: the paper compares both.
        refresh_every: n, steps between two selections. None: select only once, best in the paper.
        batches: batches to estimate from: keyword arguments of the model, on its device, in an iterable that can be
            iterated again. They hold labels, which `synflow` leaves out: its batches replace the input of ones.
        loss: (model, batch) -> scalar. Default `model(**batch).loss`.
        seed: seed of `random`.
        among: names or globs of the candidate parameters. None: all.

    Raises:
        UsageError: a value out of range; `grasp` without batches, a salience of weights with batches; at `bind`, a
            budget of more entries than there are; at a selection, no batch, or one whose loss is not finite.

    Example:
        >>> import gradselect as gs
        >>> speft = gs.StaticMask(density=0.01)
        >>> pafi = gs.StaticMask(salience=gs.salience.smallest_magnitude, budget=320_000)

    Reference: Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", arXiv
    2412.13488.
    """

    salience: AbstractSalience = saliences.gradient
    budget: int | None = None
    density: float | None = None
    scope: Literal["global", "tensor"] = "global"
    refresh_every: int | None = None
    batches: Iterable[Batch] | None = None
    loss: Loss | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_salience(self.salience)
        check_size(budget=self.budget, density=self.density)
        check_one_of("scope", self.scope, ("global", "tensor"))
        if self.refresh_every is not None:
            check_whole("refresh_every", self.refresh_every)
        check_whole("seed", self.seed, least=0)
        check_batches(self.salience, batches=self.batches, loss=self.loss)

    def start(self) -> None:
        if any(is_dtensor(tensor.parameter) for tensor in self.tensors) and self._needs_model():
            raise UsageError(
                f"{self.salience.name} from batches runs the model outside training, which fully_shard and replicate "
                "do not allow; leave batches out and use a salience of weights or of the step's own gradient, e.g. "
                "StaticMask(salience=gradselect.salience.gradient, density=0.01)"
            )
        budget = resolve_budget(self.tensors, budget=self.budget, density=self.density)
        self._counts = budget if self.scope == "global" else share_out(self.tensors, budget)

    def choice(self, step: int, num_chosen: int) -> Choice | None:
        # An empty set means that step 0 had no usable gradient: select in a later step.
        is_due = num_chosen == 0 if self.refresh_every is None else num_chosen == 0 or step % self.refresh_every == 0
        if not is_due:
            return None
        if isinstance(self.salience, GradientSalience) and self.batches is None:
            return TopOfGradient(self._counts, replace=True)
        return FromWeights()

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        assert isinstance(self.salience, GradientSalience)
        return self.salience.score(widened(weight), widened(gradient))

    @torch.no_grad()
    def choose(self, step: int, model: nn.Module) -> Indices:
        return best_entries(self.tensors, self._counts, self._scores(step, model))

    def settings(self) -> dict[str, Any]:
        """Return the settings of the mask; `batches` becomes True or False, `loss` is left out."""
        settings = super().settings() | {"salience": self.salience.name, "batches": self.batches is not None}
        del settings["loss"]
        return settings

    def _needs_model(self) -> bool:
        return self.batches is not None or isinstance(self.salience, ModelSalience)

    def _scores(self, step: int, model: nn.Module) -> ChunkScores:
        if isinstance(self.salience, WeightSalience):
            salience = self.salience
            return lambda tensor: weight_scores(salience, tensor, seed=self.seed, step=step)
        assert isinstance(self.salience, GradientSalience | ModelSalience)
        batches = [batch_of_ones(model)] if self.batches is None else self.batches
        scores = estimate_scores(self.salience, model=model, tensors=self.tensors, batches=batches, loss=self.loss)
        return lambda tensor: iter(scores[tensor.name].reshape(-1).split(chunk_length(tensor.parameter)))


def estimate_scores(
    salience: GradientSalience | ModelSalience,
    *,
    model: nn.Module,
    tensors: Sequence[MaskTensor],
    batches: Iterable[Batch],
    loss: Loss | None = None,
) -> Scores:
    """Return the scores of a salience over batches, by tensor name; -inf in tensors that no batch reaches.

    The model stays as it is, and runs in evaluation mode.

    Args:
        salience: one that runs the model.
        model: any module.
        tensors: its parameters to score.
        batches: keyword arguments of the model, on its device.
        loss: (model, batch) -> scalar. Default `model(**batch).loss`.

    Raises:
        UsageError: there is no batch, a loss is not finite, or the batches reach none of the tensors.

    Example:
        >>> from gradselect.entries import MaskTensor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> tensors = [MaskTensor(name="weight", parameter=layer.weight, module=layer)]
        >>> batch = {"input": torch.tensor([[1.0, 2.0]])}
        >>> loss = lambda model, batch: model(**batch).sum()
        >>> estimate_scores(saliences.fisher, model=layer, tensors=tensors, batches=[batch], loss=loss)
        {'weight': tensor([[1., 4.]])}
    """
    probe = Probe(model=model, tensors=tensors, batches=batches, loss=loss or model_loss)
    scores = salience.estimate(probe)
    if lost := [tensor.name for tensor in tensors if tensor.name not in probe.reached]:
        if len(lost) == len(tensors):
            raise UsageError(
                f"the batches reach none of the {len(lost)} tensors that the mask selects from ({lost[0]}, ...); "
                "name others in among=..."
            )
        for name in lost:
            scores[name].fill_(-math.inf)  # never selected
        logger.warning(
            "the batches reach no entry of %d of %d tensors, which are left out: %s",
            *(len(lost), len(tensors), ", ".join(lost[:6]) + (", ..." if len(lost) > 6 else "")),
        )
    return scores


def weight_scores(salience: WeightSalience, tensor: MaskTensor, *, seed: int, step: int) -> Iterator[Tensor]:
    """Yield scores of this rank's part of the tensor, chunk by chunk. Each tensor has its own generator."""
    weight = local_part(tensor.parameter).detach().reshape(-1)
    generator = generator_of(seed=seed, step=step, name=tensor.name)
    length = chunk_length(weight)
    if not salience.draws or weight.numel() == tensor.numel:
        yield from (salience.score(chunk, generator) for chunk in weight.split(length))
        return
    # Draw for the entries of all ranks: this rank's part then gets the same numbers as in one process.
    first = local_start(tensor.parameter, name=tensor.name)
    for start in range(0, tensor.numel, length):
        scores = salience.score(weight.new_zeros(min(length, tensor.numel - start)), generator)
        yield scores[max(0, first - start) : max(0, first + weight.numel() - start)]


def best_entries(tensors: Sequence[MaskTensor], counts: int | Mapping[str, int], scores: ChunkScores) -> Indices:
    """Return the entries of largest score: `counts` over all tensors together, or in each.

    Returns:
        By name the entries that this rank holds, as indices in the whole tensor: int64, ascending, on its device.
    """
    parameters = {tensor.name: tensor.parameter for tensor in tensors}
    shards = Shards(parameters)
    top_k = GlobalTopK(tuple(parameters), shards, counts)
    for position, tensor in enumerate(tensors):
        offset = 0
        for chunk in scores(tensor):
            top_k.top(tensor.name).add(chunk, position=position, offset=offset)
            offset += chunk.numel()
    return {
        name: shards.to_whole(name, indices).to(parameters[name].device)
        for name, (indices, _) in top_k.result().items()
        if indices.numel()
    }


def check_salience(salience: object) -> None:
    """Refuse a salience that is not one of `gradselect.salience`.

    Raises:
        UsageError: names the saliences.
    """
    if not isinstance(salience, AbstractSalience):
        known = sorted(value.name for value in vars(saliences).values() if isinstance(value, AbstractSalience))
        raise UsageError(
            f"salience={salience!r} is not a salience; write e.g. salience=gradselect.salience.gradient, or another of "
            f"{', '.join(known)}"
        )


def check_batches(salience: AbstractSalience, *, batches: Iterable[Batch] | None, loss: Loss | None) -> None:
    """Refuse batches or a loss that the salience does not use, and missing ones that it needs.

    Raises:
        UsageError: says what to change.
    """
    if batches is None and salience.needs_batches:
        raise UsageError(f"{salience.name} needs batches; write e.g. batches=[next(iter(loader))]")
    if batches is not None and isinstance(salience, WeightSalience):
        raise UsageError(f"{salience.name} reads weights only; leave batches out")
    if loss is not None and (batches is None or not salience.has_loss):
        raise UsageError(f"loss needs batches, and {salience.name} uses none here; leave loss out")
    if batches is not None and isinstance(batches, Iterator):
        raise UsageError(
            f"batches={batches!r} can be iterated only once, but a refresh and a resumed run select again; "
            "write batches=list(...)"
        )
