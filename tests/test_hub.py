"""An id on the hub without a network: one message at once, or the copy on this machine; a slow hub is no absent one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from train_fixtures import recipe_values, write_model, write_recipe, write_sums

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.data import read_hub_rows
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import parse_recipe
from gradselect.app.runtime import HubId, check_ids
from gradselect.app.runtime.hub import _unreachable, check_hub

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The hub is switched on, refuses connections, and nothing is in the cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    _unreachable.cache_clear()
    yield
    _unreachable.cache_clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    write_recipe(folder, folder / "recipe.yaml")
    suite = {
        "name": "s",
        "recipe": {name: recipe_values(folder)[name] for name in ("model", "data")},
        "methods": {"full": {"method": {"name": "full"}, "rates": [1e-3]}},
    }
    suite["recipe"]["run"] = {"steps": 1}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "{place}/recipe.yaml", "model.path=some/model"], "model.path='some/model'"),
        (["train", "{place}/recipe.yaml", "data.path=some/data"], "data.path='some/data'"),
        (["plan", "{place}/recipe.yaml", "model.path=gpt2"], "model.path='gpt2'"),
        (["data", "{place}/recipe.yaml", "data.path=some/data"], "data.path='some/data'"),
        (["tune", "{place}/recipe.yaml", "model.path=some/model"], "model.path='some/model'"),
        (["evaluate", "some/model", "--task", "gsm8k"], "model='some/model'"),
        (["evaluate", "{place}/model", "--task", "gsm8k"], "data='openai/gsm8k'"),
        (["compare", "{place}/suite.yaml", "recipe.model.path=some/model"], "model.path='some/model'"),
    ],
)
def test_without_a_network_an_id_is_refused_in_one_message(
    words: list[str], key: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The libraries tried six times, for half a minute, and each command did so for each file."""
    with pytest.raises(SystemExit) as ended:
        main([word.replace("{place}", str(place)) for word in words])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{key} cannot be used" in said
    assert f"the hub {NOWHERE} cannot be reached" in said
    assert len(said.splitlines()) == 1


def test_a_plan_needs_no_data(place: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(place / "recipe.yaml"), "data.path=some/data"])
    assert ended.value.code == 0


@pytest.mark.parametrize("change", [{"model": {"path": "some/model"}}, {"data": {"path": "some/data"}}])
def test_the_library_refuses_it_too(change: dict[str, dict[str, str]], place: Path) -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        read_inputs(parse_recipe(recipe_values(place, **change), source="recipe"))


def test_a_copy_on_this_machine_is_used_and_nothing_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "hub/models--some--model/snapshots/abc").mkdir(parents=True)
    (note,) = check_ids([HubId("model.path", "some/model", "model"), HubId("model.path", "some/model", "model")])
    assert "the copy of some/model on this machine is used" in note
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_switched_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="no copy of it from the hub on this machine, and HF_HUB_OFFLINE is set"):
        check_hub("some/model", key="model.path", kind="model")


def test_a_hub_that_answers_slowly_is_not_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_hub("some/model", key="model.path", kind="model")
        assert list(check_ids([HubId("model.path", "some/model", "model")])) == []
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["./model", "/a/b", "a/b/c", "model.path with spaces", "~/model"])
def test_what_can_be_no_id_is_left_to_other_checks(name: str) -> None:
    check_hub(name, key="model.path", kind="model")


@pytest.mark.parametrize(
    "words",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample ...",
        "BuilderConfig 'mian' not found. Available: ['main', 'socratic']",
    ],
)
def test_configurations_of_a_data_set_are_named_with_what_to_type(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ValueError(words)

    (tmp_path / "hub/datasets--openai--gsm8k/snapshots/abc").mkdir(parents=True)
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UsageError, match=r"several configurations: main, socratic; .* data\.subset=main"):
        read_hub_rows("openai/gsm8k", key="data.path", origin="gsm8k", subset_key="data.subset")


def written(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"1.jsonl": '{"a": 1, "b": "x"}\n', "2.jsonl": '{"a": 1, "c": "x"}\n'}, "column names don't match"),
        ({"1.jsonl": '{"a": \n'}, "JSON"),
        ({"data.py": "import datasets\n"}, "Dataset scripts are no longer supported"),
        ({"1.jsonl": '{"a": 1}\n'}, 'Unknown split "test"'),
    ],
    ids=["other columns", "damaged", "script", "no such split"],
)
def test_a_data_set_that_cannot_be_read_is_one_message(
    files: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of these, only the last was an error that is caught; the others ended in a traceback."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name = written(tmp_path / "data", files)
    with pytest.raises(UsageError, match=f"data.path=.* cannot be read as a data set on the hub: .*{reason}"):
        read_hub_rows(name, key="data.path", origin="data", split="test", subset_key="data.subset")


def test_control_c_while_a_data_set_is_read_ends_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(KeyboardInterrupt):
        read_hub_rows(str(tmp_path), key="data.path", origin="data", subset_key="data.subset")
