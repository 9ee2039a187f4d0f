"""What an evaluation finds, and the files it leaves."""

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
from gradselect.files import read_sealed, sealed, sha256, write_atomically
from gradselect.usage import UsageError

Item = dict[str, Any]
"""One line of `items.jsonl`; its key `index` orders them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The figures of one evaluation.

    Args:
        task: "gsm8k", "math", "loss" or "classification".
        num_items: problems, segments of text, or rows.
        accuracy: share of items whose answer or label is right; None for a loss and for scores.
        loss: mean nats per target token; None for an accuracy.
        interval: 95 % confidence interval of the accuracy (Wilson) or the loss (over items; a single item has none).
        metrics: of a classification: "matthews" and, of two labels, "f1" of the second; of scores "pearson" and
            "spearman". One that is not defined, as a correlation with a constant, is None.
        num_correct: items answered right.
        num_unanswered: problems in whose text no answer was found; they count as wrong.
        num_unfinished: answers that `max_new_tokens` cut off.
        num_undecided: answers that math-verify could not compare in time; they count as wrong.
        num_truncated: items that lost their beginning, or, where texts are classified, their end, for they exceed the
            context.
        num_tokens: target tokens of a loss.
        seconds: wall-clock time without loading the model.
        data: name, fingerprint and number of rows.
        settings: as given, and what defaults became.
        generation: the generation config that was used, where it differs from the defaults of transformers.
        versions: of what computed it.
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
        """Plain values for JSON, without the items and without what does not apply to the task."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "items"}
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """One line for people.

        Example: "gsm8k: accuracy 41.2 % (95 % interval 38.6 to 43.9), 543 of 1319"
        """
        if self.accuracy is not None and self.interval is not None:
            low, high = (f"{100 * limit:.1f}" for limit in self.interval)
            share = f"accuracy {100 * self.accuracy:.1f} % (95 % interval {low} to {high})"
            return f"{self.task}: {share}, {self.num_correct} of {self.num_items}{self._named_metrics(', ')}"
        if self.metrics is not None:
            return f"{self.task}: {self._named_metrics('')}, {self.num_items} items"
        between = "" if self.interval is None else f" (95 % interval {self.interval[0]:.4f} to {self.interval[1]:.4f})"
        return f"{self.task}: {self.loss:.4f} nats per token{between}, {self.num_tokens} tokens"

    def _named_metrics(self, lead: str) -> str:
        metrics = self.metrics or {}
        named = [f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in metrics.items()]
        return f"{lead}{', '.join(named)}" if named else ""


class ItemWriter:
    """Keeps items and appends each to `items.jsonl` of a folder at once; a context manager.

    Items come in the order of computation. When all is done `finish` puts the file into the order of the data.

    Args:
        folder: a new or empty folder; None writes nothing.

    Raises:
        UsageError: the folder holds something.
    """

    def __init__(self, folder: str | Path | None) -> None:
        if folder is not None:
            check_new_folder(folder)
        self._folder = None if folder is None else Path(folder)
        self._file: IO[str] | None = None
        self._items: list[Item] = []

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / "items.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def num_items(self) -> int:
        """How many items there are so far."""
        return len(self._items)

    def write(self, item: Item) -> None:
        """Keep this item, and append it to the file."""
        self._items.append(item)
        if self._file is not None:
            self._file.write(_line(item))
            self._file.flush()

    def finish(self) -> list[Item]:
        """All items in the order of the data; the file is written anew in that order."""
        self._items.sort(key=lambda item: item["index"])
        if self._folder is not None:
            write_atomically(self._folder / "items.jsonl", "".join(map(_line, self._items)))
        return self._items

    def write_result(self, result: EvaluationResult) -> EvaluationResult:
        """The result itself; it is in `result.json` now."""
        if self._folder is not None:
            digest = sha256(self._folder / "items.jsonl")
            values = sealed({**result.to_dict(), "items_sha256": digest})
            write_atomically(self._folder / "result.json", to_json(values))
        return result


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """What an evaluation left in its output folder: the values of `result.json`, and under "items" the items.

    Raises:
        UsageError: a file is missing or damaged, or the two are not of one evaluation; names file and value.
    """
    path = Path(folder) / "items.jsonl"
    values = read_sealed(Path(folder) / "result.json", needed=("task", "num_items"))
    try:
        digest = sha256(path)
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or half-written ({error}); evaluate again") from None
    # What was written before there were digests is believed.
    if values.pop("items_sha256", None) not in (None, digest):
        raise UsageError(
            f"{path}: damaged, or not the one of result.json, which has another items_sha256; evaluate again"
        )
    return {**values, "items": items}


def check_new_folder(folder: str | Path) -> None:
    """There is no such folder yet, or it is empty.

    Raises:
        UsageError: otherwise.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"output={str(folder)!r} exists already; name a new folder, or remove it first")


def to_json(values: Mapping[str, Any]) -> str:
    """For people to read; what JSON does not know is written as text."""
    return json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"


def plain_settings(settings: Any, **resolved: Any) -> dict[str, Any]:
    """The settings as given, with what defaults became."""
    return {**{name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()}, **resolved}


def versions(*packages: str) -> dict[str, str]:
    """Of Python, gradselect and the installed `packages`."""
    listed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "gradselect": __version__, **listed}


def _line(item: Item) -> str:
    # Only ASCII: a half of a surrogate pair, which JSON input may hold, cannot be written as UTF-8.
    return json.dumps(item) + "\n"
