"""Docstrings: all examples run, every public name has one, and first lines stand alone in an index of the API."""

import ast
import doctest
import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from safetensors.torch import save_file

import gradselect as gs
from gradselect import integrations

OPENINGS = ("Of ", "What ", "Whether ", "From ", "That ", "How ")
"""Words that do not open a docstring: its first line is a noun phrase or an imperative."""


def sources(package: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of every module, without importing any."""
    yield prefix, package / "__init__.py"
    for module in iter_modules([str(package)]):
        name = f"{prefix}.{module.name}"
        if module.ispkg:
            yield from sources(package / module.name, name)
        else:
            yield name, package / f"{module.name}.py"


SOURCES = dict(sources(Path(gs.__file__).parent, "gradselect"))
WITH_EXAMPLES = [name for name, path in SOURCES.items() if ">>>" in path.read_text("utf-8")]


@pytest.fixture(autouse=True)
def example_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that examples name: two checkpoints that differ in one entry, a data file, recipes, suites."""
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes", "suites"):
        Path(folder).symlink_to(Path(__file__).parent.parent / folder)
    for folder, last in (("base", 4.0), ("tuned", 5.0)):
        Path(folder).mkdir()
        save_file({"weight": torch.tensor([1.0, 2.0, 3.0, last])}, f"{folder}/model.safetensors")
    row = {"question": "How many is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}
    Path("train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft reads an old name
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (ModuleNotFoundError, SystemExit) as error:
        is_ours = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("gradselect")
        if name.startswith(("gradselect.app", "gradselect.adapters", integrations.__name__)) and not is_ours:
            pytest.skip(f"an optional package is missing: {error}")
        raise
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def public_objects() -> Iterator[tuple[str, object]]:
    """Yield every public name of the library with what it stands for."""
    adapters = importlib.import_module("gradselect.adapters") if find_spec("peft") else gs.delta
    for module in (gs, gs.delta, gs.sparsegrad, adapters):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)
    for name, value in vars(gs.salience).items():
        if isinstance(value, gs.salience.AbstractSalience):
            yield f"{gs.salience.__name__}.{name}", type(value)
    for found in iter_modules(integrations.__path__, f"{integrations.__name__}."):
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("gradselect"):
                raise
            continue  # its framework is missing here; `make integrations` runs its examples
        for name, value in vars(module).items():
            if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(found.name):
                yield f"{found.name}.{name}", value


def test_every_public_name_has_an_example_that_runs() -> None:
    parser = doctest.DocTestParser()
    without = []
    for name, value in public_objects():
        text = value.__doc__ or ""
        examples = parser.get_examples(text)
        complete = "Example:" in text and examples and not any(doctest.SKIP in each.options for each in examples)
        if not complete:
            without.append(name)
    assert without == []


def test_no_docstring_opens_with_a_word_that_needs_a_sentence_before_it() -> None:
    found = []
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if text.startswith(OPENINGS):
                    found.append(f"{name}: {text.splitlines()[0]}")
    assert found == []
