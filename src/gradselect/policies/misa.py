"""MISA: blocks drawn by importance up to a share of the entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from gradselect.blocks import AbstractPolicy, Norms, gumbel, random_stream, taking_part
from gradselect.usage import UsageError, check_patterns, check_positive, check_whole


@final
@dataclass(eq=False, kw_only=True)
class MISA(AbstractPolicy):
    """Draw blocks by importance every `every` steps, up to a share of the entries.

        G_b = ema G_b + (1 - ema) mean_t ||g_b,t||^2 / N_b    over the steps t of a period in which b trained
        p_b ∝ exp(eta G_b / mean(G))                          the mean over the blocks that have trained
        S   = blocks drawn one by one with probabilities p without replacement, while their entries are at most
              share * (entries of all candidates); at least one block

    N_b is the number of entries of block b. The paper's blocks are the matrices of the layers (q, k, v, o, up, down):
    give the optimizer `blocks=partition(model, by="matrix")` and name the matrices in `among`. The paper also gives the
    importance sampling by an average of squared gradient norms, the limit on the share (3 %), 50 steps per period, and
    the state cleared at the end of a period (`residency=Drop()`).

    The paper's algorithm ends a period with one more step by the momentum alone: the optimizer's
    `borders=Borders(exit_step=True)`. The authors' code does not take it, and neither does the default here.

    Our choices: eta and ema; G scaled by N_b; eta in units of the mean importance; G_b begins with the first value, and
    a block that has not trained counts as the mean. In the paper all G_b begin with 0; in these units the blocks of the
    first draw would then be drawn again and again. A block drawn twice in a row keeps its state, and takes no exit step
    between.

    Args:
        share: largest share of the candidates' entries that a draw may hold.
        every: steps per period.
        eta: strength of importance. Near 0 all blocks are equally likely.
        ema: weight of the old average, in (0, 1].
        among: names or globs of the candidate blocks. None: all, and so embedding, final norm and head too. For a Llama
            with `by="matrix"`, `("layer.*.*.*",)` names the matrices without the norms ("layer.3.vectors").
        seed: seed of the draws.

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
        if step % self.every and (kept := self.still_among(self.selection)) is not None:
            return kept
        generator = random_stream(seed=self.seed, step=step // self.every, purpose="misa")
        keys = {name: weight + gumbel(generator) for name, weight in self.log_weights().items()}
        drawn = sorted(self.names, key=lambda name: keys[name], reverse=True)
        selected = within(drawn, self.num_elements, limit=self.share * sum(map(self.num_elements.__getitem__, drawn)))
        return tuple(name for name in self.names if name in selected)

    def log_weights(self) -> dict[str, float]:
        """Return log p_b of each block, up to a constant."""
        known = [self.importance[name] for name in self.names if self.importance[name] > 0]
        mean = sum(known) / len(known) if known else 1.0
        return {name: self.eta * (self.importance[name] or mean) / mean for name in self.names}

    def observes_selected(self, step: int) -> bool:
        return True

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        if step % self.every == 0 or self.still_among(self.selection) is None:
            self.selection = list(selected)
        for name in selected:
            norm = norms.get(name, 0.0)
            # A tensor of no entries is a block too.
            self.period_sums[name] += norm**2 / max(1, self.num_elements[name]) if math.isfinite(norm) else 0.0
        if step % self.every == self.every - 1:
            for name in selected:
                mean, before = self.period_sums[name] / self.every, self.importance[name]
                self.importance[name] = self.ema * before + (1 - self.ema) * mean if before > 0 else mean
            self.period_sums = dict.fromkeys(self.period_sums, 0.0)


def within(drawn: Sequence[str], sizes: Mapping[str, int], *, limit: float) -> set[str]:
    """Return the first names of `drawn` whose sizes sum to at most `limit`; at least one."""
    selected, total = {drawn[0]}, sizes[drawn[0]]
    for name in drawn[1:]:
        total += sizes[name]
        if total > limit:
            break
        selected.add(name)
    return selected
