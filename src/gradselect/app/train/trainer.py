"""Trainers with whole checkpoints or none; that skip a step which came to no number, and that stop when told to."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from gradselect import BlockOptimizer, SparseOptimizer, UsageError
from gradselect.app.runtime import Preempted, RunFolder, SignalWatch, is_rank_0, max_over_ranks
from gradselect.integrations.transformers import SelectionCallback

from .checkpoints import delete_old_checkpoints, last_records, read_window, write_window, writing_checkpoint
from .failures import Fault

logger = logging.getLogger(__name__)


class RunTrainer(Trainer):
    """`transformers.Trainer` as the command line runs it.

    **Steps that are skipped.** When the loss or the gradient norm of a step is NaN or infinite, on any process, the
    step changes nothing: its gradients are thrown away, and weights, optimizer state and selection stay as they are.
    The data and the schedule go on. With `update_in_backward` such a step has moved weights, and ends the run.

    Args:
        folder: its checkpoints go to `folder.checkpoints`, each written aside and then renamed.
        keep_checkpoints: how many there are at most; older ones are deleted.
        max_skipped_steps: how many steps in a row may be skipped; one more ends the run.
        can_resume: whether a checkpoint holds all that decides the next step.
        penalty: added to the loss of each step, beside that of the examples.
        others: as for the parent, by keyword.

    Attributes:
        num_tokens: tokens that this session has trained on, prompts included and padding not.
        signals: after the step in which it has received one, on any process, training ends with a checkpoint.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        keep_checkpoints: int,
        max_skipped_steps: int,
        can_resume: bool = True,
        penalty: Callable[[], Tensor] | None = None,
        **others: Any,
    ) -> None:
        self._folder = folder
        self._keep_checkpoints = keep_checkpoints
        self._max_skipped_steps = max_skipped_steps
        self._can_resume = can_resume
        self._penalty = penalty
        self._writing_to = str(folder.checkpoints)
        self._bad_loss: float | None = None
        self._loss_before: Tensor | None = None
        self._told = 0
        self.num_tokens = 0
        self.signals = SignalWatch()
        super().__init__(**others)
        self.add_callback(_StopWhenTold(lambda: self._told, can_save=can_resume))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and self._penalty is not None:
            assert not return_outputs
            # The examples' loss is a share of the step's already; so is this.
            result = result + self._penalty() / self.current_gradient_accumulation_steps
        if model.training:
            self._look_at((result[0] if return_outputs else result).item())
            self.num_tokens += _count_tokens(inputs)
        return result

    def _look_at(self, loss: float) -> None:
        """Take note of the loss of a micro-batch, before it is added to the Trainer's sum."""
        if self._loss_before is None:
            self._loss_before = self._tr_loss.clone()
        if self._bad_loss is None and not math.isfinite(loss):
            self._bad_loss = loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm for the log. Called between the last backward pass of a step and its update."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        optimizer: Any = self.optimizer
        # The gradients of entries are gone: the Trainer cannot see them.
        applied = optimizer.optimizer.grad_norm if isinstance(optimizer.optimizer, SparseOptimizer) else norm
        fault = self._fault(float(applied))
        # One exchange for both: every process skips alike, and stops after the same step.
        worst, self._told = max_over_ranks([fault, self.signals.received], device=self.args.device)
        if worst != Fault.NONE:
            self._skip(model, Fault(worst), value=self._bad_loss if fault == Fault.LOSS else float(applied))
            norm = None
        self._bad_loss = self._loss_before = None
        return norm

    def _fault(self, norm: float) -> Fault:
        if self._bad_loss is not None:
            return Fault.LOSS
        return Fault.NONE if math.isfinite(norm) else Fault.GRADIENT

    def _skip(self, model: nn.Module, fault: Fault, *, value: float | None) -> None:
        """An update without gradients changes nothing; the log is as if the step had not been."""
        step = self.state.global_step + 1
        words = f"the {fault.what} of step {step} is {value}"
        if self._num_skipped_before(step) >= self._max_skipped_steps:
            raise UsageError(f"{words}; {self._advice()}")
        optimizer: Any = self.optimizer
        if isinstance(optimizer.optimizer, BlockOptimizer) and optimizer.optimizer.update_in_backward:
            # The backward pass has moved weights by now.
            raise UsageError(
                f"{words}, and with method.update_in_backward=true no step can be skipped; {self._advice()}"
            )
        optimizer.zero_grad()
        model.zero_grad()
        assert self._loss_before is not None
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1
        history: list[Any] = self.state.log_history
        history.append({"step": step, "skipped": f"{fault.what}: {value}"})
        if is_rank_0():
            logger.warning("%s: the step is skipped and has changed nothing", words)

    def _num_skipped_before(self, step: int) -> int:
        """How many steps in a row."""
        skipped: set[Any] = {entry["step"] for entry in self.state.log_history if "skipped" in entry}
        return next(count for count in range(step) if step - 1 - count not in skipped)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The run was stopped after its last step; the Trainer would take one more before it looks.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_to

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        try:
            with writing_checkpoint(self._folder, step=self.state.global_step) as aside:
                self._writing_to = str(aside)
                # Past SFTTrainer's own method, which adds a model card.
                Trainer._save_checkpoint(self, model, trial)
                (inside,) = aside.iterdir()
                write_window(inside, self._window(), process=self.args.process_index)
        finally:
            self._writing_to = str(self._folder.checkpoints)
        if is_rank_0():
            delete_old_checkpoints(self._folder, keep=self._keep_checkpoints)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last of what a checkpoint gives back, just before the first step."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._go_on_with(read_window(Path(checkpoint), process=self.args.process_index))
        records = Path(checkpoint) / self._folder.records_file.name
        unlogged = last_records(records, self.state.global_step - self._globalstep_last_logged)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SelectionCallback):
                callback._since_log[:] = unlogged

    def _window(self) -> dict[str, Any]:
        """What the next line of the log is made of."""
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def _go_on_with(self, window: dict[str, Any]) -> None:
        self._tr_loss.fill_(window["loss"])
        self._globalstep_last_logged = window["last_logged"]

    def check_weights(self) -> None:
        """Weights that are no numbers are never kept.

        Raises:
            UsageError: some are NaN or infinite.
        """
        assert self.model is not None
        if not _is_finite(self.model):
            raise UsageError(f"weights are NaN or infinite after step {self.state.global_step}; {self._advice()}")

    def stop_if_told(self) -> None:
        """Between steps: end the run if a signal has come, with a checkpoint.

        Raises:
            Preempted: one has.
        """
        step = self.state.global_step
        (number,) = max_over_ranks([self._told or self.signals.received], device=self.args.device)
        if not number:
            return
        name = signal.Signals(number).name
        if not self._can_resume:
            raise Preempted(number, message=f"{name}: stopped after step {step}; this method keeps no checkpoints")
        checkpoint = self._folder.checkpoint(step)
        if not checkpoint.exists():
            assert self.model is not None
            self._save_checkpoint(self.model, None)
        raise Preempted(number, message=f"{name}: stopped after step {step}; everything is kept in {checkpoint}")

    def count_tokens_of_all(self) -> None:
        """`num_tokens` becomes the number of all processes together."""
        count = torch.tensor(self.num_tokens, device=self.args.device)
        self.num_tokens = int(self.accelerator.reduce(count))  # pyright: ignore[reportArgumentType]

    def _advice(self) -> str:
        newest = self._folder.newest_checkpoint()
        kept = "no checkpoint had been written" if newest is None else f"the last good checkpoint is {newest}"
        return (
            f"training has stopped and {kept}. Try a smaller optimizer.lr (it was {self.args.learning_rate:g}), "
            "a longer optimizer.warmup, or model.dtype=float32"
        )


class TokenTrainer(RunTrainer, SFTTrainer):
    """The same for what learns to write tokens, with TRL's templates, packing and masks of the loss."""

    def _skip(self, model: nn.Module, fault: Fault, *, value: float | None) -> None:
        super()._skip(model, fault, value=value)
        metrics = self._metrics["train"]
        for name in list(metrics):
            metrics[name] = [number for number in metrics[name] if math.isfinite(number)]
            if not metrics[name]:
                del metrics[name]

    def _window(self) -> dict[str, Any]:
        return {**super()._window(), "tokens": self._total_train_tokens, "metrics": self._metrics["train"]}

    def _go_on_with(self, window: dict[str, Any]) -> None:
        super()._go_on_with(window)
        self._total_train_tokens = window["tokens"]
        self._metrics["train"].update(window["metrics"])


class _StopWhenTold(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint, also where none are to be written."""

    def __init__(self, told: Callable[[], int], *, can_save: bool) -> None:
        self._told = told
        self._can_save = can_save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._told():
            control.should_save = self._can_save
            control.should_training_stop = True


@torch.no_grad()
def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _count_tokens(inputs: dict[str, Any]) -> int:
    # Packed rows come without a mask and without padding.
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
