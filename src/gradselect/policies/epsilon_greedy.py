"""Explore phase that policies share: steps that look at all gradients, ever fewer as training goes on."""

from __future__ import annotations

from collections.abc import Sequence

from gradselect.blocks import AbstractPolicy, Norms, check_fraction_or_count, random_stream
from gradselect.usage import UsageError, check_patterns, check_positive, check_whole


class AbstractEpsilonGreedy(AbstractPolicy):
    """Policy that explores in step t with probability eps_t = epsilon_end^(t / N) for t < N, 0 afterwards.

    Step 0 always explores. A concrete policy declares the attributes as fields: all but the last are settings.

    Attributes:
        fraction: share of the candidate blocks that trains in a step; 0.2 unless `count` is given.
        count: number of these blocks.
        delta: added to every count of the Dirichlet draw.
        among: names or globs of the candidate blocks. None: all.
        explore_steps: N. None: `fill_explore_steps` gives it.
        epsilon_end: value of eps_t at t = N.
        seed: of every draw.
        filled_explore_steps: N as `fill_explore_steps` gave it; state.
    """

    fraction: float | None
    count: int | None
    delta: float
    among: Sequence[str] | None
    explore_steps: int | None
    epsilon_end: float
    seed: int
    filled_explore_steps: int | None

    def check_shared_settings(self) -> None:
        """Check the settings that these policies share, and fill in the default of `fraction`.

        Raises:
            UsageError: one is outside its range.
        """
        if self.fraction is None and self.count is None:
            self.fraction = 0.2
        check_fraction_or_count(fraction=self.fraction, count=self.count)
        check_positive("epsilon_end", self.epsilon_end, at_most=1, example=0.01)
        check_positive("delta", self.delta, example=1.0)
        check_whole("seed", self.seed, least=0)
        if self.explore_steps is not None:
            check_whole("explore_steps", self.explore_steps)
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def selects_anew(self, step: int) -> bool:
        """True if step `step` may explore, rather than keep the selection of the step before."""
        return True

    def fill_explore_steps(self, num_steps: int | None, *, run_steps: int | None = None) -> None:
        """Set N to the steps of the first epoch, or to `longest_explore_share` of the run's if that is less.

        N stays if it is known already. It is part of the state, so a resumed run has it. Binding keeps it. N stays open
        where only an epoch could give it: `num_steps` is None, and the phase may last as long as the run.
        """
        if num_steps is not None:
            check_whole("explore_steps", num_steps)
        limits = [] if num_steps is None else [num_steps]
        if run_steps is not None and (limits or self.longest_explore_share < 1):
            limits.append(max(1, round(self.longest_explore_share * run_steps)))
        if limits and self.explore_steps is None and self.filled_explore_steps is None:
            self.filled_explore_steps = min(limits)

    def forget_explore_steps(self) -> None:
        self.filled_explore_steps = None

    @property
    def longest_explore_share(self) -> float:
        """Share of the run's steps that N is at most, where it is derived."""
        return 0.25

    def explore_probability(self, step: int) -> float:
        """Return eps_t, the probability that step `step` explores; 0 where the selection is kept.

        Raises:
            UsageError: `step` is not 0 and the length of the first epoch is unknown.
        """
        if not self.selects_anew(step):
            return 0.0
        if step == 0:
            return 1.0
        num_steps = self.known_explore_steps()
        return self.epsilon_end ** (step / num_steps) if step < num_steps else 0.0

    def expected_explore_steps(self, num_steps: int) -> float:
        return sum(map(self.explore_probability, range(num_steps)))

    def explores(self, step: int) -> bool:
        """Draw: True if step `step` looks at all gradients."""
        return random_stream(seed=self.seed, step=step, purpose="explore").random() < self.explore_probability(step)

    def decide(self, step: int, norms: Norms) -> tuple[str, ...]:
        self.known_explore_steps()  # fails before the first update rather than after it
        return super().decide(step, norms)

    def known_explore_steps(self) -> int:
        """Return N.

        Raises:
            UsageError: it is unknown.
        """
        num_steps = self.filled_explore_steps if self.explore_steps is None else self.explore_steps
        if num_steps is None:
            name = type(self).__name__
            raise UsageError(
                f"explore_steps=None was never filled in; write {name}(explore_steps=len(loader) // 4), or let the "
                "Trainer's SelectionCallback fill it in, or make_optimizer(num_steps=..., epoch_steps=len(loader))"
            )
        return num_steps
