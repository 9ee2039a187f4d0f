"""Checks of the arguments of a BlockOptimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from torch.amp.grad_scaler import GradScaler

from gradselect.core import HALF, AbstractRule, Block, Drop, UpdateSettings, check_shards
from gradselect.parallel import check_placement, is_running, unwrapped
from gradselect.usage import UsageError, check_is, check_whole

from .borders import Borders
from .compile_check import warn_of_compiled_model
from .flops import StepCost
from .policy import AbstractPolicy
from .quantised_blocks import said_of, without_quantised

logger = logging.getLogger(__name__)


def check_model(model: nn.Module, rule: AbstractRule) -> nn.Module:
    """Return the model without its wrappers.

    Raises:
        UsageError: a wrapper hides its gradients, or it is sharded and the rule cannot be.
    """
    check_placement(model)
    warn_of_compiled_model(model)
    inner = unwrapped(model)
    check_shards(inner.parameters(), rule)
    return inner


def check_borders(borders: Borders | None, rule: AbstractRule) -> Borders:
    """Return the border rules; without any, those that change nothing.

    Raises:
        UsageError: `borders` is something else, or the update rule cannot follow them.
    """
    if borders is None:
        return Borders()
    check_is(borders, Borders, name="borders", example="borders=gs.Borders(coasting=5)")
    borders.check_rule(rule)
    return borders


def check_window(accumulation_steps: int, grad_scaler: GradScaler | None, *, in_backward: bool, skips: bool) -> None:
    """Check the accumulation window, and refuse settings that need all gradients if updates run in the backward pass.

    Raises:
        UsageError: names the setting.
    """
    check_whole("accumulation_steps", accumulation_steps)
    if grad_scaler is not None:
        check_is(grad_scaler, GradScaler, name="grad_scaler", example="grad_scaler=torch.amp.GradScaler()")
    if not in_backward:
        return
    if accumulation_steps > 1:
        raise UsageError(
            f"update_in_backward=True with accumulation_steps={accumulation_steps}: each backward pass would be a "
            "step; leave update_in_backward out, or write accumulation_steps=1 with a larger batch"
        )
    if grad_scaler is not None:
        raise UsageError(
            "update_in_backward=True with a grad_scaler, which checks all gradients for overflow before any is used; "
            "leave update_in_backward out, or train in bfloat16, which needs no scaler"
        )
    if skips:
        raise UsageError(
            "update_in_backward=True with skip_nonfinite=True: weights have moved before all gradients are known; "
            "leave one of them out"
        )
    if is_running():
        raise UsageError(
            "update_in_backward=True under torch.distributed, where a gradient is averaged after it has arrived; leave "
            "update_in_backward out on several processes"
        )


def warn_of_dropped_masters(blocks: Sequence[Block], update: UpdateSettings) -> None:
    """Warn that `Drop` loses what half-precision weights cannot hold."""
    half = {each.dtype for block in blocks for each in block.parameters} & set(HALF)
    if half and update.master_dtype is not None and isinstance(update.residency, Drop):
        name = str(half.pop()).removeprefix("torch.")
        logger.warning(
            "Drop() forgets the master weights of a block that leaves the selection: updates that are too small for "
            "%s, and had added up in the masters, are lost; write residency=gs.Offload() or gs.Keep(), or let "
            "the policy keep a selection for longer, e.g. gs.Cyclic(every=100)",
            name,
        )


def bind_policy(
    policy: AbstractPolicy, model: nn.Module, blocks: Sequence[Block], *, always: Sequence[str]
) -> AbstractPolicy:
    """Return a copy of the policy that selects among the blocks that are not in `always` and that can train.

    Raises:
        UsageError: it is no policy, or its settings do not fit these blocks.
    """
    check_is(policy, AbstractPolicy, name="policy", example="policy=gs.AdaGradSelect(fraction=0.2)")
    candidates = without_quantised(model, blocks, always=always)
    left_out = [block.name for block in blocks if block not in candidates and block.name not in always]
    try:
        return policy.bind(candidates, cost=StepCost.of_model(model, blocks))
    except UsageError as error:
        quantised = f" ({said_of(left_out, blocks)})" if left_out else ""
        named = f" (the policy does not select blocks in `always`: {', '.join(always)})" if always else ""
        raise UsageError(f"{error}{named}{quantised}") from None
