"""Steps of a `BlockOptimizer`, planned without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from gradselect.blocks import AbstractPolicy, StepCost, partition, resolve_names
from gradselect.core import Drop, is_strided, num_bytes

from .bytes import Bytes, Cost, cost_of, largest_cost, total_cost
from .forward_pass import ForwardPass
from .policy_survey import mean_by_lowest, mean_sum, survey_policy, worst
from .steps import Gradients, Step, StepKind, Work, make_step
from .training import Training

SLICE = re.compile(r"\.(columns|rows)\.\d+$")


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
        self._cost = StepCost.of_model(training.model, blocks)
        self.survey = training.survey or survey_policy(policy, blocks, self._always, cost=self._cost)
        self._names = {block.name: block.parameter_names for block in blocks}
        self._costs = {
            block.name: cost_of(block.parameters, master_dtype=training.master_dtype, rule=training.rule)
            for block in blocks
        }
        self._sizes = {name: part.num_entries for name, part in self._costs.items()}
        self._strided = {block.name: sum(map(num_bytes, filter(is_strided, block.parameters))) for block in blocks}
        self._weights = sum(map(num_bytes, training.model.parameters()))

    def explore(self, keep: int) -> Step:
        """All candidates have gradients; during the backward pass the best `keep` and one more hold theirs.

        Slices of a layer complete together, so that all of them are one more.
        """
        candidates = self._costs_of(self.survey.candidates)
        everything = {*self.survey.candidates, *self._always}
        updated = largest_cost(candidates, keep) + self._sum(self._always)
        whole = self._sum(everything)
        streamed = largest_cost(candidates, keep + 1).gradients
        slices: Counter[str] = Counter()
        for name, part in candidates.items():
            if found := SLICE.search(name):
                slices[name[: found.start()]] += part.gradients
        if slices:
            streamed = max(streamed, largest_cost(candidates, keep).gradients + max(slices.values()))
        most = min(streamed + self._sum(self._always).gradients, whole.gradients)
        accumulates = self._training.accumulation_steps > 1
        gradients = Gradients(
            before=whole.gradients if accumulates else 0,
            most=whole.gradients if accumulates else most,
            after=updated.gradients,
        )
        case = _Case(trained=everything, updated=updated, gradients=gradients)
        return self._step("explore", [case], self._work(everything))

    def exploit(self) -> Step:
        """Only selected blocks have gradients."""
        cases = [*map(self._exploit_case, worst(self.survey, self._sizes)), *self._first_case()]
        return self._step("exploit", cases, self._mean_work())

    def _mean_work(self) -> Work:
        """Mean operations of a step whose selection was proposed."""
        candidates, cost = self.survey.candidates, self._cost
        down_to = {name: {name, *self._always} for name in candidates}
        if not candidates:
            return self._work(self._always)
        recomputed = {name: self._recomputed(trained) for name, trained in down_to.items()}
        inputs = {name: cost.input_gradients(trained) for name, trained in down_to.items()}
        weights = {name: cost.weight_gradients([name]) for name in candidates}
        always = cost.weight_gradients(self._always)
        return Work(
            cost=cost,
            backward=mean_by_lowest(self.survey, inputs) + mean_sum(self.survey, weights) + always,
            recomputed=mean_by_lowest(self.survey, recomputed),
        )

    def _work(self, trained: Collection[str]) -> Work:
        return Work(cost=self._cost, backward=self._cost.backward(trained), recomputed=self._recomputed(trained))

    def _recomputed(self, trained: Collection[str]) -> float:
        if not self._forward.checkpointing:
            return 0.0
        return self._cost.recomputed(min((self._cost.depths[name] for name in trained), default=None))

    def _exploit_case(self, selection: Collection[str]) -> _Case:
        updated = self._sum({*selection, *self._always})
        beside = self.survey.beside.get(tuple(selection), ())
        trained = {*selection, *self._always, *beside}
        accumulates = self._training.accumulation_steps > 1
        looked_at = self._sum(beside).gradients  # slices of a layer complete together, at its end
        before = updated.gradients + looked_at if accumulates else 0
        after = updated.largest_gradient if self._training.update_in_backward else updated.gradients
        gradients = Gradients(before=before, most=after + looked_at, after=after)
        return _Case(trained=trained, updated=updated, gradients=gradients)

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

    def _step(self, kind: StepKind, cases: Sequence[_Case], work: Work) -> Step:
        """The case with the highest peak."""
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
        reached = self._sum(self._reached())
        if not self._training.residency.frees_device:
            return Bytes(weights=self._weights, masters=reached.masters, state_on_device=reached.moments)
        # Just before an update the host may hold all state but that of one selection: the new one, which has come, or
        # the last one, which is still on the device while the new one is unknown.
        stays = isinstance(self._training.residency, Drop) or self.survey.is_fixed
        on_host = 0 if stays else self._sum(self.survey.reached).state - self._least_state()
        # Coasting blocks come from as many selections before, at most all different.
        always, before = self._sum(self._always), 0 if self.survey.is_fixed else self._training.borders.num_coasting
        masters = min(updated.masters + before * (updated.masters - always.masters), reached.masters)
        moments = min(updated.moments + before * (updated.moments - always.moments), reached.moments)
        return Bytes(weights=self._weights, masters=masters, state_on_device=moments, state_on_host=on_host)

    def _least_state(self) -> int:
        """State of the selection that has least."""
        counts = {*self.survey.explored, *([] if self.survey.count is None else [self.survey.count])}
        states = sorted(part.state for part in self._costs_of(self.survey.reached).values())
        cases = [self._sum(selection).state for selection in self.survey.proposed]
        return min([*cases, *(sum(states[:count]) for count in counts)])

    def _workspace(self) -> int:
        """AdamW on one block: its gradients in the masters' dtype, and two tensors for the denominator.

        Columns of a weight are copied for the update, if it has no master.
        """
        parts = self._costs_of(self._reached()).values()
        copied = max((part.masters for part in parts), default=0)
        columns = 0 if copied else max(map(self._strided.__getitem__, self._reached()), default=0)
        largest = max((4 * part.largest if copied else part.largest_gradient for part in parts), default=0)
        return copied + columns + 2 * largest

    def _reached(self) -> set[str]:
        """Blocks that train sooner or later."""
        return {*self.survey.reached, *self._always}

    def _costs_of(self, names: Collection[str]) -> Mapping[str, Cost]:
        return {name: part for name, part in self._costs.items() if name in names}

    def _sum(self, names: Collection[str]) -> Cost:
        return total_cost(self._costs_of(names).values())
