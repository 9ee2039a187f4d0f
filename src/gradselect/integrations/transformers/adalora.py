"""AdaLoRA in a Trainer: ranks fall only where something lowers them after each update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradselect import All, BlockOptimizer, SparseOptimizer, UsageError

from .wrappers import without_wrapper

logger = logging.getLogger(__name__)


class AdaLoraCallback(TrainerCallback):
    """Lowers the ranks of PEFT's AdaLoRA in any Trainer.

    AdaLoRA is a plain LoRA of rank `init_r` unless `update_and_allocate` runs after each update and before gradients
    are freed. No Trainer calls it; this callback does. Ranks fall from step `tinit` to step `total_step - tfinal` of
    PEFT's configuration, and then `target_r` times the number of adapted matrices are left. Steps that were skipped
    for overflow are not scored; if the last allocation falls on one, it happens in the next step.

    Args:
        schedule: called as `schedule(config, num_steps)` when training begins; writes `total_step`, `tinit` and
            `tfinal` into PEFT's configuration. None: `total_step` becomes the number of steps of the training, and
            `tfinal` at least 1.

    Raises:
        UsageError: when training begins: the model has no AdaLoRA, or one that `model.add_adapter` injected, whose
            allocator PEFT throws away; a policy or mask frees gradients before they are scored; training resumes, and
            checkpoints hold no scores; or the schedule does not fit the number of steps.

    Example:
        >>> callback = AdaLoraCallback()  # for Trainer(get_peft_model(model, AdaLoraConfig(...)), callbacks=[callback])
    """

    def __init__(self, *, schedule: Callable[[Any, int], None] | None = None) -> None:
        self._schedule = schedule or _take_number_of_steps
        self._tuner: Any = None
        self._config: Any = None
        self._is_final = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if state.global_step > 0:
            raise UsageError(
                f"training resumes after step {state.global_step}, but checkpoints hold no scores of AdaLoRA's ranks; "
                "train from the start: call train() without resume_from_checkpoint"
            )
        _check_optimizer(parts["optimizer"])
        self._tuner = _tuner_of(parts["model"])
        self._config = self._tuner.peft_config[self._tuner.trainable_adapter_name]
        self._is_final = False
        self._schedule(self._config, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        # Scores come from gradients: a skipped step has none, or infinite ones.
        skipped = getattr(parts.get("optimizer"), "step_was_skipped", False)
        if skipped or all(parameter.grad is None for parameter in self._tuner.parameters()):
            return
        last = self._config.total_step - self._config.tfinal
        # PEFT allocates the final ranks in this one step, which may have been skipped.
        step = last if state.global_step > last and not self._is_final else state.global_step
        self._is_final = step >= last
        self._tuner.update_and_allocate(step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        left = ranks(self._tuner)
        budget = self._config.target_r * len(left)
        if sum(left.values()) == budget:
            logger.info("AdaLoRA: %d ranks are left in %d matrices, as target_r asks", budget, len(left))
        else:
            logger.warning(
                "AdaLoRA: %d ranks are left in %d matrices, but target_r=%d asks for %d; training ended after step %d, "
                "and ranks fall until step %d",
                *(sum(left.values()), len(left), self._config.target_r, budget, state.global_step),
                self._config.total_step - self._config.tfinal + 1,
            )


def ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each matrix of an AdaLoRA, its number of nonzero singular values, by name of the adapter."""
    return {
        name: int(torch.count_nonzero(parameter)) for name, parameter in model.named_parameters() if ".lora_E." in name
    }


def warn_of_adalora(model: nn.Module, optimizer: BlockOptimizer | SparseOptimizer, callbacks: list[Any]) -> None:
    """Warn of an AdaLoRA whose ranks will not fall."""
    adapted = sum(_is_adalora(module) for module in model.modules())
    if adapted and not any(isinstance(callback, AdaLoraCallback) for callback in callbacks):
        advice = "add AdaLoraCallback() to the callbacks"
        if not _keeps_gradients(optimizer):
            advice = "a policy or a mask frees the gradients that score ranks, so take a plain LoRA: LoraConfig(r=...)"
        logger.warning(
            "AdaLoRA on %d matrices trains here as a plain LoRA whose ranks never fall: nothing calls "
            "update_and_allocate; %s",
            *(adapted, advice),
        )


def _take_number_of_steps(config: Any, num_steps: int) -> None:
    # With tfinal=0, PEFT's default, the last allocation would come after the last step.
    tfinal = max(config.tfinal, 1)
    if config.tinit >= num_steps - tfinal:
        raise UsageError(
            f"AdaLoraConfig(tinit={config.tinit}, tfinal={config.tfinal}) leaves no step for ranks to fall in a "
            f"training of {num_steps} steps; write e.g. tinit={num_steps // 10}, tfinal={num_steps // 3}, or train "
            "longer"
        )
    if (config.total_step, config.tfinal) != (num_steps, tfinal):
        logger.warning(
            "AdaLoRA: total_step=%d, tfinal=%d become %d, %d, so that the last allocation falls into this training of "
            "%d steps",
            *(config.total_step, config.tfinal, num_steps, tfinal, num_steps),
        )
    config.total_step, config.tfinal = num_steps, tfinal


def _check_optimizer(optimizer: Any) -> None:
    optimizer = without_wrapper(optimizer)
    if not _keeps_gradients(optimizer):
        raise UsageError(
            f"AdaLoraCallback scores ranks by gradients, and {type(optimizer).__name__} with a selection frees them "
            "before; leave policy= or mask= out, or put it on a plain LoRA: LoraConfig(r=...)"
        )


def _keeps_gradients(optimizer: Any) -> bool:
    if isinstance(optimizer, BlockOptimizer):
        return isinstance(optimizer.policy, All) and not optimizer.update_in_backward
    return not isinstance(optimizer, SparseOptimizer)


def _tuner_of(model: nn.Module) -> Any:
    """Return PEFT's `AdaLoraModel` around the model, which has the allocator of ranks."""
    # By class name, as elsewhere: PEFT is imported only where it is used.
    tuners = [module for module in model.modules() if type(module).__name__ == "AdaLoraModel"]
    if tuners and getattr(tuners[0], "rankallocator", None) is None:
        raise UsageError(
            "the AdaLoRA of the model is frozen; load it with PeftModel.from_pretrained(model, folder, "
            "is_trainable=True), or leave AdaLoraCallback out"
        )
    if tuners:
        return tuners[0]
    if any(_is_adalora(module) for module in model.modules()):
        raise UsageError(
            "model.add_adapter throws the allocator of AdaLoRA's ranks away, so that they could not fall; write "
            "model = peft.get_peft_model(model, AdaLoraConfig(...)) instead"
        )
    raise UsageError(
        f"AdaLoraCallback found no AdaLoRA in {type(model).__name__}; write model = peft.get_peft_model(model, "
        "AdaLoraConfig(...)) before building the Trainer, or leave the callback out"
    )


def _is_adalora(module: nn.Module) -> bool:
    return any(kind.__name__ == "AdaLoraLayer" for kind in type(module).__mro__)
