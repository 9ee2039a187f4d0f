"""README, its picture and the results say what the result files say; the README is short, and its Python runs."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import torch
from tiny_models import tiny_batch, tiny_llama

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
readme = importlib.import_module("readme")


def test_tables_are_those_of_the_result_files():
    readme.main(["--check"])  # exits with the name of a file that differs


def test_it_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_python_block_trains():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    model = tiny_llama()
    before = [weight.clone() for weight in model.model.layers.parameters()]
    loader = [tiny_batch(model, seed=seed) for seed in range(4)]
    exec(blocks[0], {"model": model, "loader": loader})
    assert not all(map(torch.equal, before, model.model.layers.parameters()))


def test_every_file_in_the_tree_exists():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    (tree,) = [block for block in text.split("```")[1::2] if "\nsrc/gradselect/" in block]
    folders = [
        ROOT / name for name in ("src", "suites", "recipes", "examples", "quickstart", "benchmarks", "docs", "tests")
    ]
    known = {path.name for folder in folders for path in (folder, *folder.rglob("*"))}
    assert {name.rstrip("/") for name in re.findall(r"(_?\w+\.py|\w+/)", tree)} <= known


def test_the_picture_has_a_file_for_light_and_one_for_dark():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    light, dark = (re.search(rf' {key}="(docs/images/[\w-]+\.svg)"', text) for key in ("src", "srcset"))
    assert light is not None
    assert dark is not None
    drawn = [(ROOT / found[1]).read_text(encoding="utf-8") for found in (light, dark)]
    colour = re.compile(r"#[0-9a-f]{6}\b")
    assert colour.sub("", drawn[0]) == colour.sub("", drawn[1])
    assert not set(colour.findall(drawn[0])) & set(colour.findall(drawn[1]))


def test_outside_of_the_repository_every_link_of_it_is_whole():
    """The package index shows README.md, and knows no files."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for change in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r'\]\(([^)\s]+)\)| src(?:set)?="([^"]+)"', text)
    assert len(links) > 20
    assert [link for pair in links for link in pair if link and not link.startswith(("https://", "#"))] == []
