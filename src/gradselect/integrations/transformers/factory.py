"""Builds a selective optimizer from the kwargs of a trainer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, final

from torch import nn
from transformers import TrainingArguments

from gradselect import BlockOptimizer, SparseOptimizer, UsageError

from .checks import adamw_settings, check_clipping, check_deepspeed


@final
class SelectiveOptimizerFactory:
    """Builds a `BlockOptimizer` or a `SparseOptimizer` when a trainer asks for an optimizer.

    Trainer calls `SelectiveOptimizerFactory()(model, **kwargs)`, axolotl
    `SelectiveOptimizerFactory()(model, args, **kwargs)`.

    Example:
        >>> import gradselect as gs
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = SelectiveOptimizerFactory()(model, policy=gs.Cyclic(every=50), lr=1e-5)
        >>> optimizer.defaults["lr"]
        1e-05
    """

    def __call__(
        self, model: nn.Module, args: TrainingArguments | None = None, **options: Any
    ) -> BlockOptimizer | SparseOptimizer:
        """Build the optimizer of `model`.

        Args:
            model: the trainer's model; may be wrapped for data parallelism.
            args: source of `lr`, `weight_decay`, `betas`, `eps`, `accumulation_steps` and, with a mask,
                `max_grad_norm`, unless `options` have them. The Trainer does not pass its own: add `args` to the
                kwargs, or else `lr`.
            options: keyword arguments of `BlockOptimizer` with a `policy`, or of `SparseOptimizer` with a `mask`.

        Raises:
            UsageError: an option is unknown; policy and mask are both given or both missing; there is no learning
                rate; or the optimizer refuses a value.
        """
        if args is not None:
            check_deepspeed(args)
        kind = SparseOptimizer if "mask" in options else BlockOptimizer
        settings = options if args is None else {**_settings_of(args, kind), **options}
        _check_settings(settings, kind)
        if settings.get("update_in_backward") and args is not None:
            check_clipping(args)
        return kind(model, **settings)


def _settings_of(args: TrainingArguments, kind: type) -> dict[str, Any]:
    clipping = {"max_grad_norm": args.max_grad_norm or None} if kind is SparseOptimizer else {}
    return {**adamw_settings(args), "accumulation_steps": args.gradient_accumulation_steps, **clipping}


def _check_settings(settings: Mapping[str, Any], kind: type) -> None:
    known = list(inspect.signature(kind).parameters)[1:]
    for name in settings.keys() - {*known, "policy"}:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"write {close[0]!r}" if close else f"known are {', '.join(known)}"
        raise UsageError(f"unknown option {name!r} in the kwargs of SelectiveOptimizerFactory; {advice}")
    if ("policy" in settings) == ("mask" in settings):
        raise UsageError(
            "the kwargs of SelectiveOptimizerFactory need a 'policy', which selects blocks, or a 'mask', which selects "
            f"entries, and have {'both' if 'mask' in settings else 'neither'}; write e.g. "
            '{"policy": AdaGradSelect(fraction=0.2), "args": args}'
        )
    if "lr" not in settings:
        raise UsageError(
            "the kwargs of SelectiveOptimizerFactory have no 'lr', and the Trainer does not pass on its learning_rate; "
            'add "args": args with the TrainingArguments, or "lr": 2e-5'
        )
