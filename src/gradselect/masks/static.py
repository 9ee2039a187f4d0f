"""StaticMask: the most salient entries, chosen once, or anew every so many steps."""

from __future__ import annotations

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
from gradselect.parallel import first_index, is_dtensor, local_part
from gradselect.usage import UsageError, check_one_of, check_whole

from . import salience as saliences
from .calibration import Batch, Loss, Probe, model_loss, widened
from .salience import AbstractSalience, GradientSalience, WeightSalience

ChunkScores = Callable[[MaskTensor], Iterator[Tensor]]
"""Scores of a tensor's entries, flat, in several pieces."""


@final
@dataclass(eq=False, kw_only=True)
class StaticMask(AbstractCompactMask):
    r"""The B entries of largest salience. They are chosen at step 0 and, if asked for, at every n-th step again.

    What a salience of gradients is read from:

        batches=None    the gradient of the very step at which the entries are chosen: costs nothing
        batches=[...]   these batches, before the step: one forward and backward pass each, with the gradients of all
                        tensors in memory for that time; less noise than one batch has

    Where entries are chosen again, those that stay keep their moments and their age. Ties go to the earlier tensor,
    then to the lower index. The salience is of the weights as they are then, except `random`, which draws again.

    Args:
        salience: one of `gradselect.salience`. Default `gradient`, the best of the paper's comparison.
        budget: entries to train, B.
        density: share of the entries, instead of `budget`: B = max(1, round(density * entries)).
        scope: "global": the B best of all tensors together; "tensor": B is dealt out by the tensors' sizes first, so
            that a small tensor may get none. The default "global" is our choice: the paper compares both.
        refresh_every: n, steps after which entries are chosen again; None: never, best in the paper.
        batches: what to estimate from; an iterable that can be gone through again, of keyword arguments of the model on
            its device. With labels, but for `synflow`, where they are optional and stand in for an input of ones.
        loss: from model and batch to the loss; default `model(**batch).loss`.
        seed: of `random`.
        among: names or globs of parameters to choose from; None: all.

    Raises:
        UsageError: a value out of its range; `grasp` without batches, a salience of weights with batches; when bound, a
            budget of more entries than there are; when choosing, no batch, or one whose loss is not finite.

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
                f"{self.salience.name} from batches runs the model by itself, which fully_shard and replicate do not "
                "let it; leave batches out and take a salience of weights or of the step's own gradient, e.g. "
                "StaticMask(salience=gradselect.salience.gradient, density=0.01)"
            )
        budget = resolve_budget(self.tensors, budget=self.budget, density=self.density)
        self._counts = budget if self.scope == "global" else share_out(self.tensors, budget)

    def choice(self, step: int, num_chosen: int) -> Choice | None:
        # Without a single entry step 0 saw no gradient that counts: it is made up for.
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
        """As of any mask; of the batches only whether there are any."""
        settings = super().settings() | {"salience": self.salience.name, "batches": self.batches is not None}
        del settings["loss"]
        return settings

    def _needs_model(self) -> bool:
        return self.batches is not None or isinstance(self.salience, saliences.ModelSalience)

    def _scores(self, step: int, model: nn.Module) -> ChunkScores:
        if isinstance(self.salience, WeightSalience):
            salience = self.salience
            return lambda tensor: weight_scores(salience, tensor, seed=self.seed, step=step)
        assert isinstance(self.salience, GradientSalience | saliences.ModelSalience)
        batches = [saliences.batch_of_ones(model)] if self.batches is None else self.batches
        probe = Probe(model=model, tensors=self.tensors, batches=batches, loss=self.loss or model_loss)
        scores = self.salience.estimate(probe)
        return lambda tensor: iter(scores[tensor.name].reshape(-1).split(chunk_length(tensor.parameter)))


def weight_scores(salience: WeightSalience, tensor: MaskTensor, *, seed: int, step: int) -> Iterator[Tensor]:
    """Scores of the entries that this process holds, chunk by chunk, from a generator of the tensor's own."""
    weight = local_part(tensor.parameter).detach().reshape(-1)
    generator = generator_of(seed=seed, step=step, name=tensor.name, device=weight.device)
    length = chunk_length(weight)
    if not salience.draws or weight.numel() == tensor.numel:
        yield from (salience.score(chunk, generator) for chunk in weight.split(length))
        return
    # As in one process: what the others' entries draw is drawn here too.
    first = first_index(tensor.parameter, name=tensor.name)
    for start in range(0, tensor.numel, length):
        drawn = salience.score(weight.new_zeros(min(length, tensor.numel - start)), generator)
        yield drawn[max(0, first - start) : max(0, first + weight.numel() - start)]


def best_entries(tensors: Sequence[MaskTensor], counts: int | Mapping[str, int], scores: ChunkScores) -> Indices:
    """Indices of the entries of largest score: `counts` over all tensors together, or in each.

    Returns:
        By name indices in the whole tensor, of entries that this process holds; int64, ascending, on its device.
    """
    parameters = {tensor.name: tensor.parameter for tensor in tensors}
    shards = Shards(parameters)
    contest = GlobalTopK(tuple(parameters), shards, counts)
    for rank, tensor in enumerate(tensors):
        offset = 0
        for chunk in scores(tensor):
            contest.top(tensor.name).offer(chunk, rank=rank, offset=offset)
            offset += chunk.numel()
    return {
        name: shards.in_whole(name, chosen).to(parameters[name].device)
        for name, (chosen, _) in contest.result().items()
        if chosen.numel()
    }


def check_salience(salience: object) -> None:
    """It is one of the module's.

    Raises:
        UsageError: otherwise.
    """
    if not isinstance(salience, AbstractSalience):
        known = sorted(value.name for value in vars(saliences).values() if isinstance(value, AbstractSalience))
        raise UsageError(
            f"salience={salience!r} is none; write e.g. salience=gradselect.salience.gradient, or another of "
            f"{', '.join(known)}"
        )


def check_batches(salience: AbstractSalience, *, batches: Iterable[Batch] | None, loss: Loss | None) -> None:
    """The salience can use what is given, and is given what it needs.

    Raises:
        UsageError: otherwise.
    """
    if batches is None and salience.needs_batches:
        raise UsageError(f"{salience.name} needs batches; write e.g. batches=[next(iter(loader))]")
    if batches is not None and isinstance(salience, WeightSalience):
        raise UsageError(f"{salience.name} looks at weights only; leave batches out")
    if loss is not None and (batches is None or not salience.has_loss):
        raise UsageError(f"loss is of batches, and {salience.name} looks at none here; leave loss out")
    if batches is not None and isinstance(batches, Iterator):
        raise UsageError(
            f"batches={batches!r} can be gone through only once, but entries are chosen again on refreshing and on "
            "resuming; write batches=list(...)"
        )
