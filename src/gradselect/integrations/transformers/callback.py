"""Connects the optimizer with the Trainer that runs it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from gradselect import BlockOptimizer, JsonlWriter, SparseOptimizer, UsageError
from gradselect.integrations.callers import caller_of
from gradselect.integrations.reporting import say_explore_steps, say_what_never_trained, say_what_trains, summarise
from gradselect.usage import check_file_name

from .adalora import warn_of_adalora
from .checkpointing import keep_backward_short, restore_inputs, shorten_backward
from .checks import (
    check_clipping,
    check_deepspeed,
    check_resumed,
    warn_of_new_tokens,
    warn_of_settings,
)
from .frames import call_after_training, call_before_clipping, call_if_training_fails
from .tracking import SelectionTracking
from .wrappers import without_wrapper


class SelectionCallback(TrainerCallback):
    """Connects the Trainer with its `BlockOptimizer` or `SparseOptimizer`.

    **To the optimizer**, when training begins: which micro-batch is the last of a step, the gradient scaler and, for a
    policy that left it open (`AdaGradSelect(explore_steps=None)`), the number of steps in which it explores: the first
    epoch, at most a quarter of the run. A log line says how many steps will look at all gradients.

    **The model** is given back when `train()` ends in any way: what you had left trainable is trainable again, and
    hooks are gone. The next `train()` takes it again; what you froze in between stays frozen.

    **Activation checkpointing.** transformers makes the output of the embedding require a gradient, so the backward
    pass would visit every layer. The callback undoes that unless checkpoints are reentrant.

    **Logs.** Each log of the training loss gets, over the steps since the last one,

        selection/blocks         mean number of blocks updated in a step
        selection/explored       share of steps that read all gradients
        selection/entropy        evenness of all updates so far; 1.0: every block equally often
        selection/state_bytes    peak bytes of optimizer state and masters on the device
        selection/moved_bytes    mean bytes moved between device and host in a step

    and the last log `selection/updates/<block>`, the number of updates of each block. With a mask it gets

        selection/entries        mean number of entries updated in a step
        selection/new            mean number of entries that the step before did not update
        selection/overlap        lowest share of a step's entries that the next one updated too
        selection/state_bytes    peak bytes of indices, moments and masters on the device
        grad_norm                of the last step, before clipping, of the gradients that were applied

    **Trackers.** W&B, MLflow, trackio and TensorBoard, if the Trainer has them, get all settings of the method into the
    configuration of the run ("selection/policy/fraction"), and at the end, and at checkpoints if that costs next to no
    time, a picture of the whole run: blocks by step, or entries by step. It needs matplotlib.

    They reach `log_history` and every tracker in `report_to`: the callback moves before the Trainer's own trackers.

    **Clipping.** With a mask the Trainer cannot clip, because gradients are freed before it reads them. The optimizer
    clips instead, to its own `max_grad_norm` or, if it has none, to that of the arguments. During training
    `args.max_grad_norm` is 0.

    Args:
        jsonl: file for the records, one a line; its folder must exist when training begins.

    Raises:
        UsageError: DeepSpeed ZeRO is on. When training begins: the optimizer is not one of ours; the model has changed
            since it was built (an adapter); or training resumes from a checkpoint without optimizer state, or with
            other weights than its own.

    Example:
        >>> callback = SelectionCallback(jsonl="selection.jsonl")  # for Trainer(..., callbacks=[callback])
    """

    def __init__(self, *, jsonl: str | Path | None = None) -> None:
        if jsonl is not None:
            check_file_name("jsonl", jsonl, example="selection.jsonl")
        self._jsonl = jsonl
        self._connected: BlockOptimizer | SparseOptimizer | None = None
        self._since_log: list[Any] = []
        self._tracking = SelectionTracking(jsonl=jsonl)
        self._ends: list[Callable[[], None]] = []
        self._trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()
        self._max_grad_norm: tuple[TrainingArguments, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = vars(SelectionCallback())
        return {name: value for name, value in vars(self).items() if name not in own or name == "_jsonl"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Ray's search pickles a Trainer with its callbacks. A copy begins anew: it is another Trainer's.
        vars(self).update(vars(SelectionCallback()) | state)
        self._tracking = SelectionTracking(jsonl=self._jsonl)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        check_deepspeed(args)
        # TRL makes the embedding's output require a gradient before this.
        shorten_backward(parts["model"], args)
        self._watch_end()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if (late := self._watch_end()) is not None:
            call_if_training_fails(late, self._give_back)
        try:
            self._begin(args, state, parts)
        except BaseException:
            self._give_back()
            raise

    def _begin(self, args: TrainingArguments, state: TrainerState, parts: dict[str, Any]) -> None:
        check_deepspeed(args)
        optimizer = _unwrap_optimizer(parts["optimizer"])
        check_resumed(optimizer, state)
        warn_of_settings(args, optimizer, parts["model"])
        warn_of_adalora(parts["model"], optimizer, getattr(caller_of(CallbackHandler), "callbacks", []))
        optimizer.reopen()
        optimizer.check_model()
        if optimizer is self._connected and optimizer.num_steps == 0:
            _forget_steps(optimizer)
        if isinstance(optimizer, BlockOptimizer):
            if optimizer.update_in_backward:
                check_clipping(args)
            optimizer.grad_scaler = parts["optimizer"].scaler
            num_steps = _num_steps_of_epoch(args, state, parts["train_dataloader"])
            optimizer.policy.fill_explore_steps(num_steps, run_steps=state.max_steps)
            say_what_trains(optimizer)
            before = max(0, optimizer.num_steps - state.global_step)
            say_explore_steps(optimizer, num_steps=state.max_steps, before=before)
        else:
            optimizer.fill_steps(state.max_steps)
            self._take_over_clipping(args, optimizer)
        warn_of_new_tokens(parts["model"], optimizer)
        # The Trainer knows in each micro-batch whether a step follows; a stream has no length to count by.
        optimizer.accumulation_steps = 1
        optimizer.count_passes_if(_step_follows)
        # An interrupted train() leaves its window of micro-batches open.
        optimizer.zero_grad()
        keep_backward_short(parts["model"], args)
        self._ends.append(partial(restore_inputs, parts["model"]))
        trainer = caller_of(Trainer)
        if trainer is not None:
            self._ends.append(call_before_clipping(trainer.accelerator, optimizer.finish_window))
        self._connect(optimizer, writes=state.is_world_process_zero)
        self._tracking.follow(optimizer, caller_of(CallbackHandler), on=state.is_world_process_zero)
        self._report_before_others()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self._tracking.show(state)
        if isinstance(self._connected, BlockOptimizer):
            say_what_never_trained(self._connected)
        self._give_back()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        self._tracking.show(state, if_cheap=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        # Not earlier: the trackers begin their runs after this callback.
        self._tracking.describe()
        # Somebody may have run a backward pass since the last step, and cleared its gradients through the model.
        _unwrap_optimizer(parts["optimizer"]).zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        # The Trainer clears gradients through the model, so the optimizer does not see that the window has ended.
        if parts["optimizer"].step_was_skipped:
            _unwrap_optimizer(parts["optimizer"]).zero_grad()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **parts: Any,
    ) -> None:
        assert logs is not None
        values: dict[str, float] = {}
        if "loss" in logs and self._since_log:
            values = summarise(self._since_log)
            self._since_log.clear()
        elif "grad_norm" in logs and _has_skipped(self._connected):
            values = {"grad_norm": math.nan}  # the Trainer found no gradients and has written 0.0
        elif "train_runtime" in logs and isinstance(self._connected, BlockOptimizer):
            values = {f"selection/updates/{name}": count for name, count in self._connected.update_counts.items()}
        logs.update(values)
        # The Trainer copies the logs there before it calls the callbacks.
        state.log_history[-1].update(values)

    def _take_over_clipping(self, args: TrainingArguments, optimizer: SparseOptimizer) -> None:
        asked = args.max_grad_norm
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = asked or None
        self._max_grad_norm, args.max_grad_norm = (args, asked), 0.0

    def _watch_end(self) -> Trainer | None:
        """Give the model back whenever `train()` ends; return a Trainer that got this callback after it was built."""
        trainer = caller_of(Trainer)
        if trainer is None or trainer in self._trainers:
            return None
        self._trainers.add(trainer)
        call_after_training(trainer, self._give_back)
        return trainer

    def _give_back(self) -> None:
        """Leave model and arguments as the user had them, until the next `train()`."""
        while self._ends:
            self._ends.pop()()
        if self._connected is not None:
            self._connected.count_passes_if(None)
            self._connected.close()
        for trainer in self._trainers:  # train() may have ended before its optimizer was connected
            optimizer = without_wrapper(trainer.optimizer)
            if isinstance(optimizer, BlockOptimizer | SparseOptimizer):
                optimizer.close()
        if self._max_grad_norm is not None:
            args, asked = self._max_grad_norm
            args.max_grad_norm, self._max_grad_norm = asked, None

    def _connect(self, optimizer: BlockOptimizer | SparseOptimizer, *, writes: bool) -> None:
        """Receive the records of `optimizer`; a second `train()` of the same Trainer continues with it."""
        self._since_log.clear()
        if self._connected is optimizer:
            return
        self._connected = optimizer
        optimizer.add_record_hook(self._since_log.append)
        if self._jsonl is not None and writes:
            optimizer.add_record_hook(JsonlWriter(self._jsonl))

    def _report_before_others(self) -> None:
        handler = caller_of(CallbackHandler)
        if handler is not None and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)


def _step_follows() -> bool:
    return GradientState().sync_gradients


def _unwrap_optimizer(optimizer: torch.optim.Optimizer) -> BlockOptimizer | SparseOptimizer:
    optimizer = without_wrapper(optimizer)
    if not isinstance(optimizer, BlockOptimizer | SparseOptimizer):
        raise UsageError(
            "SelectionCallback needs a BlockOptimizer or a SparseOptimizer, but the Trainer has "
            f"{type(optimizer).__name__}; write callbacks=[SelectiveTraining(policy=...)], which brings the optimizer, "
            "or leave the callback out"
        )
    return optimizer


def _has_skipped(optimizer: BlockOptimizer | SparseOptimizer | None) -> bool:
    """Return True if the last step of a mask was skipped for NaN or infinity."""
    return isinstance(optimizer, SparseOptimizer) and optimizer.num_skipped_in_a_row > 0


def _forget_steps(optimizer: BlockOptimizer | SparseOptimizer) -> None:
    """Leave open again what the steps of the run decide.

    An attempt that ended before its first step, as those of `auto_find_batch_size` do, was one of fewer steps.
    """
    if isinstance(optimizer, BlockOptimizer):
        optimizer.policy.forget_explore_steps()
    else:
        optimizer.mask.filled_steps = None


def _num_steps_of_epoch(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Return the number of steps in an epoch, as the Trainer counts them. The last may have fewer micro-batches."""
    if not has_length(loader):
        return state.max_steps
    return max(1, -(-len(loader) // args.gradient_accumulation_steps))
