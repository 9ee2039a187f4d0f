"""GradNormTopK: the blocks of largest gradient norm, or draws in proportion to it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from gradselect.blocks import (
    AbstractPolicy,
    Norms,
    check_fraction_or_count,
    gumbel,
    largest,
    random_stream,
    resolve_count,
    resolve_count_now,
    taking_part,
)
from gradselect.usage import UsageError, check_one_of, check_patterns, check_positive, check_whole


@final
@dataclass(eq=False, kw_only=True)
class GradNormTopK(AbstractPolicy):
    """Select blocks by m_b, the gradient norm of block b or its moving average.

        m_b = ema m_b + (1 - ema) ||g_b||    where b is observed (m_b = ||g_b|| the first time); else m_b stays
        S   = the k blocks of largest m_b, or with temperature
        S   = k draws without replacement from softmax(m / temperature)

    The defaults are Algorithm 1 of AdaGradSelect's paper: a full backward pass each step, then the k largest norms.

    Without `probe_steps` every selection observes all blocks, and is made again at the next step if all norms were
    zero. With it only the first steps observe all: they update nothing and set m_b to the mean of their norms. After
    them m_b changes only for the blocks that train.

    Args:
        fraction: share of the candidate blocks that trains in a step, k = max(1, round(fraction * blocks)).
        count: k itself, instead of `fraction`.
        refresh: steps between two selections; the blocks stay the same in between. None: one selection, by the
            gradients of the first step or of the `probe_steps`.
        temperature: temperature of the softmax, on the scale of the norm: where it is large beside the differences
            between blocks, the draw is uniform. "spread", with `probe_steps`: the standard deviation of m over the
            candidates at each draw, so the scale of the norms does not matter. None: no draw.
        ema: weight of the old average, in (0, 1]. None: m_b is the latest norm.
        probe_steps: first steps, which observe and update nothing.
        norm: "l2", or "rms" = ||g_b||_2 / sqrt(number of entries), which does not favour large blocks.
        among: names or globs of the candidate blocks, e.g. `("layers",)`. None: all, and so embedding, final norm
            and head too.
        seed: seed of the draws.

    Example:
        GRASS. The numbers are examples, not the paper's:

        >>> grass = GradNormTopK(
        ...     count=2, refresh=20, temperature="spread", ema=0.9, probe_steps=20, norm="rms", among=("layer.*",)
        ... )

        One selection, by the gradients of the first step:

        >>> once = GradNormTopK(fraction=0.2, refresh=None, among=("layers",))

    Reference: Kumar, Gupta, Chawla, "AdaGradSelect", arXiv 2512.15764, Algorithm 1; Tian et al., "GRASS: Gradient-based
    Adaptive Layer-wise Importance Sampling for Memory-efficient Large Language Model Fine-tuning", arXiv 2604.07808.
    """

    method_name = "gradnorm"

    fraction: float | None = None
    count: int | None = None
    refresh: int | None = 1
    temperature: float | Literal["spread"] | None = None
    ema: float | None = None
    probe_steps: int = 0
    norm: Literal["l2", "rms"] = "l2"
    among: Sequence[str] | None = None
    seed: int = 0

    averages: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fraction_or_count(fraction=self.fraction, count=self.count)
        if self.refresh is not None:
            check_whole("refresh", self.refresh)
        check_whole("probe_steps", self.probe_steps, least=0)
        check_one_of("norm", self.norm, ("l2", "rms"))
        check_whole("seed", self.seed, least=0)
        if isinstance(self.temperature, str):
            check_one_of("temperature", self.temperature, ("spread",))
            if self.probe_steps == 0:
                raise UsageError(
                    'temperature="spread" with probe_steps=0: the spread is known only after steps that look at all '
                    "blocks; write probe_steps=20, or a number as temperature"
                )
        elif self.temperature is not None:
            check_positive("temperature", self.temperature, example=0.1)
        if self.ema is not None:
            check_positive("ema", self.ema, at_most=1, example=0.9)
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        resolve_count(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        self.averages = {}
        self.selection = []

    def expected_explore_steps(self, num_steps: int) -> float:
        if self.probe_steps:
            return min(num_steps, self.probe_steps)
        return min(num_steps, 1) if self.refresh is None else -(-num_steps // self.refresh)

    @property
    def look_only_steps(self) -> int:
        return self.probe_steps

    def propose(self, step: int) -> tuple[str, ...] | None:
        if step < self.probe_steps:
            return None
        if not self._selects_anew(step) and (kept := self.still_among(self.selection)) is not None:
            return kept
        if self.probe_steps == 0:
            return None
        temperature = self._spread() if isinstance(self.temperature, str) else self.temperature
        ranks = {name: self._rank(step, name, self.averages.get(name, -math.inf), temperature) for name in self.names}
        return largest(self.names, ranks, self.keep_at(step))

    def keep_at(self, step: int) -> int:
        if step < self.probe_steps:
            return 0
        return resolve_count_now(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)

    def score(self, step: int, block: str, norm: float) -> float:
        if not math.isfinite(norm):
            return -math.inf
        # A spread needs probe steps, and those select nothing.
        temperature = None if isinstance(self.temperature, str) else self.temperature
        return self._rank(step, block, self._average(step, block, norm), temperature)

    def observes_selected(self, step: int) -> bool:
        return 0 < self.probe_steps <= step

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        seen = {name: norms[name] for name in self.names if name in norms and math.isfinite(norms[name])}
        self.averages |= {name: self._average(step, name, norm) for name, norm in seen.items()}
        if not self._selects_anew(step) and self.still_among(self.selection) is not None:
            return
        # Where all is zero, as with GRPO and equal rewards, or nothing is finite, the first blocks of the model were
        # selected: select again.
        is_by_norms = any(self.averages.values()) and (seen or not norms)
        self.selection = list(selected) if self.probe_steps or is_by_norms else []

    def _selects_anew(self, step: int) -> bool:
        since = step - self.probe_steps
        return since == 0 if self.refresh is None else since % self.refresh == 0

    def _rank(self, step: int, block: str, average: float, temperature: float | None) -> float:
        if temperature is None:
            return average
        # Blocks that are all alike have no spread: the noise alone decides among those that have a norm.
        share = average / temperature if temperature > 0 else min(average, 0.0)
        return share + gumbel(random_stream(seed=self.seed, step=step, purpose=f"gumbel/{block}"))

    def _spread(self) -> float:
        known = [self.averages[name] for name in self.names if name in self.averages]
        return statistics.pstdev(known) if known else 0.0

    def _average(self, step: int, block: str, norm: float) -> float:
        magnitude = norm if self.norm == "l2" else norm / math.sqrt(max(1, self.num_elements[block]))
        if block not in self.averages:
            return magnitude
        old_weight = step / (step + 1) if step < self.probe_steps else self.ema or 0.0
        return old_weight * self.averages[block] + (1 - old_weight) * magnitude
