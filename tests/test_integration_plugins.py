"""Parts of the plug-ins that need no framework; `make integrations` runs the plug-ins inside theirs."""

from __future__ import annotations

import pytest

import gradselect as gs
from gradselect.integrations.plugin_path import PLUGIN_PATHS, plugin_path
from gradselect.integrations.words import read_words


def test_the_file_of_each_framework_lies_where_no_import_finds_another_package_in_its_place():
    """ms-swift puts the file's folder in front of `sys.path`, also for processes that it starts."""
    for framework in PLUGIN_PATHS:
        path = plugin_path(framework)
        assert path.is_file()
        assert {each.name for each in path.parent.iterdir()} - {"__pycache__"} == {"__init__.py", "plugin.py"}


def test_an_unknown_framework_is_refused_with_those_that_are_known():
    with pytest.raises(
        gs.UsageError, match="no plug-in file for 'axolotl'; frameworks that load one by its path: swift"
    ):
        plugin_path("axolotl")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("id3", {"name": "id3"}),
        ("name=id3 density=0.01", {"name": "id3", "density": 0.01}),
        (["uniform", "always=[embedding, norm]"], {"name": "uniform", "always": ["embedding", "norm"]}),
        ("badam jsonl=a=b.jsonl", {"name": "badam", "jsonl": "a=b.jsonl"}),
    ],
)
def test_words_become_the_keys_of_a_method(words: str | list[str], keys: dict[str, object]):
    assert read_words(words, source="--optim_args") == keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--optim_args='' names no method; write e.g. --optim_args 'adagradselect fraction=0.2"),
        ("fraction=0.2", "--optim_args='fraction=0.2' names no method"),
        ("uniform count", "--optim_args has the word 'count', which is no key=value"),
        ("adagradselect fraction=", "--optim_args has 'fraction=' without a value"),
        ("uniform count=1 count=2", "--optim_args has 'count' twice"),
        ("uniform always=[norm", "--optim_args has 'always=\\[norm', whose value is no YAML"),
    ],
)
def test_words_that_say_no_method_are_refused(words: str, message: str):
    with pytest.raises(gs.UsageError, match=message):
        read_words(words, source="--optim_args")
