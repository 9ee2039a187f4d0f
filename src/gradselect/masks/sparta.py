"""SpaRTA: entries drawn one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self, final

import torch
from torch import Tensor, nn

from gradselect.core import ATTENTION_OUTPUTS, ATTENTION_VALUES
from gradselect.entries import AbstractCompactMask, FromWeights, Indices, MaskTensor, chunk_length, generator_of
from gradselect.parallel import local_part, local_start
from gradselect.usage import UsageError, check_positive, check_whole

VALUES_AND_OUTPUTS = (
    *(f"*.{name}.*" for name in (*ATTENTION_VALUES, *ATTENTION_OUTPUTS)),
    *("*att*.out_proj.*", "*attn.dense.*", "*attention.dense.*"),
)
"""Value and output projections of attention. The last have a value of their own in some architectures only."""

OUTSIDE_ATTENTION = ("*feed_forward*", "*ffn*", "*mlp*")
"""Parts of a layer whose linear layers have such names too: RWKV's feed-forward network has a `value`."""

FEW = 20
"""Expected entries at which a draw of none is out of the question: e^-20."""


@final
@dataclass(eq=False, kw_only=True)
class SpaRTA(AbstractCompactMask):
    r"""Select each entry of the candidates with probability q, independently, at step 0; the set never changes.

        q = density N / n,    N entries of all tensors that can train, n of the candidates

    So `density` is the expected share of these entries that train; frozen tensors and those that `always` names do not
    count in N; the number itself varies by about
    sqrt(density N). `StaticMask(salience=gradselect.salience.random)` draws an exact number instead.

    From the paper and the authors' code: the draw, the share of the whole model, and the default candidates: their
    script freezes embeddings, queries, keys, MLPs and norms, so that the value and output projections of attention are
    left. A new head trains whole: `always=("score.*",)`. Ours: the names of these projections in other architectures;
    weights are updated in place with fp32 masters, where the authors add and subtract a difference in the dtype of the
    weights in each step, which rounds.

    Args:
        density: expected share of the model's entries, in (0, 1]. Default 0.01, as in the authors' script.
        seed: seed of the draw.
        among: names or globs of the candidate parameters. None: value and output projections of attention.

    Raises:
        UsageError: a density outside (0, 1]; at `bind`, no such projection, or a density that the candidates cannot
            reach, or of less than one entry; at step 0, a draw of no entry.

    Example:
        >>> mask = SpaRTA(density=0.01)
        >>> all_tensors = SpaRTA(density=0.01, among=("*",))

    Reference: Rios et al., "Sparsity May Be All You Need: Sparse Random Parameter Adaptation", arXiv 2502.15975.
    """

    method_name = "sparta"

    density: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("density", self.density, at_most=1, example=0.01)
        check_whole("seed", self.seed, least=0)

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        if self.among is None and not any(map(self.can_use, tensors)):
            raise UsageError(
                "SpaRTA finds no value or output projection of attention by name; name the candidates, e.g. "
                'among=("*.c_attn.*", "*.c_proj.*"), or among=("*",) for all'
            )
        bound = super().bind(tensors)
        bound._draw_from(sum(tensor.numel for tensor in tensors))
        return bound

    def can_use(self, tensor: MaskTensor) -> bool:
        return self.among is not None or (
            _matches(tensor.name, VALUES_AND_OUTPUTS) and not _matches(tensor.name, OUTSIDE_ATTENTION)
        )

    def start(self) -> None:
        self._probability = self.density

    def _draw_from(self, total: int) -> None:
        """Set the probability, for a model of `total` entries."""
        count = sum(tensor.numel for tensor in self.tensors)
        self._probability = self.density * total / count
        if self._probability > 1:
            raise UsageError(
                f"density={self.density} of the model's {total:,} entries is more than the {count:,} entries to draw "
                f'from; write density={count / total:.3g} or less, or name more in among, e.g. among=("*",)'
            )
        if self.expected_entries == 0:
            raise UsageError(
                f"density={self.density} of the model's {total:,} entries is less than one of them, so nothing would "
                f"train; write density={FEW / total:.2g} or more"
            )

    @property
    def expected_entries(self) -> int:
        """Expected number of entries, once bound."""
        return round(self._probability * sum(tensor.numel for tensor in self.tensors))

    def choice(self, step: int, num_chosen: int) -> FromWeights | None:
        return FromWeights() if step == 0 else None

    def choose(self, step: int, model: nn.Module) -> Indices:
        found, num_drawn = {}, 0
        for tensor in self.tensors:
            drawn = self._drawn(tensor)
            num_drawn += len(drawn)
            found[tensor.name] = _local(tensor, drawn)
        if num_drawn == 0:
            enough = self.density * FEW / self.expected_entries
            raise UsageError(
                f"density={self.density} drew no entry with seed={self.seed}, where {self.expected_entries} were "
                f"expected, so nothing would train; write density={enough:.2g} or more"
            )
        return {name: indices for name, indices in found.items() if len(indices)}

    def _drawn(self, tensor: MaskTensor) -> Tensor:
        """Draw for all entries of the tensor, on every rank alike."""
        device = local_part(tensor.parameter).device
        generator = generator_of(seed=self.seed, step=0, name=tensor.name)
        length, parts = chunk_length(local_part(tensor.parameter)), [torch.empty(0, dtype=torch.int64)]
        for start in range(0, tensor.numel, length):
            size = min(length, tensor.numel - start)
            draws = torch.rand(size, generator=generator, dtype=torch.float64)
            parts.append((draws < self._probability).nonzero().view(-1) + start)
        return torch.cat(parts).to(device)


def _local(tensor: MaskTensor, indices: Tensor) -> Tensor:
    """Return those of the indices that are in this rank's part."""
    count = local_part(tensor.parameter).numel()
    first = 0 if count == tensor.numel else local_start(tensor.parameter, name=tensor.name)
    return indices[(indices >= first) & (indices < first + count)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
