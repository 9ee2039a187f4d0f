"""LLaMA-Factory as it is by default: its trainers are those of transformers, and take callbacks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from llamafactory.extras.misc import is_env_enabled, use_kt, use_ray  # pyright: ignore[reportMissingImports]
from llamafactory.train.callbacks import LogCallback  # pyright: ignore[reportMissingImports]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradselect.integrations.transformers import SelectiveTraining
from gradselect.usage import UsageError

from .sections import Sections

logger = logging.getLogger(__name__)

OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "loraplus_lr_ratio")
FOR_REPLICAS = {"ddp_find_unused_parameters": True, "use_reentrant_gc": False}
OTHER_TRAINERS = ("use_ray", "use_mca", "use_hyper_parallel", "use_kt")


def check(sections: Sections) -> None:
    """Refuse what would leave selective training out."""
    arguments = sections.arguments
    for name in OTHER_OPTIMIZERS:
        if arguments.get(name):
            raise UsageError(
                f"{name}: {arguments[name]} and gradselect both choose the optimizer; leave one of them out"
            )
    others = [name for name in OTHER_TRAINERS if arguments.get(name)]
    others += [name for name, is_on in (("USE_RAY", use_ray()), ("USE_KT", use_kt())) if is_on]
    others += ["USE_MCA"] * is_env_enabled("USE_MCA") + ["stage: ppo"] * (arguments.get("stage") == "ppo")
    if others:
        raise UsageError(f"{others[0]}: gradselect trains in trainers of transformers, and this is none; leave it out")


def train(sections: Sections, run_exp: Callable[..., None]) -> None:
    """Train with the framework's own function."""
    callbacks: list[TrainerCallback] = [SelectiveTraining(method=sections.method, jsonl=sections.jsonl)]
    # LLaMA-Factory appends its own callbacks to this list.
    callbacks.append(SelectionInTrainerLog(callbacks))
    run_exp({**sections.arguments, **_for_replicas(sections.arguments)}, callbacks)


def _for_replicas(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DistributedDataParallel needs if some weights have no gradient, as in every selective step.

    Reentrant checkpoints, LLaMA-Factory's default, do not go together with it.
    """
    is_sharded = arguments.get("fsdp") or arguments.get("deepspeed") or is_env_enabled("ACCELERATE_USE_FSDP")
    if is_sharded or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    for name, value in FOR_REPLICAS.items():
        if arguments.get(name, value) != value:
            raise UsageError(f"{name}: {arguments[name]} with several processes; gradselect needs {name}: {value}")
    needed = {name: value for name, value in FOR_REPLICAS.items() if name not in arguments}
    for name, value in needed.items():
        logger.warning(
            "set %s: %s, which several processes need, as weights that are not selected have no gradient", name, value
        )
    return needed


class SelectionInTrainerLog(TrainerCallback):
    """Adds `selection/*` to `trainer_log.jsonl`, for which LLaMA-Factory picks certain values of the log.

    Args:
        callbacks: of the trainer; LLaMA-Factory's among them when training begins.
    """

    def __init__(self, callbacks: list[TrainerCallback]) -> None:
        self._callbacks = callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        for callback in self._callbacks:
            if isinstance(callback, LogCallback):
                _add_selection(callback, state)


def _add_selection(callback: Any, state: TrainerState) -> None:
    write = type(callback)._write_log.__get__(callback)

    def write_log(folder: str, logs: dict[str, Any]) -> None:
        entries = [each for each in state.log_history if _is_same(each, logs)]
        found = {key: value for each in entries for key, value in each.items() if key.startswith("selection/")}
        write(folder, {**logs, **found})

    callback._write_log = write_log


def _is_same(entry: Mapping[str, Any], logs: Mapping[str, Any]) -> bool:
    """Return True if an entry of the Trainer's history is what LLaMA-Factory picked `logs` from."""
    is_same_kind = all((key in entry) == (key in logs) for key in ("loss", "eval_loss"))
    return is_same_kind and entry.get("step") == logs.get("current_steps")
