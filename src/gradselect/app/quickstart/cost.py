"""Seconds and bytes of a step of the quickstart's method beside full fine-tuning."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradselect as gs
from gradselect.app.recipe import Recipe

NUM_UNTIMED = 2
"""Steps before the timed ones: the first explores, and both allocate."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Median seconds of a step and peak bytes of optimizer state, each for "ours" and "full"."""

    blocks: tuple[str, ...]
    seconds: dict[str, float]
    speed_up: float
    state_bytes: dict[str, int]


def compare_cost(recipe: Recipe, data: Path, *, num_steps: int) -> Cost:
    """Measure steps of the recipe's method and of full fine-tuning, in turn on the same batches.

    Exploration ends with the first step, so the timed steps are exploit steps.
    """
    method: Any = recipe.method
    policy = gs.AdaGradSelect(fraction=method.fraction, among=method.among, explore_steps=1)
    ours = _build(recipe, policy, always=method.always, residency=method.place())
    full = _build(recipe, gs.All(), always=(), residency=gs.Keep())
    seconds: dict[str, list[float]] = {"ours": [], "full": []}
    state = {"ours": 0, "full": 0}
    for batch in _batches(recipe, data, count=num_steps + NUM_UNTIMED):
        for name, (model, optimizer) in (("ours", ours), ("full", full)):
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
            assert optimizer.last_record is not None
            state[name] = max(state[name], optimizer.last_record.state_bytes)
    timed = {name: values[NUM_UNTIMED:] for name, values in seconds.items()}
    ratios = [full / ours for full, ours in zip(timed["full"], timed["ours"], strict=True)]
    return Cost(
        blocks=tuple(ours[1].blocks),
        seconds={name: statistics.median(values) for name, values in timed.items()},
        speed_up=statistics.median(ratios),
        state_bytes=state,
    )


def _build(recipe: Recipe, policy: gs.AbstractPolicy, **settings: Any) -> tuple[Any, gs.BlockOptimizer]:
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32).train()
    return model, gs.BlockOptimizer(model, policy, lr=recipe.optimizer.lr, **settings)


def _batches(recipe: Recipe, data: Path, *, count: int) -> Iterator[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    size = recipe.run.batch_size
    for first in range(0, count * size, size):
        texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows[first : first + size]]
        tokens = tokenizer(texts, return_tensors="pt", padding=True)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        yield {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}
