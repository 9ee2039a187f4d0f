"""Data with answers to compare, prompts to answer, and recipes on them, for the tests of trainers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train_fixtures import CHAT_TEMPLATE, recipe_values, write_model

from gradselect.app.recipe import Recipe, parse_recipe

NUM_ROWS = 12


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return path


def pairs(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+{n}?", "chosen": f" is {2 * n}", "rejected": f" no {n}, not"} for n in range(count)]


def rated() -> list[dict[str, Any]]:
    rows = enumerate(pairs())
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if n % 3 else "chosen"], "label": n % 3 == 0}
        for n, row in rows
    ]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talks(*, whole: bool) -> list[dict[str, Any]]:
    """Pairs of messages; `whole`: each answer stands behind its prompt, and there is no column of prompts."""
    rows = []
    for row in pairs():
        asked = [said("user", row["prompt"])]
        answers = {name: [said("assistant", row[name])] for name in ("chosen", "rejected")}
        if whole:
            rows.append({name: [*asked, *answer] for name, answer in answers.items()})
        else:
            rows.append({"prompt": asked, **answers})
    return rows


def prompts() -> list[dict[str, Any]]:
    return [{"question": f"{n}+{n}?", "answer": f"It is {2 * n}."} for n in range(NUM_ROWS)]


def write_place(folder: Path) -> Path:
    """Write a model with a chat template, and a file of each kind."""
    write_model(folder / "model", chat_template=CHAT_TEMPLATE)
    files = {
        "pairs": pairs(),
        "rated": rated(),
        "whole": talks(whole=True),
        "split": talks(whole=False),
        "prompts": prompts(),
        "asked": [{"prompt": [said("user", row["question"])], "answer": row["answer"]} for row in prompts()],
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def preference_recipe(place: Path, output: Path, *, trainer: str | dict[str, Any] = "dpo", **sections: Any) -> Recipe:
    """Return a recipe on pairs; `data` may name another file in `place`."""
    file = sections.pop("file", "pairs")
    data = {"format": "preference", "path": str(place / f"{file}.jsonl"), **sections.pop("data", {})}
    return _recipe(place, output, trainer, data, sections)


def prompt_recipe(place: Path, output: Path, *, trainer: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Return a recipe that draws four answers to each of two prompts in a step."""
    file = sections.pop("file", "prompts")
    data = {"format": "prompts", "path": str(place / f"{file}.jsonl"), "answer": "{answer}", **sections.pop("data", {})}
    data.setdefault("prompt", "{question}" if file == "prompts" else "{prompt}")
    settings = {"name": "grpo", "reward": "gsm8k", "num_generations": 4, "max_completion_length": 6, **(trainer or {})}
    run = {"batch_size": 8, **sections.pop("run", {})}
    return _recipe(place, output, settings, data, {**sections, "run": run})


def _recipe(place: Path, output: Path, trainer: Any, data: dict[str, Any], sections: dict[str, Any]) -> Recipe:
    run = {"output": str(output), **sections.pop("run", {})}
    values = recipe_values(place, data=data, run=run, **sections)
    values["trainer"] = {"name": trainer} if isinstance(trainer, str) else trainer
    return parse_recipe(values, source="recipe")
