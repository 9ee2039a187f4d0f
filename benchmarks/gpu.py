"""Check and measure the library on a GPU, in stages of at most ten minutes, in the order of their worth.

    python benchmarks/gpu.py                          # all stages; `make gpu` does the same
    python benchmarks/gpu.py --stages tests offload   # some

    tests     what is marked `gpu`: every policy, mask and method of a recipe trains as on a CPU
    offload   `Offload()`: are the copies right, bitwise, and are they hidden behind the computation?
    shapes    step time and peak memory at the shapes of published models, in bfloat16, beside full and LoRA
    smollm2   a real model at equal time, three seeds: suites/smollm2-gpu.yaml

Results are written to benchmarks/results/gpu, and to runs/compare/smollm2-gpu. If a stage fails, the next ones still
run, and the exit code is 1. It is 2 where there is no GPU. A stage whose time is over is interrupted, so that its own
processes end too: those of smollm2 save what they have, and the next `--stages smollm2` continues.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import RESULTS, ROOT

LIMIT = 540
"""Seconds of a stage."""

GRACE = 60
"""Seconds that a stage has to end once it is interrupted: with LIMIT ten minutes."""

OUT = RESULTS / "gpu"

SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b")
"""Of the stage `shapes`; each has a result of its name, beside that of the stage `offload`."""

SETTINGS = (
    "full AdamW",
    "full, checkpointing",
    "full, chunked loss, checkpointing",
    "AdaGradSelect 20 %",
    "AdaGradSelect 20 %, offload",
    "AdaGradSelect 20 %, offload, chunked loss, checkpointing",
    "LoRA r=32",
    "LoRA r=256",
)
"""Of the stage `shapes`: few enough to end in time."""


def stages(*, out: Path, processes: int) -> dict[str, list[list[str]]]:
    """Return the commands of each stage, as arguments of Python."""
    levers = ["benchmarks/levers.py", "--rounds", "20", "--settings", *SETTINGS]
    return {
        "tests": [["-m", "pytest", "-m", "gpu", "--numprocesses", str(processes), "--quiet", "tests"]],
        "offload": [["benchmarks/offload.py", "--out", str(out / "offload.json")]],
        "shapes": [[*levers, "--preset", f"gpu-{shape}", "--out", str(out / f"{shape}.json")] for shape in SHAPES],
        "smollm2": [["-m", "gradselect", "compare", "suites/smollm2-gpu.yaml", "--jobs", "8", "--per-device", "8"]],
    }


def run_stage(name: str, commands: Sequence[Sequence[str]]) -> bool:
    """Run the commands one after the other until one fails or the time is over. Returns True if all succeeded."""
    end = time.monotonic() + LIMIT
    for command in commands:
        print(f"{name}: python {' '.join(command)}", flush=True)
        running = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        try:
            code = running.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            interrupt(running)
            print(f"{name}: stopped after {LIMIT} seconds", flush=True)
            return False
        if code:
            print(f"{name}: ended with exit code {code}", flush=True)
            return False
    return True


def interrupt(running: subprocess.Popen[bytes], *, grace: float = GRACE) -> None:
    """End a process as Ctrl-C does. Killed at once, it would leave its own processes behind, on the GPU."""
    running.send_signal(signal.SIGINT)
    try:
        running.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def main() -> int:
    names = list(stages(out=OUT, processes=1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and there is none; on a CPU: make test", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    commands = stages(out=arguments.out.resolve(), processes=max(1, min(12, (os.cpu_count() or 1) - 2)))
    succeeded = {}
    for name in arguments.stages:
        start = time.monotonic()
        succeeded[name] = run_stage(name, commands[name])
        print(f"{name}: {'done' if succeeded[name] else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return 0 if all(succeeded.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
