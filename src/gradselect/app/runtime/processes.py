"""The processes of a run: started by torchrun or accelerate launch, each with a replica of the model.

Rank and number of processes come from the environment, so that they are known before the processes are connected:
`accelerate.PartialState` connects them when it is first asked, and waits until all have come.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from gradselect import UsageError


def num_processes() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_launcher() -> bool:
    """Return True if torchrun or its like started this process, even as the only one."""
    return "WORLD_SIZE" in os.environ


def is_rank_0() -> bool:
    """Return True in the process that writes files and shows progress."""
    return os.environ.get("RANK", "0") == "0"


def barrier() -> None:
    """Wait until all processes are here. The Trainer must have connected them."""
    if num_processes() > 1:
        dist.barrier()


@contextmanager
def own_process_group() -> Iterator[None]:
    """Disconnect the processes at the end of the block if they were connected inside it.

    A group that lives until the interpreter shuts down has threads of its own, which may abort a finished process: the
    launcher then reports a failure. The same launcher's processes cannot be connected again.
    """
    was_connected = dist.is_initialized()
    try:
        yield
        if not was_connected and dist.is_initialized():
            # No process leaves while another one still needs it.
            barrier()
    finally:
        if not was_connected:
            disconnect()


def disconnect() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process at once, after its exit handlers, without the rest of the interpreter's shutdown.

    Threads of torch's process groups have aborted finished processes there ("terminate called without an active
    exception", exit code -6), and the launcher then reports a failure though everything is written.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def max_over_ranks(values: Sequence[int], *, device: torch.device) -> list[int]:
    """Return the maximum of each value over all ranks."""
    if num_processes() == 1:
        return list(values)
    together = torch.tensor(values, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def broadcast_from_rank_0(text: str | None) -> str | None:
    """Return what rank 0 calls this with."""
    if num_processes() == 1:
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def check_one_process() -> None:
    """Check that no launcher started several processes.

    Raises:
        UsageError: one did.
    """
    if num_processes() > 1:
        raise UsageError(
            f"this is one of {num_processes()} processes, and there is work for one only; start it without torchrun or "
            "accelerate launch"
        )


def take_device(device: str) -> None:
    """Make this process' own GPU the current one.

    Raises:
        UsageError: one process sees several GPUs, or the launcher asks for FSDP or DeepSpeed.
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
