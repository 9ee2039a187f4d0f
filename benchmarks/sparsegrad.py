"""SparseGrad: what share of the gradient few entries hold in the rotated basis, and what a step costs.

    python benchmarks/sparsegrad.py --model <folder> --data <text.txt | rows.jsonl>

It writes benchmarks/results/sparsegrad.json and prints tables.

**Energy.** Bases from the first batches of the text; then, for each rotated linear and each held-out batch, the share
of Σ g² in the largest 0.5, 1 and 5 % of the entries, in the rotated and in the original basis.

**Steps.** Whole training steps (forward, backward, optimizer) of full fine-tuning with torch's fused AdamW, of
SparseGrad and of MeProp, the same mask without rotation. Each method holds its own copy of the model; they take turns,
one step each a round, so that a machine that slows down slows all of them. A ratio is taken inside a round, and its
median is reported. The peak of gradients is counted in a step of its own, when each gradient arrives.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gradselect as gs
from gradselect import sparsegrad

RESULT = Path(__file__).parent / "results" / "sparsegrad.json"
DENSITIES = (0.005, 0.01, 0.05)
LR = 1e-4

Batch = dict[str, Tensor]


@dataclass
class Method:
    """One competitor: its model, its optimizer and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: Any
    peak: PeakOfGradients
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch, *, count: bool) -> None:
        """One training step; timed if it counts."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if count:
            self.seconds.append(end - start)
            self.optimizer_seconds.append(end - middle)


class PeakOfGradients:
    """Most bytes of gradients alive at once; hooks of its own, which come before those of the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self.watching = False
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        if self.watching:
            self.bytes = max(self.bytes, sum(num_bytes(p.grad) for p in self._parameters if p.grad is not None))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
    needed = arguments.basis_batches + arguments.held_out_batches + arguments.warmup + arguments.rounds
    batches = read_batches(arguments, count=needed)
    for_bases, rest = batches[: arguments.basis_batches], batches[arguments.basis_batches :]
    held_out, for_steps = rest[: arguments.held_out_batches], rest[arguments.held_out_batches :]

    rotated = copy.deepcopy(model)
    start = time.perf_counter()
    mask = sparsegrad.convert(rotated, for_bases, arguments.density, every=arguments.every)
    result: dict[str, Any] = {
        "settings": vars(arguments) | {"model": arguments.model.name, "data": arguments.data.name, "out": None},
        "machine": machine(),
        "model": {"type": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())},
        "convert": {"seconds": time.perf_counter() - start} | bytes_of_conversion(rotated),
        "energy": energy_table(sparsegrad.energy(rotated, held_out, densities=DENSITIES)),
    }
    methods = build_all(model, rotated, mask)
    for number, batch in enumerate(for_steps, start=-arguments.warmup):
        for method in methods:
            method.step(batch, count=number >= 0)
    for method in methods:
        method.peak.watching = True
        method.step(for_steps[-1], count=False)
    result["methods"] = table(methods)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def read_batches(arguments: argparse.Namespace, *, count: int) -> list[Batch]:
    """`count` batches of running text, none of which is used twice."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    needed = count * arguments.batch * arguments.length
    tokens: list[int] = []
    for text in read_texts(arguments.data):
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= needed:
            shaped = torch.tensor(tokens[:needed]).view(count, arguments.batch, arguments.length)
            return [{"input_ids": ids, "labels": ids} for ids in shaped]
    raise SystemExit(f"{arguments.data} has {len(tokens):,} tokens, {count} batches need {needed:,}: fewer rounds")


def read_texts(path: Path) -> Sequence[str]:
    """The paragraphs of a text file, or the rows of a jsonl file, whose columns are joined."""
    lines = path.read_text("utf-8").splitlines()
    if path.suffix == ".txt":
        return [f"{line}\n" for line in lines]
    return ["\n".join(map(str, json.loads(line).values())) + "\n" for line in lines]


def build_all(model: nn.Module, rotated: nn.Module, mask: gs.TopGradient) -> list[Method]:
    """The baseline first: ratios are taken against it."""
    assert mask.among is not None
    plain_names = tuple(name.replace(".rotated_weight", ".weight") for name in mask.among)
    unrotated = copy.deepcopy(model)
    peaks = [PeakOfGradients(each) for each in (model, rotated, unrotated)]
    return [
        Method("full, torch AdamW fused", model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), peaks[0]),
        Method("SparseGrad", rotated, gs.SparseOptimizer(rotated, mask=mask, lr=LR), peaks[1]),
        Method(
            "MeProp",
            unrotated,
            gs.SparseOptimizer(unrotated, mask=gs.TopGradient(density=mask.density, among=plain_names), lr=LR),
            peaks[2],
        ),
    ]


def bytes_of_conversion(model: nn.Module) -> dict[str, int]:
    """What the conversion adds, and what it applies to."""
    rotated = [module for module in model.modules() if isinstance(module, sparsegrad.RotatedLinear)]
    bases = {module.bases for module in rotated}
    return {
        "num_linears": len(rotated),
        "rotated_weights_bytes": sum(num_bytes(module.rotated_weight) for module in rotated),
        "bases_bytes": sum(num_bytes(basis) for pair in bases for basis in pair.buffers()),
    }


def energy_table(rows: Sequence[sparsegrad.EnergyShare]) -> list[dict[str, Any]]:
    """Means over layers, for all of them and by the linear's own name."""
    names = sorted({row.layer.rpartition(".")[2] for row in rows})
    found = []
    for density in DENSITIES:
        for name in (None, *names):
            chosen = [row for row in rows if row.density == density and name in (None, row.layer.rpartition(".")[2])]
            found.append(
                {
                    "density": density,
                    "linears": name or "all",
                    "rotated": statistics.fmean(row.rotated for row in chosen),
                    "original": statistics.fmean(row.original for row in chosen),
                    "smallest_ratio": min(row.rotated / row.original for row in chosen),
                }
            )
    return found


def table(methods: Sequence[Method]) -> list[dict[str, Any]]:
    baseline = methods[0]
    rows = []
    for method in methods:
        ratios = [own / full for full, own in zip(baseline.seconds, method.seconds, strict=True)]
        rows.append(
            {
                "method": method.name,
                "step_ratio": statistics.median(ratios),
                "step_ratio_min": min(ratios),
                "step_ratio_max": max(ratios),
                "seconds": statistics.median(method.seconds),
                "optimizer_seconds": statistics.median(method.optimizer_seconds),
                "weights_bytes": sum(map(num_bytes, method.model.parameters())),
                "buffers_bytes": sum(map(num_bytes, method.model.buffers())),
                "state_bytes": state_bytes(method.optimizer),
                "peak_gradients_bytes": method.peak.bytes,
            }
        )
    return rows


def state_bytes(optimizer: Any) -> int:
    """Of moments, indices and masters."""
    if isinstance(optimizer, gs.SparseOptimizer):
        memory = optimizer.memory()
        return memory["masters"] + memory["state_on_device"]
    return sum(num_bytes(tensor) for state in optimizer.state.values() for tensor in state.values() if tensor.ndim)


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def markdown(result: dict[str, Any]) -> str:
    lines = ["| top | linears | rotated | original | smallest ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {100 * row['density']:g} % | {row['linears']} | {row['rotated']:.3f} | {row['original']:.3f} "
        f"| {row['smallest_ratio']:.2f} |"
        for row in result["energy"]
    ]
    convert = result["convert"]
    lines += [
        "",
        f"{convert['num_linears']} linears of {convert['rotated_weights_bytes'] / 1e6:.2f} MB; bases "
        f"{convert['bases_bytes'] / 1e6:.2f} MB; {convert['seconds']:.1f} s to convert",
        "",
        "| method | step against full | min-max | optimizer s | state MB | peak gradients MB | buffers MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['step_ratio']:.2f} | {row['step_ratio_min']:.2f}-{row['step_ratio_max']:.2f} "
        f"| {row['optimizer_seconds']:.4f} | {row['state_bytes'] / 1e6:.2f} | {row['peak_gradients_bytes'] / 1e6:.2f} "
        f"| {row['buffers_bytes'] / 1e6:.2f} |"
        for row in result["methods"]
    ]
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
    parser.add_argument("--model", type=Path, required=True, help="a folder with a causal language model")
    parser.add_argument("--data", type=Path, required=True, help=".txt, or .jsonl whose columns are joined")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--basis-batches", type=int, default=16)
    parser.add_argument("--held-out-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    gc.disable()
    main()
