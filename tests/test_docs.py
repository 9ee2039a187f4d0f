"""The pages name files, modules and words that exist, and the code of docs/training-loops.md runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama

import gradselect

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GLOSSARY = ROOT / "docs" / "glossary.md"  # it names the words that are not used
NOT_OUR_WORDS = r"\b(single[ -]weights?|units?|witness(es)?|contests?|choosers?)\b"
FOLDERS = "src|docs|tests|benchmarks|examples|recipes|suites|quickstart"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks_of_code() -> list[tuple[str, str]]:
    """Each Python block of the page and the heading above it."""
    text = (ROOT / "docs" / "training-loops.md").read_text(encoding="utf-8")
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
    found = re.search(NOT_OUR_WORDS, page.read_text(encoding="utf-8"), re.IGNORECASE)
    assert found is None, f"{found}: see docs/glossary.md"


@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in blocks_of_code()])
def test_code_for_training_loops_runs(code: str):
    """Each with a fresh model and loader."""
    model = tiny_llama()
    loader = [tiny_batch(model, seed=seed) for seed in range(4)]
    exec(code, {"torch": torch, "gs": gradselect, "model": model, "loader": loader})
