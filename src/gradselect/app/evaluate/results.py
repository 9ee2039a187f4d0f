"""Result of an evaluation and its files."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from gradselect import __version__
from gradselect.app.stats import Interval
from gradselect.files import make_folder, read_sealed, sealed, sha256, write_atomically
from gradselect.usage import UsageError

Item = dict[str, Any]
"""One line of `items.jsonl`; key `index` gives the order."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Figures of one evaluation.

    Args:
        task: "gsm8k", "math", "generation", "loss" or "classification".
        num_items: problems, segments of text, or rows.
        accuracy: share of items with the right answer or label; None for a loss, a generation and scores.
        loss: mean nats per target token; None for an accuracy.
        interval: 95 % confidence interval of the accuracy (Wilson), the loss or the mean chrF (over items; a single
            item has none).
        metrics: for labels "matthews" and, with two labels, "f1" of the second; for scores "pearson" and "spearman";
            for a generation "mean_chrf", over items, and "chrf" and "bleu" of all texts together. None if undefined,
            such as the correlation with a constant.
        num_correct: items with the right answer.
        num_unanswered: problems without an answer in the model's text; they count as wrong.
        num_unfinished: answers that `max_new_tokens` cut off.
        num_undecided: answers that math-verify did not compare in time; they count as wrong.
        num_truncated: items longer than the context. A classified text loses its end, other items their beginning.
        num_tokens: target tokens of a loss.
        seconds: wall-clock time without loading the model.
        data: name, fingerprint and number of rows.
        settings: settings as given, with defaults resolved.
        generation: settings of the generation config that differ from the defaults of transformers.
        versions: versions of the software.
        items: one record per item, in the order of the data; not part of `to_dict`.
    """

    task: str
    num_items: int
    accuracy: float | None = None
    loss: float | None = None
    interval: Interval | None = None
    metrics: Mapping[str, float | None] | None = None
    num_correct: int | None = None
    num_unanswered: int | None = None
    num_unfinished: int | None = None
    num_undecided: int | None = None
    num_truncated: int
    num_tokens: int | None = None
    seconds: float
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    versions: Mapping[str, str]
    items: Sequence[Item] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the items and without fields that are None."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "items"}
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """Return one line for people.

        Example: "gsm8k: accuracy 41.2 % (95 % interval 38.6 to 43.9), 543 of 1319"
        """
        if self.accuracy is not None and self.interval is not None:
            low, high = (f"{100 * limit:.1f}" for limit in self.interval)
            share = f"accuracy {100 * self.accuracy:.1f} % (95 % interval {low} to {high})"
            return f"{self.task}: {share}, {self.num_correct} of {self.num_items}{self._named_metrics(', ')}"
        if self.metrics is not None:
            between = (
                "" if self.interval is None else f", the first {self.interval[0]:.4f} to {self.interval[1]:.4f} (95 %)"
            )
            return f"{self.task}: {self._named_metrics('')}, {self.num_items} items{between}"
        between = "" if self.interval is None else f" (95 % interval {self.interval[0]:.4f} to {self.interval[1]:.4f})"
        return f"{self.task}: {self.loss:.4f} nats per token{between}, {self.num_tokens} tokens"

    def _named_metrics(self, lead: str) -> str:
        metrics = self.metrics or {}
        named = [f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in metrics.items()]
        return f"{lead}{', '.join(named)}" if named else ""


class ItemWriter:
    """Context manager that keeps items and appends each to `items.jsonl` of a folder at once.

    Items arrive in the order of computation. `finish` rewrites the file in the order of the data.

    Args:
        folder: a new or empty folder. None: write nothing.

    Raises:
        UsageError: the folder is not empty.
    """

    def __init__(self, folder: str | Path | None) -> None:
        if folder is not None:
            check_new_folder(folder)
        self._folder = None if folder is None else Path(folder)
        self._file: IO[str] | None = None
        self._items: list[Item] = []

    def __enter__(self) -> Self:
        if self._folder is not None:
            make_folder(self._folder, name="output")
            self._file = (self._folder / "items.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def num_items(self) -> int:
        """Number of items so far."""
        return len(self._items)

    def write(self, item: Item) -> None:
        """Keep the item and append it to the file."""
        self._items.append(item)
        if self._file is not None:
            self._file.write(_line(item))
            self._file.flush()

    def finish(self) -> list[Item]:
        """Return all items in the order of the data, after rewriting the file in that order."""
        self._items.sort(key=lambda item: item["index"])
        if self._folder is not None:
            write_atomically(self._folder / "items.jsonl", "".join(map(_line, self._items)))
        return self._items

    def write_result(self, result: EvaluationResult) -> EvaluationResult:
        """Write the result to `result.json` and return it."""
        if self._folder is not None:
            digest = sha256(self._folder / "items.jsonl")
            values = sealed({**result.to_dict(), "items_sha256": digest})
            write_atomically(self._folder / "result.json", to_json(values))
        return result


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """Return the values of `result.json` in an evaluation's output folder, with its items under "items".

    Raises:
        UsageError: a file is missing or damaged, or the two files belong to different evaluations; names the file.
    """
    path = Path(folder) / "items.jsonl"
    values = read_sealed(Path(folder) / "result.json", needed=("task", "num_items"))
    try:
        digest = sha256(path)
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or half-written ({error}); evaluate again") from None
    # Results from before the digest existed are accepted without one.
    if values.pop("items_sha256", None) not in (None, digest):
        raise UsageError(
            f"{path}: damaged, or not the items of result.json, whose items_sha256 differs; evaluate again"
        )
    return {**values, "items": items}


def check_new_folder(folder: str | Path) -> None:
    """Refuse an output folder that exists and is not empty.

    Raises:
        UsageError: names the folder.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"output={str(folder)!r} exists already; name a new folder, or remove it first")


def to_json(values: Mapping[str, Any]) -> str:
    """Return indented JSON; values that JSON does not know become text."""
    return json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"


def plain_settings(settings: Any, **resolved: Any) -> dict[str, Any]:
    """Return the settings as given, with `resolved` in place of defaults."""
    return {**{name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()}, **resolved}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, gradselect and the installed `packages`."""
    listed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "gradselect": __version__, **listed}


def _line(item: Item) -> str:
    # ASCII only: JSON input may hold half of a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(item) + "\n"
