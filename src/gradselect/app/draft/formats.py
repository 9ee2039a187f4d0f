"""Format of data, found from the names of its columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradselect import UsageError
from gradselect.app.data import (
    Row,
    columns_of,
    holds_messages,
    is_empty,
    optional_columns_of,
    other_sign,
    shown_columns,
)

NUM_ROWS = 100
"""Rows that are looked at."""

PROMPTS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("completion", "output", "response", "answer", "solution", "target")
CONTEXTS = ("input", "context")
LABELS = ("label", "labels")
CLASSIFIED = ("text", "sentence", "sentence1", "premise", "question1", "question", "sentence2", "hypothesis")


@dataclass(frozen=True, kw_only=True)
class Guess:
    """Format of data.

    Args:
        data: keys for the section `data`.
        columns: columns that are used.
        unused: columns that no template names.
        trainer: keys for the section `trainer`, if the format needs one.
    """

    data: Mapping[str, Any]
    columns: tuple[str, ...]
    unused: tuple[str, ...]
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        unused = f"; not used: {_listed(self.unused)}" if self.unused else ""
        return f"{self.data['format']}, found from the column{_s(self.columns)} {_listed(self.columns)}{unused}"


def guess_format(rows: Sequence[Row], *, path: str, given: Mapping[str, Any], formats: Collection[str]) -> Guess:
    """Return the format of rows.

    Args:
        rows: rows of the data; the first of them are looked at.
        path: name of the data in errors.
        given: keys of the section `data` that the user has written.
        formats: formats that a recipe knows.

    Raises:
        UsageError: the columns fit several formats, or none; says what to type.

    Example:
        >>> row = {"question": "2 + 3?", "answer": "5"}
        >>> guess_format([row], path="sums.jsonl", given={}, formats=["prompt-completion"]).data["prompt"]
        'Question: {question}\\nAnswer:'
    """
    first = rows[:NUM_ROWS]
    columns = tuple(dict.fromkeys(str(column) for row in first for column in row))
    spoken = tuple(column for column in columns if any(holds_messages(row.get(column)) for row in first))
    if {"chosen", "rejected"} <= {*columns} and "preference" in formats:
        return _preference(columns, given)
    decided = {"messages", "text", "completion"}.intersection(given) or "preference" not in formats
    if not decided and (label := _judged(first, columns)) is not None:
        return _rated(columns, given, label=label)
    if spoken or "messages" in given:
        return _chat(columns, spoken, path=path, given=given)
    if "text" in given and "label" not in given:
        return _guess(columns, {"format": "text", "text": given["text"]})
    written = {name: given[name] for name in ("prompt", "completion") if name in given}
    prompts = [column for column in PROMPTS if column in columns] or [c for c in CONTEXTS if c in columns][:1]
    answers = [column for column in ANSWERS if column in columns]
    if (prompts or "prompt" in written) and (answers or "completion" in written):
        return _pair(columns, prompts, answers, path=path, written=written)
    if any(column in columns for column in LABELS) or "label" in given:
        raise UsageError(_labelled(columns, path=path))
    if "text" in columns and not prompts:
        return _guess(columns, {"format": "text", "text": "{text}"})
    raise UsageError(_unknown(columns, first, path=path))


def _chat(columns: Sequence[str], spoken: Sequence[str], *, path: str, given: Mapping[str, Any]) -> Guess:
    if "messages" in given:
        return _guess(columns, {"format": "chat"}, names=_names(given["messages"]))
    if {"prompt", "completion"} <= {*spoken}:
        names: tuple[str, ...] = ("prompt", "completion")
    elif "messages" in spoken or len(spoken) == 1:
        names = ("messages",) if "messages" in spoken else tuple(spoken)
    else:
        choices = " or ".join(f"data.messages={name}" for name in spoken)
        raise UsageError(f"{path}: the columns {_listed(spoken)} all hold messages; write {choices}")
    messages = names[0] if len(names) == 1 else list(names)
    return _guess(columns, {"format": "chat", "messages": messages}, names=names)


def _judged(rows: Sequence[Row], columns: Sequence[str]) -> str | None:
    """Return the column that says of each answer if it is good: true or false, behind a prompt and one answer.

    Numbers and text may be classes, so they count only beside columns that are named prompt and completion.
    """
    if len([column for column in ANSWERS if column in columns]) != 1 or not any(c in columns for c in PROMPTS):
        return None
    verdicts = ("true", "false", "0", "1") if {"prompt", "completion"} <= {*columns} else ()
    for label in (column for column in LABELS if column in columns):
        values = [row.get(label) for row in rows]
        if all(isinstance(value, bool) or str(value).lower() in verdicts for value in values):
            return label
    return None


def _rated(columns: Sequence[str], given: Mapping[str, Any], *, label: str) -> Guess:
    answer = next(column for column in ANSWERS if column in columns)
    data = {**_asked(columns, given), "completion": f"{{{answer}}}", "label": label}
    return _guess(columns, {"format": "preference", **data}, names=_used(data, answer, label), trainer={"name": "kto"})


def _asked(columns: Sequence[str], given: Mapping[str, Any]) -> dict[str, str]:
    """Return the template of the prompt; none where whole conversations hold it."""
    found = given.get("prompt") or next((f"{{{column}}}" for column in PROMPTS if column in columns), None)
    return {} if found is None else {"prompt": found}


def _used(data: Mapping[str, str], *others: str) -> tuple[str, ...]:
    return (*columns_of(data.get("prompt", "")), *others)


def _preference(columns: Sequence[str], given: Mapping[str, Any]) -> Guess:
    data = _asked(columns, given)
    return _guess(
        columns, {"format": "preference", **data}, names=_used(data, "chosen", "rejected"), trainer={"name": "dpo"}
    )


def _pair(
    columns: Sequence[str], prompts: Sequence[str], answers: Sequence[str], *, path: str, written: Mapping[str, Any]
) -> Guess:
    for key, found in (("prompt", prompts), ("completion", answers)):
        if key not in written and len(found) > 1:
            choices = " or ".join(f"'data.{key}={_template(key, name, columns, answers)}'" for name in found)
            raise UsageError(
                f"{path}: the columns {_listed(found)} could all be the {key}; write {choices.translate(_TYPED)}"
            )
    prompt = written.get("prompt") or _template("prompt", prompts[0], columns, answers)
    completion = written.get("completion") or _template("completion", answers[0], columns, answers)
    return _guess(columns, {"format": "prompt-completion", "prompt": prompt, "completion": completion})


_TYPED = {ord("\n"): "\\n"}
"""Line ends as they are typed on a command line."""


def _template(key: str, name: str, columns: Sequence[str], answers: Sequence[str]) -> str:
    """Return the usual template of a column: Alpaca's for instructions, "Question: ... Answer:" for questions."""
    if key == "completion":
        follows_a_line_end = name == "completion" or {"instruction", "prompt"}.intersection(columns)
        return f"{{{name}}}" if follows_a_line_end else f" {{{name}}}"
    context = next((column for column in CONTEXTS if column in columns and column != name), None)
    if name == "prompt":
        return "{prompt}" if "completion" in answers else "{prompt}\n"
    if name == "instruction":
        part = f"{{?{context}:### Input:\n{{{context}}}\n\n}}" if context else ""
        return f"### Instruction:\n{{instruction}}\n\n{part}### Response:\n"
    part = f"{{?{context}:{{{context}}}\n\n}}" if context else ""
    return f"{part}Question: {{{name}}}\nAnswer:"


def _guess(columns: Sequence[str], data: Mapping[str, Any], *, names: Sequence[str] = (), **more: Any) -> Guess:
    texts = [text for text in data.values() if isinstance(text, str) and "{" in text]
    used = [*names, *(column for text in texts for column in (*columns_of(text), *optional_columns_of(text)))]
    unused = tuple(column for column in columns if column not in used)
    return Guess(data=dict(data), columns=tuple(dict.fromkeys(used)), unused=unused, **more)


def _labelled(columns: Sequence[str], *, path: str) -> str:
    label = next((column for column in LABELS if column in columns), "label")
    texts = [column for column in CLASSIFIED if column in columns][:2] or ["text"]
    words = ["data.format=classification", f"'data.text={{{texts[0]}}}'"]
    words += [f"'data.text_pair={{{texts[1]}}}'"] if len(texts) > 1 else []
    words += [f"data.label={label}"]
    return (
        f"{path}: the column {label!r} may be a label to predict: to train a classifier write {' '.join(words)}; to "
        f"train on the text alone data.format=text 'data.text={{{texts[0]}}}'"
    )


def _unknown(columns: Sequence[str], rows: Sequence[Row], *, path: str) -> str:
    named = f"{path}: no format is known for its columns: {shown_columns(columns)}"
    if sign := other_sign(columns):  # no template can name parts of a column
        return f"{named}{sign}"
    plain = [column for column in columns if any(isinstance(row.get(column), str) for row in rows)] or [*columns]
    plain = [column for column in plain if not all(is_empty(row.get(column)) for row in rows)] or plain
    asked, answered = (plain[0], plain[-1]) if len(plain) > 1 else (plain[0], "answer")
    return (
        f"{named}. Say what the model reads and what it learns to write, e.g. 'data.prompt={{{asked}}}\\n' "
        f"'data.completion={{{answered}}}'; or, to train on one text, 'data.text={{{plain[0]}}}'"
    )


def _names(messages: Any) -> tuple[str, ...]:
    return tuple(map(str, messages)) if isinstance(messages, list | tuple) else (str(messages),)


def _listed(names: Sequence[str]) -> str:
    *rest, last = [shown_columns([name])[:40] for name in names]
    return f"{', '.join(rest)} and {last}" if rest else last


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) > 1 else ""
