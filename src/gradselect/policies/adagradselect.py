"""AdaGradSelect: epsilon-greedy selection of blocks with a Dirichlet draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from gradselect.blocks import (
    LAYERS,
    Norms,
    gumbel,
    log_gamma,
    random_stream,
    resolve_count,
    resolve_count_now,
    taking_part,
    tells,
)
from gradselect.usage import UsageError, check_one_of, check_positive, check_whole

from .epsilon_greedy import AbstractEpsilonGreedy
from .strata import By, Strata, check_strata, strata_of


@final
@dataclass(eq=False, kw_only=True)
class AdaGradSelect(AbstractEpsilonGreedy):
    """Epsilon-greedy selection of blocks: by gradient norm while exploring, by a Dirichlet draw while exploiting.

        eps_t = exp(-lambda t) for t < N, 0 afterwards;   lambda = ln(1 / epsilon_end) / N,   N = explore_steps
        explore (probability eps_t):  full backward;  G_b += ||g_b||;  S = the k blocks of largest G_b
        exploit (otherwise):          p ~ Dirichlet(f + delta);        S = the k blocks of largest p_b
        f_b += 1 for b in S

    Step 0 always explores. An explore step whose gradients are all zero adds nothing to f. With a small delta and
    growing f the draw locks in like a Pólya urn. `delta`, `delta_growth`, `discount`, `norm="rms"` and `coverage` work
    against that.

    The paper selects from all blocks, explores in the first epoch, fixes eps_0 = 1, eps_N near 0 and exploitation only
    after N, and shows fractions of 0.1, 0.2 and 0.3: `preset="paper"`. By default embeddings, final norms and heads
    over the vocabulary are no candidates, which was better on SmolLM2-135M at equal time (docs/results.md), and N is at
    most a quarter of the run. This and every other number and option is our choice.

    Args:
        fraction: share of the candidate blocks that trains in a step, k = max(1, round(fraction * blocks)). Default
            0.2 unless `count` is given.
        count: k itself, instead of `fraction`.
        explore_steps: N, in optimizer steps; a quarter of the run is a good start. None: `gradselect train` or the
            Trainer's callback fills it in: the steps of the first epoch, but at most a quarter of the run.
        epsilon_end: value of eps_t, the chance that step t explores, at t = N.
        delta: added to every count. A larger one draws more evenly.
        rank_by: "cumulative" ranks by G_b, the sum of a block's norms, "step" by the norm of this step only.
        norm: "l2", or "rms" = ||g_b||_2 / sqrt(number of entries), which does not favour large blocks.
        draw: "top-k" of p, or "multinomial": k draws without replacement with probabilities p.
        among: names or globs of the candidate blocks, e.g. `("layer.1?",)`. "layers" stands for all but embeddings,
            final norms and heads over the vocabulary. None: all.
        every: steps between two selections; the blocks stay the same in between. f counts selections, not updates:
            counting updates would multiply the lock-in.
        discount: factor on the counts f and the sums G at each selection. Below 1 old steps are forgotten.
        coverage: every block trains at least once in any `coverage` consecutive steps. None: no such guarantee.
        delta_growth: delta_t = delta + delta_growth * t.
        strata: "layer" or "category" selects `fraction` or `count` of each stratum apart, as `gradselect.Stratified`
            divides them: with slices, so many of each layer. The rule is the same within each. None: no strata.
        preset: "paper" selects from all blocks, unless `among` says otherwise, and explores in the whole first epoch,
            unless `explore_steps` does.
        seed: seed of every draw.

    Example:
        >>> policy = AdaGradSelect(fraction=0.2, explore_steps=1000)
        >>> policy.explore_probability(0), round(policy.explore_probability(500), 2), policy.explore_probability(1000)
        (1.0, 0.1, 0.0)

    Reference: Kumar, Gupta, Chawla, "AdaGradSelect", arXiv 2512.15764.
    """

    method_name = "adagradselect"

    fraction: float | None = None
    count: int | None = None
    explore_steps: int | None = None
    epsilon_end: float = 0.01
    delta: float = 1.0
    rank_by: Literal["cumulative", "step"] = "cumulative"
    norm: Literal["l2", "rms"] = "l2"
    draw: Literal["top-k", "multinomial"] = "top-k"
    among: Sequence[str] | None = (LAYERS,)
    every: int = 1
    discount: float = 1.0
    coverage: int | None = None
    delta_growth: float = 0.0
    strata: By | None = None
    preset: Literal["paper"] | None = None
    seed: int = 0

    counts: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    scores: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    last_steps: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    selection: list[str] = field(default_factory=list, init=False, repr=False)
    filled_explore_steps: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_one_of("preset", self.preset, ("paper",))
            self.among = None if self.among == (LAYERS,) else self.among
        self.check_shared_settings()
        check_one_of("rank_by", self.rank_by, ("cumulative", "step"))
        check_one_of("norm", self.norm, ("l2", "rms"))
        check_one_of("draw", self.draw, ("top-k", "multinomial"))
        if self.strata is not None:
            check_one_of("strata", self.strata, ("layer", "category"))
        check_whole("every", self.every)
        check_positive("discount", self.discount, at_most=1, example=0.99)
        if self.coverage is not None:
            check_whole("coverage", self.coverage)
        if self.delta_growth != 0:
            check_positive("delta_growth", self.delta_growth, example=0.01)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        self._check_fit()
        self.counts = dict.fromkeys(self.names, 0.0)
        self.scores = dict.fromkeys(self.names, 0.0)
        self.last_steps = dict.fromkeys(self.names, -1)
        self.selection = []

    def settings(self) -> dict[str, Any]:
        """Return what decides the draws, as older checkpoints name it: `strata` only if given, and never `preset`.

        What the preset decides stands in `among` and, once it is known, in the state.
        """
        settings = super().settings()
        del settings["preset"]
        return {name: value for name, value in settings.items() if name != "strata" or value is not None}

    def selects_anew(self, step: int) -> bool:
        return step % self.every == 0

    def propose(self, step: int) -> tuple[str, ...] | None:
        if step % self.every and (kept := self.still_among(self.selection)) is not None:
            return kept
        if self.explores(step):
            return None
        due_first = self._exploit_keys(step) | dict.fromkeys(self._due(step), math.inf)
        return self.best(step, due_first)

    def stratum(self, block: str) -> str:
        return "" if self.strata is None else self._divided(self.strata).of[block]

    def keep_in(self, step: int, stratum: str) -> int:
        if self.strata is None:
            return resolve_count_now(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        return self._divided(self.strata).num_taken(stratum, step // self.every)

    def keep_at(self, step: int) -> int:
        return sum(self.keep_by_stratum(step).values())

    def score(self, step: int, block: str, norm: float) -> float:
        if block in self._due(step):
            return math.inf
        if not math.isfinite(norm):
            return -math.inf
        return self._accumulated(block, norm) if self.rank_by == "cumulative" else self._magnitude(block, norm)

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        self.last_steps |= dict.fromkeys(selected, step)
        if step % self.every and self.still_among(self.selection) is not None:
            return
        counted = selected if tells(norms) else ()
        self.counts = {name: self.discount * count + (name in counted) for name, count in self.counts.items()}
        self.scores = {name: self._accumulated(name, norms.get(name, 0.0)) for name in self.scores}
        self.selection = list(selected)

    @property
    def longest_explore_share(self) -> float:
        return super().longest_explore_share if self.preset is None else 1.0

    @property
    def coverage_steps(self) -> int | None:
        return self.coverage

    def _exploit_keys(self, step: int) -> dict[str, float]:
        """Return a key per block. The k largest keys are the draw: top-k of log p, or of log p + Gumbel noise."""
        generator = random_stream(seed=self.seed, step=step, purpose="exploit")
        delta = self.delta + self.delta_growth * step
        log_shares = {name: log_gamma(generator, self.counts[name] + delta) for name in self.names}
        if self.draw == "top-k":
            return log_shares
        return {name: log_share + gumbel(generator) for name, log_share in log_shares.items()}

    def _accumulated(self, block: str, norm: float) -> float:
        finite = self._magnitude(block, norm) if math.isfinite(norm) else 0.0
        return self.discount * self.scores[block] + finite

    def _magnitude(self, block: str, norm: float) -> float:
        return norm if self.norm == "l2" else norm / math.sqrt(max(1, self.num_elements[block]))

    def _due(self, step: int) -> tuple[str, ...]:
        if self.coverage is None:
            return ()
        slacks: dict[str, dict[str, int]] = {}
        for name in self.names:
            left = (self.last_steps[name] + self.coverage - step) // self.every
            slacks.setdefault(self.stratum(name), {})[name] = left
        return tuple(name for stratum, left in slacks.items() for name in due(left, self._least_count(stratum)))

    def _divided(self, by: By) -> Strata:
        return strata_of(self.names, by, self.fraction, self.count)

    def _least_count(self, stratum: str) -> int:
        """Return how many blocks of the stratum every selection holds at least."""
        if self.strata is None:
            return self.keep_in(0, stratum)
        return math.floor(self._divided(self.strata).mean_count(stratum))

    def _check_fit(self) -> None:
        """Check count and coverage against the candidates."""
        if self.strata is None:
            resolve_count(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        else:
            check_strata(self._divided(self.strata), by=self.strata)
        for stratum, num_blocks in Counter(map(self.stratum, self.names)).items():
            num_selected = self._least_count(stratum)
            least = (math.ceil(num_blocks / num_selected) - 1) * self.every + 1
            if self.coverage is not None and self.coverage < least:
                raise UsageError(
                    f"coverage={self.coverage} cannot be kept: {num_selected} of {num_blocks} blocks, selected anew "
                    f"every {self.every} steps, need {least} steps to reach all; write coverage={least} or more"
                )


def due(slacks: Mapping[str, int], num_selected: int) -> tuple[str, ...]:
    """Return the blocks that this selection must contain so that every deadline can be met, earliest deadline first.

    slacks[b] is the number of selections that may still leave out block b. Let N_d be the number of blocks with slack
    <= d, and k = num_selected. They share (d + 1) k places, of which d k come after this selection. So at least
    max_d (N_d - d k) must be selected now. If slacks are at least ceil(blocks / k) - 1 after each selection, that
    number never exceeds k.
    """
    by_deadline = sorted(slacks, key=lambda name: slacks[name])
    num_now = max(position - num_selected * slacks[name] for position, name in enumerate(by_deadline, start=1))
    return tuple(by_deadline[: max(0, num_now)])
