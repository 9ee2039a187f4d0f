"""Failures of a step, in words: NaN or infinite losses and gradients, too little memory."""

from __future__ import annotations

import shlex
from enum import IntEnum

import torch

from gradselect.app.recipe import Recipe
from gradselect.app.runtime import RunFolder, host_bytes


class Fault(IntEnum):
    """Reason to skip a step. The worst of all ranks holds for all."""

    NONE = 0
    GRADIENT = 1
    LOSS = 2

    @property
    def what(self) -> str:
        """Name in messages."""
        return {Fault.NONE: "nothing", Fault.GRADIENT: "gradient norm", Fault.LOSS: "loss"}[self]


def is_dead_worker(error: BaseException) -> bool:
    """Return True if a process that reads the data has died. torch has no class for that."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the device or the host ran out of memory."""
    # For the host torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def describe_kept(folder: RunFolder) -> str:
    """Say which checkpoint a run that ends here leaves."""
    newest = folder.newest_checkpoint()
    return "no checkpoint had been written" if newest is None else f"the last checkpoint, {newest}, is whole"


def describe_bad_numbers(folder: RunFolder, *, lr: float, has_trained: bool) -> str:
    """Say what is left of a run that NaN or infinity has ended, and what to try.

    Args:
        folder: folder of the run.
        lr: the learning rate.
        has_trained: True if a step has changed weights.
    """
    newest = folder.newest_checkpoint()
    kept = "no checkpoint had been written" if newest is None else f"the last good checkpoint is {newest}"
    if has_trained:
        advice = f"Try a smaller optimizer.lr (it was {lr:g}), a longer optimizer.warmup, or model.dtype=float32"
    else:
        advice = (
            "No step had changed a weight, so the learning rate is not the cause: try model.dtype=float32, and look at "
            "the base, whose own loss gradselect evaluate --task loss measures"
        )
    return f"training has stopped and {kept}. {advice}"


def describe_out_of_memory(error: BaseException, *, recipe: Recipe, folder: RunFolder) -> str:
    """Say what to type to find a setting that fits."""
    # Before the first step there is no copy of the recipe yet.
    file = str(folder.recipe_file) if folder.recipe_file.exists() else "RECIPE"
    command = ["gradselect", "plan", file, "--fit", f"{_memory_mebibytes(recipe)}MiB"]
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory ({reason}); {describe_kept(folder)}. To find the best setting that fits, type: "
        f"{shlex.join(command)}\n"
        "Try first: model.gradient_checkpointing=true, with which --resume continues this run. Then: a smaller "
        f"run.batch_size (it is {recipe.run.batch_size}) with a larger run.accumulation; a smaller data.max_length; "
        "another method or fraction. Those make it another run: give it another run.output"
    )


def _memory_mebibytes(recipe: Recipe) -> int:
    """Return the size of the memory of the device that the recipe trains on."""
    if recipe.run.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // 2**20
    return host_bytes() // 2**20
