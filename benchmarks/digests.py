"""Digests of what training computes: proof that a refactoring changed no bit.

    python benchmarks/digests.py record before.json
    python benchmarks/digests.py compare before.json          # exit code 1 and a list of what differs

For 30 steps of every policy, mask, rule and residency it records SHA-256 digests of the weights, of the optimizer state
and of the step records; the same for SparseGrad and SPT, for a run of `gradselect train` that is stopped by a signal
and resumed, for 60 steps of the quickstart's model, and for a report made from the committed results. Only public names
and the command line are used, so the script outlives a move of every file.

Digests hold on one machine with one version of torch and one thread; they are no golden values, and no test reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import gradselect as gs

ROOT = Path(__file__).parent.parent
STEPS = 30
QUICKSTART_STEPS = 60
VOCABULARY = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="a regular expression on the names of the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for name, digest in rows().items():
        if re.search(arguments.only, name):
            found[name] = digest()
            print(name, *(f"{what} {value[:12]}" for what, value in found[name].items()), sep="  ", flush=True)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(arguments.file.read_text(encoding="utf-8"))
    wanted = {name: row for name, row in before.items() if re.search(arguments.only, name)}
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    print(f"{len(wanted) - len(different)} of {len(wanted)} equal", *different, sep="\n  ")
    raise SystemExit(1 if different else 0)


def rows() -> dict[str, Callable[[], dict[str, str]]]:
    """What to digest, by name."""
    return {
        **{f"policy/{name}": lambda make=make: of_blocks(policy=make()) for name, make in POLICIES.items()},
        **{f"blocks/{name}": lambda make=make: of_blocks(**make()) for name, make in BLOCK_SETTINGS.items()},
        **{f"mask/{name}": lambda make=make: of_entries(mask=make()) for name, make in MASKS.items()},
        **{f"entries/{name}": lambda make=make: of_entries(**make()) for name, make in ENTRY_SETTINGS.items()},
        "sparsegrad": of_sparsegrad,
        "spt": of_spt,
        "train/stopped and resumed, blocks": lambda: of_stopped_run({"name": "adagradselect", "fraction": 0.4}),
        "train/stopped and resumed, entries": lambda: of_stopped_run({"name": "id3", "budget": 900}),
        "train/quickstart": of_quickstart,
        "report/small": of_report,
    }


LAYERS = ("layer.*",)
POLICIES: dict[str, Callable[[], gs.AbstractPolicy]] = {
    "all": gs.All,
    "fixed": lambda: gs.Fixed(("layer.1", "embedding")),
    "uniform": lambda: gs.Uniform(count=2, seed=1),
    "uniform, every 5": lambda: gs.Uniform(count=2, every=5, among=LAYERS, seed=1),
    "cyclic": lambda: gs.Cyclic(every=3, seed=1),
    "cyclic, descending": lambda: gs.Cyclic(every=2, order="descending", count=2),
    "norm top-k": lambda: gs.GradNormTopK(fraction=0.3),
    "norm top-k, GRASS": lambda: gs.GradNormTopK(
        count=2, refresh=4, temperature=0.5, ema=0.9, probe_steps=6, norm="rms", among=LAYERS, seed=1
    ),
    "adagradselect": lambda: gs.AdaGradSelect(fraction=0.4, explore_steps=12, seed=1),
    "adagradselect, rms, step, multinomial": lambda: gs.AdaGradSelect(
        count=2, explore_steps=12, rank_by="step", norm="rms", draw="multinomial", among=LAYERS, seed=1
    ),
    "adagradselect, every, forgetting": lambda: gs.AdaGradSelect(
        count=2, explore_steps=12, every=3, discount=0.9, delta_growth=0.1, seed=1
    ),
    "adagradselect, coverage": lambda: gs.AdaGradSelect(count=2, explore_steps=12, delta=0.01, coverage=4, seed=1),
    "misa": lambda: gs.MISA(share=0.3, every=5, seed=1),
}


def flagship() -> gs.AdaGradSelect:
    return gs.AdaGradSelect(fraction=0.4, explore_steps=12, seed=1)


BLOCK_SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    f"{rule}, {residency}, {dtype}": (
        lambda rule=rule, residency=residency, dtype=dtype: {
            "policy": flagship(),
            "rule": {"adamw": gs.AdamWRule(), "fused": gs.AdamWRule(fused=True), "8 bit": gs.AdamW8bitRule()}[rule],
            "residency": {"keep": gs.Keep(), "offload": gs.Offload(), "drop": gs.Drop()}[residency],
            "dtype": getattr(torch, dtype),
            "always": ("embedding",),
            # AdamW8bitRule leaves small tensors as they are.
            "width": 64 if rule == "8 bit" else 16,
        }
    )
    for rule in ("adamw", "fused", "8 bit")
    for residency in ("keep", "offload", "drop")
    for dtype in ("float32", "bfloat16")
} | {
    "accumulation": lambda: {"policy": flagship(), "accumulation_steps": 2},
    "update in backward": lambda: {"policy": flagship(), "update_in_backward": True},
    "no masters": lambda: {"policy": flagship(), "dtype": torch.bfloat16, "master_dtype": None},
    "no decay": lambda: {"policy": flagship(), "no_decay": ("*mlp*",), "weight_decay": 0.1},
    "matrices": lambda: {"policy": flagship(), "by": "matrix"},
}

MASKS: dict[str, Callable[[], gs.AbstractMask]] = {
    "id3": lambda: gs.ID3(budget=900, steps=20),
    "id3, exponent": lambda: gs.ID3(density=0.05, steps=10, exponent=2.0, among="*mlp*"),
    "gmt": lambda: gs.GMT(fraction=0.3),
    "gmt, global": lambda: gs.GMT(fraction=0.1, scope="global"),
    "gmt, update": lambda: gs.GMT(fraction=0.3, mask="update"),
    "top gradient": lambda: gs.TopGradient(density=0.1, among="*mlp*"),
    "lift": lambda: gs.LIFT(rank=1, refresh_every=7),
    "lift, blocks": lambda: gs.LIFT(density=0.1, approximation_rank=3, block_size=4, refresh_every=5, seed=5),
    "bitfit": gs.BitFit,
    "mofo": lambda: gs.MoFO(fraction=0.2),
    "sparta": lambda: gs.SpaRTA(density=0.02, seed=1),
    "sparta, all": lambda: gs.SpaRTA(density=0.02, among=("*",), seed=1),
    "fixed entries": lambda: gs.FixedEntries(
        entries={
            "model.layers.1.mlp.up_proj.weight": torch.arange(0, 300, 7),
            "model.layers.3.self_attn.q_proj.bias": torch.tensor([2, 5]),
        }
    ),
    "static": lambda: gs.StaticMask(budget=700),
    "static, tensor, refreshed": lambda: gs.StaticMask(budget=700, scope="tensor", refresh_every=6),
} | {
    f"static, {name}": (
        lambda salience=salience: gs.StaticMask(
            salience=salience, budget=700, refresh_every=11, batches=BATCHES if salience.needs_batches else None
        )
    )
    for name, salience in sorted(vars(gs.salience).items())
    if isinstance(salience, gs.salience.AbstractSalience)
}
ENTRY_SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "id3, bfloat16": lambda: {"mask": gs.ID3(budget=900, steps=20), "dtype": torch.bfloat16},
    "id3, bfloat16, no masters": lambda: {
        "mask": gs.ID3(budget=900, steps=20),
        "dtype": torch.bfloat16,
        "master_dtype": None,
    },
    "id3, clipped": lambda: {"mask": gs.ID3(budget=900, steps=20), "max_grad_norm": 0.5},
    "id3, always": lambda: {"mask": gs.ID3(budget=900, steps=20), "always": ("*embed_tokens*",)},
    "id3, accumulation": lambda: {"mask": gs.ID3(budget=900, steps=20), "accumulation_steps": 2},
    "id3, lean accumulation": lambda: {
        "mask": gs.ID3(budget=900, steps=20),
        "accumulation_steps": 2,
        "lean_accumulation": True,
    },
    "id3, decay": lambda: {"mask": gs.ID3(budget=900, steps=20), "weight_decay": 0.1, "no_decay": ("*mlp*",)},
    "gmt, bfloat16": lambda: {"mask": gs.GMT(fraction=0.3), "dtype": torch.bfloat16, "weight_decay": 0.1},
}


def of_blocks(
    *, policy: gs.AbstractPolicy, dtype: torch.dtype = torch.float32, width: int = 16, **settings: Any
) -> dict[str, str]:
    model = tiny_model(dtype, width=width)
    if (by := settings.pop("by", None)) is not None:
        settings["blocks"] = gs.partition(model, by=by)
    return trained(model, gs.BlockOptimizer(model, policy, **{"lr": 1e-2, **settings}))


def of_entries(*, mask: gs.AbstractMask, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, str]:
    model = tiny_model(dtype)
    return trained(model, gs.SparseOptimizer(model, mask, **{"lr": 1e-2, **settings}))


def of_sparsegrad() -> dict[str, str]:
    model = tiny_model()
    mask = gs.sparsegrad.convert(model, BATCHES, density=0.05)
    found = trained(model, gs.SparseOptimizer(model, mask, lr=1e-2))
    gs.sparsegrad.fold(model)
    return {**found, "folded": digest_of(model.state_dict())}


def of_spt() -> dict[str, str]:
    model = tiny_model()
    parts = gs.spt.convert(model, BATCHES, density=0.05, rank=1, matrix_share=0.5, dropout=0.0, seed=1)
    found = trained(model, gs.SparseOptimizer(model, parts.mask, always=parts.always, lr=1e-2))
    gs.spt.fold(model)
    return {**found, "folded": digest_of(model.state_dict())}


def trained(model: nn.Module, optimizer: gs.BlockOptimizer | gs.SparseOptimizer) -> dict[str, str]:
    """Digests after `STEPS` steps."""
    records: list[Any] = []
    optimizer.add_record_hook(records.append)
    number = 0
    for _ in range(STEPS):
        for _ in range(optimizer.accumulation_steps):
            model(**batch(number)).loss.backward()
            number += 1
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    return {
        "weights": digest_of(model.state_dict()),
        "state": digest_of(state["state"]),
        "selection": digest_of(state["selection"].get("policy_state", {})),
        "records": digest_of([as_first_written(record) for record in records]),
        "memory": digest_of(dict(optimizer.memory())),
    }


def as_first_written(record: Any) -> dict[str, Any]:
    """Return a record without the fields that came later and are at their defaults here: old digests still hold."""
    return {name: value for name, value in asdict(record).items() if name not in ("measure", "coasted", "rates")}


def tiny_model(dtype: torch.dtype = torch.float32, *, width: int = 16) -> nn.Module:
    """Biases, norms, matrices and a tied embedding."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).to(dtype).train()


def batch(seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


BATCHES = [batch(seed) for seed in (101, 102)]


def digest_of(value: Any) -> str:
    """SHA-256 of nested plain values and tensors."""
    digest = hashlib.sha256()
    for part in parts_of(value):
        digest.update(part)
    return digest.hexdigest()


def parts_of(value: Any) -> Iterable[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from parts_of(value[key])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from parts_of(entry)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(value).encode()


def of_stopped_run(method: dict[str, Any]) -> dict[str, str]:
    """A run of the command line that SIGTERM stops after its first steps, and that is resumed."""
    from gradselect.app.word_problems import write_problems

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problems(folder / "train.jsonl", count=200)
        overrides = [
            f"model.path={ROOT / 'quickstart' / 'base'}",
            f"data.path={folder / 'train.jsonl'}",
            f"run.output={folder / 'run'}",
            "run.steps=20",
            "run.save_every=5",
            "run.log_every=5",
            f"method={json.dumps(method)}",
        ]
        command = ["train", str(ROOT / "recipes" / "quickstart.yaml"), *overrides]
        first = subprocess.Popen([*GRADSELECT, *command], env=ONE_THREAD, stdout=subprocess.DEVNULL)
        wait_for_steps(folder / "run" / "records.jsonl", count=7, process=first)
        first.send_signal(signal.SIGTERM)
        if first.wait() != 128 + signal.SIGTERM:
            raise SystemExit(f"the run was to be stopped by SIGTERM and ended with exit code {first.returncode}")
        run_gradselect(*command, "--resume")
        return of_run(folder / "run")


def of_quickstart() -> dict[str, str]:
    """The quickstart's recipe on its base model, some of its steps."""
    from gradselect.app.word_problems import write_problems

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problems(folder / "train.jsonl", count=8000)
        run_gradselect(
            "train",
            str(ROOT / "recipes" / "quickstart.yaml"),
            f"model.path={ROOT / 'quickstart' / 'base'}",
            f"data.path={folder / 'train.jsonl'}",
            f"run.output={folder / 'run'}",
            f"run.steps={QUICKSTART_STEPS}",
            "run.save_every=60",
            "run.log_every=10",
            "method.explore_steps=20",
        )
        return of_run(folder / "run")


def of_run(folder: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts = {key: run[key] for key in ("steps", "training_loss", "tokens", "steps_by_kind", "selection")}
    facts |= {"bytes": [run["bytes"]["peak"], run["bytes"]["average"]], "limit": run["flop"]["limit"]}
    curves = [{key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry} for entry in run["history"]]
    newest = sorted((folder / "checkpoints").glob("step-*0/optimizer.pt"))[-1:]
    states = [torch.load(path, weights_only=True)["state"] for path in newest]
    return {
        "weights": digest_of(load_file(folder / "model.safetensors")),
        "state": digest_of(states),
        "records": digest_of(records),
        "losses": digest_of(curves),
        "facts": digest_of(facts),
    }


def of_report() -> dict[str, str]:
    """The page made from the committed results: its pictures, its numbers, all of it."""
    with tempfile.TemporaryDirectory() as name:
        run_gradselect("report", str(ROOT / "benchmarks" / "results" / "small"), "--output", str(Path(name) / "report"))
        files = sorted(path for path in (Path(name) / "report").rglob("*") if path.is_file())
        page = next(path for path in files if path.suffix == ".html").read_text(encoding="utf-8")
        pictures = re.findall(r"<svg.*?</svg>|data:image/[^\"']+", page, flags=re.DOTALL)
        text = re.sub(r"<svg.*?</svg>|data:image/[^\"']+|<style.*?</style>", "", page, flags=re.DOTALL)
        cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", text, flags=re.DOTALL)]
        return {
            "pictures": digest_of([*pictures, *(path.read_bytes() for path in files if path.suffix == ".svg")]),
            "cells": digest_of(cells),
            "numbers": digest_of(re.findall(r"-?\d+(?:\.\d+)?", " ".join(cells))),
            "page": digest_of(page),
        }


GRADSELECT = [str(Path(sys.executable).with_name("gradselect"))]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_gradselect(*arguments: str) -> None:
    done = subprocess.run([*GRADSELECT, *arguments], env=ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"gradselect {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def wait_for_steps(path: Path, *, count: int, process: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Until that many steps are recorded."""
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run recorded no {count} steps; exit code {process.poll()}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
