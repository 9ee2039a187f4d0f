"""Checks of what a framework's run left on disk: records, weights, and whether they agree."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

BASE = Path(__file__).parent.parent / "quickstart" / "base"
"""A Llama of eight layers, with tied weights."""

ROWS = [(f"Tom has {n} cups and buys {n + 3}. How many?", f"{n} + {n + 3} = {2 * n + 3}") for n in range(16)]
"""Questions and answers."""


def untied_model(folder: Path) -> str:
    """Write a Llama of four layers with random weights, none of them tied, beside the quickstart's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(BASE)
    config.tie_word_embeddings, config.num_hidden_layers = False, 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model or of an adapter."""
    found = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    assert found, folder
    return found


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights in two folders."""
    weights, others = read_weights(one), read_weights(other)
    assert weights.keys() == others.keys()
    return max((weights[name].float() - others[name].float()).abs().max().item() for name in weights)


def moved_entries(before: Path, after: Path) -> dict[str, int]:
    """Return the number of entries of each tensor that differ, of those that do."""
    weights, others = read_weights(before), read_weights(after)
    counts = {name: int((weights[name] != others[name]).sum()) for name in weights}
    return {name: count for name, count in counts.items() if count}


def block_of(name: str) -> str:
    """Return the block of a tensor, by its name alone."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer is not None:
        return f"layer.{layer[1]}"
    return {"embed_tokens": "embedding", "norm": "norm", "lm_head": "head"}[name.split(".")[-2]]


def check_moved(records: Sequence[Mapping[str, Any]], saved: Sequence[Path]) -> None:
    """Check that each step moved exactly what its record says.

    Args:
        records: of the steps between the checkpoints.
        saved: folders with the weights before the first of these steps, and after each.
    """
    assert len(records) == len(saved) - 1 > 0
    for record, before, after in zip(records, saved[:-1], saved[1:], strict=True):
        moved = moved_entries(before, after)
        if "selected" in record:
            assert {block_of(name) for name in moved} == set(record["selected"]), record["step"]
            continue
        # PEFT saves adapters without their name.
        recorded = {name.replace(".default.", "."): count for name, count in record["num_entries"].items()}
        assert moved.keys() <= recorded.keys(), record["step"]
        assert all(count <= recorded[name] for name, count in moved.items()), record["step"]
        # A step may leave an entry where it was, by rounding.
        assert sum(moved.values()) >= 0.9 * sum(recorded.values()), record["step"]
