"""A tiny BERT, a tiny decoder, and texts with labels, that the tests of training and of evaluation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from train_fixtures import byte_tokenizer, recipe_values, write_model
from transformers import BertConfig, BertModel

from gradselect.app.recipe import Recipe
from gradselect.app.recipe.load import parse_recipe

COLUMNS = ["number", "grade", "sentence", "other"]
"""Of the files, which name none."""


def write_place(folder: Path) -> Path:
    """A folder with two models without a head, and three files of rows."""
    write_bert(folder / "bert")
    write_model(folder / "model")
    write_rows(folder / "train.tsv", rows=24)
    write_rows(folder / "dev.tsv", rows=8)
    write_rows(folder / "scores.tsv", rows=24, scores=True)
    return folder


def write_bert(folder: Path, *, pooler: bool = True) -> Path:
    config = BertConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=257,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, *, rows: int, scores: bool = False) -> Path:
    """Rows without a header; a good text begins with an a, a bad one with a b, and a quote sign stands alone."""
    lines = []
    for number in range(rows):
        good = number % 3 > 0
        grade = f"{number % 3 + 0.5}" if scores else "good" if good else "bad"
        lines.append(f'{number}\t{grade}\t{"a" if good else "b"} "text of {"some " * (number % 4)}length\t{number % 2}')
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def classify(place: Path, output: Path, *, base: str = "bert", **sections: dict[str, Any]) -> Recipe:
    """A recipe that learns good from bad; `sections` change keys of its sections."""
    values = recipe_values(place, **{name: sections[name] for name in sections.keys() & {"method", "optimizer"}})
    values["model"] = {"path": str(place / base), "dtype": "float32", **sections.get("model", {})}
    values["data"] = {
        "format": "classification",
        "path": str(place / "train.tsv"),
        "columns": COLUMNS,
        "label": "grade",
        **sections.get("data", {}),
    }
    values["run"] |= {"output": str(output), **sections.get("run", {})}
    return parse_recipe(values, source="recipe")
