"""Does `Offload()` hide its copies, and are they right? Needs a CUDA device; without one it says so and ends with 2.

    python benchmarks/offload.py                          # writes benchmarks/results/offload.json
    python benchmarks/offload.py --preset qwen2.5-0.5b --fraction 0.1 --out /tmp/offload.json

Hidden: of the time that the copies take alone, out and back one after the other from and to page-locked memory, the
share that a step with `Offload()` does not take longer than the same step with `Keep()`:

    hidden = 1 - (seconds of a step, Offload - seconds of a step, Keep) / seconds of its copies

Blocks are chosen uniformly at every step: no policy moves more. `waiting` is the twin whose host waits for every copy.

Right: layers of many weights and few tokens, where copies are still under way long after the computation is through;
after 1,000 steps with another selection each, weights and state are bitwise those of copies that the host waits for.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import gradselect as gs
from gradselect.core.residency import AbstractMover, _Offloading
from gradselect.core.transfer import SynchronousLanes, Transfer

RESULT = Path(__file__).parent / "results" / "offload.json"
WARMUP = 30
"""Steps after which nearly every block has a state that can move."""

PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "config": transformers.LlamaConfig(
            num_hidden_layers=28,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=128_256,
            tie_word_embeddings=True,
        ),
        "batch": 4,
        "length": 768,
    },
    "qwen2.5-0.5b": {
        "config": transformers.Qwen2Config(
            num_hidden_layers=24,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
            tie_word_embeddings=True,
        ),
        "batch": 8,
        "length": 512,
    },
}


@dataclass(frozen=True, kw_only=True)
class Waiting(gs.Offload):
    """The twin: the same switches, and the host waits for every copy."""

    def open(self, device: torch.device) -> AbstractMover:
        transfer = Transfer(SynchronousLanes(device), max_pinned_bytes=0)
        return _Offloading(transfer, max_device_bytes=self.max_device_bytes)


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("benchmarks/offload.py measures copies beside a computation: it needs a CUDA device, and there is none")
        return 2
    device = torch.device("cuda")
    result = {
        "settings": vars(arguments) | {"out": None},
        "machine": {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__},
        "right": compare_bits(device, steps=arguments.switches, width=arguments.width),
        "hidden": measure(arguments, device),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["right"]["equal"] else 1


def compare_bits(device: torch.device, *, steps: int, width: int, layers: int = 10) -> dict[str, Any]:
    """Weights and state of a run whose copies overlap and of its twin, bitwise."""
    ends = []
    for residency in (gs.Offload(), Waiting()):
        torch.manual_seed(0)
        linears = [nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16) for _ in range(layers)]
        model = nn.Sequential(*linears)
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=3), lr=1e-3, residency=residency)
        inputs = torch.randn(2, width, device=device, dtype=torch.bfloat16)
        for _ in range(steps):
            model(inputs).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((model.state_dict(), optimizer.state_dict()["state"]))
    (weights, states), (twin_weights, twin_states) = ends
    is_equal = [torch.equal(weights[name], twin_weights[name]) for name in weights]
    is_equal += [torch.equal(states[i][name], twin_states[i][name]) for i in states for name in states[i]]
    is_finite = all(bool(weight.isfinite().all()) for weight in weights.values())
    return {"steps": steps, "tensors": len(is_equal), "equal": all(is_equal) and is_finite}


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of a step and peak bytes with each residency, and what of the copies is hidden."""
    rows: dict[str, dict[str, float]] = {}
    for name, residency in (("keep", gs.Keep()), ("offload", gs.Offload()), ("waiting", Waiting())):
        rows[name] = run(arguments, device, residency)
        gc.collect()
        torch.cuda.empty_cache()  # the next one's peak is its own
    moved = rows["offload"]["moved_bytes_per_step"]
    copies = moved * seconds_per_byte(device)
    longer = rows["offload"]["seconds_per_step"] - rows["keep"]["seconds_per_step"]
    return {"methods": rows, "copy_seconds_per_step": copies, "hidden": 1 - longer / copies if copies else None}


def run(arguments: argparse.Namespace, device: torch.device, residency: gs.AbstractResidency) -> dict[str, float]:
    """Another selection at random in every step; the host runs ahead of the device as in training."""
    preset = PRESETS[arguments.preset]
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(preset["config"], dtype=torch.bfloat16).train()
    policy = gs.Uniform(fraction=arguments.fraction)
    rule = gs.AdamWRule(fused=True)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-5, rule=rule, residency=residency)
    moved: list[int] = []
    optimizer.add_record_hook(lambda record: moved.append(record.moved_bytes))
    tokens = torch.randint(preset["config"].vocab_size, (preset["batch"], preset["length"]), device=device)
    start = 0.0
    for step in range(WARMUP + arguments.steps):
        if step == WARMUP:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize(device)
    return {
        "seconds_per_step": (time.perf_counter() - start) / arguments.steps,
        "moved_bytes_per_step": sum(moved[WARMUP:]) / arguments.steps,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def seconds_per_byte(device: torch.device, *, num_bytes: int = 2**28, repeats: int = 20) -> float:
    """Of one byte in one direction, page-locked: mean of both directions."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    start = 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:
            torch.cuda.synchronize(device)
            start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        host.copy_(there, non_blocking=True)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / (2 * repeats * num_bytes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.2-3b")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the blocks that train")
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--switches", type=int, default=1000, help="that are compared bitwise")
    parser.add_argument("--width", type=int, default=4096, help="of the layers that are compared")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
