"""The command line: a user's mistake gives one message and exit code 2, and no file on the disk is harmed."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import write_model, write_recipe, write_sums
from transformers import LlamaConfig, LlamaForCausalLM

import gradselect
from gradselect.app.cli import command_line, main
from gradselect.usage import install_command, lacking_packages

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model, data, a recipe and broken variants of each."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    write_recipe(folder, folder / "recipe.yaml")
    write_broken(folder)
    return folder


def write_broken(folder: Path) -> None:
    """Files and models that cannot be used."""
    lines = (folder / "sums.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*lines[:3], '{"question": "?', *lines[3:]]))
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(lines[0].encode() + b'\n{"question": "\xfc?", "answer": ""}\n')
    (folder / "sums.xlsx").write_text("x")
    (folder / "broken.yaml").write_text("model: [")

    shared = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    flat = write_model(folder / "flat")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, max_position_embeddings=64, **shared)).save_pretrained(flat)
    torn = write_model(folder / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    lacking = write_model(folder / "lacking")
    config = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the text on stderr of a command that exits with code 2."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    said = capsys.readouterr()
    assert raised.value.code == 2, said
    assert "Traceback" not in said.err
    return said.err


BAD_TRAINING = {
    "unknown method": (["method.name=adagradselct"], "did you mean 'adagradselect'"),
    "unknown key": (["run.stepz=3"], "did you mean 'steps'"),
    "unknown key of the method": (["method.name=uniform", "method.conut=1"], "did you mean 'count'"),
    "fraction of zero": (["method.name=uniform", "method.fraction=0"], "outside (0, 1]"),
    "fraction above one": (["method.name=adagradselect", "method.fraction=1.2"], "outside (0, 1]"),
    "more blocks than there are": (["method.name=uniform", "method.count=99"], "count=99 is more than the 6 blocks"),
    "no such block": (["method.name=fixed", "method.names=[layer.9]"], "layer.9"),
    "no such block always": (["method.name=lisa", "method.always=[emedding]"], "emedding"),
    "no override": (["run.steps"], "write key=value"),
    "no such model": (["model.path=./nix"], "no such folder"),
    "no such model on the hub": (["model.path=nobody/nothing"], "cannot be used"),
    "torn model": (["model.path={place}/torn"], "model.path="),
    "model without some weights": (["model.path={place}/lacking"], "lacks 18 weights"),
    "model without layers": (["model.path={place}/flat", "method.name=uniform", "method.count=1"], "repeated"),
    "no such data": (["data.path={place}/nix.jsonl"], "no such file"),
    "broken line": (["data.path={place}/broken.jsonl"], "broken.jsonl, line 4: broken JSON"),
    "empty data": (["data.path={place}/empty.jsonl"], "holds no rows"),
    "unknown encoding": (["data.path={place}/latin.jsonl"], "latin.jsonl, line 2: not UTF-8"),
    "unknown ending": (["data.path={place}/sums.xlsx"], "'.xlsx'"),
    "missing column": (['data.prompt="{query}"'], "line 1 has no column 'query'; its columns are: question, answer"),
    "too long": (["data.max_length=65"], "more than the model's 64 positions"),
    "rows in place of a share": (
        ["data.validation=100"],
        "data.validation: 100 is no share of the rows; write one",
    ),
    "nothing to learn": (["data.max_length=1"], "leaves nothing of data.path"),
    "unknown tracker": (["run.report_to=[trackio]"], "pip install trackio"),
    "diverging": (
        ["optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.max_grad_norm=0", "run.max_skipped_steps=0"],
        "is nan; training has",
    ),
}


@pytest.mark.parametrize(("overrides", "said"), BAD_TRAINING.values(), ids=list(BAD_TRAINING))
def test_what_cannot_be_trained_is_said_and_leaves_no_trace(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    overrides = [override.replace("{place}", str(place)) for override in overrides]
    before = sorted(path.name for path in place.iterdir())
    error = fails(capsys, "train", str(place / "recipe.yaml"), f"run.output={tmp_path / 'out'}", *overrides)
    assert said in " ".join(error.split())
    assert sorted(path.name for path in place.iterdir()) == before
    # Once training has begun, what it wrote stays.
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / "run.json").exists()


def test_an_output_that_exists_is_refused_and_not_touched(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    recipe = str(place / "recipe.yaml")
    error = fails(capsys, "train", recipe, f"run.output={tmp_path}")
    assert "exists and is not empty" in error
    assert "--resume" in error
    assert "holds no run to resume" in fails(capsys, "train", recipe, f"run.output={tmp_path}", "--resume")
    assert "exists" in fails(capsys, "train", recipe, f"run.output={tmp_path / 'notes.txt'}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_launchers_that_shard_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    assert f"does not run under {name}" in fails(capsys, "train", str(place / "recipe.yaml"))


def test_an_empty_output_folder_is_as_good_as_none(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", str(place / "recipe.yaml"), f"run.output={tmp_path}", "run.steps=1"])
    assert raised.value.code == 0
    assert (tmp_path / "model.safetensors").exists()


def test_an_interrupted_run_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradselect.app.train.trainer.RunTrainer.compute_loss", interrupt)
    with pytest.raises(SystemExit) as raised:
        main(["train", str(place / "recipe.yaml"), f"run.output={tmp_path / 'out'}"])
    assert raised.value.code == 130
    assert f"gradselect train {place}/recipe.yaml run.output={tmp_path}/out --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nix.yaml"], "nix.yaml: no such recipe"),
        (["train", "{place}/broken.yaml"], "no valid YAML"),
        (["train"], "Missing argument"),
        (["tarin"], "No such command"),
        (["train", "{place}/recipe.yaml", "--resum"], "No such option"),
        (["evaluate", "{place}/model", "--task", "gsm9k"], "'gsm9k' is not one of"),
        (["evaluate", "{place}/model", "--task", "loss"], "has no data of its own"),
        (["evaluate", "{place}/model", "--task", "loss", "--data", "{place}/broken.jsonl"], "line 4: broken JSON"),
        (["evaluate", "./nix", "--task", "loss", "--data", "{place}/sums.jsonl"], "nix"),
        (["evaluate", "{place}/model", "--task", "gsm8k", "--limit", "0"], "limit=0"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    error = fails(capsys, *(argument.replace("{place}", str(place)) for argument in arguments))
    assert said in " ".join(error.replace("│", "").split())


def test_a_trained_model_is_evaluated_with_the_command_that_training_names(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(place / "recipe.yaml"), f"run.output={tmp_path / 'out'}", "run.steps=1"])
    *_, also, last = capsys.readouterr().out.strip().splitlines()
    assert also == f"also: gradselect report {tmp_path / 'out'}, gradselect chat {tmp_path / 'out'}"
    assert last.startswith("next: gradselect evaluate")
    words = ["evaluate", str(tmp_path / "out"), "--task", "loss", "--data", str(place / "sums.jsonl")]
    with pytest.raises(SystemExit) as raised:
        main([*words, "--prompt", "{question}\\n", "--completion", " {answer}", "--output", str(tmp_path / "eval")])
    assert raised.value.code == 0
    assert "nats per token" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["settings"]["prompt"] == "{question}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["evaluate", "-h"]])
def test_help_and_version_are_there(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 0
    said = capsys.readouterr().out
    assert (gradselect.__version__ if arguments == ["--version"] else "Usage") in said


def test_the_package_itself_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gradselect", "--version"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("gradselect", run_name="__main__")
    assert raised.value.code == 0
    assert gradselect.__version__ in capsys.readouterr().out


def test_packages_that_an_extra_lacks_are_named_as_pip_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name of ours is needed to install what a command lacks."""
    monkeypatch.setattr("importlib.metadata.requires", lambda _: REQUIREMENTS)
    lacking = lacking_packages("train")
    assert install_command(lacking) == "pip install no-such-package 'other-one[x]>=2.0' 'rich>=999'"
    assert [package.lack for package in lacking[:2]] == ["no no-such-package", "no other-one"]
    assert lacking_packages("tune") == []


def test_a_package_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: REQUIREMENTS)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    old = f"rich {version('rich')} is older than 999"
    assert capsys.readouterr().err == f"warning: {old}; run: pip install 'rich>=999'\n"


def test_a_name_that_a_package_lacks_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ImportError("cannot import name 'new' from 'old'")

    monkeypatch.setattr(command_line, "app", fails)
    with pytest.raises(ImportError, match="cannot import name"):
        main(["train"])
    monkeypatch.setattr("importlib.metadata.requires", lambda _: REQUIREMENTS)
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: cannot import name 'new' from 'old'; run: pip install no-such-package")


REQUIREMENTS = [
    "torch>=2.11",
    "gradselect[transformers]; extra == 'train'",
    "typer>=0.20; extra == 'train'",
    'no-such-package; extra == "train"',
    "other-one[x]>=2.0; python_version > '3' and extra == 'train'",
    "rich>=999; extra == 'train'",
    "optuna>=4.5; extra == 'tune'",
]
