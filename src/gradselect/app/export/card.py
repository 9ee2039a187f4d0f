"""Model card of a trained model: base, data, method and results, without paths of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradselect.app.data import ending_of
from gradselect.app.models import loading_of, register_own_adapters
from gradselect.app.results import FinishedRun

from .exported import ExportedModel

PRIVATE = ("output", "report_to", "device", "log_every", "keep_checkpoints")
"""Settings of a run that say nothing about the model."""

OTHER_ENDINGS = {".gguf", ".json", ".py", ".txt"}
"""Endings of files, besides those of data, that no id on the hub is taken to have."""


def model_card(model: ExportedModel, *, name: str, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the card as Markdown, with the metadata that the hub reads.

    Args:
        model: that the card is of.
        name: name of the model on the hub.
        evaluations: values of `result.json` of each evaluation of the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    record = model.record
    base = _base(record)
    relation: dict[str, Any] = (
        {} if base is None else {"base_model_relation": "adapter" if model.is_adapter else "finetune"}
    )
    data: Any = ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=base,
        **relation,
        library_name="peft" if model.is_adapter else "transformers",
        pipeline_tag=_task(record),
        tags=["gradselect", record.recipe["method"]["name"]],
        datasets=_dataset(record),
        eval_results=[found for values in evaluations if (found := _result(values, record)) is not None] or None,
    )
    body = "\n".join(_body(model, name=name, evaluations=evaluations))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _body(model: ExportedModel, *, name: str, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    record, recipe = model.record, model.record.recipe
    method = recipe["method"]
    yield f"# {name.rpartition('/')[2]}\n"
    kind = "Adapter of" if model.is_adapter else "Fine-tuned from"
    base = _link(recipe["model"]["path"], hub_id=_base(record))
    trainer = f"trainer `{recipe['trainer']['name']}`, " if recipe.get("trainer") else ""
    yield f"{kind} {base} with gradselect, {trainer}method `{method['name']}`, {record.steps:,} steps.\n"
    if results := [*_results(record, evaluations)]:
        yield "## Results\n"
        yield from _table(("Measure", "Value"), results)
    yield "\n## Training\n"
    yield from _table(("Setting", "Value"), _training(record))
    yield "\n### Method\n"
    yield from _table(("Setting", "Value"), [(key, value) for key, value in method.items() if value is not None])
    for title in ("Trainer", "Optimizer", "Run", "Data"):
        settings = recipe.get(title.lower()) or {}
        kept = [(k, _shown(v)) for k, v in settings.items() if v is not None and k not in PRIVATE]
        if not kept:
            continue
        yield f"\n### {title}\n"
        yield from _table(("Setting", "Value"), kept)
    yield "\n## Use\n"
    yield from _use(model, name)
    yield "\n## Licence and limits\n"
    yield "The licences of the base model and of the data apply; this card was generated and states neither."
    yield "What the model may say was not checked beyond the results above."


def _results(record: FinishedRun, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, object]]:
    for title, value in (("training loss", record.training_loss), ("validation loss", record.validation_loss)):
        if value is not None:
            yield title, f"{value:.4f}"
    for values in evaluations:
        measure = f"{values['task']}, {values['num_items']:,} items"
        interval = values.get("interval")
        if values.get("accuracy") is not None:
            between = "" if not interval else f" (95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
            yield f"{measure}: accuracy", f"{100 * values['accuracy']:.1f} %{between}"
        elif values.get("loss") is not None:
            yield f"{measure}: loss", f"{values['loss']:.4f} nats per token"
        for metric, value in (values.get("metrics") or {}).items():
            yield f"{measure}: {metric}", "undefined" if value is None else f"{value:.4f}"


def _training(record: FinishedRun) -> Iterator[tuple[str, object]]:
    yield "base model", _link(record.recipe["model"]["path"], hub_id=_base(record))
    if record.model.parameters:
        yield "parameters", f"{record.model.parameters:,}"
    for part, source in record.data.items():
        origin = _rows_origin(str(source.get("path")), dataset=_dataset(record))
        yield f"{part} data", f"{origin}, {source.get('rows_used', 0):,} rows"
    yield "skipped steps", record.skipped_steps
    yield "training time", f"{record.training_seconds:,.0f} s on {record.machine.device or 'an unknown device'}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _use(model: ExportedModel, name: str) -> Iterator[str]:
    yield "```python"
    if model.is_adapter:
        if register_own_adapters(model.folder):
            yield "import gradselect.adapters  # this adapter is not one of PEFT's own\n"
        kind, more = loading_of(model.folder)
        yield f"from peft import AutoPeftModelFor{kind}\n"
        yield f"model = AutoPeftModelFor{kind}.from_pretrained({name!r}{more})"
    else:
        kind = "SequenceClassification" if _task(model.record) == "text-classification" else "CausalLM"
        yield f"from transformers import AutoModelFor{kind}, AutoTokenizer\n"
        yield f"tokenizer = AutoTokenizer.from_pretrained({name!r})"
        yield f"model = AutoModelFor{kind}.from_pretrained({name!r})"
    yield "```"
    data = model.record.recipe["data"]
    if data.get("format") in ("prompt-completion", "preference", "prompts") and not data.get("as_chat"):
        yield f"\nIt was trained on prompts of this form: `{json.dumps(data['prompt'], ensure_ascii=False)}`."


def _result(values: Mapping[str, Any], record: FinishedRun) -> Any:
    from huggingface_hub import EvalResult

    metric = next((name for name in ("accuracy", "loss") if values.get(name) is not None), None)
    if metric is None:
        return None
    dataset = _shown((values.get("data") or {}).get("name") or values["task"])
    return EvalResult(
        task_type=_task(record),
        dataset_type=values["task"],
        dataset_name=str(dataset),
        metric_type=metric,
        metric_value=values[metric],
    )


def _task(record: FinishedRun) -> str:
    return "text-classification" if record.recipe["data"].get("format") == "classification" else "text-generation"


def _base(record: FinishedRun) -> str | None:
    """Return the base model's id on the hub; None for a folder."""
    return None if record.model.is_local else _hub_id(record.recipe["model"]["path"])


def _dataset(record: FinishedRun) -> str | None:
    """Return the id of the training data on the hub, whose record names the split; None for files."""
    path = record.recipe["data"].get("path", "")
    return _hub_id(path) if str(record.data.get("train", {}).get("path")).startswith(f"{path} [") else None


def _hub_id(path: str) -> str | None:
    """Return the path if it may be an id on the hub, such as Qwen/Qwen2.5-0.5B; None for a place on this machine."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    is_file = ending_of(path) is not None or Path(path).suffix in OTHER_ENDINGS
    return None if is_file or Path(path).exists() else path


def _link(path: str, *, hub_id: str | None, kind: str = "") -> str:
    """Return a link to an id on the hub, or the last part of a path of this machine."""
    return f"`{Path(path).name}`" if hub_id is None else f"[{hub_id}](https://huggingface.co/{kind}{hub_id})"


def _rows_origin(path: str, *, dataset: str | None) -> str:
    """Return the origin of rows without folders of this machine, its split, and how many rows of it were held out."""
    name, _, about = path.rpartition(" (")
    if not about.endswith(" rows held out)"):
        name, about = path, ""
    name, bracket, split = name.partition(" [")
    hub_id = dataset if name == dataset else None
    origin = _link(name, hub_id=hub_id, kind="datasets/") + bracket + split
    return f"{origin} ({about}" if about else origin


def _shown(value: object) -> object:
    """Return a value without the folders of a path on this machine."""
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if not isinstance(value, str) or _hub_id(value) is not None or "/" not in value or "{" in value:
        return value
    if " " in value and not Path(value).is_absolute():  # words, not a path
        return value
    return Path(value).name


def _table(titles: tuple[str, str], rows: Any) -> Iterator[str]:
    yield f"| {titles[0]} | {titles[1]} |"
    yield "|---|---|"
    for key, value in rows:
        yield f"| {_cell(key)} | {_cell(value)} |"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n")
