"""Time and bytes of one training step, method by method, against full fine-tuning in the same run.

    python benchmarks/step_time.py                      # writes benchmarks/results/step_time.json and prints the table
    python benchmarks/step_time.py --rounds 3 --layers 4 --hidden 64 --vocabulary 500 --out /tmp/small.json

Every method holds its own copy of one randomly initialised Qwen2-type model. The methods take turns, one step each a
round, so that a machine that slows down slows all of them; a ratio is taken inside a round, and its median is reported.
`limit` is the speed-up that the FLOPs allow for the blocks that were selected, 6 / (2 + 2 d + 2 (1 - s)): s is the
frozen share of the parameters, d the share of the layers that the backward pass visits.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import gradselect as gs

RESULT = Path(__file__).parent / "results" / "step_time.json"
LR = 1e-5


@dataclass
class Method:
    """One competitor: its model, its optimizer and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: Any
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    bookkeeping_seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    peak_gradient_bytes: int = 0

    def step(self, batch: dict[str, torch.Tensor], *, count: bool) -> None:
        """One training step; timed if it counts."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, gradient_bytes(self.model))
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if count:
            self.seconds.append(end - start)
            self.optimizer_seconds.append(end - middle)
            if isinstance(self.optimizer, Stopwatch):
                self.bookkeeping_seconds.append(end - middle - self.optimizer.update_seconds)
                record = self.optimizer.last_record
                self.limits.append(1.0 if record.explored else flop_limit(self.model, record.selected))


class Stopwatch(gs.BlockOptimizer):
    """BlockOptimizer that knows how long the update itself took; the rest of `step` is bookkeeping."""

    update_seconds = 0.0

    def _update(self, selected: Any) -> None:
        start = time.perf_counter()
        super()._update(selected)
        self.update_seconds = time.perf_counter() - start


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    methods = build_all(arguments)
    generator = torch.Generator().manual_seed(0)
    for round_number in range(-arguments.warmup, arguments.rounds):
        shape = (arguments.batch, arguments.length)
        tokens = torch.randint(0, arguments.vocabulary, shape, generator=generator)
        for method in methods:
            method.step({"input_ids": tokens, "labels": tokens}, count=round_number >= 0)
    result = {"settings": vars(arguments) | {"out": None}, "machine": machine(), "methods": table(methods)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def build_all(arguments: argparse.Namespace) -> list[Method]:
    """The baseline first: ratios are taken against it."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(arguments)).train()

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def blocks(policy: gs.AbstractPolicy, **settings: Any) -> Callable[[nn.Module], Stopwatch]:
        return lambda model: Stopwatch(model, policy, lr=LR, rule=gs.AdamWRule(fused=True), **settings)

    always_exploring = gs.AdaGradSelect(fraction=0.2, explore_steps=10**9)
    makers: dict[str, Callable[[nn.Module], Any]] = {
        "full, torch AdamW fused": plain,
        "full, All()": blocks(gs.All()),
        "AdaGradSelect 10 %, exploit": blocks(gs.AdaGradSelect(fraction=0.1, explore_steps=1)),
        "AdaGradSelect 20 %, exploit": blocks(gs.AdaGradSelect(fraction=0.2, explore_steps=1)),
        "AdaGradSelect 20 %, exploit, Offload()": blocks(
            gs.AdaGradSelect(fraction=0.2, explore_steps=1), residency=gs.Offload()
        ),
        "AdaGradSelect 20 %, exploit, Drop()": blocks(
            gs.AdaGradSelect(fraction=0.2, explore_steps=1), residency=gs.Drop()
        ),
        "AdaGradSelect 20 %, exploit, embedding always": blocks(
            gs.AdaGradSelect(fraction=0.2, explore_steps=1), always=("embedding",)
        ),
        "AdaGradSelect 30 %, exploit": blocks(gs.AdaGradSelect(fraction=0.3, explore_steps=1)),
        "AdaGradSelect 20 %, explore": blocks(always_exploring),
        "LISA, 2 layers + embedding, norm, head": blocks(
            gs.Uniform(count=2, every=20), always=("embedding", "norm", "head")
        ),
        "BAdam, 1 block": blocks(gs.Cyclic(every=2), residency=gs.Drop()),
    }
    methods = []
    for name, make in makers.items():
        model = fresh()
        methods.append(Method(name, model, make(model)))
    for rank in (16, 128, 256):
        model = with_lora(fresh(), rank=rank)
        methods.append(Method(f"LoRA r={rank}, all linears (PEFT)", model, plain(model)))
    return methods + public_badam(fresh)


def with_lora(model: nn.Module, *, rank: int) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def public_badam(fresh: Callable[[], nn.Module]) -> list[Method]:
    """The authors' package, an outside witness; left out, aloud, where it is not installed."""
    try:
        import badam
    except ImportError:
        print("the package `badam` is not installed (extra `peers`): left out")
        return []
    model = fresh()
    optimizer = badam.BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=2,
        switch_mode="random",
        verbose=0,
    )
    return [Method("BAdam, package `badam`", model, optimizer)]


def config(arguments: argparse.Namespace) -> transformers.Qwen2Config:
    return transformers.Qwen2Config(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        intermediate_size=8 * arguments.hidden // 3,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 64),
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
    )


def flop_limit(model: nn.Module, selected: tuple[str, ...]) -> float:
    """6 / (2 + 2 d + 2 (1 - s)) for this selection; see the module docstring."""
    blocks = gs.partition(model)
    trained = sum(block.num_elements for block in blocks if block.name in selected)
    layers = [block.name for block in blocks if block.name.startswith("layer.")]
    visited = [i for i, name in enumerate(layers) if name in selected]
    depth = 1.0 if "embedding" in selected else 1 - min(visited, default=len(layers)) / len(layers)
    return 6 / (2 + 2 * depth + 2 * trained / sum(block.num_elements for block in blocks))


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: Any) -> dict[str, int]:
    """Optimizer state and masters that exist at the end; of a foreign optimizer all on the device."""
    if isinstance(optimizer, gs.BlockOptimizer):
        memory = optimizer.memory()
        return {"device": memory["masters"] + memory["state_on_device"], "host": memory["state_on_host"]}
    base = getattr(optimizer, "base_optimizer", optimizer)
    tensors = [t for state in base.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return {"device": sum(t.numel() * t.element_size() for t in tensors), "host": 0}


def table(methods: list[Method]) -> list[dict[str, Any]]:
    baseline = methods[0]
    rows = []
    for method in methods:
        ratios = [full / own for full, own in zip(baseline.seconds, method.seconds, strict=True)]
        state = state_bytes(method.optimizer)
        rows.append(
            {
                "method": method.name,
                "speed_up": statistics.median(ratios),
                "speed_up_min": min(ratios),
                "speed_up_max": max(ratios),
                "flop_limit": statistics.mean(method.limits) if method.limits else None,
                "seconds": statistics.median(method.seconds),
                "optimizer_seconds": statistics.median(method.optimizer_seconds),
                "bookkeeping_share": (
                    statistics.median(method.bookkeeping_seconds) / statistics.median(method.seconds)
                    if method.bookkeeping_seconds
                    else None
                ),
                "state_on_device_bytes": state["device"],
                "state_on_host_bytes": state["host"],
                "gradient_bytes_after_backward": method.peak_gradient_bytes,
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| method | speed-up | min-max | limit | optimizer s | bookkeeping | state MB | on host MB | gradients MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["methods"]:
        limit = "" if row["flop_limit"] is None else f"{row['flop_limit']:.2f}"
        share = "" if row["bookkeeping_share"] is None else f"{100 * row['bookkeeping_share']:.2f} %"
        lines.append(
            f"| {row['method']} | {row['speed_up']:.2f} | {row['speed_up_min']:.2f}-{row['speed_up_max']:.2f} "
            f"| {limit} | {row['optimizer_seconds']:.3f} | {share} | {row['state_on_device_bytes'] / 1e6:.0f} "
            f"| {row['state_on_host_bytes'] / 1e6:.0f} | {row['gradient_bytes_after_backward'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    gc.disable()
    main()
