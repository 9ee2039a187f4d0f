"""The steps of `BlockOptimizer`, before there is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradselect.blocks import AbstractPolicy, resolve_names, visited_share
from gradselect.core import AbstractResidency, AbstractRule, Block, Drop

from .bytes import Bytes, Tensors, cost, together, upper
from .forward_pass import ForwardPass
from .policy_survey import Choices, ask, mean_depth, mean_elements, worst
from .steps import Gradients, Step, Work, moments


@dataclass(frozen=True, kw_only=True)
class BlockTraining:
    """What decides the bytes of a run with blocks; fields are the arguments of `BlockOptimizer`.

    Args:
        choices: of the policy, where they are known already.
    """

    model: nn.Module
    blocks: Sequence[Block]
    policy: AbstractPolicy
    always: Collection[str]
    residency: AbstractResidency
    master_dtype: torch.dtype | None
    accumulation_steps: int = 1
    rule: AbstractRule | None = None
    update_in_backward: bool = False
    choices: Choices | None = None


def choices_of(policy: AbstractPolicy, blocks: Sequence[Block], always: Collection[str]) -> Choices:
    """What the policy may choose of these blocks, where some train at every step.

    Raises:
        UsageError: it does not fit them.
    """
    fixed = resolve_names(blocks, tuple(always))
    return ask(policy.bind([block for block in blocks if block.name not in fixed]))


def block_steps(training: BlockTraining, forward: ForwardPass) -> list[Step]:
    """The kinds of steps that the policy takes."""
    always = resolve_names(training.blocks, tuple(training.always))
    choices = training.choices or choices_of(training.policy, training.blocks, always)
    planner = _BlockPlanner(training, forward, always=always, choices=choices)
    steps = [planner.explore(keep) for keep in planner.choices.explored[-1:]]
    return [*steps, planner.exploit()] if planner.choices.proposed else steps


class _BlockPlanner:
    def __init__(
        self, training: BlockTraining, forward: ForwardPass, *, always: Sequence[str], choices: Choices
    ) -> None:
        self.choices = choices
        self._training = training
        self._forward = forward
        self._always = tuple(always)
        self._names = {block.name: block.parameter_names for block in training.blocks}
        self._costs = {
            block.name: cost(block.parameters, master_dtype=training.master_dtype, rule=training.rule)
            for block in training.blocks
        }
        self._sizes = {name: part.elements for name, part in self._costs.items()}
        self._weights = sum(parameter.nbytes for parameter in training.model.parameters())
        self._elements = sum(parameter.numel() for parameter in training.model.parameters())

    def explore(self, keep: int) -> Step:
        """All candidates have gradients; during the backward pass the best `keep` and one more hold theirs."""
        candidates = self._of(self.choices.candidates)
        chosen = upper(candidates, keep) + self._sum(self._always)
        everything = self._sum({*self.choices.candidates, *self._always})
        streamed = upper(candidates, keep + 1) + self._sum(self._always)
        adds_up = self._training.accumulation_steps > 1
        gradients = Gradients(
            before=everything.gradients if adds_up else 0,
            most=everything.gradients if adds_up else streamed.gradients,
            after=chosen.gradients,
        )
        return self._step(
            "explore",
            [({*self.choices.candidates, *self._always}, chosen, gradients)],
            depth=self._depth({*self.choices.candidates, *self._always}),
            elements=everything.elements,
        )

    def exploit(self) -> Step:
        """The chosen blocks alone have gradients."""
        cases = []
        for selection in worst(self.choices, self._sizes):
            chosen = self._sum({*selection, *self._always})
            before = chosen.gradients if self._training.accumulation_steps > 1 else 0
            most = self._largest_gradient(chosen) if self._training.update_in_backward else chosen.gradients
            gradients = Gradients(before=before, most=most, after=most)
            cases.append(({*selection, *self._always}, chosen, gradients))
        visited = {name: self._depth({name, *self._always}) for name in self.choices.candidates}
        elements = mean_elements(self.choices, self._sizes) + self._sum(self._always).elements
        depth = mean_depth(self.choices, visited) if visited else self._depth(self._always)
        return self._step("exploit", cases, depth=depth, elements=elements)

    def _step(
        self,
        kind: str,
        cases: Sequence[tuple[Collection[str], Tensors, Gradients]],
        *,
        depth: float,
        elements: float,
    ) -> Step:
        """The dearest of some cases: blocks that have gradients, those that are updated, bytes of gradients."""
        steps = []
        work = Work(depth=depth, frozen=1 - elements / self._elements, checkpointing=self._forward.checkpointing)
        for trained, chosen, gradients in cases:
            kept = self._forward.kept([name for block in trained for name in self._names[block]])
            steps.append(
                Step(
                    kind="explore" if kind == "explore" else "exploit",
                    moments=moments(self._held(chosen), kept, gradients, workspace=self._workspace()),
                    relative_time=work.relative_time,
                    backward_skipped=work.backward_skipped,
                )
            )
        return max(steps, key=lambda step: step.peak_bytes)

    def _held(self, chosen: Tensors) -> Bytes:
        """What stays through a step in which `chosen` are updated, when every block has had a turn."""
        reached = self._sum({*self.choices.reached, *self._always})
        if not self._training.residency.frees_device:
            return Bytes(weights=self._weights, masters=reached.masters, state_on_device=reached.moments)
        # Just before an update all that was ever chosen may be on the host but one selection: the new one has come, or,
        # where it is not known yet, the last one is still there.
        stays = isinstance(self._training.residency, Drop) or self.choices.is_fixed
        on_host = 0 if stays else self._sum(self.choices.reached).state - self._least_state()
        return Bytes(
            weights=self._weights,
            masters=chosen.masters,
            state_on_device=chosen.moments,
            state_on_host=on_host,
        )

    def _least_state(self) -> int:
        """Of the selection that holds the least."""
        counts = {*self.choices.explored, *([] if self.choices.count is None else [self.choices.count])}
        states = sorted(part.state for part in self._of(self.choices.reached).values())
        cases = [self._sum(selection).state for selection in self.choices.proposed]
        return min([*cases, *(sum(states[:count]) for count in counts)])

    def _largest_gradient(self, chosen: Tensors) -> int:
        return chosen.largest * next(self._training.model.parameters()).element_size()

    def _workspace(self) -> int:
        """Of AdamW on one block: its gradients in the masters' type, and two tensors for the denominator."""
        parts = self._of({*self.choices.reached, *self._always}).values()
        copied = max((part.masters for part in parts), default=0)
        itemsize = 4 if copied else next(self._training.model.parameters()).element_size()
        return copied + 2 * itemsize * max((part.largest for part in parts), default=0)

    def _depth(self, trained: Collection[str]) -> float:
        return visited_share(trained, list(self._names))

    def _of(self, names: Collection[str]) -> Mapping[str, Tensors]:
        return {name: part for name, part in self._costs.items() if name in names}

    def _sum(self, names: Collection[str]) -> Tensors:
        return together(self._of(names).values())
