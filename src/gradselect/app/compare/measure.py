"""Measurements of a trained model: scores, forgetting, and the size of the file to ship."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradselect import UsageError, delta
from gradselect.app.evaluate import EvaluationResult, evaluate
from gradselect.app.recipe import EvaluationSettings, RandomData
from gradselect.app.results import FinishedRun, Forgetting, Item, Score
from gradselect.app.runtime import RunFolder
from gradselect.delta import DeltaFile
from gradselect.files import beside_weights, read_sealed, sealed, write_atomically

from .job import Job
from .protocol import local_folder

ITEM_KEYS = ("index", "correct", "loss", "num_tokens", "score")
"""Keys that a result keeps of each item."""


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """Files to ship to somebody who has the base model.

    Args:
        num_bytes: size of the adapter, of the delta, or of the whole model if that is no larger; None for a model of
            random data or of a short run.
        num_trained: entries of the adapter, or of the tensors that changed.
    """

    num_bytes: int | None
    num_trained: int | None


def measure_scores(job: Job) -> dict[str, EvaluationResult]:
    """Evaluate the trained model; results by the name of the evaluation."""
    return {name: evaluate(entry.settings(job.training)) for name, entry in job.evaluations.items()}


def measure_forgetting(job: Job) -> Forgetting | dict[str, Forgetting] | None:
    """Measure losses of the base model, once for all runs, and of the trained one; by name, if the sets have names."""
    found = {
        name: Forgetting(before=_loss_of_base(job, name), after=_loss(entry.settings(job.training)))
        for name, entry in job.forgetting.items()
    }
    return found.get("", found or None)


def measure_shipment(job: Job, run: FinishedRun) -> Shipment:
    """Find the smallest files to ship the trained model with."""
    folder = RunFolder(job.training)
    if isinstance(job.recipe.data, RandomData) or job.share < 1:
        return Shipment(num_bytes=None, num_trained=None)
    if folder.adapter.is_dir():
        adapter = Shipment(num_bytes=weight_bytes(folder.adapter), num_trained=count_weights(folder.adapter))
        if job.recipe.method.name != "hiwi":
            return adapter
        # Of HiWi only new biases are left, which are fewer numbers than were trained.
        left = _delta_of_run(job, folder).num_bytes
        return adapter if left is None else replace(adapter, num_bytes=min(adapter.num_bytes or left, left))
    if job.recipe.method.name == "full":
        return Shipment(num_bytes=weight_bytes(folder.root), num_trained=run.model.parameters)
    return _delta_of_run(job, folder)


def score_of(result: EvaluationResult, metric: str | None = None) -> Score:
    """Return a figure of an evaluation. Default: the main one, accuracy, else loss, else the first metric.

    Raises:
        UsageError: the evaluation has no such metric.
    """
    figures = {"accuracy": result.accuracy, "loss": result.loss}
    named = {**{name: value for name, value in figures.items() if value is not None}, **(result.metrics or {})}
    main = next(iter(named))
    metric = metric or main
    if metric not in named:
        raise UsageError(f"metric={metric}: this evaluation has {', '.join(named)}; write one of them")
    interval = result.interval if metric == main else None
    return Score(task=result.task, metric=metric, value=named[metric], interval=interval, num_items=result.num_items)


def items_of(result: EvaluationResult) -> list[Item]:
    """Return each item: right or wrong, or its loss in nats, summed over its tokens."""
    kept = [{key: item[key] for key in ITEM_KEYS if key in item} for item in result.items]
    summed = [item | {"loss": item["loss"] * item["num_tokens"]} if "loss" in item else item for item in kept]
    return [Item.model_validate(item) for item in summed]


def weight_bytes(folder: Path) -> int:
    """Size of the files that hold weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def count_weights(folder: Path) -> int:
    """Number of entries of all tensors in the folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _delta_of_run(job: Job, folder: RunFolder) -> Shipment:
    model = job.recipe.model
    base = local_folder(model.path, revision=model.revision)
    with TemporaryDirectory(dir=folder.root) as aside:
        _cast_checkpoint(base, Path(aside), dtype=getattr(torch, model.dtype))
        beside_weights(base).copy_to(Path(aside))  # who has the base has its tokenizer
        return _delta_shipment(Path(aside), folder.root, whole=weight_bytes(folder.root))


def _cast_checkpoint(base: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write the base in the dtype of the training. Otherwise every tensor of another dtype would count as changed."""
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
    """Write the delta beside the base, and measure it."""
    path = base / "delta"
    delta.diff(base, tuned, path)
    file = DeltaFile(path)
    tensors = file.contents["tuned"].tensors
    moved = sum(tensors[name].num_entries for name in file.changes if name in tensors)
    return Shipment(num_bytes=min(whole, path.stat().st_size), num_trained=moved)


def _loss_of_base(job: Job, name: str) -> float:
    """Loss of the base model in the dtype of the training. Measured once, then read from `forgetting_file`."""
    key, file = f"{job.protocol} {name}".strip(), job.forgetting_file
    known = read_sealed(file) if file.exists() else {}
    if key not in known:
        model = job.recipe.model
        settings = job.forgetting[name].settings(local_folder(model.path, revision=model.revision))
        loss = _loss(replace(settings, dtype=model.dtype) if settings.dtype == "auto" else settings)
        # Another run may have written meanwhile.
        known = {**(read_sealed(file) if file.exists() else {}), key: loss}
        write_atomically(file, json.dumps(sealed(known), indent=1) + "\n")
    return known[key]


def _loss(settings: EvaluationSettings) -> float:
    loss = evaluate(settings).loss
    assert loss is not None
    return loss
