"""Write docs/recipes.md: every key of a recipe, from the schema itself.

    python docs/site/recipe_page.py

A test compares the page with the schema.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from gradselect.app.recipe import AbstractSamplingTrainer, Recipe
from gradselect.app.recipe.data_settings import AbstractDataSettings, AbstractTokenData
from gradselect.app.recipe.schema import ModelSettings, OptimizerSettings, RunSettings
from gradselect.methods import AbstractBlockMethod, AbstractFreeMaskMethod, AbstractMaskMethod
from gradselect.methods.settings import Settings

PAGE = Path(__file__).resolve().parent.parent / "recipes.md"
KEY = re.compile(r"^ {4}(?P<keys>\w+(?:, \w+)*): (?P<text>.+(?:\n {8,}.+)*)", re.MULTILINE)

DATA = {"Keys of all formats of files": AbstractDataSettings, "Keys of formats for language models": AbstractTokenData}
METHODS = {
    "Keys of all methods that train blocks": AbstractBlockMethod,
    "Keys of all methods that train entries": AbstractMaskMethod,
    "Keys of masks that also select in an adapter": AbstractFreeMaskMethod,
}
TRAINERS = {"Keys of trainers that draw answers": AbstractSamplingTrainer}

START = """# Recipes

A recipe is one YAML file with the sections `model`, `data`, `method`, `optimizer` and `run`, and `trainer` for
preferences and rewards. `gradselect train mine.yaml` trains by this one:

```yaml
model: {path: Qwen/Qwen2.5-0.5B-Instruct}
data: {format: chat, path: chats.jsonl, validation: 0.02}
method: {name: adagradselect, fraction: 0.2}
optimizer: {lr: 1.0e-4}
run: {output: runs/mine, epochs: 3}
```

This page lists every key; `docs/site/recipe_page.py` makes it from the schema.
[Recipes to start from](../recipes/README.md) are in `recipes/`. Any key can be replaced on the command line:
`gradselect train recipes/gsm8k.yaml optimizer.lr=2e-4` ([command-line.md](command-line.md#keyvalue)).

An unknown key is an error that names the nearest known one. `gradselect train` writes the recipe with every default
filled in to `recipe.yaml` in the folder of the run. A key without a default must be given. `base: other.yaml` takes
another recipe's values, so that a file writes only what differs.

The section `method` is also what [frameworks](frameworks.md) and `gs.method({...})` take.
"""
DATA_TEXT = "The key `format` says which form the examples have ([data.md](data.md)).\n\n"
METHOD_TEXT = (
    "The key `name` says which method it is ([which to take](choose.md)). The `seed` of a policy or mask is that of "
    "the run.\n\n"
)
TRAINER_TEXT = "Without this section a run is supervised fine-tuning. See [preference.md](preference.md).\n"
ABSURD = 10**4
NO_KEYS = ["No keys of its own.", ""]


def page() -> str:
    """Return the text of the page."""
    schema = Recipe.model_json_schema()
    sections = [START]
    sections += ["## model\n", *section(ModelSettings, schema)]
    sections += ["## data\n", f"{DATA_TEXT}{names_of('data', 'format')}"]
    sections += families("data", "format", DATA, schema)
    sections += ["## method\n", f"{METHOD_TEXT}{names_of('method', 'name')}"]
    sections += families("method", "name", METHODS, schema)
    sections += ["## optimizer\n", *section(OptimizerSettings, schema)]
    sections += ["## run\n", *section(RunSettings, schema)]
    sections += ["## trainer\n", TRAINER_TEXT]
    sections += families("trainer", "name", TRAINERS, schema)
    return "\n".join(sections)


def names_of(key: str, tag: str) -> str:
    """Return a link to each class of a section that has several."""
    titles = [tag_of(kind, tag) for kind in kinds_of(key)]
    links = [f"[{title}](#{key}{tag}-{title.replace(',', '').replace(' ', '-')})" for title in titles]
    return f"One of: {', '.join(links)}.\n"


def families(key: str, tag: str, shared: Mapping[str, type[Settings]], schema: dict[str, Any]) -> list[str]:
    """Return the keys that several classes of a section share, then each class with its own."""
    parts: list[str] = []
    for title, family in shared.items():
        parts += [f"### {title}\n", *table(family, schema, without=(tag, *inherited(family)))]
    for kind in kinds_of(key):
        fields = {
            name: field
            for family in shared.values()
            if issubclass(kind, family)
            for name, field in family.model_fields.items()
        }
        same = [name for name, field in fields.items() if kind.model_fields[name].default == field.default]
        parts += [f"### {key}.{tag}: {tag_of(kind, tag)}\n", *section(kind, schema, without=(tag, *same))]
    return parts


def inherited(kind: type[Settings]) -> set[str]:
    """Return the keys that a class has from its bases."""
    return {key for base in kind.__mro__[1:] for key in getattr(base, "model_fields", {})}


def section(kind: type[Settings], schema: dict[str, Any], *, without: Iterable[str] = ()) -> list[str]:
    """Return what a class says about itself, and the table of its keys."""
    return [about(kind), "", *table(kind, schema, without=without)]


def table(kind: type[Settings], schema: dict[str, Any], *, without: Iterable[str] = ()) -> list[str]:
    """Return a table of the keys of a class, those of its bases last."""
    properties = schema["$defs"].get(kind.__name__) or kind.model_json_schema()
    meanings = meanings_of(kind)
    rows = [
        f"| `{key}` | {kind_of(properties['properties'][key])} | {default_of(field)} | {meanings.get(key, '')} |"
        for key, field in own_first(kind)
        if key not in without
    ]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else NO_KEYS


def own_first(kind: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """Return the fields of a class; those that it inherits last."""
    own = set(inspect.get_annotations(kind))
    return sorted(kind.model_fields.items(), key=lambda item: item[0] not in own)


def about(kind: type[Settings]) -> str:
    """Return the description of a class: its docstring up to the first section."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return escaped(re.split(r"\n+(?:Attributes|Args|Example|Raises):", text)[0], in_table=False)


def meanings_of(kind: type[Settings]) -> dict[str, str]:
    """Return the description of each key, from the docstrings of the class, its bases, and its policy or mask."""
    selector = getattr(kind, "policy_class", None) or getattr(kind, "mask_class", None)
    found: dict[str, str] = {}
    for source in (*reversed(selector.__mro__ if selector else ()), *reversed(kind.__mro__)):
        text = inspect.cleandoc(source.__dict__.get("__doc__") or "")
        for block in re.findall(r"^(?:Attributes|Args):\n((?:(?: {4}.*)?\n?)*)", text, re.MULTILINE):
            for match in KEY.finditer(block):
                meaning = escaped(" ".join(match["text"].split()))
                found |= dict.fromkeys(match["keys"].split(", "), meaning)
    return found


def escaped(text: str, *, in_table: bool = True) -> str:
    """Return the text with what Markdown would take for its own signs kept as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [part if part.startswith("`") else re.sub(r"([*<|]|\b_(?=\w))", r"\\\1", part) for part in parts]
    return "".join(plain).replace("\n", " " if in_table else "\n")


def kind_of(value: Mapping[str, Any]) -> str:
    """Return the values that a key takes, in words."""
    if "anyOf" in value or "oneOf" in value:
        return ", or ".join(dict.fromkeys(kind_of(each) for each in value.get("anyOf") or value["oneOf"]))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    if "$ref" in value:
        return "a section"
    if value.get("type") == "array":
        items = value.get("prefixItems") or [value.get("items", {})]
        return f"{len(items)} of: {kind_of(items[0])}" if "prefixItems" in value else f"list of: {kind_of(items[0])}"
    if value.get("type") == "object":
        return "a mapping"
    words = {"integer": "integer", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}
    return f"{words.get(value.get('type', ''), 'any')}{limits(value)}"


def limits(value: Mapping[str, Any]) -> str:
    """Return the bounds of a number in words, those that only keep absurd values out left out."""
    least, above = value.get("minimum"), value.get("exclusiveMinimum")
    if above is not None and value["type"] == "integer":
        least, above = above + 1, None
    most, below = value.get("maximum"), value.get("exclusiveMaximum")
    bounds = {"from": least, "above": above, "to": most, "below": below}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None and bound < ABSURD]
    return "".join(f" {word}" for word in words)


def default_of(field: FieldInfo) -> str:
    """Return the default as YAML has it."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, str):
        return f"`{value}`" if value.replace("-", "").replace("_", "").isalnum() else f"`{json.dumps(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def kinds_of(key: str) -> list[type[Settings]]:
    """Return the classes of a section that has several."""
    return [kind for kind in classes_in(Recipe.model_fields[key].annotation) if kind is not type(None)]


def classes_in(annotation: Any) -> list[Any]:
    """Return the classes that an annotation names."""
    arguments = getattr(annotation, "__args__", None)
    return [annotation] if not arguments else [kind for each in arguments for kind in classes_in(each)]


def tag_of(kind: type[Settings], key: str) -> str:
    """Return the names under which a recipe asks for a class."""
    return ", ".join(kind.model_fields[key].annotation.__args__)  # pyright: ignore[reportOptionalMemberAccess]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
