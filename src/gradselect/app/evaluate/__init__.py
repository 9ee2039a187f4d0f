"""Evaluation of a model: accuracy on worked problems, loss on any text, published tasks through lm-eval."""

from gradselect.app.recipe import EvaluationSettings

from .evaluation import evaluate, evaluate_model
from .generation import answer_all, greedy_config, resolve_max_new_tokens
from .harness import HarnessResult, run_harness
from .language_model import LanguageModel, check_folder
from .language_model import load as load_language_model
from .results import EvaluationResult, read_evaluation
from .saved import SavedEvaluation, find_evaluations
from .shown_answers import NUM_SHOWN, answer_lines
from .tokens import encode_prompt

__all__ = [
    "NUM_SHOWN",
    "EvaluationResult",
    "EvaluationSettings",
    "HarnessResult",
    "LanguageModel",
    "SavedEvaluation",
    "answer_all",
    "answer_lines",
    "check_folder",
    "encode_prompt",
    "evaluate",
    "evaluate_model",
    "find_evaluations",
    "greedy_config",
    "load_language_model",
    "read_evaluation",
    "resolve_max_new_tokens",
    "run_harness",
]
