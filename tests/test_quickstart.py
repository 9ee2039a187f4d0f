"""`gradselect quickstart`: the recipe of the repository on the base that comes along, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.quickstart import base_folder, files, recipe_file, run
from gradselect.app.recipe import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few problems instead of thousands, and a few timed steps."""
    for name, value in {"NUM_TRAIN": 64, "NUM_TEST": 2, "TIMED_STEPS": 1}.items():
        monkeypatch.setattr(run, name, value)


@pytest.mark.usefixtures("few_problems")
def test_the_quickstart_trains_by_the_recipe_of_the_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only paths and steps differ, so the weights are those of the recipe."""
    output = tmp_path / "new" / "quick"
    with pytest.raises(SystemExit) as raised:
        main(["quickstart", str(output), "--steps", "2"])
    assert raised.value.code == 0
    said = capsys.readouterr().out
    assert "right answers, 2 unseen problems" in said
    assert f"next: gradselect chat {output / 'run'}" in said
    assert (output / "run" / "model.safetensors").exists()
    assert (output / "blocks.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((output / "quickstart.json").read_text())
    assert summary["accuracy_before"] == 0
    assert summary["state_bytes"]["ours"] < summary["state_bytes"]["full"]

    own = {"model.path": base_folder(), "data.path": output / "train.jsonl", "run.output": output / "run"}
    words = [f"{key}={value}" for key, value in own.items()]
    wanted = load_recipe(recipe_file(), [*words, "run.steps=2"])
    assert load_recipe(output / "run" / "recipe.yaml") == wanted


@pytest.mark.usefixtures("few_problems")
def test_a_folder_that_holds_something_is_refused_and_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as raised:
        main(["quickstart", str(tmp_path)])
    assert raised.value.code == 2
    assert f"gradselect quickstart {tmp_path}-2" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_installation_without_the_base_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HERE", tmp_path)
    monkeypatch.setattr(files, "REPOSITORY", tmp_path)
    with pytest.raises(UsageError, match="has no base of the quickstart"):
        base_folder()
    with pytest.raises(UsageError, match=r"has no quickstart\.yaml of the quickstart"):
        recipe_file()


def test_what_a_wheel_holds_comes_before_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    monkeypatch.setattr(files, "HERE", tmp_path)
    assert base_folder() == tmp_path / "base"
