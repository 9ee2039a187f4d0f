"""Borders of a selection: what happens to a block that has just left it, or that returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradselect.core import AbstractRule, Group
from gradselect.usage import UsageError, check_is, check_positive, check_whole

_NEEDS = (
    ("coasting_decay", "coasting", 5),
    ("rewarm_after", "rewarm_steps", 50),
    ("rewarm_first", "rewarm_steps", 50),
    ("rate_cap", "rate_by_visits", 0.5),
)
"""A setting, the one that turns its rule on, and a value for that."""


@dataclass(frozen=True, kw_only=True)
class Borders:
    r"""Rules for blocks that leave the selection, return to it, or are seldom in it. Each is off by default.

    **Coasting.** At the j-th step after its last update, j = 1, ..., `coasting`, a block that is not selected moves on
    by its momentum, without a gradient. With AdamW's moments m and v after t updates:

        m <- beta1 m,   w <- w - lr coasting_decay^j (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    v, t and weight decay rest. With SGD: b <- momentum b, w <- w - lr coasting_decay^j b. It is an exception to "blocks
    that are not selected stay bit-identical", and costs no backward pass. The state of coasting blocks stays on the
    device, and leaves afterwards. Other rules have no momentum of this form and are refused.

    **Exit step.** At the first step after its last update, a block that is not selected moves once, by all that its
    momentum would still add if v stayed as it is: coasting for ever, in one step. With AdamW

        w <- w - lr (beta1 / (1 - beta1)) (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),   m <- 0

    MISA takes it at the end of a period, before the state is cleared. Blocks that the last step of a training selects
    take none.

    **Re-warming.** The n-th update of a block since its return moves by min(1, n / `rewarm_steps`) of the learning
    rate. A block returns when it was not updated for `rewarm_after` steps or more, or lost its state to `Drop()`; with
    `rewarm_first` also at its first update of all.

    **Rate by visits.** Before step t, block b of N candidates has had n_b updates, all candidates n_1 + ... + n_N. Its
    rate is multiplied by

        ((1 + (n_1 + ... + n_N) / N) / (1 + n_b))^rate_by_visits

    within [1 / `rate_cap`, `rate_cap`]: 1 for a block that is visited as often as the mean, more for one that is
    visited less often. Inverse propensities correct a sampled gradient by the same ratio; that a learning rate takes
    it, the exponent and the cap are our choice. `always` blocks keep their rate.

    A factor of the rate scales AdamW's decoupled weight decay too, as a scheduler does.

    Args:
        coasting: number of steps, >= 0. 0: a block that leaves stays as it is.
        coasting_decay: factor of each coasting step against the one before, beside the momentum's own decay, in (0, 1].
        exit_step: move a block that leaves once, by all of its momentum.
        rewarm_steps: number of updates, >= 0. 0: no re-warming.
        rewarm_after: least number of steps without an update, >= 1.
        rewarm_first: warm a block's first updates of all too.
        rate_by_visits: exponent in [0, 1]. 0: equal rates.
        rate_cap: largest factor, >= 1.

    Raises:
        UsageError: a value outside its range, or a setting of a rule that is off.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> policy = gs.Cyclic(every=1, order="ascending")
        >>> optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, borders=gs.Borders(coasting=1))
        >>> for _ in range(2):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.last_record.selected, optimizer.last_record.coasted
        (('layer.1',), ('layer.0',))

    Reference:
        Wang et al.: LoSiA, arXiv 2507.04487, for re-warming after a new selection. Liu et al.: MISA, arXiv 2511.00056,
        algorithm 1, for the exit step, which the authors' code does not take.
    """

    coasting: int = 0
    coasting_decay: float = 1.0
    exit_step: bool = False
    rewarm_steps: int = 0
    rewarm_after: int = 1
    rewarm_first: bool = True
    rate_by_visits: float = 0.0
    rate_cap: float = 4.0

    def __post_init__(self) -> None:
        check_whole("coasting", self.coasting, least=0)
        check_whole("rewarm_steps", self.rewarm_steps, least=0)
        check_whole("rewarm_after", self.rewarm_after)
        check_positive("coasting_decay", self.coasting_decay, at_most=1, example=0.5)
        if self.rate_by_visits != 0:
            check_positive("rate_by_visits", self.rate_by_visits, at_most=1, example=0.5)
        check_is(self.rewarm_first, bool, name="rewarm_first", example="rewarm_first=False")
        check_is(self.exit_step, bool, name="exit_step", example="exit_step=True")
        if self.exit_step and self.coasting:
            raise UsageError(
                f"exit_step=True with coasting={self.coasting}: the exit step is all of a block's coasting at once; "
                "leave one of them out"
            )
        check_positive("rate_cap", self.rate_cap, example=4.0)
        if self.rate_cap < 1:
            raise UsageError(f"rate_cap={self.rate_cap} is below 1; write e.g. rate_cap=4.0")
        self._check_used()

    def _check_used(self) -> None:
        """Refuse a setting of a rule that is off: it would change nothing.

        Raises:
            UsageError: names the setting, and the one that turns its rule on.
        """
        for name, switch, example in _NEEDS:
            value = getattr(self, name)
            if value != getattr(Borders, name) and not getattr(self, switch):
                raise UsageError(
                    f"{name}={value} changes nothing while {switch}={getattr(self, switch)}; write {switch}={example} "
                    f"too, or leave {name} out"
                )

    @property
    def num_coasting(self) -> int:
        """Number of steps that a block takes after it has left."""
        return 1 if self.exit_step else self.coasting

    @property
    def is_on(self) -> bool:
        """True if any rule is on."""
        return bool(self.num_coasting or self.rewarm_steps or self.rate_by_visits)

    def check_rule(self, rule: AbstractRule) -> None:
        """Refuse an update rule that cannot follow these rules.

        Raises:
            UsageError: it cannot coast, or has no learning rate.
        """
        if self.num_coasting and not (rule.coasts and (self.coasting or rule.momentum_name is not None)):
            name = "exit_step" if self.exit_step else "coasting"
            raise UsageError(
                f"{name}={getattr(self, name)} needs a rule that can take a step by its momentum alone, and "
                f"{rule.name} cannot; write rule=gs.AdamWRule() or gs.SGDRule(momentum=0.9), or leave {name} out"
            )
        if self.is_on and "lr" not in rule.hyper_parameters:
            raise UsageError(f"{rule.name} has no learning rate that Borders could change; leave borders out")


class BorderRules:
    """Follows the `Borders` of one optimizer: who coasts in a step, and the factor of each block's rate.

    Everything is a function of the step, the blocks' last updates and their update counts, so it is equal on all ranks.

    Attributes:
        frozen: names of the blocks that the user froze: they do not coast.

    Args:
        borders: the settings.
        blocks: names of all blocks, in model order.
        drops: True if a block's state is lost when it leaves.
    """

    def __init__(self, borders: Borders, blocks: Sequence[str], *, drops: bool) -> None:
        self.settings = borders
        self.frozen: Collection[str] = ()
        self._blocks = tuple(blocks)
        self._least_absence = min(borders.rewarm_after, borders.num_coasting + 1) if drops else borders.rewarm_after
        self._last: dict[str, int] = {}
        self._warmed: dict[str, int] = {}
        self._visits: Mapping[str, int] = {}
        self._mean_visits = 0.0
        self._step = 0

    # A step ----------------------------------------------------------------------------------------------------------

    def expect(self, step: int, counts: Mapping[str, int]) -> None:
        """Begin a step. `counts`: number of updates of each candidate of the policy so far."""
        self._step, self._visits = step, dict(counts)
        self._mean_visits = sum(counts.values()) / max(1, len(counts))

    def coasting(self, selected: Collection[str]) -> tuple[str, ...]:
        """Return the blocks that coast in this step if `selected` are selected, in model order."""
        if not self.settings.num_coasting:
            return ()
        recent = range(self._step - self.settings.num_coasting, self._step)
        resting = {*selected, *self.frozen}
        return tuple(name for name in self._blocks if self._last.get(name) in recent and name not in resting)

    def group_of(self, name: str, group: Group) -> Group:
        """Return the hyper-parameters with which a selected block is updated."""
        return _scaled(group, self.rate(name))

    def coasting_group_of(self, name: str, group: Group) -> Group:
        """Return the hyper-parameters with which a block coasts: its rate, decayed."""
        age = self._step - self._last[name]
        warm = _share(self._warmed.get(name), self.settings.rewarm_steps)
        remaining = _remaining(group) if self.settings.exit_step else self.settings.coasting_decay**age
        return _scaled(group, remaining * warm * self._by_visits(name))

    def rate(self, name: str) -> float:
        """Return the factor of the block's learning rate, if it is selected in this step."""
        return _share(self._next_warmed(name), self.settings.rewarm_steps) * self._by_visits(name)

    def commit(self, selected: Sequence[str]) -> dict[str, float]:
        """Count the step. Return the factors that were not 1, by block."""
        rates = {name: rate for name in selected if (rate := self.rate(name)) != 1.0}
        if self.settings.rewarm_steps:
            warmed = {name: self._next_warmed(name) for name in selected}
            self._warmed.update({name: number for name, number in warmed.items() if number is not None})
        if self.settings.num_coasting or self.settings.rewarm_steps:
            self._last.update(dict.fromkeys(selected, self._step))
        return rates

    def _next_warmed(self, name: str) -> int | None:
        """Return which update since the block's return the coming one is, at most `rewarm_steps`; None: full rate."""
        last, steps = self._last.get(name), self.settings.rewarm_steps
        if last is None:
            return 1 if self.settings.rewarm_first else None
        if self._step - last - 1 >= self._least_absence:
            return min(1, steps)
        before = self._warmed.get(name)
        return None if before is None else min(before + 1, steps)

    def _by_visits(self, name: str) -> float:
        if not self.settings.rate_by_visits or name not in self._visits:
            return 1.0
        factor = ((1 + self._mean_visits) / (1 + self._visits[name])) ** self.settings.rate_by_visits
        return min(max(factor, 1 / self.settings.rate_cap), self.settings.rate_cap)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return the settings, as a checkpoint holds them; empty if no rule is on."""
        settings = asdict(self.settings) if self.settings.is_on else {}
        # Checkpoints from before there was an exit step do not hold it.
        return {name: value for name, value in settings.items() if name != "exit_step" or value}

    def state(self) -> dict[str, dict[str, int]]:
        """Return what is known of each block, as plain values."""
        return {"last": dict(self._last), "warmed": dict(self._warmed)}

    def load_state(self, state: Mapping[str, Mapping[str, int]] | None) -> None:
        """Continue from what `state()` returned; None: nothing is known."""
        state = state or {"last": {}, "warmed": {}}
        self._last, self._warmed = dict(state["last"]), dict(state["warmed"])


def _share(number: int | None, of: int) -> float:
    return 1.0 if number is None or not of else min(1.0, number / of)


def _remaining(group: Group) -> float:
    """Return 1 + beta + beta^2 + ...: all coasting steps, in terms of the first."""
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    return 1 / (1 - momentum)


def _scaled(group: Group, factor: float) -> Group:
    return group if factor == 1.0 else {**group, "lr": group["lr"] * factor}
