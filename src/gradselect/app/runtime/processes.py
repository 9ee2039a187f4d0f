"""The processes of a run: started by torchrun or accelerate launch, each with a replica of the model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from gradselect import UsageError


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_launcher() -> bool:
    """Whether torchrun or its like has started this process, be it the only one."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes and shows."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Go on when all processes have come here; the Trainer has connected them."""
    if num_processes() > 1:
        dist.barrier()


def largest_of_all(values: Sequence[int], *, device: torch.device) -> list[int]:
    """The largest of each of the values over all processes; every process gets the same."""
    if num_processes() == 1:
        return list(values)
    together = torch.tensor(values, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def said_by_first(text: str | None) -> str | None:
    """What the first process calls this with."""
    if num_processes() == 1:
        return text
    said = [text]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def check_one_process() -> None:
    """No launcher has started several.

    Raises:
        UsageError: one has.
    """
    if num_processes() > 1:
        raise UsageError(
            f"this is one of {num_processes()} processes, and there is work for one only; start it without torchrun or "
            "accelerate launch"
        )


def take_device(device: str) -> None:
    """This process' own GPU becomes the current one.

    Raises:
        UsageError: one process sees several GPUs, or the launcher asks for what the Trainer would do wrongly.
    """
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UsageError(
                f"gradselect train keeps a whole model in each process and does not run under {what}; use torchrun or "
                "accelerate launch --multi_gpu, or write a loop around BlockOptimizer and fully_shard: "
                "docs/distributed.md"
            )
    if device == "cpu" or not torch.cuda.is_available():
        return
    if num_processes() == 1 and torch.cuda.device_count() > 1:
        raise UsageError(
            f"gradselect train uses one GPU a process and sees {torch.cuda.device_count()}; choose one with "
            "CUDA_VISIBLE_DEVICES=0, or start one process for each: torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} --no-python gradselect train ..."
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
