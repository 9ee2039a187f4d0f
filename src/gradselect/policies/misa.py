"""MISA: matrices, drawn by importance until a share of the weights is reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from gradselect.blocks import AbstractPolicy, Norms, gumbel, stream, taking_part
from gradselect.usage import UsageError, check_patterns, check_positive, check_whole


@final
@dataclass(eq=False, kw_only=True)
class MISA(AbstractPolicy):
    """Every `every` steps a new draw of blocks, by their gradients while they trained, within a share of the weights.

        G_b = ema G_b + (1 - ema) mean_t ||g_b,t||^2 / N_b    over the steps t of a period in which b trained
        p_b ∝ exp(eta G_b / mean(G))                          the mean over blocks; at first all G_b are 0, p_b alike
        S   = blocks drawn one by one with probabilities p without replacement, while their weights are at most
              share * (weights of all taking part); at least one

    The paper's units are the matrices of the layers (q, k, v, o, up, down), so give the optimizer
    `blocks=partition(model, by="matrix")` and `among` the matrices. From the paper: modules as units, the importance
    sampling by an average of squared gradient norms, the limit on the share of the weights (its 3 % is the default here
    too), 50 steps a period, state cleared at the end of one (`residency=Drop()`).

    Choices of this library: eta and ema, that G is scaled by the number of weights N_b and eta is in units of the mean
    importance, that a block which is drawn twice in a row keeps its state, and that the paper's additional momentum
    step at the end of a period is left out.

    Args:
        share: of the weights taking part that a draw may hold at most.
        every: steps of a period.
        eta: how strongly importance counts; towards 0 all blocks are drawn alike.
        ema: weight of the old average, in (0, 1].
        among: names or globs of the blocks that take part; None: all. Of a Llama cut into matrices `("layer.*.*.*",)`
            are the matrices, without the norms ("layer.3.vectors").
        seed: of the draws.

    Example:
        >>> misa = MISA(among=("layer.*.*.*",))

    Reference: Liu, Deng, He, Wang, Yao, Yuan, "MISA: Memory-Efficient LLMs Optimization with Module-wise Importance
    Sampling", arXiv 2511.00056.
    """

    share: float = 0.03
    every: int = 50
    eta: float = 1.0
    ema: float = 0.9
    among: Sequence[str] | None = None
    seed: int = 0

    importance: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    period_sums: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("share", self.share, at_most=1, example=0.03)
        check_whole("every", self.every)
        check_positive("eta", self.eta, example=1.0)
        check_positive("ema", self.ema, at_most=1, example=0.9)
        check_whole("seed", self.seed, least=0)
        if self.ema == 1:
            raise UsageError("ema=1 would never learn an importance; write ema=0.9")
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        self.importance = dict.fromkeys(self.names, 0.0)
        self.period_sums = dict.fromkeys(self.names, 0.0)
        self.selection = []

    def propose(self, step: int) -> tuple[str, ...]:
        if step % self.every:
            return tuple(self.selection)
        generator = stream(seed=self.seed, step=step // self.every, purpose="misa")
        keys = {name: weight + gumbel(generator) for name, weight in self.log_weights().items()}
        drawn = sorted(self.names, key=lambda name: keys[name], reverse=True)
        chosen = within(drawn, self.num_elements, limit=self.share * sum(map(self.num_elements.__getitem__, drawn)))
        return tuple(name for name in self.names if name in chosen)

    def log_weights(self) -> dict[str, float]:
        """log p_b of each block, up to a constant."""
        mean = sum(self.importance.values()) / len(self.importance)
        return {name: self.eta * value / mean if mean > 0 else 0.0 for name, value in self.importance.items()}

    def observes_selected(self, step: int) -> bool:
        return True

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        self.selection = list(selected)
        for name in selected:
            norm = norms.get(name, 0.0)
            self.period_sums[name] += norm**2 / self.num_elements[name] if math.isfinite(norm) else 0.0
        if step % self.every == self.every - 1:
            for name in selected:
                mean = self.period_sums[name] / self.every
                self.importance[name] = self.ema * self.importance[name] + (1 - self.ema) * mean
            self.period_sums = dict.fromkeys(self.names, 0.0)


def within(drawn: Sequence[str], sizes: Mapping[str, int], *, limit: float) -> set[str]:
    """The first of `drawn` whose sizes together stay within `limit`; at least one."""
    chosen, total = {drawn[0]}, sizes[drawn[0]]
    for name in drawn[1:]:
        total += sizes[name]
        if total > limit:
            break
        chosen.add(name)
    return chosen
