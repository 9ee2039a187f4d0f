"""Builds a selective optimizer from the kwargs of a trainer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, final

from torch import nn
from transformers import TrainingArguments

from gradselect import BlockOptimizer, SparseOptimizer, UsageError
from gradselect.methods import RunFacts, parse_selection

from .checks import adamw_settings, check_clipping, check_deepspeed, check_sharding, warn_of_sharded_checkpoints

CHOICES = ("policy", "mask", "method")
"""Options that say what trains; exactly one is given."""


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
        self,
        model: nn.Module,
        trainer_args: TrainingArguments | None = None,
        /,
        *,
        args: TrainingArguments | None = None,
        **options: Any,
    ) -> BlockOptimizer | SparseOptimizer:
        """Build the optimizer of `model`.

        Args:
            model: the trainer's model; may be wrapped for data parallelism.
            trainer_args: `args`, as axolotl passes them.
            args: source of `lr`, `weight_decay`, `betas`, `eps`, `accumulation_steps`, a method's seed and, with a
                mask, `max_grad_norm`, unless `options` have them. The Trainer does not pass its own: add `args` to the
                kwargs, or else `lr`.
            options: keyword arguments of `BlockOptimizer` with a `policy`, of `SparseOptimizer` with a `mask`; or a
                `method` (`gradselect.method`, or its plain data) with other arguments of its optimizer.

        Raises:
            UsageError: an option is unknown; not exactly one of policy, mask and method is given; there is no learning
                rate; or the optimizer refuses a value.
        """
        args = trainer_args if args is None else args
        if args is not None:
            check_deepspeed(args)
        warn_of_sharded_checkpoints()
        check_options(options, of="the kwargs of SelectiveOptimizerFactory")
        kind = optimizer_class(options)
        check_sharding(model, options)
        if "method" in options:
            options = _with_method(model, options, seed=0 if args is None else args.seed)
        settings = options if args is None else {**_settings_of(args, kind), **options}
        if "lr" not in settings:
            raise UsageError(
                "the kwargs of SelectiveOptimizerFactory have no 'lr', and the Trainer does not pass on its "
                'learning_rate; add "args": args with the TrainingArguments, or "lr": 2e-5'
            )
        if settings.get("update_in_backward") and args is not None:
            check_clipping(args)
        return kind(model, **settings)


def optimizer_class(options: Mapping[str, Any]) -> type[BlockOptimizer] | type[SparseOptimizer]:
    """Return the class of the optimizer that the options are for."""
    if "method" in options:
        return parse_selection(options["method"]).optimizer_class
    return SparseOptimizer if "mask" in options else BlockOptimizer


def check_options(options: Mapping[str, Any], *, of: str) -> None:
    """Check the names of the options, and that exactly one of them says what trains.

    Args:
        options: keyword arguments.
        of: what has them, for errors.

    Raises:
        UsageError: names the option.
    """
    given = [name for name in CHOICES if name in options]
    if len(given) != 1:
        raise UsageError(
            f"{of} need one of 'policy', which selects blocks, 'mask', which selects entries, and 'method', which is "
            f"plain data, and have {' and '.join(map(repr, given)) or 'none'}; write e.g. "
            '"policy": AdaGradSelect(fraction=0.2)'
        )
    known = list(inspect.signature(optimizer_class(options)).parameters)[1:]
    for name in options.keys() - {*known, *CHOICES}:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"write {close[0]!r}" if close else f"known are {', '.join(known)}"
        raise UsageError(f"unknown option {name!r} in {of}; {advice}")


def _with_method(model: nn.Module, options: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Return the options with what the method decides in place of the method."""
    method = parse_selection(options["method"])
    others = {name: value for name, value in options.items() if name != "method"}
    decided = method.optimizer_options(model, RunFacts(seed=seed))
    if twice := sorted(others.keys() & decided.keys()):
        where = "a key of" if twice[0] in type(method).model_fields else "decided by"
        raise UsageError(f"{twice[0]}={others[twice[0]]!r} beside a method: it is {where} the method; write it there")
    return {**decided, **others}


def _settings_of(args: TrainingArguments, kind: type) -> dict[str, Any]:
    clipping = {"max_grad_norm": args.max_grad_norm or None} if kind is SparseOptimizer else {}
    return {**adamw_settings(args), "accumulation_steps": args.gradient_accumulation_steps, **clipping}
