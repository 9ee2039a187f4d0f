"""Made-up result files in the format of `gradselect compare`, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BLOCKS = ["embedding", *(f"layer.{index}" for index in range(8)), "norm"]
PROTOCOL = {
    "recipe": {"model": {"path": "quickstart/base"}, "run": {"steps": 60, "batch_size": 16}},
    "evaluations": {"test": {"task": "gsm8k", "limit": 200}},
}
MODEL_BYTES = 5_600_000
FULL_STEP = 0.4


def block_selection(*, steps: int, count: int, seed: int, explores: bool, num_blocks: int = 10) -> dict[str, Any]:
    """Blocks drawn with a liking for some of them; the first half of the steps explores now and then."""
    draw = random.Random(seed)
    blocks = BLOCKS if num_blocks == len(BLOCKS) else [f"layer.{index}" for index in range(num_blocks)]
    liking = [1 / (1 + index % 4) for index in range(num_blocks)]
    selected, explored, entropy, updates = [], [], [], [0] * num_blocks
    for step in range(steps):
        keys = {index: draw.random() ** (1 / liking[index]) for index in range(num_blocks)}
        chosen = sorted(sorted(keys, key=keys.__getitem__)[-count:])
        selected.append(chosen)
        explored.append(int(explores and draw.random() < math.exp(-6 * step / steps)))
        for index in chosen:
            updates[index] += 1
        shares = [update / sum(updates) for update in updates if update]
        entropy.append(-sum(share * math.log(share) for share in shares) / math.log(num_blocks) + 0.0)
    return {"blocks": blocks, "updates": updates, "entropy": entropy, "selected": selected, "explored": explored}


def mask_selection() -> dict[str, Any]:
    by_tensor = {"model.layers.0.mlp.up_proj.weight": 9000, "model.embed_tokens.weight": 5000, "model.norm.weight": 96}
    return {"mask": "ID3", "entries": 14096, "entries_to_choose_from": 1_400_000, "entries_by_tensor": by_tensor}


def result(
    method: str,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    role: str = "score",
    skill: float = 0.5,
    speed: float = 1.0,
    state: float = 2.0,
    steps: int = 60,
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
    settings: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    num_items: int = 200,
    flop_limit: float | None = None,
) -> dict[str, Any]:
    """One result file's content.

    Args:
        skill: share of the items that the model gets right, about.
        speed: how much faster than full fine-tuning a step is.
        state: optimizer state and gradients relative to the weights.
    """
    draw = random.Random(f"{method} {seed} {lr}")
    # An item is as hard for every method; what a method adds is its skill and some luck.
    hardness = [random.Random(index).random() for index in range(num_items)]
    items = [{"index": index, "correct": hard + 0.15 * draw.gauss(0, 1) < skill} for index, hard in enumerate(hardness)]
    correct = sum(item["correct"] for item in items)
    losses = [
        {"index": index, "loss": 30 * (3 - skill) + draw.gauss(0, 1) + 8 * hard, "num_tokens": 40 + index % 7}
        for index, hard in enumerate(hardness)
    ]
    loss = sum(item["loss"] for item in losses) / sum(item["num_tokens"] for item in losses)
    step = FULL_STEP / speed
    kinds = {"step": steps} if selection is None or "mask" in selection else {"explore": 12, "exploit": steps - 12}
    at = list(range(10, steps + 1, 10))
    valid = [1.4 - 0.6 * skill + 1.5 * math.exp(-4 * s / steps) for s in at]
    train = [1.4 - 0.6 * skill + 1.5 * math.exp(-4 * s / steps) + 0.1 * draw.gauss(0, 1) for s in range(1, steps + 1)]
    peak = {
        "weights": MODEL_BYTES,
        "gradients": round(MODEL_BYTES * state / 3),
        "masters": 0,
        "state_on_device": round(MODEL_BYTES * state * 2 / 3),
        "state_on_host": 0,
    }
    return {
        "run_info": {
            "created_at": "2026-11-22T00:00:00+00:00",
            "total_time": 40.0,
            "experiment_name": f"quick/{method}/lr-{lr:g}/seed-{seed}",
            "peft_branch": "",
            "train_config": {"seed": seed},
            "peft_config": None,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": step * steps,
            "file_size": MODEL_BYTES if state > 0.6 else 240_000,
            "num_trainable_params": 1_400_000,
            "num_total_params": 1_400_000,
            "status": "success",
            "metrics": [
                *({"step": s, "valid accuracy": None, "tokens / sec": 2000 * speed + draw.random()} for s in at),
                {"step": steps, "test accuracy": correct / num_items, "forgetting": 0.1},
            ],
        },
        "meta_info": {
            "model_info": None,
            "dataset_info": None,
            "package_info": {"torch": "2.13.0", "transformers": "5.23.0", "gradselect": "0.3.0"},
            "system_info": {"system": "Linux", "cpus": 2},
            "pytorch_info": "2.13.0+cpu",
        },
        "gradselect": {
            "format": 1,
            "suite": "quick",
            "protocol": "5f1c" * 16,
            "protocol_settings": PROTOCOL,
            "method": method,
            "method_settings": settings or {"name": method},
            "lr": lr,
            "rates": list(rates),
            "seed": seed,
            "role": role,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "command": ["gradselect", "compare", "suites/quick.yaml", "--only", method],
            "seconds": {
                "training": step * steps,
                "by_kind": {
                    kind: {
                        "steps": count,
                        "median": step if kind != "explore" else FULL_STEP,
                        "forward": FULL_STEP / 3,
                        "backward": (step if kind != "explore" else FULL_STEP) - FULL_STEP / 3 - 0.03,
                        "optimizer": 0.025,
                        "selection": 0.002,
                    }
                    for kind, count in kinds.items()
                },
            },
            "bytes": {
                "peak": {**peak, "together": sum(peak.values())},
                "average": {"together": 0.9 * sum(peak.values())},
                "process": 700_000_000,
                "allocated": 0,
                "reserved": 0,
            },
            "flop": {"limit": flop_limit, "speed_up": None},
            "validation_loss": 1.4 - 0.6 * skill + 0.05 * abs(math.log10(lr / 1e-3)) + 0.01 * draw.random(),
            "scores": None
            if role == "rate"
            else {
                "test": {
                    "task": "gsm8k",
                    "metric": "accuracy",
                    "value": correct / num_items,
                    "interval": [correct / num_items - 0.05, correct / num_items + 0.05],
                    "num_items": num_items,
                },
                "stories": {"task": "loss", "metric": "loss", "value": loss, "interval": None, "num_items": num_items},
            },
            "forgetting": None if role == "rate" else {"before": 2.1, "after": 2.2 + 0.1 * skill},
            "items": None if role == "rate" else {"test": items, "stories": losses},
            "curves": {
                "train": {
                    "step": list(range(1, steps + 1)),
                    "seconds": [step * s for s in range(1, steps + 1)],
                    "loss": train,
                },
                "validation": {"step": at, "seconds": [step * s for s in at], "loss": valid},
            },
            "selection": selection,
        },
    }


METHODS: dict[str, dict[str, Any]] = {
    "full": {"skill": 0.62, "flop_limit": 1.0},
    "AdaGradSelect 20 %": {
        "skill": 0.61, "speed": 1.38, "state": 0.7, "flop_limit": 1.43, "count": 2, "explores": True,
    },
    "AdaGradSelect 10 %": {
        "skill": 0.55, "speed": 1.5, "state": 0.45, "flop_limit": 1.55, "count": 1, "explores": True,
    },
    "uniform 20 %": {"skill": 0.57, "speed": 1.4, "state": 0.6, "flop_limit": 1.43, "count": 2},
    "LoRA r=64": {"skill": 0.48, "speed": 0.93, "state": 0.5, "flop_limit": 1.5},
    "ID3 1 %": {"skill": 0.5, "speed": 0.8, "state": 0.4},
}  # fmt: skip


def results_of(method: str, *, seeds: int = 3, steps: int = 60) -> list[dict[str, Any]]:
    """A method's search of the rate and its scored runs."""
    values = dict(METHODS[method])
    count, explores = values.pop("count", None), values.pop("explores", False)
    settings = {"name": "full"} if method == "full" else {"name": method.split()[0].lower()}
    found = []
    for role, lr, seed in [
        *(("rate", lr, 0) for lr in (3e-4, 1e-3, 3e-3)),
        *(("score", 1e-3, seed) for seed in range(seeds)),
    ]:
        selection = None if count is None else block_selection(steps=steps, count=count, seed=seed, explores=explores)
        if method.startswith("ID3"):
            selection = mask_selection()
        found.append(
            result(method, seed=seed, lr=lr, role=role, steps=steps, settings=settings, selection=selection, **values)
        )
    return found


def write(folder: Path, values: dict[str, Any]) -> Path:
    """A result file under the name that the runner would give it."""
    record = values["gradselect"]
    slug = "".join(letter if letter.isalnum() else "-" for letter in record["method"].lower())
    path = folder / f"{slug}.lr-{record['lr']:g}.seed-{record['seed']}.{record['role']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_all(folder: Path, *methods: str, seeds: int = 3, steps: int = 60) -> Path:
    """All results of these methods, or of every method there is."""
    for method in methods or METHODS:
        for values in results_of(method, seeds=seeds, steps=steps):
            write(folder, values)
    return folder
