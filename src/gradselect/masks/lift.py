"""LIFT: the largest entries of a low-rank approximation of each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradselect.entries import (
    AbstractCompactMask,
    FromWeights,
    Indices,
    MaskTensor,
    StreamingTopK,
    generator_of,
    say_left_out,
)
from gradselect.parallel import full_tensor
from gradselect.usage import UsageError, check_positive, check_whole

OVERSAMPLING = 10
POWER_ITERATIONS = 16
"""Two are enough for a near best norm, but not for the entries: singular values of real weights fall slowly."""


@final
@dataclass(eq=False, kw_only=True)
class LIFT(AbstractCompactMask):
    r"""Select, every n steps, the k entries of largest |W_r| in each matrix of a linear layer.

        W_r = U_r S_r V_r^T,   the best approximation of rank r of W (m x n)
        k   = rank * (m + n)        as many as LoRA of that rank would train

    Entries that stay keep their moments. W_r comes from a randomised singular value decomposition, in float32; the
    authors' code has an exact one. Of the entries selected in a layer of SmolLM2-135M with density=0.05, 92 % are those
    of the exact one.

    Candidates are the weights of `nn.Linear` and of transformers' `Conv1D`; never embeddings, norms or biases. The
    method leaves out the head. Without `among`, a linear layer counts only if it is part of a repeated layer, shown by
    a number in its name ("model.layers.3.mlp.up_proj.weight"). This leaves out heads, classifiers and poolers. With
    `among`, every linear layer that matches counts. Experts that are one tensor of three dimensions are no candidates,
    which a warning says with their number of weights.

    Args:
        rank: sets k, limited to the entries of the matrix.
        density: share of the entries of each matrix, instead of `rank`: k = max(1, round(density * m * n)).
        approximation_rank: r, limited to min(m, n). The authors' scripts use 32 to 128 with rank=128. None: the rank
            of a LoRA with k parameters, max(1, round(k / (m + n))), which equals `rank` if that is given; our choice.
        refresh_every: n. None: select only once.
        block_size: 1: single entries. 4: tiles of 4 x 4, cut off at the lower and right edges, ranked by their sum of
            |W_r|; as many tiles as needed for k entries, so at least k and less than k + 16 per matrix.
        seed: seed of the decomposition's random sketch.
        among: names or globs of the candidate parameters. None: the linear layers inside repeated layers.

    Raises:
        UsageError: a value out of range; at `bind`, no such matrix, or a rank that selects every entry of all of them;
            at a selection, weights that are not finite.

    Example:
        >>> mask = LIFT(rank=128, approximation_rank=32)

    Reference: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
    Reasoning-Focused Supervised Fine-Tuning", arXiv 2506.00772.
    """

    method_name = "lift"

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
        if self.among is None:
            say_left_out(((tensor.name, tensor.parameter) for tensor in tensors), method="LIFT")
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
        # Every rank decomposes the whole matrix, one matrix at a time.
        weight = full_tensor(tensor.parameter).float()
        if not torch.isfinite(weight).all():
            raise UsageError(f"{tensor.name!r} holds weights that are not finite; go back to a good checkpoint")
        rank = self.approximation_rank or max(1, round(count / sum(weight.shape)))
        generator = generator_of(seed=self.seed, step=step, name=tensor.name)
        left, right = low_rank(weight, min(rank, *weight.shape), generator=generator)
        magnitudes = (left @ right).abs_()
        return largest_entries(magnitudes, count) if self.block_size == 1 else largest_tiles(magnitudes, count)


def is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's linear layer, matched by name because the library does not import transformers.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def low_rank(matrix: Tensor, rank: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return factors (m, rank) and (rank, n) of a nearly optimal approximation of this rank.

    Power iterations with orthogonalisation find the range from a Gaussian sketch with a few extra columns. The
    projection onto that range is decomposed exactly.

    Reference: Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    num_columns = min(rank + OVERSAMPLING, *matrix.shape)
    drawn = torch.randn(matrix.shape[1], num_columns, generator=generator, dtype=matrix.dtype)
    sketch = drawn.to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ (left[:, :rank] * values[:rank]), right[:rank]


def largest_entries(scores: Tensor, count: int) -> Tensor:
    """Return flat indices of the `count` largest scores, ascending; ties go to the lower index."""
    top = StreamingTopK(count)
    top.add(scores.reshape(-1), position=0)
    return top.result()[1]


def largest_tiles(scores: Tensor, count: int, *, size: int = 4) -> Tensor:
    """Return flat indices, ascending, of the entries of the best `size` x `size` tiles that hold `count` entries."""
    sums, sizes = tile_sums(scores, size), tile_sums(torch.ones_like(scores), size)
    order = torch.argsort(sums.view(-1), descending=True, stable=True)
    held = sizes.view(-1)[order].cumsum(0, dtype=torch.int64)
    selected = torch.zeros_like(sums.view(-1), dtype=torch.bool)
    selected[order[: int((held < count).sum()) + 1]] = True
    entries = selected.view_as(sums).repeat_interleave(size, 0).repeat_interleave(size, 1)
    return entries[: scores.shape[0], : scores.shape[1]].reshape(-1).nonzero().view(-1)


def tile_sums(scores: Tensor, size: int) -> Tensor:
    """Return the sum of each tile, shape (ceil(m / size), ceil(n / size)); edge tiles may be smaller."""
    rows, columns = scores.shape
    padded = functional.pad(scores, (0, -columns % size, 0, -rows % size))
    return padded.view(-1, size, padded.shape[1] // size, size).sum((1, 3))
