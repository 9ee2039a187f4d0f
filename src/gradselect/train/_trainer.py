"""Trainers with whole checkpoints or none, and an end to a run whose loss is no number."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

from .. import UsageError
from ._folder import RunFolder, aside_of, writing_aside
from ._processes import is_first, wait_for_all


class RunTrainer(Trainer):
    """`transformers.Trainer` as the command line runs it.

    Args:
        folder: its checkpoints go to `folder.checkpoints`, each written aside and then renamed.
        keep_checkpoints: how many there are at most; older ones are deleted.
        penalty: added to the loss of each step, beside that of the examples.
        others: as for the parent, by keyword.

    Attributes:
        num_tokens: tokens that this session has trained on, prompts included and padding not.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        keep_checkpoints: int,
        penalty: Callable[[], Tensor] | None = None,
        **others: Any,
    ) -> None:
        self._folder = folder
        self._keep_checkpoints = keep_checkpoints
        self._penalty = penalty
        self._writing_to = str(folder.checkpoints)
        self.num_tokens = 0
        super().__init__(**others)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch.

        Raises:
            UsageError: it is NaN or infinite in training; the step has changed nothing yet.
        """
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and self._penalty is not None:
            assert not return_outputs
            # The examples' loss is a share of the step's already; so is this.
            result = result + self._penalty() / self.current_gradient_accumulation_steps
        if model.training:
            loss = (result[0] if return_outputs else result).item()
            if not math.isfinite(loss):
                raise UsageError(f"the loss of step {self.state.global_step + 1} is {loss}; {self._advice()}")
            self.num_tokens += _count_tokens(inputs)
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_to

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if not _is_finite(model):
            raise UsageError(f"weights are NaN or infinite after step {step}; {self._advice()}")
        try:
            with _written_by_all(self._folder.checkpoint(step)) as aside:
                self._writing_to = str(aside)
                # Past SFTTrainer's own method, which adds a model card.
                Trainer._save_checkpoint(self, model, trial)
        finally:
            self._writing_to = str(self._folder.checkpoints)
        if is_first():
            self._delete_old_checkpoints()

    def count_tokens_of_all(self) -> None:
        """`num_tokens` becomes the number of all processes together."""
        count = torch.tensor(self.num_tokens, device=self.args.device)
        self.num_tokens = int(self.accelerator.reduce(count))  # pyright: ignore[reportArgumentType]

    def _delete_old_checkpoints(self) -> None:
        for old in self._folder.complete_checkpoints()[: -self._keep_checkpoints]:
            shutil.rmtree(old)

    def _advice(self) -> str:
        newest = self._folder.newest_checkpoint()
        kept = "no checkpoint had been written" if newest is None else f"the last good checkpoint is {newest}"
        return (
            f"training has stopped and {kept}. Try a smaller optimizer.lr (it was {self.args.learning_rate:g}), "
            "a longer optimizer.warmup, or model.dtype=float32"
        )


class TokenTrainer(RunTrainer, SFTTrainer):
    """The same for what learns to write tokens, with TRL's templates, packing and masks of the loss."""


@contextmanager
def _written_by_all(target: Path) -> Iterator[Path]:
    """As `writing_aside`, for a folder into which every process writes: the first makes it and gives it its name."""
    with writing_aside(target) if is_first() else nullcontext(aside_of(target)) as aside:
        wait_for_all()
        yield aside
        wait_for_all()
        if is_first():
            _lift(aside)
    wait_for_all()


@torch.no_grad()
def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def _count_tokens(inputs: dict[str, Any]) -> int:
    # Packed rows come without a mask and without padding.
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()


def _lift(folder: os.PathLike[str]) -> None:
    """Move what stands in the only folder inside `folder` one level up."""
    (inner,) = os.scandir(folder)
    for entry in list(os.scandir(inner)):
        os.rename(entry.path, os.path.join(folder, entry.name))
    os.rmdir(inner)
