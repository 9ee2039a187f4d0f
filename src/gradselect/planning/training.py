"""Settings of a training run that decide its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from gradselect.blocks import Borders
from gradselect.core import AbstractResidency, AbstractRule, Block, Keep

from .policy_survey import Survey


@dataclass(frozen=True, kw_only=True)
class Training:
    """Model and settings of an optimizer; fields are the arguments of `plan`.

    Args:
        num_steps: steps of the run. Each adds a bit of bookkeeping to each tensor of a mask whose entries change.
        survey: of the policy, if there is one already.
    """

    model: nn.Module
    always: Sequence[str] = ()
    residency: AbstractResidency = field(default_factory=Keep)
    master_dtype: torch.dtype | None = torch.float32
    blocks: Sequence[Block] | None = None
    accumulation_steps: int = 1
    num_steps: int = 1000
    rule: AbstractRule | None = None
    update_in_backward: bool = False
    borders: Borders = field(default_factory=Borders)
    survey: Survey | None = None
