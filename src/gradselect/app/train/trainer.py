"""Trainers that write checkpoints atomically, skip NaN and infinite steps, and stop on a signal."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from gradselect import BlockOptimizer, SparseOptimizer, UsageError
from gradselect.app.inputs import LengthSampler
from gradselect.app.progress import SILENT, Stage, Stages
from gradselect.app.results import TokenCounts
from gradselect.app.runtime import Preempted, RunFolder, SignalWatch, is_rank_0, max_over_ranks
from gradselect.integrations.transformers import SelectionCallback

from .checkpoints import delete_old_checkpoints, last_records, read_window, write_window, writing_checkpoint
from .failures import Fault, describe_bad_numbers
from .restoring import check_adapter, restore_weights

logger = logging.getLogger(__name__)


class RunTrainer(Trainer):
    """`transformers.Trainer` as the command line runs it.

    **Skipped steps.** If the loss or the gradient norm of a step is NaN or infinite on any rank, the step changes
    nothing: its gradients are dropped, and weights, optimizer state and selection stay as they are. Data and schedule
    move on. With `update_in_backward` such a step has already moved weights, so it ends the run.

    Args:
        folder: folder of the run; checkpoints are written atomically to `folder.checkpoints`.
        keep_checkpoints: maximum number of checkpoints; older ones are deleted.
        max_skipped_steps: maximum number of skipped steps in a row; one more ends the run.
        token_counts: tokens of the rows "train" and "validation", before and after cutting.
        can_resume: True if a checkpoint holds everything that decides the next step.
        penalty: added to the loss of each step.
        row_lengths: tokens of the rows of `train_dataset`, to put rows of about the same length into a batch. None: the
            parent class draws the order.
        stages: shows what it does beside the steps.
        others: keyword arguments of the parent class.

    Attributes:
        num_tokens: tokens that this session has trained on, with prompts, without padding.
        notes: what the user must know of the loss, with numbers.
        plain_rows: rows before they got the columns of a trainer of TRL. None: `train_dataset` is as it was made.
        signals: signals received. After the step in which any rank receives one, training ends with a checkpoint.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        keep_checkpoints: int,
        max_skipped_steps: int,
        token_counts: Mapping[str, TokenCounts],
        can_resume: bool = True,
        penalty: Callable[[], Tensor] | None = None,
        row_lengths: Sequence[int] | None = None,
        stages: Stages = SILENT,
        **others: Any,
    ) -> None:
        self._folder = folder
        self._keep_checkpoints = keep_checkpoints
        self._max_skipped_steps = max_skipped_steps
        self.token_counts = token_counts
        self._can_resume = can_resume
        self._penalty = penalty
        self._row_lengths = row_lengths
        self._stages = stages
        self._evaluation = Stage("evaluating")
        self._writing_to = str(folder.checkpoints)
        self._bad_loss: float | None = None
        self._loss_before: Tensor | None = None
        self._signal = 0
        self.num_tokens = 0
        self.notes: Sequence[str] = ()
        self.plain_rows: Any = None
        self.signals = SignalWatch()
        super().__init__(**others)
        self.add_callback(_RunCallback(self))

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
            # The loss of most trainers is divided by accumulation already; the Trainer divides that of the others.
            is_whole = getattr(self, "loss_is_scaled_for_ga", None) is False
            result = result + self._penalty() / (1 if is_whole else self.current_gradient_accumulation_steps)
        if model.training:
            self._note_loss((result[0] if return_outputs else result).item())
            self.num_tokens += self._count_tokens(inputs)
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._row_lengths is None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        batch_size = args.train_batch_size * args.world_size
        return LengthSampler(self._row_lengths, batch_size=batch_size, seed=args.seed)

    def _count_tokens(self, inputs: dict[str, Any]) -> int:
        """Return the tokens of a micro-batch, without padding."""
        # Not the Trainer's own count: in packed rows, which have no mask, it leaves out every end of text that doubles
        # as padding token, and it adds seconds to every line of the log.
        return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()

    def _note_loss(self, loss: float) -> None:
        """Note the loss of a micro-batch before the Trainer adds it to its sum."""
        if self._loss_before is None:
            self._loss_before = self._tr_loss.clone()
        if self._bad_loss is None and not math.isfinite(loss):
            self._bad_loss = loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm for the log. Called between the last backward pass of a step and its update."""
        # Not on_pre_optimizer_step: it comes after clipping, which turns an infinite norm into zeros and NaN.
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        optimizer: Any = self.optimizer
        # The Trainer cannot read the gradients of entries: they are freed.
        applied = optimizer.optimizer.grad_norm if isinstance(optimizer.optimizer, SparseOptimizer) else norm
        fault = self._fault(float(applied))
        # One exchange for both: all ranks skip the same steps and stop after the same step.
        worst, self._signal = max_over_ranks([fault, self.signals.received], device=self.args.device)
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
        """Drop the gradients, so that the update changes nothing, and take the step out of the log."""
        step = self.state.global_step + 1
        words = f"the {fault.what} of step {step} is {value}"
        if self._num_skipped_before(step) >= self._max_skipped_steps:
            raise UsageError(f"{words}; {self._advice()}")
        optimizer: Any = self.optimizer
        if isinstance(optimizer.optimizer, BlockOptimizer) and optimizer.optimizer.update_in_backward:
            # The backward pass has moved weights already.
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
        """Return the number of skipped steps in a row before this one."""
        skipped: set[Any] = {entry["step"] for entry in self.state.log_history if "skipped" in entry}
        return next(count for count in range(step) if step - 1 - count not in skipped)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step. Not on_epoch_begin: the Trainer reads `control` only after another step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        # Not args.output_dir: every checkpoint holds a copy of the arguments.
        return self._writing_to

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Not on_save: by then a half-written checkpoint would have its final name.
        self.check_weights()
        step = self.state.global_step
        try:
            with (
                self._stages.open(f"saving the checkpoint of step {step}"),
                writing_checkpoint(self._folder, step=step) as aside,
            ):
                self._writing_to = str(aside)
                # Not SFTTrainer's own method, which adds a model card.
                Trainer._save_checkpoint(self, model, trial)
                (inside,) = aside.iterdir()
                write_window(inside, self._window(), process=self.args.process_index)
        finally:
            self._writing_to = str(self._folder.checkpoints)
        if is_rank_0():
            delete_old_checkpoints(self._folder, keep=self._keep_checkpoints)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **options: Any) -> Any:
        with self._stages.open("evaluating", total=len(dataloader)) as self._evaluation:
            return super().evaluation_loop(dataloader, *args, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights of a checkpoint, or refuse: the Trainer's own loading skips tensors of other names."""
        live: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(live, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_adapter(live, Path(resume_from_checkpoint))
        else:
            restore_weights(live, Path(resume_from_checkpoint))

    def resume_log(self) -> None:
        """Restore what the checkpoint of this step had not logged yet."""
        checkpoint = self._folder.checkpoint(self.state.global_step)
        self._restore_window(read_window(checkpoint, process=self.args.process_index))
        records = checkpoint / self._folder.records_file.name
        unlogged = last_records(records, self.state.global_step - self._globalstep_last_logged)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SelectionCallback):
                callback._since_log[:] = unlogged

    def _window(self) -> dict[str, Any]:
        """Return the sums for the next line of the log."""
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def _restore_window(self, window: dict[str, Any]) -> None:
        self._tr_loss.fill_(window["loss"])
        self._globalstep_last_logged = window["last_logged"]

    def check_weights(self) -> None:
        """Refuse to keep bad weights.

        Raises:
            UsageError: some weights are NaN or infinite.
        """
        assert self.model is not None
        if not _is_finite(self.model):
            raise UsageError(f"weights are NaN or infinite after step {self.state.global_step}; {self._advice()}")

    def stop_on_signal(self) -> None:
        """End the run with a checkpoint if any rank has received a signal. Call it between steps.

        Raises:
            Preempted: a signal has been received.
        """
        step = self.state.global_step
        (number,) = max_over_ranks([self._signal or self.signals.received], device=self.args.device)
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

    def sum_tokens_over_ranks(self) -> None:
        """Set `num_tokens` to its sum over all ranks."""
        count = torch.tensor(self.num_tokens, device=self.args.device)
        self.num_tokens = int(self.accelerator.reduce(count))  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        """Free what the trainer holds beside memory."""

    def _advice(self) -> str:
        steps = self.state.global_step
        # A step that was skipped has changed no weight.
        has_trained = self._num_skipped_before(steps + 1) < steps
        return describe_bad_numbers(self._folder, lr=self.args.learning_rate, has_trained=has_trained)


class MetricsTrainer(RunTrainer):
    """`RunTrainer` on top of a trainer of TRL, which keeps lists of metrics until the next line of the log."""

    def __init__(self, *, model: nn.Module, **others: Any) -> None:
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model=model, **others)
        for parameter, values in trained:
            if parameter.dtype != values.dtype:
                # TRL casts an adapter on a 4-bit base to bfloat16, which swallows small updates and does not resume.
                parameter.data = values

    def train_metrics(self) -> Any:
        """Return the lists of metrics, by name."""
        return self._metrics["train"]  # pyright: ignore[reportAttributeAccessIssue]

    def _skip(self, model: nn.Module, fault: Fault, *, value: float | None) -> None:
        super()._skip(model, fault, value=value)
        metrics = self.train_metrics()
        for name in list(metrics):
            metrics[name] = [number for number in metrics[name] if math.isfinite(number)]
            if not metrics[name]:
                del metrics[name]

    def _window(self) -> dict[str, Any]:
        tokens = getattr(self, "_total_train_tokens", 0)
        return {**super()._window(), "tokens": tokens, "metrics": dict(self.train_metrics())}

    def _restore_window(self, window: dict[str, Any]) -> None:
        super()._restore_window(window)
        self._total_train_tokens = window["tokens"]
        self.train_metrics().update(window["metrics"])


class TokenTrainer(MetricsTrainer, SFTTrainer):
    """`RunTrainer` for language models, with TRL's templates, packing and loss masks."""


class _RunCallback(TrainerCallback):
    """Resumes the log, counts batches of evaluations, and ends training after the step in which a signal came."""

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # After SelectionCallback, which clears what has not been logged.
        if 0 < state.global_step < state.max_steps:
            self._trainer.resume_log()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._evaluation.advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer._signal:
            control.should_save = self._trainer._can_resume
            control.should_training_stop = True


@torch.no_grad()
def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
