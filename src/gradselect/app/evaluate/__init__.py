"""Evaluation of a model: accuracy on worked problems, loss on any text, published tasks through lm-eval."""

from gradselect.app.recipe import EvaluationSettings

from .evaluation import evaluate, evaluate_model
from .harness import HarnessResult, run_harness
from .results import EvaluationResult, read_evaluation
from .shown_answers import NUM_SHOWN, answer_lines

__all__ = [
    "NUM_SHOWN",
    "EvaluationResult",
    "EvaluationSettings",
    "HarnessResult",
    "answer_lines",
    "evaluate",
    "evaluate_model",
    "read_evaluation",
    "run_harness",
]
