"""What a training run will hold and how long its steps take, before it begins. Importing it needs torch alone."""

from .blocks_plan import choices_of
from .bytes import CATEGORIES, Bytes
from .forward_pass import ForwardPass, Loss
from .policy_survey import Choices
from .steps import Step
from .tape import Rows
from .training_plan import Plan, plan, plan_steps

__all__ = [
    "CATEGORIES",
    "Bytes",
    "Choices",
    "ForwardPass",
    "Loss",
    "Plan",
    "Rows",
    "Step",
    "choices_of",
    "plan",
    "plan_steps",
]
