"""Contract of a policy, which selects the blocks of each step.

Before the forward pass of step t the policy **proposes**: it names the blocks, or returns None because it needs
gradient norms first. In that case every block takes part in the backward pass, and the policy **decides** from the
norms. After the step the policy **commits** it: the only call that changes the policy's state.

    propose(t) -> names              train exactly these; everything else is frozen before the forward pass
    propose(t) -> None               full backward pass; then decide(t, norms) -> names
    commit(t, selected, norms)       count the step

`propose`, `score` and `decide` are pure: their result depends only on the policy's settings (its seed included), the
step, the committed history and the norms. So all ranks select alike once the norms are reduced, and a resumed run
proposes what the interrupted one had proposed.

A decision is always "the `keep_at(t)` blocks of largest score", ties to the earlier block, and a score depends on one
block's norm only. So the observer can free a block's gradients during the backward pass as soon as that many better
blocks are known. A random draw adds noise that is fixed before the norms are seen (Gumbel top-k). A policy with
*strata* (`stratum`, `keep_in`) selects so in each stratum apart.

At a step with a proposal a policy may look at other blocks too (`observed`): they take part in the backward pass, are
measured, and lose their gradients at once.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from gradselect.core import Block, Measure
from gradselect.usage import UsageError, check_positive, check_whole

from .flops import StepCost
from .partitioning import resolve_names

Norms = Mapping[str, float]
"""L2 norm, or the policy's own measure, of each observed block's gradient, by block name."""


@dataclass(eq=False)
class AbstractPolicy(ABC):
    """Selects the blocks of each step; see the module docstring.

    A concrete policy is one final dataclass: its settings are the fields of `__init__`, its state the fields with
    `init=False`. Settings are given at construction, blocks by `bind`.

    Attributes:
        candidates: the blocks to select from, in model order; empty until bound. `start` may narrow them: other blocks
            are never selected and never observed. Between steps the optimizer leaves out those that the loss does not
            reach, and puts back those that it reaches again; the state of a block that is out stays.
        num_elements: number of entries of each block, by block name.
        cost: FLOPs of the model's steps.
        method_name: `method.name` in recipes that use it. None: no method is just this policy.
        measure: number that "norms" hold: "l2" sqrt(sum g^2), "l1" sum |g|, for Adam's first-order gain lr |g|_1, or
            "taylor" sum |w g|.

    Example:
        A policy that trains the last block only:

        >>> import torch
        >>> import gradselect as gs
        >>> class Last(gs.AbstractPolicy):
        ...     def start(self):
        ...         pass
        ...
        ...     def propose(self, step):
        ...         return self.names[-1:]
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> Last().bind(gs.partition(model)).propose(step=0)
        ('layer.2',)
    """

    method_name: ClassVar[str | None] = None
    measure: ClassVar[Measure] = "l2"

    candidates: tuple[Block, ...] = field(default=(), init=False, repr=False)
    num_elements: Mapping[str, int] = field(default_factory=dict, init=False, repr=False)
    cost: StepCost = field(default_factory=lambda: StepCost.of_blocks(()), init=False, repr=False)

    def bind(self, blocks: Sequence[Block], *, cost: StepCost | None = None) -> Self:
        """Return a copy of this policy, with fresh state, that selects among `blocks`. The original stays unbound.

        Args:
            blocks: in model order.
            cost: of the model's steps; holds these blocks. None: made from the blocks alone.

        Raises:
            UsageError: the settings do not fit these blocks (a name that none of them has, more blocks than there are).
        """
        if not blocks:
            raise UsageError(
                "no block is left for the policy to select from; write always=() or name fewer blocks there"
            )
        bound = copy.copy(self)
        bound.candidates = tuple(blocks)
        bound.num_elements = {block.name: block.num_elements for block in blocks}
        bound.cost = StepCost.of_blocks(blocks) if cost is None else cost
        bound.start()
        return bound

    @abstractmethod
    def start(self) -> None:
        """Narrow `self.candidates` if the settings say so, check the settings against them, set fresh state."""

    @abstractmethod
    def propose(self, step: int) -> tuple[str, ...] | None:
        """Return names of the blocks to train at `step` (from 0), in model order; None if gradient norms are needed."""

    def keep_at(self, step: int) -> int:
        """Number of blocks that the decision of `step` selects; 0: only observe. Called if `propose(step)` was None."""
        raise AssertionError(f"{type(self).__name__} proposed no observation at step {step}")

    def score(self, step: int, block: str, norm: float) -> float:
        """Score of `block` in the decision of `step`, given the norm of its gradient; larger is better."""
        raise AssertionError(f"{type(self).__name__} proposed no observation at step {step}")

    def stratum(self, block: str) -> str:
        """Return the stratum in which `block` competes in decisions. By default there is one, called ""."""
        return ""

    def keep_in(self, step: int, stratum: str) -> int:
        """Number of blocks of this stratum that the decision of `step` selects; over all strata it is `keep_at`."""
        return self.keep_at(step)

    def keep_by_stratum(self, step: int) -> dict[str, int]:
        """Return `keep_in` of every stratum that the candidates stand in."""
        strata = dict.fromkeys(map(self.stratum, self.names))
        return {stratum: self.keep_in(step, stratum) for stratum in strata}

    def decide(self, step: int, norms: Norms) -> tuple[str, ...]:
        """Return the `keep_at(step)` blocks of largest score, in model order. Called if `propose(step)` was None."""
        return self.best(step, {name: self.score(step, name, norms[name]) for name in self.names})

    def best(self, step: int, scores: Mapping[str, float]) -> tuple[str, ...]:
        """Return the candidates of largest score, `keep_in(step, stratum)` of each stratum, in model order."""
        members: dict[str, list[str]] = {}
        for name in self.names:
            members.setdefault(self.stratum(name), []).append(name)
        selected = {
            name for stratum, names in members.items() for name in largest(names, scores, self.keep_in(step, stratum))
        }
        return tuple(name for name in self.names if name in selected)

    def measured(self) -> Measure:
        """Return the measure of gradients that the optimizer takes: `measure`, unless the settings choose one."""
        return self.measure

    def draws_evenly(self) -> bool:
        """True if all sets of blocks of one size are about equally likely while gradients are alike.

        A plan then takes the mean over all sets, otherwise over steps that it draws.
        """
        return True

    def observes_selected(self, step: int) -> bool:
        """True if `commit` needs the norms of the selected blocks at a step whose selection was proposed."""
        return False

    def observed(self, step: int) -> tuple[str, ...]:
        """Candidates whose norms `commit` needs at a step whose selection was proposed, be they selected or not.

        Those that are not selected cost their weight gradients and change nothing.
        """
        return ()

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        """Count a step that has updated `selected`, as proposed or decided. `norms` holds observed norms, if any."""

    def fill_explore_steps(self, num_steps: int | None, *, run_steps: int | None = None) -> None:
        """Derive the length of the explore phase, if it was left open, from that of the first epoch and of the run.

        Args:
            num_steps: optimizer steps of the first epoch, be the run shorter or not. None: unknown.
            run_steps: optimizer steps of the run. None: unknown.
        """

    def forget_explore_steps(self) -> None:
        """Leave the length of the explore phase open again, if `fill_explore_steps` gave it. Default: it never does."""

    def expected_explore_steps(self, num_steps: int) -> float:
        """Expected number of those of the first `num_steps` steps that look at the gradients of all blocks."""
        return 0.0

    @property
    def look_only_steps(self) -> int:
        """Number of first steps that look at the gradients of all blocks and select none. Default: 0."""
        return 0

    @property
    def coverage_steps(self) -> int | None:
        """Number of consecutive steps that surely train every candidate at least once; None: no such number."""
        return None

    def state(self) -> dict[str, Any]:
        """Return everything committed so far, as plain numbers, strings, lists and dicts of them."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self._state_names()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` of the same policy on the same blocks returned.

        Raises:
            UsageError: the state is of another kind of policy.
        """
        expected = self._state_names()
        if set(state) != set(expected):
            raise UsageError(
                f"the saved policy state holds {sorted(state)}, {type(self).__name__} needs {sorted(expected)}; "
                "resume with the policy that was saved"
            )
        for name in expected:
            setattr(self, name, copy.deepcopy(state[name]))

    def _state_names(self) -> list[str]:
        given_by_bind = {shared.name for shared in fields(AbstractPolicy)}
        return [own.name for own in fields(self) if not own.init and own.name not in given_by_bind]

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments; a checkpoint keeps them so that another policy is refused."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `candidates`."""
        return tuple(block.name for block in self.candidates)

    def still_among(self, selection: Sequence[str]) -> tuple[str, ...] | None:
        """Return the blocks of an earlier selection that are candidates now, in model order; None if none of it is."""
        return tuple(name for name in self.names if name in selection) or None


def largest(names: Sequence[str], scores: Mapping[str, float], count: int) -> tuple[str, ...]:
    """Return the `count` names of largest score, in the order of `names`; NaN ranks last, ties go to the earlier."""
    ranked = sorted(names, key=lambda name: -math.inf if math.isnan(scores[name]) else scores[name], reverse=True)
    selected = set(ranked[:count])
    return tuple(name for name in names if name in selected)


def tells(norms: Norms) -> bool:
    """True if norms tell blocks apart, or none were needed.

    If none of them is finite and above zero, the first blocks of the model have won. All are zero with GRPO and equal
    rewards, for example.
    """
    return not norms or any(norm != 0 and math.isfinite(norm) for norm in norms.values())


LAYERS = "layers"
"""Word in `among` for all blocks but those around the layers."""


def taking_part(blocks: Sequence[Block], among: Sequence[str] | None) -> tuple[Block, ...]:
    """Return the blocks that a policy selects from, in model order.

    Args:
        blocks: of the model.
        among: names, aliases or globs; None: all. The word "layers" stands for all blocks but embeddings, final norms
            and heads over the vocabulary: poolers, heads of classifiers and blocks of the user's own are among them. It
            stands for all blocks if there are no others.

    Raises:
        UsageError: a glob matches nothing.
    """
    if among is None:
        return tuple(blocks)
    names = set(resolve_names(blocks, [pattern for pattern in among if pattern != LAYERS]))
    if LAYERS in among:
        names |= {block.name for block in blocks if not _is_around_layers(block)} or {block.name for block in blocks}
    return tuple(block for block in blocks if block.name in names)


def _is_around_layers(block: Block) -> bool:
    kind = block.name.rpartition(".")[2]
    if "layer" in block.name.split("."):
        return False
    return kind in ("embedding", "norm") or (kind == "head" and block.over_vocabulary)


def resolve_count(*, num_blocks: int, fraction: float | None, count: int | None) -> int:
    """Number of selected blocks: `count`, or max(1, round(fraction * num_blocks)).

    Raises:
        UsageError: `count` is larger than the number of blocks.
    """
    if count is None:
        assert fraction is not None
        return max(1, round(fraction * num_blocks))
    if count > num_blocks:
        raise UsageError(f"count={count} is more than the {num_blocks} blocks to select from; write count={num_blocks}")
    return count


def resolve_count_now(*, num_blocks: int, fraction: float | None, count: int | None) -> int:
    """As `resolve_count`, but at most `num_blocks`: during training blocks may have dropped out."""
    return resolve_count(
        num_blocks=num_blocks, fraction=fraction, count=None if count is None else min(count, num_blocks)
    )


def check_fraction_or_count(*, fraction: float | None, count: int | None) -> None:
    """Check that exactly one of `fraction` in (0, 1] and `count` >= 1 is given.

    Raises:
        UsageError: otherwise.
    """
    if (fraction is None) == (count is None):
        raise UsageError(f"got fraction={fraction} and count={count}; give one of them, e.g. fraction=0.2")
    if fraction is not None:
        check_positive("fraction", fraction, at_most=1, example=0.2)
    if count is not None:
        check_whole("count", count)
