"""`gradselect launch`: commands that know nothing of gradselect train selectively."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preference_support import save_model, tokenizer
from safetensors.torch import load_file
from test_integration_transformers import arguments
from tiny_models import tiny_llama
from transformers import Trainer, TrainerState

import gradselect as gs
from gradselect.app.cli import main
from gradselect.app.cli.launch import _parse
from gradselect.integrations.launch import environment, make_trainers_selective, num_trained
from gradselect.integrations.transformers import SelectiveTraining


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [{"prompt": f"{i} {i + 1}", "completion": f" {i + 2}"} for i in range(12)]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_trl_sft_trains_selectively_in_processes_that_the_command_starts(base, tmp_path, monkeypatch, capfd):
    """A shell starts `trl sft`, which starts two ranks; together they train exactly what the records say."""
    settings = "--max_steps 4 --learning_rate 1e-2 --use_cpu --bf16 False --dtype float32 --report_to none"
    settings += " --num_processes 2 --ddp_find_unused_parameters True --gradient_checkpointing False"
    trl = Path(sys.executable).parent / "trl"
    command = f"{trl} sft --model_name_or_path {base}/model --dataset_name {base}/data --output_dir out {settings}"
    method = ("adagradselect", "count=1", "always=head", "jsonl=selection.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["launch", *method, "--", "sh", "-c", command])
    said = capfd.readouterr().err
    assert end.value.code == 0, said
    assert "gradselect launch: 1 training with adagradselect" in said
    records = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all("head" in record["selected"] for record in records)
    before = load_file(base / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {block_of(name) for name in moved} == {name for record in records for name in record["selected"]}


def block_of(name):
    """The block of a parameter of a Llama."""
    if name.startswith("model.layers."):
        return f"layer.{name.split('.')[2]}"
    return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}[name]


def test_a_command_in_which_nothing_trains_is_an_error(capfd):
    with pytest.raises(SystemExit) as end:
        main(["launch", "uniform", "count=1", "--", sys.executable, "-c", "print(1)"])
    assert end.value.code == 2
    said = capfd.readouterr()
    assert said.out == "1\n"
    assert "no Trainer of transformers has trained in it, so nothing was selective" in said.err


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", 143)]
)
def test_exit_codes_of_the_command_are_kept(code, expected, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["launch", "full", "--", sys.executable, "-c", code])
    assert end.value.code == expected


def test_another_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')\n")
    env = environment({"name": "full"}, jsonl=None, trained=tmp_path / "trained")
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run([sys.executable, "-c", "pass"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n"


def test_a_python_without_gradselect_is_named(tmp_path):
    """It would train everything. The transformers of this test is a stand-in."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "trainer.py").touch()
    env = environment({"name": "full"}, jsonl=None, trained=tmp_path / "trained")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"].split(os.pathsep)[0], str(tmp_path)])
    code = "import sys; sys.modules['gradselect'] = None; import transformers.trainer"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{sys.executable} -m pip install gradselect" in done.stderr


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["full"], {"name": "full"}),
        (["id3", "density=0.01", "among=*.mlp.*"], {"name": "id3", "density": 0.01, "among": "*.mlp.*"}),
        (["uniform", "method.count=2", "fraction=null"], {"name": "uniform", "count": 2, "fraction": None}),
        (
            ["uniform", "count=1", "always=[embedding, norm]"],
            {"name": "uniform", "count": 1, "always": ["embedding", "norm"]},
        ),
    ],
)
def test_words_before_the_command(words, settings):
    assert _parse([*words, "--", "trl", "sft"])[0] == settings
    gs.method(settings)


@pytest.mark.parametrize(
    "text",
    ["method: {name: uniform, count: 3}\nrun: {steps: 4}\n", "name: uniform\ncount: 3\n"],
    ids=["recipe", "section"],
)
def test_the_method_of_a_file(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    settings, command = _parse([str(tmp_path / "recipe.yaml"), "count=2", "--", "trl", "sft", "--", "x=1"])
    assert gs.method(settings).model_dump()["count"] == 2
    assert command == ["trl", "sft", "--", "x=1"]


def test_a_word_displaces_its_rival_in_a_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: {name: uniform, fraction: 0.3, always: norm}\n")
    settings, _ = _parse([str(tmp_path / "recipe.yaml"), "count=2", "--", "trl"])
    assert settings == {"name": "uniform", "count": 2, "always": "norm"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["uniform", "count=1", "method.count=2", "--", "trl"], "has 'count' twice"),
        (["uniform", "count=1", "jsonl=no/such.jsonl", "--", "trl"], "jsonl='no/such.jsonl' is no file in a folder"),
        (["uniform", "count=1", "jsonl=5", "--", "trl"], "jsonl=5 is no file"),
        (["uniform", "count=1", "jsonl=.", "--", "trl"], "jsonl='.' is no file"),
        (["adagradselect", "trl", "sft"], "needs -- before the command"),
        (["fraction=0.2", "--", "trl"], "needs a method first, got 'fraction=0.2'"),
        (["adagradselect", "--"], "no command behind --"),
        (["adagradselect", "fraction", "--", "trl"], "has the word 'fraction', which is no key=value"),
        (["adagradselect", "fractoin=0.2", "--", "trl"], "fractoin: unknown key, did you mean 'fraction'"),
        (["lora", "--", "trl"], "'lora' does not select"),
        (["nothing.yaml", "--", "trl"], "nothing.yaml: no such recipe"),
        (["uniform", "count=1", "--", "no-such-command"], "'no-such-command' cannot be started: No such file"),
    ],
)
def test_bad_words(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["launch", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_launcher_within_a_launcher_is_refused(monkeypatch, capsys):
    """The outer one would count no training, and end with an error after all of it."""
    monkeypatch.setenv("GRADSELECT_LAUNCH", "{}")
    with pytest.raises(SystemExit) as end:
        main(["launch", "full", "--", "true"])
    assert end.value.code == 2
    assert "gradselect launch within gradselect launch" in capsys.readouterr().err


def test_looking_for_the_module_of_trainers_leaves_them_selective(tmp_path):
    """Libraries look for a module to know if a package is installed, and import it later."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "trainer.py").write_text("Trainer = 1\n")
    env = environment({"name": "full"}, jsonl=None, trained=tmp_path / "trained")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"].split(os.pathsep)[0], str(tmp_path)])
    code = "import sys, types, importlib.util as u; fake = types.ModuleType('gradselect.integrations.launch');"
    code += "fake.make_trainers_selective = lambda kind, settings: print('made', kind);"
    code += "sys.modules.update({n: fake for n in ('gradselect', 'gradselect.integrations', fake.__name__)});"
    code += "u.find_spec('transformers.trainer'); u.find_spec('transformers.trainer'); import transformers.trainer"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "made 1\n"


def test_each_machine_counts_its_trainings(tmp_path, monkeypatch):
    """The launcher of the second machine would say that nothing has trained."""

    class Trainer:
        def __init__(self):
            self.callbacks = []

        def add_callback(self, callback):
            self.callbacks.append(callback)

    trained = tmp_path / "trained"
    monkeypatch.setattr(SelectiveTraining, "attach", lambda self, trainer: None)
    make_trainers_selective(Trainer, {"method": {"name": "full"}, "jsonl": None, "trained": str(trained)})
    for is_first_of_its_machine in (True, False):
        state = TrainerState(is_local_process_zero=is_first_of_its_machine, is_world_process_zero=False)
        Trainer().callbacks[-1].on_train_begin(None, state, None)
    assert num_trained(trained) == 1


def test_a_trainer_with_an_optimizer_of_its_own_is_told_who_brings_another(tmp_path):
    settings = {"method": {"name": "full"}, "jsonl": None, "trained": str(tmp_path / "trained")}

    class Launched(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    make_trainers_selective(Launched, settings)
    model = tiny_llama()
    with pytest.raises(gs.UsageError, match=r"^`gradselect launch` gives every Trainer .* leave out optimizers="):
        Launched(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))


def test_help_needs_no_package_of_the_command_line(capsys):
    for words in (["launch", "--help"], ["launch"], ["plugin-path", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"Usage: gradselect {words[0]}")


def test_the_path_of_a_plugin(capsys):
    with pytest.raises(SystemExit) as end:
        main(["plugin-path", "swift"])
    assert end.value.code == 0
    assert Path(capsys.readouterr().out.strip()).suffix == ".py"
    with pytest.raises(SystemExit) as end:
        main(["plugin-path", "axolotl"])
    assert end.value.code == 2
