"""Recipes and data files with random errors."""

from __future__ import annotations

import copy
import datetime
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

TAG = "!!python/object/apply:os.system ['exit 1']"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A YAML bomb: 300 bytes that expand to a billion values."""

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**9, 10**12, 10**400, -(10**30), 1e308, 1e-320, float("inf"), float("nan"), 0.5),
    *("", " ", "x", "x" * 300, "x" * 5000, "a\0b", "\ud800", "1", "1e-4", "yes", "~", "~/nothing", "../../nothing"),
    *("/dev/zero", "{a.__class__}", "{", "{}", "{0}", "{a!r:>999999999}", "adagradselect", "lora", "chat", "\x1b[31m"),
    *([], {}, [[]], [None], {"a": 1}, {1: 2}, [1, 2, 3], datetime.date(2024, 1, 2), b"\xff\xfe", ["x"] * 2000),
)
SNIPPETS = (
    *(TAG, BOMB, "[" * 3000, "{a: " * 2000, "- " * 2000, "&x [*x]", "*nobody", "<<: {a: 1}", "? [1, 2]\n: 3", "\t- x"),
    *("2024-13-45", "!!binary '%'", "!!timestamp soon", "!!bool perhaps", "!!int ''", "!!float x", "!!set {a, b}"),
    *("0x_", "1" * 5000, "'\\0'", '"\\ud800"', '"\\xff"', "%YAML 9.9\n---", "---\n---\n", "# only a remark", "\ufeff"),
    *(
        "base: recipe.yaml",
        "base: x\0y",
        "base: ./././recipe.yaml",
        "base: /dev/zero",
        "base: [1]",
        "base: ../../nothing",
    ),
)


def fuzzed_recipe(values: dict[str, Any], draw: random.Random) -> bytes:
    """Return the YAML of `values` with some errors, now and then with none."""
    changed = copy.deepcopy(values)
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        draw.choice((_replace, _replace, _drop, _add, _nest))(changed, draw)
    content = yaml.dump(changed, allow_unicode=False).encode("utf-8", "backslashreplace")
    for _ in range(draw.choice((0, 0, 1, 2))):
        content = draw.choice((_flip, _cut, _insert_bytes, _insert_snippet, _repeat_line, _encode))(content, draw)
    return content


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Return every container and key of nested values."""
    if not isinstance(values, dict):
        return []
    return [place for key, value in values.items() for place in ((values, key), *_places(value))]


def _replace(values: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(values) or [(values, "x")])
    container[key] = copy.deepcopy(draw.choice(VALUES))


def _drop(values: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(values) or [(values, "x")])
    container.pop(key, None)


def _add(values: dict[Any, Any], draw: random.Random) -> None:
    container, _ = draw.choice(_places(values) or [(values, "x")])
    key = draw.choice(("steps", "name", "base", "rank", "max_length", "é", "a\nb", "x" * 3000, 7, None, ""))
    container[key] = copy.deepcopy(draw.choice(VALUES))


def _nest(values: dict[str, Any], draw: random.Random) -> None:
    container, key = draw.choice(_places(values) or [(values, "x")])
    for _ in range(draw.choice((1, 20, 60))):
        container[key] = draw.choice(({"a": container.get(key)}, [container.get(key)]))


# Bytes ---------------------------------------------------------------------------------------------------------------


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _insert_bytes(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice((draw.randbytes(8), bytes(8), b"\r", b"\xff\xfe", b"\n\n")) + content[place:]


def _insert_snippet(content: bytes, draw: random.Random) -> bytes:
    """Insert a snippet in place of a value, or as a line."""
    snippet = draw.choice(SNIPPETS).encode("utf-8", "backslashreplace")
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    lines[place] = lines[place].split(b": ")[0] + b": " + snippet if draw.random() < 0.5 else snippet
    return b"\n".join(lines)


def _repeat_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    return b"\n".join([*lines[:place], *[lines[place]] * draw.choice((2, 2, 300)), *lines[place:]])


def _encode(content: bytes, draw: random.Random) -> bytes:
    text = content.decode("latin-1")
    return text.encode(draw.choice(("utf-16", "utf-32", "utf-16-le", "utf-8-sig", "cp500")))


# Data ----------------------------------------------------------------------------------------------------------------

ROWS = [
    {"question": f"{n}+1?", "answer": f"is {n + 1}", "label": n % 2, "messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{n}"},
    ]} for n in range(6)
]  # fmt: skip
JSON_VALUES = (
    *('"\\ud800"', '"\\u0000"', "NaN", "1e999", "-Infinity", "1" * 5000, "[" * 60_000, '{"a":' * 3000, "null", "true"),
    *('"' + "x" * 200_000 + '"', "[1, 2]", "{}", "01", "'x'", "", '"a', "\\", '"\ufeff"', '{"role": "user"}'),
)
ENDINGS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")


def fuzzed_data(ending: str, draw: random.Random) -> bytes:
    """Return a data file of this ending with some errors, now and then with none."""
    content = _WRITERS[ending](draw)
    for _ in range(draw.choice((0, 0, 1, 2))):
        content = draw.choice((_flip, _cut, _insert_bytes, _repeat_line, _encode, _line_ends))(content, draw)
    return content


def _line_ends(content: bytes, draw: random.Random) -> bytes:
    return content.replace(b"\n", draw.choice((b"\r\n", b"\r", b"", b"\n\n\n", "\u2028".encode())))


def _odd_objects(draw: random.Random) -> list[str]:
    objects = [json.dumps(row) for row in ROWS]
    for _ in range(draw.choice((0, 0, 1, 2))):
        place, value = draw.randrange(len(objects)), draw.choice(JSON_VALUES)
        key = draw.choice(("question", "answer", "label", "messages", "x"))
        whole = {name: entry for name, entry in ROWS[place].items() if name != key}
        beside = json.dumps(whole)[:-1] + f', "{key}": {value}}}'
        objects[place] = draw.choice((value, beside, beside, json.dumps(whole)))
    return objects


def _jsonl(draw: random.Random) -> bytes:
    return ("\n".join(_odd_objects(draw)) + "\n").encode("utf-8", "backslashreplace")


def _json(draw: random.Random) -> bytes:
    return f"[{', '.join(_odd_objects(draw))}]".encode("utf-8", "backslashreplace")


def _table(draw: random.Random, sign: str) -> bytes:
    cells = [["question", "answer", "label"], *([row["question"], row["answer"], str(row["label"])] for row in ROWS)]
    if draw.random() < 0.5:
        row = draw.choice(cells)
        row[draw.randrange(3)] = draw.choice(
            ("", '"', '"x""', sign, "question", "x" * 200_000, "nan", "\0", "=1+1", "\n")
        )
    return "\n".join(sign.join(row) for row in cells).encode()


def _txt(draw: random.Random) -> bytes:
    return draw.choice(("one\ntwo\n", "", "\n", " \n\n", "x" * 300_000, "a\0b\n", "\x0c\x1c\x85")).encode()


def _parquet(draw: random.Random) -> bytes:
    import pyarrow
    from pyarrow import parquet

    rows = copy.deepcopy(ROWS)
    if draw.random() < 0.3:
        rows = [{**row, "question": draw.choice((None, "x", ""))} for row in rows]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


_WRITERS: dict[str, Callable[[random.Random], bytes]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda draw: _table(draw, ","),
    "tsv": lambda draw: _table(draw, "\t"),
    "txt": _txt,
    "parquet": _parquet,
}
SECTIONS: tuple[dict[str, Any], ...] = (
    {"format": "prompt-completion", "prompt": "{question}", "completion": "{answer}"},
    {"format": "prompt-completion", "prompt": "{question}", "completion": "{answer}", "as_chat": True},
    {"format": "chat"},
    {"format": "text", "text": "{text}"},
    {"format": "text", "text": "{question}"},
    {"format": "classification", "text": "{question}"},
    {"format": "classification", "text": "{question}", "text_pair": "{answer}", "regression": True},
)
"""Sections `data` of recipes that may read such files."""
