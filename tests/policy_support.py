"""Tiny blocks, made-up gradient norms, and a loop that drives a policy as the optimizer does."""

import functools
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from gradselect.blocks.policy import AbstractPolicy
from gradselect.core.block import Block

NUM_STEPS = 60
BLOCK_NAMES = ("embedding", "layer.0", "layer.1", "layer.2", "layer.3", "layer.4", "norm")


@functools.cache
def make_blocks(names: tuple[str, ...] = BLOCK_NAMES) -> tuple[Block, ...]:
    """Blocks of unequal size: 1, 4, 9, ... weights."""
    return tuple(
        Block(name=name, parameters=(Parameter(torch.zeros(size, size)),), parameter_names=(f"{name}.weight",))
        for size, name in enumerate(names, start=1)
    )


def norms_at(step: int) -> dict[str, float]:
    """Return gradient norms of a step; in every ninth step one is not finite."""
    generator = random.Random(f"norms {step}")
    norms = {name: generator.lognormvariate(0.0, 1.0) for name in BLOCK_NAMES}
    if step % 9 == 4:
        norms[generator.choice(BLOCK_NAMES)] = generator.choice((math.nan, math.inf))
    return norms


def choose(policy: AbstractPolicy, step: int) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return selection and observed norms of a step, in the order of calls of the optimizer."""
    proposal = policy.propose(step)
    seen = {name: norm for name, norm in norms_at(step).items() if name in policy.names}
    if proposal is None:
        return policy.decide(step, seen), seen
    return proposal, {name: seen[name] for name in observed(policy, step, proposal)}


def observed(policy: AbstractPolicy, step: int, proposal: tuple[str, ...]) -> tuple[str, ...]:
    """Return the blocks that the optimizer measures in a step with a proposal."""
    return (*policy.observed(step), *(proposal if policy.observes_selected(step) else ()))


def run(policy: AbstractPolicy, steps: range = range(NUM_STEPS)) -> Iterator[tuple[str, ...]]:
    for step in steps:
        selected, norms = choose(policy, step)
        policy.commit(step, selected, norms)
        yield selected


def through_torch(state: object) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dataclass(eq=False)
class Measured(AbstractPolicy):
    """Top-k of every step's own measure."""

    kind: str

    def start(self):
        pass

    def measured(self):
        return self.kind

    def propose(self, step):
        return None

    def keep_at(self, step):
        return 2

    def score(self, step, block, norm):
        return norm


def take_step(policy: AbstractPolicy, step: int, norms: dict[str, float]) -> tuple[str, ...]:
    """Take one step with the given gradient norms; return the selection."""
    proposal = policy.propose(step)
    selected = policy.decide(step, norms) if proposal is None else proposal
    wanted = observed(policy, step, selected)
    policy.commit(step, selected, norms if proposal is None else {name: norms[name] for name in wanted})
    return selected
