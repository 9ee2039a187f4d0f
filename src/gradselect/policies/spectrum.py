"""Spectrum: the matrices of largest signal-to-noise ratio, of each type."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradselect.blocks import AbstractPolicy, largest, layer_of, resolve_count_now, taking_part
from gradselect.core import Block
from gradselect.parallel import full_tensor
from gradselect.usage import UsageError, check_patterns, check_positive


@final
@dataclass(eq=False, kw_only=True)
class Spectrum(AbstractPolicy):
    r"""Select, of each type of matrix, the share of largest signal-to-noise ratio; the same at every step.

    Of a matrix (m, n) with singular values S, sigma is estimated from their interquartile range:

        e   = sigma (1 + sqrt(min(m, n) / max(m, n))),   sigma = IQR(S) / 1.349
        SNR = (sum of S > e) / (sum of S <= e) / max(S)

    Matrices are of one type if their names are equal but for the number of the layer: all "self_attn.q_proj". Of N of
    them max(1, round(fraction N)) train. The ratios are those of the weights when the optimizer is built, and a resumed
    run keeps them. No data is read; the decomposition of every matrix takes a while. The threshold e lacks the factor
    sqrt(max(m, n)) of the law of Marchenko and Pastur, so a matrix may have no value below it: then its ratio is
    infinite, and ties go to the earlier layer.

    From the authors' code: the ratio, and the choice within each type; embedding and head train too: give the optimizer
    `always=("embedding", "head")`. Ours: only matrices inside the layers are ranked, and norms do not train. Give the
    optimizer `blocks=partition(model, by="matrix")`.

    Args:
        fraction: share of the matrices of each type, in (0, 1]. Default 0.25; the paper has 25 and 50 %.
        among: names or globs of the candidate blocks. None: all that hold one matrix, inside the layers.

    Raises:
        UsageError: a fraction outside (0, 1]; at `bind`, no such block; weights that are not finite.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> len(Spectrum(fraction=0.25).bind(gs.partition(model, by="matrix")).propose(step=0))
        1

    Reference: Hartford, Atkins, Fernandes Neto, Golchinfar, "Spectrum: Targeted Training on Signal to Noise Ratio",
    arXiv 2406.06623.
    """

    fraction: float = 0.25
    among: Sequence[str] | None = None

    ratios: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("fraction", self.fraction, at_most=1, example=0.25)
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        matrices = {block.name: _matrix_of(block) for block in taking_part(self.candidates, self.among)}
        found = {name: matrix for name, matrix in matrices.items() if matrix is not None and layer_of(name)}
        if not found:
            raise UsageError(
                "Spectrum finds no block of one matrix inside the layers; divide the layers, with "
                'blocks=gs.partition(model, by="matrix") or method.blocks=matrix'
            )
        self.candidates = tuple(block for block in self.candidates if block.name in found)
        self.ratios = {name: _ratio_of(name, matrix) for name, matrix in found.items()}

    def propose(self, step: int) -> tuple[str, ...]:
        of_type: dict[str, list[str]] = {}
        for name in self.names:
            of_type.setdefault(_type_of(name), []).append(name)
        selected: set[str] = set()
        for names in of_type.values():
            count = resolve_count_now(num_blocks=len(names), fraction=self.fraction, count=None)
            selected.update(largest(names, self.ratios, count))
        return tuple(name for name in self.names if name in selected)


def signal_to_noise(matrix: Tensor) -> float:
    """Return the ratio of `Spectrum`; at most the largest float, which a matrix without noise has."""
    values = torch.linalg.svdvals(matrix.detach().float())
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device)).tolist()
    threshold = (high - low) / 1.349 * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
    is_signal = values > threshold
    signal, noise, largest = (float(each) for each in (values[is_signal].sum(), values[~is_signal].sum(), values.max()))
    if not signal:
        return 0.0
    return signal / noise / largest if noise else sys.float_info.max


def _ratio_of(name: str, matrix: Tensor) -> float:
    if matrix.is_meta:
        return 0.0  # in a plan, where the matrices of one type are alike
    whole = full_tensor(matrix)
    if not torch.isfinite(whole).all():
        raise UsageError(f"{name!r} holds weights that are not finite; go back to a good checkpoint")
    return signal_to_noise(whole)


def _matrix_of(block: Block) -> Tensor | None:
    matrices = [parameter for parameter in block.parameters if parameter.ndim > 1]
    return matrices[0] if len(matrices) == 1 and matrices[0].ndim == 2 else None


def _type_of(name: str) -> str:
    """Return the name without the number of its layer: "layer.*.self_attn.q_proj"."""
    layer = layer_of(name)
    assert layer is not None
    return f"{layer.rpartition('.')[0]}.*{name[len(layer) :]}"
