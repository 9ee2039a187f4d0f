"""Presets of the suite `lab`: shape and pretraining of the base model, and sizes of the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import lab_problems  # noqa: F401 - puts quickstart/ on the path
import pretrain


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings that decide the files.

    Args:
        base: shape and pretraining of the model.
        num_tokens: length of the text; pretraining repeats it when it is used up.
        shard_tokens: length of a piece of text; each piece has its own seed.
        largest: largest number in stories and problems.
        num_steps: numbers of steps of the problems.
        num_train: number of training problems; `num_valid` and `num_test` alike.
        num_known: number of held-out documents.
        tokenizer_texts: number of documents for the tokenizer is twice this.
    """

    base: pretrain.Recipe
    num_tokens: int
    shard_tokens: int = 250_000
    largest: int = 99
    num_steps: tuple[int, ...] = (2, 3, 4)
    num_train: int = 4000
    num_valid: int = 400
    num_test: int = 400
    num_known: int = 300
    tokenizer_texts: int = 4000


PRESETS = {
    "cpu": Preset(
        base=pretrain.Recipe(
            hidden_size=224,
            intermediate_size=560,
            num_layers=8,
            num_heads=4,
            max_length=320,
            steps=5000,
            cooldown_steps=1700,
            save_steps=250,
        ),
        num_tokens=8_000_000,
    ),
    "gpu": Preset(
        base=pretrain.Recipe(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_layers=18,
            num_heads=6,
            max_length=512,
            steps=3000,
            batch_size=64,
            window=512,
            muon_lr=4e-3,
            adamw_lr=2e-3,
            warmup_steps=100,
            cooldown_steps=1000,
            save_steps=500,
        ),
        num_tokens=60_000_000,
        largest=999,
        num_steps=(2, 3, 4, 5),
        num_train=12_800,
        num_valid=1000,
        num_test=1000,
        num_known=1000,
    ),
}


def changed(preset: Preset, changes: dict[str, Any]) -> Preset:
    """Return the preset with changed values; keys of `base` are named as they are there."""
    of_base = {key: value for key, value in changes.items() if key in {f.name for f in dataclasses.fields(preset.base)}}
    own = {key: value for key, value in changes.items() if key not in of_base}
    own |= {"num_steps": tuple(own["num_steps"])} if "num_steps" in own else {}
    return dataclasses.replace(preset, base=dataclasses.replace(preset.base, **of_base), **own)
