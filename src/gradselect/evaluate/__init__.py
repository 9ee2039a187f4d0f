"""How good is a model: accuracy on worked problems, loss on any text, published tasks through lm-eval."""

from ._harness import HarnessResult as HarnessResult
from ._harness import run_harness as run_harness
from ._results import EvaluationResult as EvaluationResult
from ._results import read_evaluation as read_evaluation
from ._run import evaluate as evaluate
from ._run import evaluate_model as evaluate_model
from ._settings import EvaluationSettings as EvaluationSettings

__all__ = [
    "EvaluationResult",
    "EvaluationSettings",
    "HarnessResult",
    "evaluate",
    "evaluate_model",
    "read_evaluation",
    "run_harness",
]
