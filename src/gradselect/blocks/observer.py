"""Gradient norms of blocks, measured during the backward pass; gradients that cannot win are freed at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Parameter

from gradselect.core import (
    SELECTION,
    AbstractGradientHooks,
    BackwardPasses,
    Measure,
    Ownership,
    Phases,
    gradient_norm,
    in_phase,
    norm_of,
)
from gradselect.parallel import NormSums

from .policy import AbstractPolicy

logger = logging.getLogger(__name__)

Score = Callable[[str, float], float]


class GradientObserver(AbstractGradientHooks):
    """Measures ||g_b||_2, or another `measure`, of each watched block b when its last gradient has arrived.

    All measures are called norms here: they grow linearly with the gradient, and are finite if it is.

    With `stream`, only the blocks of the `keep` largest scores so far keep gradients (*streaming top-k*): when a block
    completes, the worst of the best `keep + 1` is freed at once. The backward pass visits one block after the other, so
    at most `keep + 1` watched blocks hold gradients at any time, where the slices of a layer, which complete together,
    count as one more. Strata compete apart, each with its own `keep`. A block whose norm is NaN or infinite keeps its
    gradients and takes no place among the `keep`: a gradient scaler or clipping must see the overflow.

    A pass beyond the expected ones adds to the gradients that are left; those of freed blocks are freed again. The
    blocks are then those of the passes that were read.

    Within reentrant checkpoints a gradient may arrive in parts: its block is measured when the pass ends, see
    `BackwardPasses`.

    A block never completes during the backward pass if one of its parameters gets no gradient (an expert without
    tokens, for example). It is measured when the pass ends.

    On several ranks a gradient is final when the wrapper has averaged it, after the backward pass. Blocks are measured
    then, no gradient is freed before, and `norms` sums over the shards.

    Args:
        blocks: parameters of each block, by block name, in model order.
        ownership: of the optimizer.
        measure: taken of gradients. "taylor" reads the weights as they are in the pass, before the update.
        accumulation_steps: backward passes before an optimizer step; gradients are measured in the last, see
            `AbstractGradientHooks`.
        grad_scaler: scales the loss, or None; norms are divided by its scale.
        is_one_of_many: True if there are several ranks.
        phases: of the optimizer.
        passes: of the optimizer.
    """

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Parameter]],
        ownership: Ownership,
        *,
        measure: Measure = "l2",
        accumulation_steps: int = 1,
        grad_scaler: GradScaler | None = None,
        is_one_of_many: bool = False,
        phases: Phases | None = None,
        passes: BackwardPasses | None = None,
    ) -> None:
        super().__init__(ownership, accumulation_steps=accumulation_steps, passes=passes)
        self.grad_scaler = grad_scaler
        self._phases = phases or Phases()
        self._rank = {name: position for position, name in enumerate(blocks)}
        self._watched: frozenset[str] = frozenset()
        self._score: Score | None = None
        self._stratum: Callable[[str], str] = _one_stratum
        self._keep: Mapping[str, int] = {}
        self._has_said_late = False
        self._measure: Measure = measure
        norm = partial(gradient_norm, measure=measure)
        self._sums = NormSums(norm, adds_squares=measure == "l2") if is_one_of_many else None
        self.follow(blocks)

    def follow(self, blocks: Mapping[str, Sequence[Parameter]]) -> None:
        """Observe these parameters of the same blocks, at the start and when a wrapper has replaced them."""
        self._blocks = {name: tuple(parameters) for name, parameters in blocks.items()}
        self.restart()
        self._register((name, parameter) for name, parameters in self._blocks.items() for parameter in parameters)

    def prepare(self, policy: AbstractPolicy, step: int, proposal: Sequence[str] | None) -> None:
        """Measure what the policy needs at this step, and keep only gradients that the step may apply."""
        if proposal is None:
            self.watch(policy.names)
            keep, score = policy.keep_by_stratum(step), partial(policy.score, step)
            self.stream(keep=keep, score=score, stratum=policy.stratum)
            return
        observed = policy.observed(step) if proposal else ()
        needed = {*observed, *(proposal if policy.observes_selected(step) else ())}
        self.watch([name for name in self._blocks if name in needed])
        if not needed.issubset(proposal):
            kept = frozenset(proposal)
            keep = {"selected": len(kept), "observed": 0}
            self.stream(keep=keep, score=_no_score, stratum=lambda name: "selected" if name in kept else "observed")

    def watch(self, names: Sequence[str]) -> None:
        """Measure these blocks in the following backward passes."""
        self._watched = frozenset(names)
        self._score = None
        self.restart()

    def stream(
        self, *, keep: int | Mapping[str, int], score: Score, stratum: Callable[[str], str] | None = None
    ) -> None:
        """Keep only the gradients of the `keep` watched blocks of largest `score(name, norm)`; call after `watch`.

        Args:
            keep: number of blocks, or numbers by stratum.
            score: of a block, given its norm.
            stratum: of a block; None: all blocks are one.
        """
        self._stratum = _one_stratum if stratum is None else stratum
        self._keep = {"": keep} if isinstance(keep, int) else keep
        self._score = score

    def restart(self) -> None:
        """Start a new window, in which nothing has arrived yet."""
        self._norms: dict[str, Tensor | float] = {}
        self._parts: dict[Parameter, Tensor] = {}
        self._so_far: dict[str, Tensor] = {}
        self._leaders: dict[str, float] = {}
        self._incomplete = {name: len(self._blocks[name]) for name in self._watched}
        self._end_window()
        self._num_passes = 0
        self._known_scale: float | None = None
        if self._sums is not None:
            self._sums.clear()

    @property
    def saw_gradients(self) -> bool:
        """True if a backward pass has reached a watched block in this window."""
        return bool(self._norms) or self._num_passes > 0

    @in_phase(SELECTION)
    def norms(self) -> dict[str, float]:
        """Norm of every watched block, in model order.

        If the window ended before its last announced backward pass, blocks are measured now, from the gradients as they
        are: unscaled, and clipped if they were clipped. If it had as many as announced, but fewer than expected, they
        were measured after each pass.
        """
        if self._sums is not None and not self._norms:
            self._norms.update(self._shared_norms())
        self._measure_rest(scale=1.0)
        return {name: float(self._norms[name]) for name in self._blocks if name in self._norms}

    @in_phase(SELECTION)
    def finish_window(self) -> None:
        if self._sums is None and self._num_counted:
            self._measure_rest(scale=1.0 if self._is_unscaled() else self._scale())

    def _measure_rest(self, *, scale: float) -> None:
        """Measure what the passes have not, because they are fewer than announced or expected."""
        for name in self._blocks:
            if name in self._so_far and name not in self._norms:
                self._take(name, self._so_far[name])
            elif name in self._watched and name not in self._norms:
                self._complete(name, scale=scale)

    def arrived(self, name: str, parameter: Parameter) -> None:
        if name not in self._watched:
            return
        if self._num_counted >= self.num_expected and self._score is not None:
            self._forget_overflow()
        if self._sums is None:
            self.passes.at_end(self._end_pass)
        else:
            self.passes.at_end(self._end_shared_pass, after_wrappers=True)
        is_again = parameter in self._parts and self._is_last_pass()
        if is_again:
            self.passes.arrived_again(parameter)
        if self._is_released(name) and self._sums is None:
            parameter.grad = None
        elif is_again:
            self._reopen(name, parameter)
        elif self._is_last_pass() and self._sums is None and not self.passes.may_arrive_again(parameter):
            # Measure now: an update inside the backward pass frees the gradient next.
            self._parts[parameter] = norm_of(parameter, measure=self._measure)
            self._incomplete[name] -= 1
            if self._incomplete[name] == 0:
                with self._phases(SELECTION):
                    self._complete(name, scale=self._scale())

    def _reopen(self, name: str, parameter: Parameter) -> None:
        """Measure the block when the pass ends: what was measured is a part of the gradient."""
        del self._parts[parameter]
        self._incomplete[name] += 1
        self._norms.pop(name, None)
        self._leaders.pop(name, None)

    @in_phase(SELECTION)
    def _end_pass(self) -> None:
        is_last = self._is_last_pass()
        self._count_pass()
        if is_last:
            for name in self._blocks:
                if name in self._watched and name not in self._norms:
                    self._complete(name, scale=self._scale())
        elif self._is_late:
            self._take_late_pass()
        elif self._num_counted >= self.accumulation_steps:  # the window may end here
            self._so_far = {name: self._norm(name) / self._scale() for name in self._watched}
        self._known_scale = None  # if the scaler skips the step, the next pass has another one

    def _end_shared_pass(self) -> None:
        """Measure local parts after every pass, because only the wrapper knows in which pass it averages."""
        is_last = self._is_last_pass()
        self._count_pass()
        self._measure_shared(self._watched, scale=self._scale())
        if is_last and self._score is not None:
            self._norms.update(self._shared_norms())
            for name in self._norms:
                self._consider(name)
        elif self._is_late:
            self._take_late_pass()
        self._known_scale = None

    def _count_pass(self) -> None:
        self._num_passes += 1
        self._num_counted += self._counts()

    @property
    def _is_late(self) -> bool:
        """True after a pass beyond those in which gradients were measured."""
        return self._num_counted > self.num_expected

    def _is_released(self, name: str) -> bool:
        """True if the gradients of a measured block were freed, because it cannot be among the best."""
        return self._score is not None and name in self._norms and name not in self._leaders and self._is_finite(name)

    def _is_finite(self, name: str) -> bool:
        return math.isfinite(self._norms[name])

    def _forget_overflow(self) -> None:
        """Begin a new window if a norm is not finite: the loop may have skipped the step with `model.zero_grad()`.

        If it has not, the gradients are NaN or infinite still, and are measured as such again.
        """
        if not all(map(self._is_finite, self._norms)):
            self.drop_window()

    def _take_late_pass(self) -> None:
        """Free what a late pass added to freed gradients; if none was freed, measure all norms anew."""
        if self._score is None and self._sums is None:
            self._parts.clear()
            for name in self._norms:
                self._complete(name, scale=self._scale())
        for name in self._norms:
            if self._is_released(name):
                for parameter in self._blocks[name]:
                    parameter.grad = None
        if self._score is not None and not self._has_said_late:
            self._has_said_late = True
            logger.warning(
                "a step has more than the %d backward passes that accumulation_steps or the step before announced: "
                "its blocks are selected by the gradients of the first %d. From the next step on as many passes are "
                "expected as this one has; with accumulation_steps=<backward passes per step> that holds at once. A "
                "loop that skips steps clears their gradients with optimizer.zero_grad(), not model.zero_grad()",
                *(self.num_expected, self.num_expected),
            )

    def _measure_shared(self, names: Collection[str], *, scale: float) -> None:
        assert self._sums is not None
        for name in names:
            self._sums.measure(name, self._blocks[name], scale=scale)

    def _shared_norms(self) -> dict[str, float]:
        """Norms of the watched blocks' whole gradients, summed over ranks."""
        assert self._sums is not None
        watched = [name for name in self._blocks if name in self._watched]
        self._measure_shared([name for name in watched if name not in self._sums], scale=1.0)
        return self._sums.norms(watched)

    def _scale(self) -> float:
        if self._known_scale is None:
            self._known_scale = 1.0 if self.grad_scaler is None else float(self.grad_scaler.get_scale())
        return self._known_scale

    def _is_unscaled(self) -> bool:
        """True if the loop has called `scaler.unscale_` for this step already."""
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return False
        state = self.grad_scaler._per_optimizer_states[id(self._ownership.optimizer)]  # torch has no public question
        return state["stage"] is OptState.UNSCALED

    def _complete(self, name: str, *, scale: float) -> None:
        self._take(name, self._norm(name, known=self._parts) / scale)

    def _norm(self, name: str, *, known: Mapping[Parameter, Tensor] = MappingProxyType({})) -> Tensor:
        return gradient_norm(self._blocks[name], measure=self._measure, known=known)

    def _take(self, name: str, norm: Tensor) -> None:
        self._norms[name] = norm
        if self._score is not None:  # otherwise the norm stays on the device and nothing waits for it
            self._consider(name)

    def _consider(self, name: str) -> None:
        """Rank a measured block, and free the gradients of the worst if there are too many."""
        assert self._score is not None
        self._norms[name] = number = float(self._norms[name])
        if math.isfinite(number):
            self._leaders[name] = self._score(name, number)
            stratum = self._stratum(name)
            rivals = [leader for leader in self._leaders if self._stratum(leader) == stratum]
            # A scaler raises an error if it finds no gradient at all.
            is_only = self.grad_scaler is not None and len(self._leaders) == 1 and not any(self._keep.values())
            if len(rivals) > self._keep[stratum] and not is_only:
                self._release_worst(rivals)

    def _release_worst(self, rivals: Sequence[str]) -> None:
        worst = min(rivals, key=lambda name: (_ordered(self._leaders[name]), -self._rank[name]))
        del self._leaders[worst]
        for parameter in self._blocks[worst]:
            parameter.grad = None


def _one_stratum(name: str) -> str:
    return ""


def _no_score(name: str, norm: float) -> float:
    return 0.0


def _ordered(score: float) -> float:
    return -math.inf if math.isnan(score) else score  # as in `largest`
