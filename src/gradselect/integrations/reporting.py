"""Numbers and lines for the logs of any framework."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from statistics import fmean

from gradselect import AbstractPolicy, AdaGradSelect, BlockOptimizer, MaskRecord, StepRecord
from gradselect.blocks import LAYERS, taking_part
from gradselect.usage import UsageError, listed

logger = logging.getLogger(__name__)

FEW_LAYERS = 8
"""Models of 8 and of 6 layers, in which AdaGradSelect was better on matrices: suites/small-variants.yaml and
suites/seeds/stsb.yaml."""
_LAYER = re.compile(r"(.*\.)?layer\.\d+")


def summarise(records: Sequence[StepRecord] | Sequence[MaskRecord]) -> dict[str, float]:
    """Summarise one or more steps as the numbers that a `SelectionCallback` logs.

    Example:
        >>> record = MaskRecord(step=0, num_entries={"w": 4}, num_new=4, overlap=1.0, grad_norm=2.0, state_bytes=64)
        >>> summarise([record])["selection/entries"]
        4.0
    """
    of_blocks = [record for record in records if isinstance(record, StepRecord)]
    of_masks = [record for record in records if isinstance(record, MaskRecord)]
    return _summarise_masks(of_masks) if of_masks else _summarise_blocks(of_blocks)


def say_what_trains(optimizer: BlockOptimizer) -> None:
    """Say which blocks will never train, and that those around the layers can, where `among` was left open.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> say_what_trains(gs.BlockOptimizer(model, policy=gs.Uniform(count=1)))
    """
    all_weights = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    if left_out := optimizer.never_trained:
        # A warning, as below.
        logger.warning(
            "%d of %d blocks never train, %s: %s of %s weights; name one in `always` to train it at every step",
            len(left_out),
            len(optimizer.blocks),
            listed(left_out),
            f"{sum(left_out.values()):,}",
            f"{all_weights:,}",
        )
    if around := _candidates_around_layers(optimizer.policy):
        logger.warning(
            '%s can train too, as among=None means all blocks: %s of %s weights; among=["layers"] leaves them out',
            listed(around),
            f"{sum(around.values()):,}",
            f"{all_weights:,}",
        )


def _candidates_around_layers(policy: AbstractPolicy) -> dict[str, int]:
    """Return numbers of weights of embedding, final norm and head, if they are candidates because `among` is None."""
    if policy.settings().get("among", ()) is not None:
        return {}
    inside = {block.name for block in taking_part(policy.candidates, (LAYERS,))}
    return {name: size for name, size in policy.num_elements.items() if name in policy.names and name not in inside}


def say_explore_steps(optimizer: BlockOptimizer, *, num_steps: int, before: int = 0) -> None:
    """Say how many steps of the run will look at all gradients, if any will.

    Args:
        optimizer: with the number of steps of the run filled in.
        num_steps: of the run.
        before: steps that the optimizer took before the run, which goes on from there.

    Raises:
        UsageError: no step of the run selects a block.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> say_explore_steps(gs.BlockOptimizer(model, policy=gs.Uniform(count=1)), num_steps=10)
    """
    policy = optimizer.policy
    if policy.look_only_steps >= before + num_steps:
        raise UsageError(
            f"the first {policy.look_only_steps:,} steps look at gradients and select no block, and this run ends "
            f"after {before + num_steps:,}: it would select none; train for longer, or write a smaller probe_steps, "
            "such as 1"
        )
    if not (all_steps := policy.expected_explore_steps(before + num_steps)):
        return
    expected = round(all_steps - policy.expected_explore_steps(before))
    # A warning, because other levels are not shown unless somebody asks for them.
    if before:
        logger.warning(
            "about %d of %d steps will look at the gradients of all blocks: the optimizer has taken %d steps before "
            "this training and goes on from there; build a new Trainer to begin anew",
            *(expected, num_steps, before),
        )
    else:
        logger.warning("about %d of %d steps will look at the gradients of all blocks", expected, num_steps)


def say_what_never_trained(optimizer: BlockOptimizer) -> None:
    """Say, after a run, which candidates of the policy trained in no step, and the setting that has each train.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> say_what_never_trained(gs.BlockOptimizer(model, policy=gs.Uniform(count=1)))
    """
    policy, updates = optimizer.policy, optimizer.update_counts
    counts = {name: updates[name] for name in policy.names}
    never = {name: policy.num_elements[name] for name, count in counts.items() if not count}
    if not never or not optimizer.num_steps:
        return
    advice = ""
    if isinstance(policy, AdaGradSelect) and policy.coverage is None and any(counts.values()):
        mean_selected = sum(counts.values()) / optimizer.num_steps
        steps = policy.every * math.ceil(2 * len(counts) / mean_selected)  # twice the least
        if sum(1 for name in counts if _LAYER.fullmatch(name)) in range(1, FEW_LAYERS + 1):
            advice = (
                '; with few layers matrices did better: write blocks=gs.partition(model, by="matrix"), in a recipe '
                "method.blocks=matrix"
            )
        elif steps <= optimizer.num_steps:
            advice = (
                f"; to have each train at least once in {steps} steps, write coverage={steps}, in a recipe "
                f"method.coverage={steps}"
            )
    # A warning, as above.
    logger.warning(
        "%d of %d candidate blocks trained in none of the %d steps, %s: %s of %s weights%s",
        *(len(never), len(counts), optimizer.num_steps, listed(never)),
        *(f"{sum(never.values()):,}", f"{sum(policy.num_elements[name] for name in counts):,}", advice),
    )


def _summarise_blocks(records: Sequence[StepRecord]) -> dict[str, float]:
    coasted = fmean(len(record.coasted) for record in records)
    return {
        "selection/blocks": fmean(len(record.selected) for record in records),
        "selection/explored": fmean(record.explored for record in records),
        "selection/entropy": records[-1].selection_entropy,
        "selection/state_bytes": max(record.state_bytes for record in records),
        "selection/moved_bytes": fmean(record.moved_bytes for record in records),
    } | ({"selection/coasted": coasted} if coasted else {})


def _summarise_masks(records: Sequence[MaskRecord]) -> dict[str, float]:
    return {
        "selection/entries": fmean(sum(record.num_entries.values()) for record in records),
        "selection/new": fmean(record.num_new for record in records),
        "selection/overlap": min(record.overlap for record in records),
        "selection/state_bytes": max(record.state_bytes for record in records),
        "grad_norm": records[-1].grad_norm,
    }
