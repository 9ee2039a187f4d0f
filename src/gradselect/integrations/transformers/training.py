"""One callback that makes any Trainer selective."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradselect import UsageError
from gradselect.integrations.callers import caller_of
from gradselect.usage import check_file_name, check_is

from .callback import SelectionCallback
from .checkpointing import is_reentrant
from .checks import check_deepspeed, warn_of_adapter
from .factory import SelectiveOptimizerFactory, check_options

logger = logging.getLogger(__name__)

OF = "the arguments of SelectiveTraining"


@final
class SelectiveTraining(TrainerCallback):
    """Trains selectively in any `transformers.Trainer`, by one of its `callbacks`.

    It gives the Trainer its optimizer, `SelectiveOptimizerFactory` with the Trainer's own arguments, and adds
    `SelectionCallback`, which says what happens in training and logs. Every trainer that is built on Trainer takes
    `callbacks`: those of transformers and TRL, sentence-transformers, and of frameworks.

    Args:
        policy: selects blocks, e.g. `AdaGradSelect(fraction=0.2)`; or
        mask: selects entries, e.g. `ID3(density=0.01)`; or
        method: either, as plain data: the section `method` of a recipe (`gradselect.method`).
        jsonl: file for the records, one a line.
        options: further arguments of `BlockOptimizer` or `SparseOptimizer`: `always`, `residency`, `rule`, ... Learning
            rate, weight decay, betas, eps, accumulation and clipping come from the Trainer's arguments.

    Raises:
        UsageError: an option is unknown, or not exactly one of policy, mask and method is given. When the Trainer is
            built: it has an optimizer already, or DeepSpeed ZeRO is on.

    Example:
        >>> import gradselect as gs
        >>> selective = SelectiveTraining(policy=gs.AdaGradSelect(fraction=0.2), always=("embedding",))
        >>> # Trainer(..., callbacks=[selective])
    """

    def __init__(self, *, jsonl: str | Path | None = None, **options: Any) -> None:
        check_options(options, of=OF)
        if jsonl is not None:
            check_file_name("jsonl", jsonl, example="selection.jsonl")
        self._jsonl = jsonl
        self._options = options

    def attach(self, trainer: Trainer) -> None:
        """Make a Trainer selective that was built without this callback; call it before `train()`.

        Raises:
            UsageError: the Trainer has an optimizer already, or DeepSpeed ZeRO is on.
        """
        check_is(trainer, Trainer, name="trainer", example="SelectiveTraining(...).attach(Trainer(model, args, ...))")
        self._bring_optimizer(trainer)
        callback = self._add_callback(trainer)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        trainer = caller_of(Trainer)
        if trainer is not None:
            self._bring_optimizer(trainer)
            # The handler is going through its callbacks, and comes to this one too.
            self._add_callback(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        trainer = caller_of(Trainer)
        if trainer is None or not self._has_brought_optimizer(trainer):
            raise UsageError(
                "SelectiveTraining was added after the Trainer was built, which has another optimizer by now; pass it "
                "as Trainer(..., callbacks=[SelectiveTraining(...)]), or call SelectiveTraining(...).attach(trainer) "
                "instead of trainer.add_callback(...)"
            )

    def _bring_optimizer(self, trainer: Trainer) -> None:
        args = trainer.args
        check_deepspeed(args)
        if trainer.optimizer_cls_and_kwargs is not None or trainer.optimizer is not None:
            name = "optimizers" if trainer.optimizer is not None else "optimizer_cls_and_kwargs"
            raise UsageError(
                f"the Trainer has {name}= and SelectiveTraining, and each brings an optimizer; leave out {name}=, or "
                "one of two SelectiveTraining"
            )
        others = [each for each in trainer.callback_handler.callbacks if isinstance(each, SelectionCallback)]
        if others:
            raise UsageError("SelectiveTraining brings a SelectionCallback of its own; leave SelectionCallback out")
        if isinstance(trainer.model, nn.Module):  # None until train() calls `model_init`
            warn_of_adapter(trainer.model)
        optim = getattr(args.optim, "value", args.optim)
        if not optim.startswith("adamw_torch"):
            logger.warning("TrainingArguments(optim=%r) is not used: SelectiveTraining brings the optimizer", optim)
        if args.ddp_find_unused_parameters is None and not is_reentrant(args):
            # The Trainer's own default is False with activation checkpointing. Without several processes it is unused.
            args.ddp_find_unused_parameters = True
            # Accelerate has taken the default over when the Trainer was built.
            if (handler := trainer.accelerator.ddp_handler) is not None:
                handler.find_unused_parameters = True
        # The annotation knows no factories, which the Trainer calls as factory()(model, **kwargs).
        factory: Any = SelectiveOptimizerFactory
        trainer.optimizer_cls_and_kwargs = (factory, {"args": args, **self._options})

    def _has_brought_optimizer(self, trainer: Trainer) -> bool:
        """True also in a copy of the Trainer and of this, as Ray's search makes it: nothing here knows the Trainer."""
        factory, options = trainer.optimizer_cls_and_kwargs or (None, {})
        ours = all(options.get(name) is value for name, value in self._options.items())
        return factory is SelectiveOptimizerFactory and ours

    def _add_callback(self, trainer: Trainer) -> SelectionCallback:
        callback = SelectionCallback(jsonl=self._jsonl)
        trainer.add_callback(callback)
        return callback
