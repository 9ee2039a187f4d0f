"""The page of one run, section by section."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradselect.app.evaluate import SavedEvaluation
from gradselect.core import BlockHistory
from gradselect.integrations.pictures import chart_settings

from . import number_format as words
from .page import Page, Part, Section
from .run_charts import byte_charts, loss_charts, selection_charts
from .run_findings import run_findings, summary
from .run_tables import pair_list
from .table import Cell, Column, Table
from .training_run import TrainingRun

MOST_ANSWERS = 10
LONGEST_TEXT = 600
"""Letters of a prompt or an answer."""
LARGEST_TENSORS = 30
VERDICTS = {"True": "right", "False": "wrong"}


def build_run_page(run: TrainingRun) -> Page:
    """Build the page of one run; empty sections are left out."""
    with chart_settings():
        sections = (
            _section("loss", "Loss", _loss_parts(run)),
            _section("selection", "Selected blocks" if run.blocks is not None else "Selected entries", _selected(run)),
            _section("costs", "Memory and time", _cost_parts(run)),
            _section("answers", "Answers", _answer_parts(run)),
            _section("settings", "What was run", _setting_parts(run)),
        )
    return Page(
        title=f"Training run: {run.title}",
        facts=tuple(_facts(run)),
        findings=tuple(sentence for _, sentence in run_findings(run)),
        sections=tuple(section for section in sections if section.parts),
    )


def _section(key: str, title: str, parts: Iterable[Part]) -> Section:
    return Section(key=key, title=title, parts=tuple(parts))


def _facts(run: TrainingRun) -> Iterator[str]:
    yield f"method {run.method_name}"
    if run.trainer:
        yield f"trainer {run.trainer_name}"
    if run.record is None:
        yield {"Trainer": "from the files of a transformers Trainer"}.get(run.maker, "from selection records")
        return
    yield f"model {run.record.recipe.get('model', {}).get('path', '')}"
    if run.record.model.parameters:
        yield f"{run.record.model.parameters:,} parameters"
    if "train" in run.record.data:
        yield f"data {run.record.data['train'].get('path')}"
    if run.finished is not None:
        yield f"finished {run.finished.finished_at}"


def _loss_parts(run: TrainingRun) -> Iterator[Part]:
    charts = tuple(loss_charts(run))
    if charts:
        yield Part(charts=charts)
    for name, points in run.validation.items():
        rows = tuple((Cell(f"{step:,}"), Cell(words.number(loss, digits=4))) for step, loss in points)
        title = "Validation losses" if name == "validation" else f"Validation losses of {name}"
        yield Part(
            title=title, table=Table(columns=(Column("Step"), Column("Loss")), rows=rows), is_folded=len(rows) > 5
        )


def _selected(run: TrainingRun) -> Iterator[Part]:
    if charts := tuple(selection_charts(run)):
        yield Part(charts=charts)
    if run.blocks is not None and run.blocks.steps:
        yield Part(title="Updates by block", table=_update_table(run.blocks), is_folded=True)
    by_tensor = (
        run.entries.by_tensor if run.entries is not None else {} if run.mask is None else run.mask.entries_by_tensor
    )
    if by_tensor:
        largest = sorted(by_tensor, key=lambda name: (-by_tensor[name], name))
        rows = tuple((Cell(name), Cell(f"{by_tensor[name]:,}")) for name in largest[:LARGEST_TENSORS])
        more = len(largest) - len(rows)
        yield Part(
            title="Entries by tensor at the last step",
            text=f"The {len(rows)} largest; {more} more tensors have fewer." if more > 0 else "",
            table=Table(columns=(Column("Tensor", is_text=True), Column("Entries")), rows=rows),
            is_folded=True,
        )


def _update_table(history: BlockHistory) -> Table:
    first, last = {}, {}
    for step, names in zip(history.steps, history.selected, strict=True):
        for name in names:
            first.setdefault(name, step)
            last[name] = step
    rows = tuple(
        (
            Cell(name),
            Cell(f"{count:,}"),
            Cell(words.share(count / len(history.steps))),
            Cell(f"{first[name]:,}" if count else words.UNKNOWN),
            Cell(f"{last[name]:,}" if count else words.UNKNOWN),
        )
        for name, count in history.updates.items()
    )
    titles = ("Updates", "Of all steps", "First step", "Last step")
    return Table(columns=(Column("Block", is_text=True), *map(Column, titles)), rows=rows)


def _cost_parts(run: TrainingRun) -> Iterator[Part]:
    if charts := tuple(byte_charts(run)):
        yield Part(charts=charts)
    if run.finished is None:
        return
    session = "Of the last session, after the resume." if run.finished.resumed_from else ""
    held = run.finished.bytes
    names = [name for name in held.peak if held.peak[name] or held.average.get(name)]
    if names:
        rows = tuple(
            (
                Cell(name.replace("_", " ")),
                Cell(words.num_bytes(held.peak[name])),
                Cell(words.num_bytes(held.average.get(name))),
            )
            for name in names
        )
        columns = (Column("Bytes", is_text=True), Column("Peak"), Column("Average"))
        yield Part(title="Memory", text=session, table=Table(columns=columns, rows=rows))
    kinds = run.finished.seconds.by_kind
    if kinds:
        parts = ("median", "forward", "backward", "optimizer", "selection")
        rows = tuple(
            (Cell(kind), Cell(f"{of.steps:,}"), *(Cell(words.seconds(getattr(of, part))) for part in parts))
            for kind, of in kinds.items()
        )
        titles = ("Steps", "Median", "Forward", "Backward", "Optimizer", "Selection")
        columns = (Column("Kind of step", is_text=True), *map(Column, titles))
        yield Part(title="Time of a step", text=session, table=Table(columns=columns, rows=rows))


def _answer_parts(run: TrainingRun) -> Iterator[Part]:
    for evaluation in run.evaluations:
        yield Part(title=summary(evaluation), text=f"From {evaluation.folder}.", table=_answer_table(evaluation))


def _answer_table(evaluation: SavedEvaluation) -> Table | None:
    items = [item for item in evaluation.items if "prediction" in item][:MOST_ANSWERS]
    if not items:
        return None
    rows = tuple(
        (
            Cell(_short(item.get("question", item.get("text", "")))),
            Cell(_short(item["prediction"])),
            Cell(_short(item.get("reference", ""))),
            Cell(VERDICTS.get(str(item.get("correct")), words.UNKNOWN)),
        )
        for item in items
    )
    titles = ("Asked", "Answer of the model", "Reference", "Verdict")
    return Table(columns=tuple(Column(title, is_text=True) for title in titles), rows=rows)


def _setting_parts(run: TrainingRun) -> Iterator[Part]:
    sections: Mapping[str, Any] = {"method": run.method} if run.record is None else run.record.recipe
    titles = {
        "method": "Method",
        "trainer": "Trainer",
        "model": "Model",
        "data": "Data",
        "optimizer": "Optimizer",
        "run": "Run",
    }
    for key in ("method", *(key for key in sections if key != "method")):
        if settings := sections.get(key):
            table = pair_list([*_flat(settings)], titles=("Setting", "Value"))
            yield Part(title=titles.get(key, key), table=table, is_folded=key != "method")
    if run.record is None:
        return
    counts = run.record.token_counts
    if counts:
        pairs = [
            (f"{part}: {name.replace('_', ' ')}", value)
            for part, of in counts.items()
            for name, value in of.values().items()
        ]
        yield Part(title="Tokens and rows", table=pair_list(pairs, titles=("Count", "Value")), is_folded=True)
    if run.finished is not None and run.finished.notes:
        yield Part(title="Notes", lines=tuple(run.finished.notes))
    if run.record.command:
        yield Part(title="Commands", lines=(shlex.join(run.record.command),))
    facts = [*run.record.versions.items(), *run.record.machine.values().items()]
    yield Part(title="Versions and machine", table=pair_list(facts, titles=("What", "Value")), is_folded=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings with their values; those of a section in a section with its name."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _value(value)


def _value(value: object) -> object:
    if value is None:
        return words.UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
