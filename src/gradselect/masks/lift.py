"""LIFT: the entries that are largest in a low-rank approximation of their matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradselect.entries import AbstractCompactMask, FromWeights, Indices, MaskTensor, StreamingTopK, generator_of
from gradselect.parallel import whole
from gradselect.usage import UsageError, check_positive, check_whole

OVERSAMPLING = 10
POWER_ITERATIONS = 2


@final
@dataclass(eq=False, kw_only=True)
class LIFT(AbstractCompactMask):
    r"""In each matrix of a linear layer the k entries of largest |W_r| train; every n steps they are chosen again.

        W_r = U_r S_r V_r^T,   the best approximation of rank r of W (m x n)
        k   = rank * (m + n)        as many as LoRA of that rank would train

    Entries that stay keep their moments. W_r comes from a randomised singular value decomposition, in float32.

    Matrices of linear layers are the weights of `nn.Linear` and of transformers' `Conv1D`. Among them the method leaves
    out the head. Where `among` says nothing, that is told by place: a linear layer counts if it stands inside a
    repeated one, which shows in a number in its name ("model.layers.3.mlp.up_proj.weight"); so heads, classifiers and
    poolers do not. What `among` matches counts wherever it stands. Embeddings, norms and biases never do.

    Args:
        rank: sets k; no more than all entries of a matrix.
        density: share of the entries of each matrix, instead of `rank`: k = max(1, round(density * m * n)).
        approximation_rank: r, no more than min(m, n). The authors' scripts have 32 to 128, beside rank=128. None: that
            of a LoRA of k weights, max(1, round(k / (m + n))), which is `rank` where that is given; our choice.
        refresh_every: n; None: never again.
        block_size: 1: single entries; 4: blocks of 4 x 4, cut off at the lower and right edges, by the sum of |W_r| in
            them, as many of the best as hold k entries: so at least k and less than k + 16 in each matrix.
        seed: of the decomposition's random sketch.
        among: names or globs of parameters to choose from; None: the linear layers inside repeated ones.

    Raises:
        UsageError: a value out of its range; when bound, no such matrix, or a rank at which all of them train whole;
            when choosing, weights that are not finite.

    Example:
        >>> mask = LIFT(rank=128, approximation_rank=32)

    Reference: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
    Reasoning-Focused Supervised Fine-Tuning", arXiv 2506.00772.
    """

    rank: int | None = None
    density: float | None = None
    approximation_rank: int | None = None
    refresh_every: int | None = 400
    block_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.density is None):
            raise UsageError(f"got rank={self.rank} and density={self.density}; give one of them, e.g. rank=32")
        for name in ("rank", "approximation_rank", "refresh_every"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.density is not None:
            check_positive("density", self.density, at_most=1, example=0.05)
        if self.block_size not in (1, 4):
            raise UsageError(f"block_size={self.block_size!r} is unknown; write block_size=1 or block_size=4")
        check_whole("seed", self.seed, least=0)

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        if not any(map(self.can_use, tensors)):
            raise UsageError(
                "LIFT finds no matrix of a linear layer inside a repeated layer of this model; "
                'name matrices of linear layers, e.g. among=("encoder.up.weight",)'
            )
        return super().bind(tensors)

    def can_use(self, tensor: MaskTensor) -> bool:
        is_matrix_of_linear = tensor.parameter.ndim == 2 and is_linear(tensor.module)
        is_in_layer = any(part.isdecimal() for part in tensor.name.split("."))
        return is_matrix_of_linear and (is_in_layer or self.among is not None)

    def start(self) -> None:
        if self.rank is not None and all(self._count(tensor) == tensor.numel for tensor in self.tensors):
            raise UsageError(
                f"rank={self.rank} lets every matrix train whole; write a smaller rank, or density=1.0 if you mean that"
            )

    def choice(self, step: int, num_chosen: int) -> FromWeights | None:
        is_due = step == 0 if self.refresh_every is None else step % self.refresh_every == 0
        return FromWeights() if is_due else None

    @torch.no_grad()
    def choose(self, step: int, model: nn.Module) -> Indices:
        return {tensor.name: self._best(tensor, step) for tensor in self.tensors}

    def _count(self, tensor: MaskTensor) -> int:
        if self.rank is None:
            assert self.density is not None
            return max(1, round(self.density * tensor.numel))
        return min(self.rank * sum(tensor.parameter.shape), tensor.numel)

    def _best(self, tensor: MaskTensor, step: int) -> Tensor:
        count = self._count(tensor)
        # Every process decomposes the whole matrix, one after the other.
        weight = whole(tensor.parameter).float()
        if not torch.isfinite(weight).all():
            raise UsageError(f"{tensor.name!r} holds weights that are not finite; go back to a good checkpoint")
        rank = self.approximation_rank or max(1, round(count / sum(weight.shape)))
        generator = generator_of(seed=self.seed, step=step, name=tensor.name, device=weight.device)
        left, right = low_rank(weight, min(rank, *weight.shape), generator=generator)
        magnitudes = (left @ right).abs_()
        return best_entries(magnitudes, count) if self.block_size == 1 else best_blocks(magnitudes, count)


def is_linear(module: nn.Module) -> bool:
    # Conv1D of transformers, GPT-2's linear layer, by name: the core does not import transformers.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def low_rank(matrix: Tensor, rank: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors (m, rank) and (rank, n) of nearly the best approximation of this rank.

    The range is found from a Gaussian sketch of a few more columns, by power iterations with orthogonalisation between
    them; what lies in it is decomposed exactly.

    Reference: Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    num_columns = min(rank + OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], num_columns, generator=generator, device=matrix.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ (left[:, :rank] * values[:rank]), right[:rank]


def best_entries(scores: Tensor, count: int) -> Tensor:
    """Flat indices of the `count` largest, ascending; ties to the lower index."""
    top = StreamingTopK(count)
    top.offer(scores.reshape(-1), rank=0)
    return top.result()[1]


def best_blocks(scores: Tensor, count: int, *, size: int = 4) -> Tensor:
    """Flat indices, ascending, of the entries of the best `size` x `size` blocks, as many as hold `count` entries."""
    sums, sizes = block_sums(scores, size), block_sums(torch.ones_like(scores), size)
    order = torch.argsort(sums.view(-1), descending=True, stable=True)
    held = sizes.view(-1)[order].cumsum(0, dtype=torch.int64)
    chosen = torch.zeros_like(sums.view(-1), dtype=torch.bool)
    chosen[order[: int((held < count).sum()) + 1]] = True
    entries = chosen.view_as(sums).repeat_interleave(size, 0).repeat_interleave(size, 1)
    return entries[: scores.shape[0], : scores.shape[1]].reshape(-1).nonzero().view(-1)


def block_sums(scores: Tensor, size: int) -> Tensor:
    """Sum in each block; blocks at the lower and right edges may be smaller. Shape (ceil(m / size), ceil(n / size))."""
    rows, columns = scores.shape
    padded = functional.pad(scores, (0, -columns % size, 0, -rows % size))
    return padded.view(-1, size, padded.shape[1] // size, size).sum((1, 3))
