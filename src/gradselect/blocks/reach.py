"""Reach of the loss: blocks that no gradient ever reaches are found, said by name, and no candidates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from gradselect.core import (
    WHOLE,
    AbstractGradientHooks,
    Block,
    OutputProbes,
    Ownership,
    ParameterTable,
    is_frozen_for_now,
    is_kept_frozen,
)
from gradselect.parallel import collective_device, naming_the_collective
from gradselect.usage import UsageError, listed

from .compile_check import is_compiled
from .observer import GradientObserver
from .policy import AbstractPolicy
from .probed_modules import blocks_by_module

logger = logging.getLogger(__name__)

MAX_MISSES = 20
"""Updates in a row without a gradient after which a block that was reached before is no candidate any more."""


class Reach(AbstractGradientHooks):
    """Finds the blocks that the loss reaches.

    Each block is *unknown*, *reached*, *missed* or *unreached*:

        unknown      at the start. In the first step probes on outputs of its modules see whether a gradient arrives
                     there; they compute no gradient of a weight.
        missed       no probe of it was reached, but its weights were frozen: in the next backward pass they can get a
                     gradient, because weights may be used though their module is not called (a head in a fused loss).
        unreached    all of its weights could get a gradient, and none did. It is no candidate. Its weights stay able to
                     get one: that costs nothing as long as none arrives, and one that does makes it a candidate again.
        reached      nothing looks at it any more. If `MAX_MISSES` updates in a row find no gradient (an expert without
                     tokens), it is unreached.

    Gradients of watched blocks that are not selected are freed: on arrival, or on several ranks at the end of the pass,
    when data-parallel wrappers are done.

    After the first step two probes stay: one on the module that the first backward pass reached first, one on the
    model. Through them a loss can be differentiated though no selected block takes part in it.

    Blocks that the user froze whole while the optimizer was closed are no candidates either, until it is closed again.

    Attributes:
        unreached: names of the unreached blocks.
        frozen: names of the blocks that the user froze.

    Args:
        model: trained by the optimizer.
        table: its blocks.
        names: blocks that may be selected, and those that train always; in model order.
        ownership: of the optimizer.
        observer: knows the gradient scaler, which raises an error if a pass leaves no gradient.
        is_one_of_many: True if there are several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        table: ParameterTable,
        names: Sequence[str],
        ownership: Ownership,
        observer: GradientObserver,
        *,
        is_one_of_many: bool,
    ) -> None:
        super().__init__(ownership, accumulation_steps=1, passes=observer.passes)
        self._model = model
        self._table = table
        self._names = tuple(names)
        self._observer = observer
        self._is_one_of_many = is_one_of_many
        self._trained: frozenset[str] = frozenset()
        self._filled: Parameter | None = None
        self.frozen: frozenset[str] = frozenset()
        self._probes = OutputProbes({}, self)
        self.begin(None)

    # What is known -------------------------------------------------------------------------------------------------

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Continue from what `state()` returned; None: nothing is known."""
        state = state or {
            "unknown": self._names,
            "missed": (),
            "unreached": (),
            "misses": {},
            "anchor": None,
            "lost": 0,
        }
        self._unknown = set(state["unknown"])
        self._missed = set(state["missed"])
        self.unreached = frozenset(state["unreached"])
        self._misses: Counter[str] = Counter(state["misses"])
        self._anchor: str | None = state["anchor"]
        self._num_lost: int = state["lost"]
        self._forget()
        members = {name: self._table.members[name] for name in self._in_order(self._unknown)}
        self._blocks_of = blocks_by_module(self._model, members)
        paths = self._blocks_of if self._unknown else [path for path in [self._anchor] if path is not None]
        self._probes.remove()
        if not self._ownership.is_held:
            return  # loaded while the optimizer is closed; it begins again when that opens
        self._probes = OutputProbes({path: self._model.get_submodule(path) for path in paths}, self, whole=self._model)
        if not self._unknown:
            self._probes.keep(self._anchor)
        self.follow()

    def state(self) -> dict[str, Any]:
        """Return what is known, as plain values."""
        return {
            "unknown": self._in_order(self._unknown),
            "missed": self._in_order(self._missed),
            "unreached": self._in_order(self.unreached),
            "misses": dict(self._misses),
            "anchor": self._anchor,
            "lost": self._num_lost,
        }

    def look_for_frozen(self) -> None:
        """Find the blocks that the user froze while the optimizer was closed.

        Raises:
            UsageError: all blocks that may train are frozen.
        """
        before = self.frozen
        self.frozen = frozenset(name for name in self._names if all(map(is_kept_frozen, self._table.of(name))))
        if self.frozen.issuperset(self._names):
            raise UsageError(
                f"every block that may train was frozen while the optimizer was closed: {listed(self._names)}; thaw "
                "some, e.g. model.requires_grad_(True), then call reopen(), or train"
            )
        if gone := self._in_order(self.frozen - before):
            logger.warning(
                "%d of %d blocks were frozen while the optimizer was closed, and are no candidates: %s; to "
                "train them thaw them between close() and reopen()",
                *(len(gone), len(self._names), listed(gone)),
            )

    @property
    def left_out(self) -> frozenset[str]:
        """Blocks that are no candidates: unreached and frozen ones."""
        return self.unreached | self.frozen

    @property
    def watched(self) -> frozenset[str]:
        """Blocks whose weights may get a gradient in the coming pass though they are not selected."""
        return self.unreached | self._missed

    def candidates_of(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Return the blocks that are not left out; after a lost step without missed ones too, if there are others."""
        known = [block for block in blocks if block.name not in self.left_out]
        sure = [block for block in known if block.name not in self._missed]
        return tuple(sure if sure and self._num_lost else known)

    def lose(self, step: int) -> None:
        """Say that a step is lost, because it had selected only blocks that the loss does not reach."""
        self._num_lost += 1
        logger.warning(
            "step %d had selected only blocks that the loss does not reach: nothing has changed, the step is not "
            "counted and selects anew",
            step,
        )

    def propose(self, policy: AbstractPolicy, step: int) -> tuple[str, ...] | None:
        """Return what the policy proposes, without blocks that are left out.

        Raises:
            UsageError: nothing is left, because the policy does not select among its `candidates`.
        """
        if not policy.candidates:
            return ()  # blocks that train always are left
        proposal = policy.propose(step)
        if not proposal or self.left_out.isdisjoint(proposal):
            return proposal
        kept = tuple(name for name in proposal if name not in self.left_out)
        if not kept:
            raise UsageError(
                f"{type(policy).__name__} proposes only blocks that are frozen or that the loss does not reach: "
                f"{listed(proposal)}; let propose() select among self.names, which holds the others"
            )
        return kept

    # In the passes -------------------------------------------------------------------------------------------------

    def expect(self, trained: Collection[str]) -> None:
        """Free the gradients of watched blocks but these, whose gradients are wanted."""
        self._trained = frozenset(trained)

    def restart(self) -> None:
        self.passes.forget()  # what was seen remains true

    def end(self) -> None:
        """Remove hooks and probes."""
        self._probes.remove()
        self.close()

    def follow(self) -> None:
        """Put hooks on the weights of all blocks that are not known to be reached; also of a wrapper that came late."""
        names = [*self._unknown, *self.watched]
        if names and self._is_one_of_many:
            names = self._table.blocks  # a gradient that a wrapper averages may have arrived on another rank only
        named = [(name, parameter) for name in names for parameter in self._table.of(name)]
        frozen = [parameter for _, parameter in named if is_frozen_for_now(parameter)]
        for parameter in frozen:
            parameter.requires_grad_(True)  # torch refuses a hook otherwise
        self._register(named)
        for parameter in frozen:
            parameter.requires_grad_(False)

    def is_listening(self) -> bool:
        return self._ownership.covers(self._table.of(self._names[0])[0])

    def reached(self, name: str) -> None:
        self._begin_pass()
        self._seen.update(self._blocks_of.get(name, ()))
        if self._first is None and name != WHOLE:
            self._first = name

    def arrived(self, name: str, parameter: Parameter) -> None:
        self._begin_pass()
        if name in self._unknown or name in self.watched:
            self._seen.add(name)
            if name not in self._trained and not self._is_one_of_many:
                parameter.grad = None

    def _begin_pass(self) -> None:
        self._had_pass = True
        self.passes.at_end(self._end_pass, after_wrappers=self._is_one_of_many)

    def _end_pass(self) -> None:
        if self._is_one_of_many:
            for name in self.watched - self._trained:
                for parameter in self._table.of(name):
                    if parameter.grad is not None:
                        self._seen.add(name)
                        parameter.grad = None
        if self._observer.grad_scaler is not None:
            self._fill()

    def _fill(self) -> None:
        """Leave a gradient of zeros if the pass has left none at all, for the gradient scaler."""
        parameters = [parameter for name in self._trained for parameter in self._table.of(name)]
        if parameters and all(parameter.grad is None for parameter in parameters):
            self._filled = min(parameters, key=Parameter.numel)
            self._filled.grad = torch.zeros_like(self._filled)

    # At the step ---------------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        """Free the gradient of zeros, if there is one."""
        if self._filled is not None:
            self._filled.grad = None
            self._filled = None

    def conclude(self, selected: Sequence[str], *, has_gradient: Callable[[str], bool]) -> bool:
        """Learn from the passes since the last step; return True if that changes candidates or watched blocks.

        Args:
            selected: blocks that are about to be updated.
            has_gradient: returns True if a weight of the block got a gradient.

        Raises:
            UsageError: the loss reaches no block at all.
        """
        before, is_open = self.unreached, bool(self._unknown or self._missed)
        if is_open or self._seen:
            self._learn(is_open=is_open)
        if self._had_pass:
            self._count_misses(selected, has_gradient)
        learned = self._had_pass
        self._forget()
        if self.unreached != before:
            self._say(before)
        elif not (is_open and learned):
            return False
        self.follow()
        return True

    def _learn(self, *, is_open: bool) -> None:
        """Move blocks between the four kinds."""
        if is_compiled(self._model):
            # Probes are not traced, and a graph may leave out blocks that were frozen: `UnreachedBlocks` judges.
            self._unknown, self._missed = set(), set()
            self._probes.remove()
            return
        if self._is_one_of_many and is_open:
            self._share()
        if not self._had_pass:
            return
        were_watched = self.watched | self._trained
        unseen = (self._unknown | self._missed) - self._seen - self.frozen
        self.unreached = (self.unreached - self._seen) | (unseen & were_watched)
        self._unknown, self._missed = set(), unseen - were_watched
        self._anchor = self._first if self._anchor is None else self._anchor
        self._probes.keep(self._anchor)

    def _forget(self) -> None:
        self._seen: set[str] = set()
        self._first: str | None = None
        self._had_pass = False

    def _share(self) -> None:
        """Combine what the ranks have seen."""
        first = self._table.of(self._names[0])[0]
        flags = [self._had_pass, *(name in self._seen for name in self._names)]
        seen = torch.tensor(flags, dtype=torch.int32, device=collective_device(first))
        with naming_the_collective("finding what the loss reaches"):
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        self._had_pass, *flags = map(bool, seen.tolist())
        self._seen = {name for name, flag in zip(self._names, flags, strict=True) if flag}

    def _count_misses(self, selected: Sequence[str], has_gradient: Callable[[str], bool]) -> None:
        for name in selected:
            if has_gradient(name):
                self._misses.pop(name, None)
            elif name not in self.unreached:
                self._misses[name] += 1
        late = [name for name, misses in self._misses.items() if misses >= MAX_MISSES]
        for name in late:
            del self._misses[name]
        self.unreached = self.unreached.union(late)

    def _say(self, before: frozenset[str]) -> None:
        if self.left_out.issuperset(self._names):
            raise UsageError(
                f"the loss reaches no weight of any block that may train: {listed(self._names)}; name blocks that it "
                "reaches, in the policy's among=... or blocks=..., or in always=..."
            )
        if gone := self._in_order(self.unreached - before):
            sizes = {name: sum(map(Parameter.numel, self._table.of(name))) for name in self._table.blocks}
            share = sum(sizes[name] for name in gone) / sum(sizes.values())
            logger.warning(
                "the loss reaches no weight of %d of %d blocks, which are no candidates any more: %s (%.0f %% of the "
                "weights)",
                *(len(gone), len(self._names), listed(gone), 100 * share),
            )
        if back := self._in_order(before - self.unreached):
            logger.warning("the loss now reaches %s: candidates from the next step on", listed(back))

    def _in_order(self, names: Collection[str]) -> list[str]:
        return [name for name in self._names if name in names]
