"""Bytes and time of a training run before it starts. Needs torch only."""

from .activations import ActivationCounter
from .bytes import CATEGORIES, Bytes
from .entries_plan import look_step
from .forward_pass import ForwardPass, Loss
from .meta_forward import Rows
from .policy_survey import Survey, survey_policy
from .steps import Step
from .training import Training
from .training_plan import Plan, plan, plan_steps

__all__ = [
    "CATEGORIES",
    "ActivationCounter",
    "Bytes",
    "ForwardPass",
    "Loss",
    "Plan",
    "Rows",
    "Step",
    "Survey",
    "Training",
    "look_step",
    "plan",
    "plan_steps",
    "survey_policy",
]
