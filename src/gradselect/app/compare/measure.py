"""What is measured of a trained model: scores, forgetting, and the size of what must be shipped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradselect import delta
from gradselect.app.evaluate import EvaluationResult, evaluate
from gradselect.app.recipe import EvaluationSettings, RandomData
from gradselect.app.runtime import RunFolder
from gradselect.delta import DeltaFile
from gradselect.files import read_sealed, sealed, write_atomically

from .job import Job
from .protocol import local_folder

ITEM_KEYS = ("index", "correct", "loss", "num_tokens")
"""What a result keeps of each item."""


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What must be handed on for somebody who has the base to have the trained model.

    Args:
        num_bytes: size of the adapter, of the delta, or of the whole model where that is no larger; None for a model
            that is not kept.
        num_trained: weights of the adapter, or of the tensors that moved.
    """

    num_bytes: int | None
    num_trained: int | None


def measure_scores(job: Job) -> dict[str, EvaluationResult]:
    """The trained model's answers, by the names of the evaluations."""
    return {name: evaluate(entry.settings(job.training)) for name, entry in job.evaluations.items()}


def measure_forgetting(job: Job) -> dict[str, float] | None:
    """Loss of the base and of the trained model; that of the base is measured once and kept."""
    if job.forgetting is None:
        return None
    return {"before": _loss_of_base(job), "after": _loss(job.forgetting.settings(job.training))}


def measure_shipment(job: Job, run: Mapping[str, Any]) -> Shipment:
    """The smallest way to hand on the trained model, `run` being its run.json."""
    folder, total = RunFolder(job.training), run["model"]["parameters"]
    if isinstance(job.recipe.data, RandomData):
        return Shipment(num_bytes=None, num_trained=None)
    if folder.adapter.is_dir():
        return Shipment(num_bytes=weight_bytes(folder.adapter), num_trained=count_weights(folder.adapter))
    whole = weight_bytes(folder.root)
    if job.recipe.method.name == "full":
        return Shipment(num_bytes=whole, num_trained=total)
    model = job.recipe.model
    base = local_folder(model.path, revision=model.revision)
    with TemporaryDirectory(dir=folder.root) as aside:
        _cast_checkpoint(base, Path(aside), dtype=getattr(torch, model.dtype))
        return _delta_shipment(Path(aside), folder.root, whole=whole)


def score_of(result: EvaluationResult) -> dict[str, Any]:
    """The figure of an evaluation, and which it is."""
    named = {"accuracy": result.accuracy, "loss": result.loss, **(result.metrics or {})}
    metric = next(name for name, value in named.items() if value is not None or name in (result.metrics or {}))
    return {
        "task": result.task,
        "metric": metric,
        "value": named[metric],
        "interval": result.interval,
        "num_items": result.num_items,
    }


def items_of(result: EvaluationResult) -> list[dict[str, Any]]:
    """Each item: right or wrong, or its loss in nats, summed over its tokens."""
    kept = [{key: item[key] for key in ITEM_KEYS if key in item} for item in result.items]
    return [item | {"loss": item["loss"] * item["num_tokens"]} if "loss" in item else item for item in kept]


def weight_bytes(folder: Path) -> int:
    """Of the files that hold weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def count_weights(folder: Path) -> int:
    """Entries of all tensors in these files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _cast_checkpoint(base: Path, target: Path, *, dtype: torch.dtype) -> None:
    """The base as the training loads it: else every tensor of another type would count as moved."""
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {name: _cast(tensor, dtype) for name, tensor in tensors.items()}, target / file.name, {"format": "pt"}
        )
    for index in base.glob("*.safetensors.index.json"):
        shutil.copy(index, target)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _delta_shipment(base: Path, tuned: Path, *, whole: int) -> Shipment:
    """The delta is written beside the base, and looked at."""
    path = base / "delta"
    delta.diff(base, tuned, path)
    file = DeltaFile(path)
    tensors = file.contents["tuned"].tensors
    moved = sum(tensors[name].num_entries for name in file.changes if name in tensors)
    return Shipment(num_bytes=min(whole, path.stat().st_size), num_trained=moved)


def _loss_of_base(job: Job) -> float:
    """Measured in the type that the training loads the base in, and kept for the runs that follow."""
    assert job.forgetting is not None
    key, file = job.protocol, job.forgetting_file
    known = read_sealed(file) if file.exists() else {}
    if key not in known:
        model = job.recipe.model
        settings = job.forgetting.settings(local_folder(model.path, revision=model.revision))
        known[key] = _loss(replace(settings, dtype=model.dtype) if settings.dtype == "auto" else settings)
        write_atomically(file, json.dumps(sealed(known), indent=1) + "\n")
    return known[key]


def _loss(settings: EvaluationSettings) -> float:
    loss = evaluate(settings).loss
    assert loss is not None
    return loss
