"""The pages name files, modules and words that exist, and the code of those that are written to be run runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_batch, tiny_llama
from typer.main import get_command

import gradselect
from gradselect.app.cli.command_line import app
from gradselect.app.compare.suite import Suite, parse_suite
from gradselect.app.recipe import Recipe, load_recipe, merge, parse_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GLOSSARY = ROOT / "docs" / "glossary.md"  # it names the words that are not used
NOT_OUR_WORDS = r"\b(single[ -]weights?|units?|witness(es)?|contests?|choosers?)\b"
OF_MODELS = r"<!-- answers: begin -->.*?<!-- answers: end -->"
FOLDERS = "src|docs|tests|benchmarks|examples|recipes|suites|quickstart"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


EACH_APART = ("index", "quickstart", "choose", "training-loops", "coming-from")  # blocks of these pages run alone
IN_A_ROW = ("write-a-policy", "write-a-mask", "write-a-rule")  # blocks of these go on from one another


def blocks_of_code(page: str) -> list[tuple[str, str]]:
    """Return each Python block of a page and the heading above it."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found, heading = [], ""
    for match in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```", text, re.MULTILINE | re.DOTALL):
        heading = match["heading"] or heading
        if match["code"]:
            found.append((heading, match["code"]))
    assert found
    return found


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@each_page
def test_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<![\w/.-])app/[\w./-]*\w", text):
        assert (ROOT / "src" / "gradselect" / path).exists(), path


@each_page
def test_files_hold_the_functions_that_a_page_finds_there(page: Path):
    for path, name in re.findall(r"`(src/[\w./]+\.py)`: `(?:\w+\.)?(\w+)`", page.read_text(encoding="utf-8")):
        assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{path}: {name}"


@each_page
def test_modules_and_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w./-])gradselect((?:\.\w+)+)", text):
        assert exists(name.removeprefix(".")), f"gradselect{name}"
    for name in re.findall(r"\bgs((?:\.[A-Za-z]\w*)+)", text):
        assert exists(name.removeprefix(".")), f"gs{name}"
    for module, names in re.findall(r"from (gradselect[\w.]*) import ([\w, ]+)", text):
        for name in names.split(","):
            assert exists(f"{module}.{name.strip()}".removeprefix("gradselect.")), f"{module}.{name}"


def exists(name: str) -> bool:
    """Whether `gradselect.<name>` is a module, or something in one."""
    found = gradselect
    for position, part in enumerate(parts := name.split(".")):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(["gradselect", *parts[: position + 1]]))
            except ModuleNotFoundError as error:
                is_of_framework = not str(error.name).startswith("gradselect")
                return is_of_framework and is_in_file(parts[: position + 1], parts[position + 1 :])
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def is_in_file(module: list[str], names: list[str]) -> bool:
    """Whether the file of a module whose framework is not installed here defines the name, if there is one."""
    path = ROOT.joinpath("src", "gradselect", *module).with_suffix(".py")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return path.exists() and all(re.search(rf"^(def|class) {name}\b", text, re.MULTILINE) for name in names[:1])


@pytest.mark.parametrize("page", [page for page in PAGES if page != GLOSSARY], ids=lambda page: page.name)
def test_one_word_for_one_thing(page: Path):
    text = re.sub(OF_MODELS, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.search(NOT_OUR_WORDS, text, re.IGNORECASE)
    assert found is None, f"{found}: see docs/glossary.md"


ALONE = [pytest.param(code, id=f"{page}: {heading}") for page in EACH_APART for heading, code in blocks_of_code(page)]


@pytest.mark.parametrize("code", ALONE)
def test_a_block_of_code_runs(code: str):
    """Each with a fresh model and loader."""
    run(code)


@pytest.mark.parametrize("page", IN_A_ROW)
def test_the_code_of_a_page_runs_in_a_row(page: str):
    run("\n".join(code for _, code in blocks_of_code(page)))


def run(code: str) -> None:
    model = tiny_llama()
    loader = [tiny_batch(model, seed=seed) for seed in range(4)]
    compiled = compile(code, "page", "exec", dont_inherit=True)
    exec(compiled, {"torch": torch, "gs": gradselect, "model": model, "loader": loader})


BLOCKS_OF_YAML = [
    pytest.param(match[1], id=f"{page.stem}: {match[1].strip().splitlines()[0]}")
    for page in PAGES
    for match in re.finditer(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


def commands_of(page: Path) -> list[str]:
    """Return the lines within fences that run `gradselect`."""
    lines, is_code = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        if is_code and re.match(r"(\w+=\S+ )*gradselect [a-z]", line):
            lines.append(line.split("#")[0].strip().removesuffix("\\"))
    return lines


COMMANDS = [(page.name, line) for page in PAGES for line in dict.fromkeys(commands_of(page))]


@pytest.mark.parametrize("block", BLOCKS_OF_YAML)
def test_a_block_of_yaml_is_valid(block: str):
    """A part of a recipe or of a suite stands in a whole one; a section of a framework holds a method."""
    values = yaml.safe_load(block)
    if "gradselect" in values:
        gradselect.method({key: value for key, value in values["gradselect"].items() if key != "jsonl"})
    elif values.keys() <= Suite.model_fields.keys():
        parse_suite(merge(suite_of_pages(), values), source="page")
    else:
        sections = values if values.keys() <= Recipe.model_fields.keys() else {"data": values}
        whole = merge(suite_of_pages()["recipe"], {"method": {"name": "full"}, "optimizer": {"lr": 1.0}})
        parse_recipe(merge(merge(whole, {"run": {"output": "out"}}), sections), source="page")


def suite_of_pages() -> dict[str, Any]:
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("```yaml\n# mine.yaml")[1].split("```")[0])


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text)
def test_a_command_of_a_page_has_these_options_and_keys(page: str, line: str):
    words = shlex.split(line)
    words = words[words.index("gradselect") + 1 :]
    command: Any = get_command(app)
    while commands := getattr(command, "commands", {}):
        assert words[0] in commands, line
        command = commands[words.pop(0)]
    own = words[: words.index("--")] if "--" in words else words
    known = {name for option in command.params for name in option.opts} | {"--help"}
    assert {word.split("=")[0] for word in own if word.startswith("--")} <= known, line
    if own and (ROOT / own[0]).is_file() and own[0].startswith("recipes/"):
        load_recipe(ROOT / own[0], [word for word in own[1:] if re.match(r"[a-z_.]+=", word)])


def test_the_reference_of_recipes_is_that_of_the_schema(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    recipe_page = importlib.import_module("recipe_page")
    text = recipe_page.PAGE.read_text(encoding="utf-8")
    assert text == recipe_page.page(), "write it anew: python docs/site/recipe_page.py"


def test_every_key_of_a_recipe_has_a_meaning():
    rows = [line for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "docs" / "site" / "zensical.toml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f'= "{page.name}"' not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_shows_what_a_run_of_it_shows(path: Path):
    """Every cell has run, in order and without an error, and nothing names a folder of the machine that ran it."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert [output for output in outputs if output["output_type"] == "error"] == []
    texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]
    assert [text for text in texts if re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)] == []
