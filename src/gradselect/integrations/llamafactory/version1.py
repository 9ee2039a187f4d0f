"""LLaMA-Factory's v1: registers the optimizer plug-in `gradselect`.

    optim_config: {name: gradselect, method: {name: adagradselect, fraction: 0.2}, jsonl: selection.jsonl}

v1 passes the plug-in a model and this section. The rest the plug-in finds in the trainer that calls it: learning rate,
micro-batches of a step, steps, clipping, seed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from llamafactory.v1.accelerator.interface import DistributedInterface  # pyright: ignore[reportMissingImports]
from llamafactory.v1.core.base_trainer import BaseTrainer  # pyright: ignore[reportMissingImports]
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin  # pyright: ignore[reportMissingImports]
from llamafactory.v1.utils.callbacks import TrainerCallback  # pyright: ignore[reportMissingImports]
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradselect import BlockOptimizer, JsonlWriter, SparseOptimizer
from gradselect.integrations.callers import caller_of
from gradselect.integrations.reporting import say_explore_steps, say_what_never_trained, say_what_trains, summarise
from gradselect.integrations.section import parse_section
from gradselect.integrations.transformers import checkpoint_selected
from gradselect.usage import UsageError

from .sections import SECTION, Sections

KEY = "optim_config"
KEYS = ("method", "jsonl", "lr", "weight_decay", "betas", "eps")
_OPTIONS = KEYS[2:]


def check(sections: Sections) -> None:
    """Refuse what would leave selective training out."""
    if sections.arguments.get(KEY) is not None:
        raise UsageError(f"{KEY} and {SECTION} both choose the optimizer; leave one of them out")


def train(sections: Sections, run: Callable[..., None]) -> None:
    """Train with the framework's own function."""
    method = sections.method.model_dump(exclude_unset=True)
    run({**sections.arguments, KEY: {"name": SECTION, "method": method, "jsonl": sections.jsonl}})


@OptimizerPlugin(SECTION).register()
def make_optimizer(model: nn.Module, config: Mapping[str, Any]) -> BlockOptimizer | SparseOptimizer:
    """Build the optimizer of v1's trainer.

    Args:
        model: the trainer's; may be sharded.
        config: section `optim_config`. Its `lr`, `weight_decay`, `betas` and `eps` go to the optimizer.

    Raises:
        UsageError: the section is wrong; there is no learning rate; or the model is wrapped in a way in which nothing
            can be selected.
    """
    _check_keys(config)
    method, _ = parse_section(config["method"], key=f"{KEY}.method")
    given = {name: config[name] for name in _OPTIONS if name in config}
    trainer = caller_of(BaseTrainer)
    if trainer is None:
        if "lr" not in given:
            raise UsageError(f"no trainer of LLaMA-Factory calls this plug-in, and {KEY} has no 'lr'; add lr: 2e-5")
        return method.make_optimizer(model, **given)
    _check_wrapper(model, trainer.args)
    if method.optimizer_class is SparseOptimizer:
        given = {"max_grad_norm": trainer.args.max_grad_norm or None, **given}
    epoch_steps = len(trainer.train_batch_generator)
    optimizer = method.make_optimizer(
        model,
        seed=trainer.args.seed,
        num_steps=trainer.num_training_steps,
        epoch_steps=epoch_steps if epoch_steps > 0 else None,
        accumulation_steps=trainer.train_batch_generator.num_micro_batch,
        **{"lr": trainer.args.learning_rate, **given},
    )
    _connect(optimizer, trainer, config.get("jsonl"))
    return optimizer


class SelectionInLog(TrainerCallback):
    """Adds `selection/*` to v1's log, and with a mask the true `grad_norm`, over the steps since the last log.

    Args:
        trainer: has no list of callbacks before it has an optimizer, so this joins them after the first step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._since_log: list[Any] = []

    def __call__(self, record: Any) -> None:
        self._since_log.append(record)
        if self not in self._trainer.callback_handler.callbacks:
            self._trainer.callback_handler.callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, logs: dict[str, Any], **parts: Any) -> None:
        """Add to `logs`, before the callback that writes them."""
        if self._since_log:
            logs.update(summarise(self._since_log))
            self._since_log.clear()

    def on_train_end(self, args: Any, state: Any, **parts: Any) -> None:
        """Say which candidates trained in no step."""
        if isinstance(self._trainer.optimizer, BlockOptimizer):
            say_what_never_trained(self._trainer.optimizer)


def _connect(optimizer: BlockOptimizer | SparseOptimizer, trainer: Any, jsonl: str | None) -> None:
    if trainer.args.enable_activation_checkpointing:
        checkpoint_selected(trainer.model)
    if isinstance(optimizer, BlockOptimizer):
        say_what_trains(optimizer)
        say_explore_steps(optimizer, num_steps=trainer.num_training_steps)
    optimizer.add_record_hook(SelectionInLog(trainer))
    if jsonl is not None and DistributedInterface().get_rank() == 0:
        optimizer.add_record_hook(JsonlWriter(jsonl))


def _check_keys(config: Mapping[str, Any]) -> None:
    for name in config.keys() - {"name", *KEYS}:
        close = difflib.get_close_matches(name, KEYS, n=1)
        advice = f"write {close[0]!r}" if close else f"settings of the method go into {KEY}.method"
        raise UsageError(f"unknown key {name!r} in {KEY} (known: {', '.join(KEYS)}); {advice}")
    if "method" not in config:
        raise UsageError(f"{KEY} has no 'method'; add {KEY}.method: {{name: adagradselect, fraction: 0.2}}")


def _check_wrapper(model: nn.Module, args: Any) -> None:
    name = None if args.dist_config is None else args.dist_config.name
    if name == "deepspeed":
        raise UsageError(
            "dist_config.name: deepspeed steps an optimizer of its own, in which no block can be selected; write "
            "dist_config: {name: fsdp2}"
        )
    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        raise UsageError(
            "without dist_config, LLaMA-Factory's v1 wraps the model in DistributedDataParallel without "
            "find_unused_parameters=True, and would not average gradients; write dist_config: {name: fsdp2}"
        )
