"""Tiny model, data and recipes: a whole run takes a second and reads nothing from outside the test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradselect.app.inputs import Inputs, read_inputs
from gradselect.app.recipe import Recipe
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.runtime.run_folder import RunFolder
from gradselect.app.train import train
from gradselect.app.train.setup import build_trainer
from gradselect.app.train.trainer import RunTrainer

ADAGRADSELECT = {"name": "adagradselect", "fraction": 0.4, "among": None, "explore_steps": 3}
"""Method section that explores and exploits within a few steps."""
NUM_LAYERS = 4
POSITIONS = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""The same text, with the assistant's turns marked."""


def write_model(
    folder: Path, *, seed: int = 0, tied: bool = True, chat_template: str | None = None, **sizes: int
) -> Path:
    """Write a random Llama of four layers, or of other `sizes`, and a tokenizer of bytes."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": NUM_LAYERS}
    config = LlamaConfig(
        **{**small, **sizes},
        vocab_size=258,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, an end of text and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*alphabet, "<end>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def write_sums(path: Path, *, rows: int = 24) -> Path:
    """Write questions and answers of unequal length."""
    lines = [json.dumps({"question": f"{n}+{n * n}?", "answer": f"is {n + n * n}"}) for n in range(rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def recipe_values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe on `folder/model` and `folder/sums.jsonl`; `sections` change keys of its sections."""
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "format": "prompt-completion",
            "path": str(folder / "sums.jsonl"),
            "prompt": "{question}",
            "completion": " {answer}",
        },
        "method": {"name": "full"},
        "optimizer": {"lr": 1e-2},
        "run": {
            "output": str(folder / "out"),
            "steps": 4,
            "batch_size": 4,
            "log_every": 1,
            "device": "cpu",
            "report_to": [],
        },
    }
    for name, changes in sections.items():
        # Another method or format has other keys.
        is_whole = name in ("method", "trainer") or "format" in changes
        values[name] = changes if is_whole else {**values[name], **changes}
    return values


def write_recipe(folder: Path, path: Path, **sections: dict[str, Any]) -> Path:
    """Write `recipe_values` to `path` as YAML."""
    path.write_text(yaml.safe_dump(recipe_values(folder, **sections)), "utf-8")
    return path


def parse(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """Return `recipe_values` as a checked recipe."""
    return parse_recipe(recipe_values(folder, **sections), source="recipe")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def build(folder: Path, output: Path, **sections: dict[str, Any]) -> tuple[RunTrainer, Inputs]:
    """Build the trainer of a recipe without running it."""
    recipe = parse(folder, **{**sections, "run": {"output": str(output), **sections.get("run", {})}})
    inputs = read_inputs(recipe)
    return build_trainer(recipe, inputs, folder=RunFolder(output)), inputs


def train_until(recipe: Recipe, *, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the recipe until something interrupts it in the forward pass behind this step."""
    compute_loss = RunTrainer.compute_loss

    def stop(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step and self.model is not None and self.model.training:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, console=quiet())


def quiet() -> Console:
    """Return a console that shows nothing."""
    return Console(file=io.StringIO())
