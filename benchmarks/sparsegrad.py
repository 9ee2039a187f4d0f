"""SparseGrad: the share of the gradient that few entries hold in the rotated basis, and the cost of a step.

    python benchmarks/sparsegrad.py --model <folder> --data <text.txt | rows.jsonl>
    python benchmarks/sparsegrad.py --table

The first command writes benchmarks/results/sparsegrad.json and prints the tables.

**Energy.** Bases come from the first batches of the text. For each rotated linear and each held-out batch: the share of
Σ g² in the largest 0.5, 1 and 5 % of the entries, in the rotated and in the original basis.

**Steps.** Whole training steps (forward, backward, optimizer) of full fine-tuning with torch's fused AdamW, of
SparseGrad, and of MeProp, the same mask without rotation. Each method holds its own copy of the model; they take turns,
one step each a round. A ratio is taken inside a round, and the table has its median. One more step of each method,
without timing, counts the peak of gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from torch import nn

import gradselect as gs
from gradselect import sparsegrad

RESULT = common.RESULTS / "sparsegrad.json"
DENSITIES = (0.005, 0.01, 0.05)
LR = 1e-4


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
    first, second = arguments.basis_batches, arguments.basis_batches + arguments.held_out_batches
    batches = read_batches(arguments, count=second + arguments.warmup + arguments.rounds)

    rotated = copy.deepcopy(model)
    start = time.perf_counter()
    mask = sparsegrad.convert(rotated, batches[:first], arguments.density, every=arguments.every)
    seconds = time.perf_counter() - start
    energy = sparsegrad.energy(rotated, batches[first:second], densities=DENSITIES)
    competitors = build_all(model, rotated, mask)
    methods = [method for method, _ in competitors]
    common.take_turns(methods, batches[second:], warmup=arguments.warmup, rounds=arguments.rounds)
    return {
        "settings": common.settings_of(arguments),
        "machine": common.machine(),
        "model": {"type": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())},
        "convert": {"seconds": seconds, **bytes_of_conversion(rotated)},
        "energy": energy_table(energy),
        "methods": [row_of(method, peak, methods[0], batches[-1]) for method, peak in competitors],
    }


def read_batches(arguments: argparse.Namespace, *, count: int) -> list[common.Batch]:
    """Return `count` batches of running text, all different."""
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
    """Return the paragraphs of a text file, or the rows of a JSONL file with their columns joined."""
    lines = path.read_text("utf-8").splitlines()
    if path.suffix == ".txt":
        return [f"{line}\n" for line in lines]
    return ["\n".join(map(str, json.loads(line).values())) + "\n" for line in lines]


def build_all(
    model: nn.Module, rotated: nn.Module, mask: gs.TopGradient
) -> list[tuple[common.Method, common.GradientPeak]]:
    """Return the methods, the baseline first, each with the counter of its gradients."""
    assert mask.among is not None
    plain_names = tuple(name.replace(".rotated_weight", ".weight") for name in mask.among)
    plain_mask = gs.TopGradient(density=mask.density, among=plain_names)
    unrotated = copy.deepcopy(model)
    peaks = [common.GradientPeak(each) for each in (model, rotated, unrotated)]
    methods = [
        common.Method("full, torch AdamW fused", model, common.fused_adamw(model, lr=LR)),
        common.Method("SparseGrad", rotated, gs.SparseOptimizer(rotated, mask=mask, lr=LR)),
        common.Method("MeProp", unrotated, gs.SparseOptimizer(unrotated, mask=plain_mask, lr=LR)),
    ]
    return list(zip(methods, peaks, strict=True))


def bytes_of_conversion(model: nn.Module) -> dict[str, int]:
    """Return how many linears were rotated, and the bytes of rotated weights and bases."""
    rotated = [module for module in model.modules() if isinstance(module, sparsegrad.RotatedLinear)]
    bases = {module.bases for module in rotated}
    return {
        "num_linears": len(rotated),
        "rotated_weights_bytes": sum(module.rotated_weight.nbytes for module in rotated),
        "bases_bytes": sum(basis.nbytes for pair in bases for basis in pair.buffers()),
    }


def energy_table(rows: Sequence[sparsegrad.EnergyShare]) -> list[dict[str, Any]]:
    """Return means over layers: of all linears, and of each kind of linear."""
    names = sorted({row.layer.rpartition(".")[2] for row in rows})
    found = []
    for density in DENSITIES:
        for name in (None, *names):
            selected = [row for row in rows if row.density == density and name in (None, row.layer.rpartition(".")[2])]
            found.append(
                {
                    "density": density,
                    "linears": name or "all",
                    "rotated": statistics.fmean(row.rotated for row in selected),
                    "original": statistics.fmean(row.original for row in selected),
                    "smallest_ratio": min(row.rotated / row.original for row in selected),
                }
            )
    return found


def row_of(
    method: common.Method, peak: common.GradientPeak, baseline: common.Method, batch: common.Batch
) -> dict[str, Any]:
    """Return the figures of a method, after one more step that counts gradients."""
    peak.is_on = True
    method.step(batch, count=False)
    return {
        "method": method.name,
        **common.ratio_columns("step_ratio", method.seconds, baseline.seconds),
        "seconds": statistics.median(method.seconds),
        "optimizer_seconds": statistics.median(method.optimizer_seconds),
        "weights_bytes": sum(parameter.nbytes for parameter in method.model.parameters()),
        "buffers_bytes": sum(buffer.nbytes for buffer in method.model.buffers()),
        "state_bytes": common.state_bytes(method.optimizer)["device"],
        "peak_gradients_bytes": peak.bytes,
    }


def markdown(result: dict[str, Any]) -> str:
    convert = result["convert"]
    conversion = (
        f"{convert['num_linears']} linears of {common.megabytes(convert['rotated_weights_bytes'], digits=2)} MB; bases "
        f"{common.megabytes(convert['bases_bytes'], digits=2)} MB; {convert['seconds']:.1f} s to convert"
    )
    return "\n\n".join([energy_markdown(result["energy"]), conversion, steps_markdown(result["methods"])])


def energy_markdown(rows: Sequence[dict[str, Any]]) -> str:
    return common.markdown_table(
        ["top", "linears", "rotated", "original", "smallest ratio"],
        [
            [
                f"{100 * row['density']:g} %",
                row["linears"],
                f"{row['rotated']:.3f}",
                f"{row['original']:.3f}",
                f"{row['smallest_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def steps_markdown(rows: Sequence[dict[str, Any]]) -> str:
    headings = ["method", "step against full", "min-max", "optimizer s"]
    return common.markdown_table(
        [*headings, "state MB", "peak gradients MB", "buffers MB"],
        [
            [
                row["method"],
                f"{row['step_ratio']:.2f}",
                f"{row['step_ratio_min']:.2f}-{row['step_ratio_max']:.2f}",
                f"{row['optimizer_seconds']:.4f}",
                *(common.megabytes(row[f"{key}_bytes"], digits=2) for key in ("state", "peak_gradients", "buffers")),
            ]
            for row in rows
        ],
    )


def main() -> None:
    sizes = {"rounds": 20, "warmup": 3, "batch": 8, "length": 128, "threads": 1}
    parser = common.make_parser(__doc__, out=RESULT, **sizes)
    parser.add_argument("--model", type=Path, help="a folder with a causal language model")
    parser.add_argument("--data", type=Path, help=".txt, or .jsonl whose columns are joined")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--basis-batches", type=int, default=16)
    parser.add_argument("--held-out-batches", type=int, default=8)
    arguments = common.parse(parser, "model", "data")
    common.measure_and_print(arguments, measure, markdown)


if __name__ == "__main__":
    main()
