"""Steps of a `BlockOptimizer`, planned without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from gradselect.blocks import AbstractPolicy, partition, resolve_names, visited_share
from gradselect.core import Drop, num_bytes

from .bytes import Bytes, Cost, cost_of, largest_cost, total_cost
from .forward_pass import ForwardPass
from .policy_survey import mean_depth, mean_entries, survey_policy, worst
from .steps import Gradients, Step, StepKind, Work, make_step
from .training import Training


def block_steps(training: Training, policy: AbstractPolicy, forward: ForwardPass) -> tuple[Step, ...]:
    """Return the kinds of steps that the policy takes, explore before exploit."""
    planner = _BlockPlanner(training, policy, forward)
    steps = [planner.explore(keep) for keep in planner.survey.explored[-1:]]
    return (*steps, planner.exploit()) if planner.survey.proposed else tuple(steps)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One selection: its blocks that have gradients, the cost of those that are updated, and bytes of gradients.

    `probed` names a parameter down to which the backward pass goes, though it gets no gradient.
    """

    trained: Collection[str]
    updated: Cost
    gradients: Gradients
    probed: tuple[str, ...] = ()


class _BlockPlanner:
    def __init__(self, training: Training, policy: AbstractPolicy, forward: ForwardPass) -> None:
        self._training = training
        self._forward = forward
        blocks = partition(training.model) if training.blocks is None else training.blocks
        self._always = resolve_names(blocks, training.always)
        self.survey = training.survey or survey_policy(policy, blocks, self._always)
        self._names = {block.name: block.parameter_names for block in blocks}
        self._costs = {
            block.name: cost_of(block.parameters, master_dtype=training.master_dtype, rule=training.rule)
            for block in blocks
        }
        self._sizes = {name: part.num_entries for name, part in self._costs.items()}
        self._weights = sum(map(num_bytes, training.model.parameters()))
        self._num_entries = sum(parameter.numel() for parameter in training.model.parameters())

    def explore(self, keep: int) -> Step:
        """All candidates have gradients; during the backward pass the best `keep` and one more hold theirs."""
        candidates = self._costs_of(self.survey.candidates)
        everything = {*self.survey.candidates, *self._always}
        updated = largest_cost(candidates, keep) + self._sum(self._always)
        whole = self._sum(everything)
        streamed = largest_cost(candidates, keep + 1) + self._sum(self._always)
        accumulates = self._training.accumulation_steps > 1
        gradients = Gradients(
            before=whole.gradients if accumulates else 0,
            most=whole.gradients if accumulates else streamed.gradients,
            after=updated.gradients,
        )
        case = _Case(trained=everything, updated=updated, gradients=gradients)
        return self._step("explore", [case], depth=self._depth(everything), num_entries=whole.num_entries)

    def exploit(self) -> Step:
        """Only selected blocks have gradients."""
        visited = {name: self._depth({name, *self._always}) for name in self.survey.candidates}
        return self._step(
            "exploit",
            [*map(self._exploit_case, worst(self.survey, self._sizes)), *self._first_case()],
            depth=mean_depth(self.survey, visited) if visited else self._depth(self._always),
            num_entries=mean_entries(self.survey, self._sizes) + self._sum(self._always).num_entries,
        )

    def _exploit_case(self, selection: Collection[str]) -> _Case:
        trained = {*selection, *self._always}
        updated = self._sum(trained)
        before = updated.gradients if self._training.accumulation_steps > 1 else 0
        most = updated.largest * self._itemsize if self._training.update_in_backward else updated.gradients
        return _Case(trained=trained, updated=updated, gradients=Gradients(before=before, most=most, after=most))

    def _first_case(self) -> list[_Case]:
        """The first step, whose probes look at all candidates: its backward pass visits the lowest one too.

        An explore step does that by itself.
        """
        if self.survey.explored or not self.survey.candidates:
            return []
        lowest = self._names[self.survey.candidates[0]]
        sizes = dict(self._training.model.named_parameters())
        smallest = min(lowest, key=lambda name: sizes[name].numel())
        return [replace(self._exploit_case(self.survey.proposed[0]), probed=(smallest,))]

    def _step(self, kind: StepKind, cases: Sequence[_Case], *, depth: float, num_entries: float) -> Step:
        """The case with the highest peak."""
        work = Work(depth=depth, frozen=1 - num_entries / self._num_entries, checkpointing=self._forward.checkpointing)
        steps = [
            make_step(
                kind,
                work,
                self._forward.kept([*case.probed, *(name for block in case.trained for name in self._names[block])]),
                held=self._held(case.updated),
                gradients=case.gradients,
                workspace=self._workspace(),
            )
            for case in cases
        ]
        return max(steps, key=lambda step: step.peak_bytes)

    def _held(self, updated: Cost) -> Bytes:
        """Bytes that stay through a step in which `updated` is updated, after every block has had a turn."""
        reached = self._sum({*self.survey.reached, *self._always})
        if not self._training.residency.frees_device:
            return Bytes(weights=self._weights, masters=reached.masters, state_on_device=reached.moments)
        # Just before an update the host may hold all state but that of one selection: the new one, which has come, or
        # the last one, which is still on the device while the new one is unknown.
        stays = isinstance(self._training.residency, Drop) or self.survey.is_fixed
        on_host = 0 if stays else self._sum(self.survey.reached).state - self._least_state()
        return Bytes(
            weights=self._weights, masters=updated.masters, state_on_device=updated.moments, state_on_host=on_host
        )

    def _least_state(self) -> int:
        """State of the selection that has least."""
        counts = {*self.survey.explored, *([] if self.survey.count is None else [self.survey.count])}
        states = sorted(part.state for part in self._costs_of(self.survey.reached).values())
        cases = [self._sum(selection).state for selection in self.survey.proposed]
        return min([*cases, *(sum(states[:count]) for count in counts)])

    def _workspace(self) -> int:
        """AdamW on one block: its gradients in the masters' dtype, and two tensors for the denominator."""
        parts = self._costs_of({*self.survey.reached, *self._always}).values()
        copied = max((part.masters for part in parts), default=0)
        return copied + 2 * (4 if copied else self._itemsize) * max((part.largest for part in parts), default=0)

    @property
    def _itemsize(self) -> int:
        return next(self._training.model.parameters()).element_size()

    def _depth(self, trained: Collection[str]) -> float:
        return visited_share(trained, list(self._names))

    def _costs_of(self, names: Collection[str]) -> Mapping[str, Cost]:
        return {name: part for name, part in self._costs.items() if name in names}

    def _sum(self, names: Collection[str]) -> Cost:
        return total_cost(self._costs_of(names).values())
