"""gradselect export: what goes to the hub and what its card says, and llama.cpp's converter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_report_run import evaluation
from train_fixtures import ADAGRADSELECT, parse, quiet, write_model, write_sums
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradselect.app.cli import main
from gradselect.app.export.card import _use
from gradselect.app.models import merge_command
from gradselect.app.results import RunRecord
from gradselect.app.runtime.hub import _unreachable
from gradselect.app.train import train
from gradselect.files import sealed

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

CONVERTER = """
import argparse, pathlib, sys
options = argparse.ArgumentParser()
options.add_argument("model"), options.add_argument("--outfile"), options.add_argument("--outtype")
given = options.parse_args()
if given.outtype == "bf16":
    pathlib.Path(given.outfile).write_text("half")
    sys.exit("ModuleNotFoundError: No module named 'gguf'")
names = sorted(path.name for path in pathlib.Path(given.model).iterdir())
pathlib.Path(given.outfile).write_text(f"{given.outtype} {'config.json' in names}")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("export")
    write_model(root / "model")
    write_sums(root / "sums.jsonl")
    for name, method in {"run": ADAGRADSELECT, "lora": {"name": "lora", "rank": 2}}.items():
        train(parse(root, method=method, run={"output": str(root / name), "steps": 2}), console=quiet())
    evaluation(root / "judged", model=root / "run")
    return root


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything; returns what it was given."""
    taken = SimpleNamespace(files={}, repositories={})

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            assert exist_ok
            taken.repositories[name] = private
            return SimpleNamespace(repo_id=name)

        def create_commit(self, name, operations, *, commit_message):
            taken.files[name] = {one.path_in_repo: one.path_or_fileobj for one in operations}
            return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("gradselect.app.export.hub.hub_fault", lambda: None)
    return taken


def export(*words: object) -> int:
    try:
        main(["export", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_hub_gets_the_model_and_its_card_and_nothing_else(root, hub, capsys, tmp_path):
    assert export(root / "run", "--hub", "you/sums", "--private") == 0
    assert hub.repositories == {"you/sums": True}
    files = hub.files["you/sums"]
    assert set(files) >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert not set(files) & {"run.json", "recipe.yaml", "records.jsonl", "messages.log", "gradselect-manifest.json"}
    for name, content in files.items():
        target = tmp_path / name
        target.write_bytes(content) if isinstance(content, bytes) else shutil.copy(content, target)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(tensor.equal(loaded[name]) for name, tensor in load_file(root / "run" / "model.safetensors").items())
    assert "https://hub/you/sums/commit/1" in capsys.readouterr().out


def test_answers_to_validation_rows_stay_here_without_a_manifest_too(root, hub, tmp_path):
    run = shutil.copytree(root / "run", tmp_path / "run")
    (run / "gradselect-manifest.json").unlink()
    (run / "answers.jsonl").write_text('{"step": 2, "prompt": "a patient\'s letter", "output": "4"}\n')
    assert export(run, "--hub", "you/sums") == 0
    assert "model.safetensors" in hub.files["you/sums"]
    assert "answers.jsonl" not in hub.files["you/sums"]


def test_the_card_says_method_base_data_and_results_but_no_path_of_this_machine(root, capsys):
    assert export(root / "run", "--hub", "you/sums", "--dry-run") == 0
    shown = capsys.readouterr().out
    card = ModelCard(shown[: shown.index("\nchat_template") if "\nchat_template" in shown else None])
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["gradselect", "adagradselect"]
    assert card.data.base_model is None  # a folder of this machine is no id
    assert card.data.eval_results[0].metric_value == 0.5
    for text in (
        "# sums",
        "Fine-tuned from `model` with gradselect, method `adagradselect`, 2 steps.",
        "| fraction | 0.4 |",
        "| gsm8k, 2 items: accuracy | 50.0 % (95 % interval 10.0 to 90.0) |",
        "| training loss |",
        "| train data | `sums.jsonl`, 24 rows |",
        "| lr | 0.01 |",
        "nothing was uploaded",
    ):
        assert text in shown, text
    assert str(root) not in shown
    assert "/tmp" not in shown


def card_of(root, tmp_path, capsys, *, model, is_local, data):
    """Return the card of a run whose base and training data had these paths, as their records tell them."""
    folder = shutil.copytree(root / "run", tmp_path / "run", dirs_exist_ok=True)
    values = json.loads((folder / "run.json").read_text())
    values["recipe"]["model"]["path"], values["model"]["is_local"] = model, is_local
    values["recipe"]["data"]["path"], values["data"]["train"]["path"] = data.partition(" [")[0], data
    (folder / "run.json").write_text(json.dumps(sealed(values)))
    assert export(folder, "--hub", "you/sums", "--dry-run") == 0
    return ModelCard(capsys.readouterr().out)


def test_ids_on_the_hub_are_linked_and_named_in_the_metadata(root, tmp_path, capsys):
    card = card_of(root, tmp_path, capsys, model="some/base-0.5B", is_local=False, data="some/data-1.5 [train]")
    assert (card.data.base_model, card.data.datasets) == ("some/base-0.5B", "some/data-1.5")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "Fine-tuned from [some/base-0.5B](https://huggingface.co/some/base-0.5B) with" in card.text
    assert "| train data | [some/data-1.5](https://huggingface.co/datasets/some/data-1.5) [train], " in card.text


def test_a_folder_that_looks_like_an_id_is_none(root, tmp_path, capsys):
    card = card_of(root, tmp_path, capsys, model="runs/base", is_local=True, data="data/sums")
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "Fine-tuned from `base` with" in card.text
    assert "| train data | `sums`, " in card.text
    run = json.loads((root / "run" / "run.json").read_text())
    assert run["model"]["is_local"] is True


def test_what_loads_and_merges_the_adapter_of_a_classifier_keeps_its_outputs(root, tmp_path, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    run = SimpleNamespace(is_adapter=True, folder=tmp_path / "adapter", record=SimpleNamespace(recipe={"data": {}}))
    names: dict[str, Any] = {}
    exec("\n".join(line for line in _use(run, str(tmp_path / "adapter")) if "```" not in line), names)
    assert torch.equal(names["model"].score.modules_to_save.default.weight, model.score.modules_to_save.default.weight)
    monkeypatch.chdir(tmp_path)
    for base in (None, str(root / "model")):
        _, _, code = shlex.split(merge_command(tmp_path / "adapter", base=base))
        exec(code, {})
        merged = AutoModelForSequenceClassification.from_pretrained("MERGED")
        assert torch.equal(merged.score.weight, model.score.modules_to_save.default.weight)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "AutoPeftModelForSequenceClassification" in merge_command(tmp_path / "adapter")


def test_the_card_names_held_out_rows_without_their_folder(root, tmp_path, capsys):
    folder = shutil.copytree(root / "run", tmp_path / "run")
    values = json.loads((folder / "run.json").read_text())
    held_out = {"path": "my/sums.jsonl (6 of 30 rows held out)", "fingerprint": "ab", "rows_used": 6}
    values["data"] |= {"validation": held_out}
    (folder / "run.json").write_text(json.dumps(sealed(values)))
    assert export(folder, "--hub", "you/sums", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "| validation data | `sums.jsonl` (6 of 30 rows held out), 6 rows |" in shown
    assert "my/" not in shown


def test_the_card_names_the_trainer_and_no_folder_of_its_rewards(root, tmp_path, capsys):
    folder = shutil.copytree(root / "run", tmp_path / "run")
    values = json.loads((folder / "run.json").read_text()) | {"training_loss": None, "validation_loss": None}
    values["recipe"]["trainer"] = {"name": "grpo", "beta": 0.0, "reward": ["gsm8k", "/home/my name/rewards.py:short"]}
    values["recipe"]["data"] |= {"format": "prompts", "prompt": "Q: {question}"}
    (folder / "run.json").write_text(json.dumps(sealed(values)))
    assert export(folder, "--hub", "you/sums", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "Fine-tuned from `model` with gradselect, trainer `grpo`, method `adagradselect`, 2 steps." in shown
    assert "| reward | ['gsm8k', 'rewards.py:short'] |" in shown
    assert "prompts of this form" in shown
    assert "/home" not in shown
    assert "Results" not in shown  # there are none


def test_an_adapter_goes_alone_or_merged(root, hub, capsys):
    assert export(root / "lora", "--hub", "you/merged") == 0
    assert export(root / "lora", "--hub", "you/adapter", "--adapter") == 0
    assert "model.safetensors" in hub.files["you/merged"]
    assert "adapter_model.safetensors" in hub.files["you/adapter"]
    assert "model.safetensors" not in hub.files["you/adapter"]
    card = ModelCard(hub.files["you/adapter"]["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM" in card.text


def test_what_the_hub_says_becomes_one_message(root, hub, monkeypatch, capsys):
    def refuse(self, *args, **options):
        raise RuntimeError("401 Client Error: Unauthorized\nfor url")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert export(root / "run", "--hub", "you/sums") == 2
    err = capsys.readouterr().err
    assert "the hub did not take you/sums: 401 Client Error: Unauthorized" in err
    assert "hf auth login" in err.replace("\n", " ")


def test_without_a_network_it_says_so_at_once(root, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    _unreachable.cache_clear()
    try:
        assert export(root / "run", "--hub", "you/sums") == 2
    finally:
        _unreachable.cache_clear()
    assert "you/sums cannot be uploaded: the hub http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_the_converter_of_llama_cpp_writes_the_file(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "convert_lora_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert export(root / "run", "--gguf", tmp_path / "a.gguf") == 0
    assert (tmp_path / "a.gguf").read_text() == "auto True"
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export(root / "run", "--gguf", tmp_path / "b.gguf", "--type", "q8_0") == 0
    assert (tmp_path / "b.gguf").read_text() == "q8_0 True"
    assert export(root / "lora", "--gguf", "--adapter", tmp_path / "c.gguf") == 0
    assert (tmp_path / "c.gguf").read_text() == "f32 False"
    assert export(root / "run", "--gguf") == 0
    assert (root / "run.gguf").read_text() == "auto True"
    (root / "run.gguf").unlink()


PACKING_CONVERTER = """
import sys, tarfile
with tarfile.open(sys.argv[3], "w") as packed:
    packed.add(sys.argv[1], "")
"""


def run_with_adapter(root: Path, tmp_path: Path, **options: Any) -> Any:
    """Make a run with a LoRA of these options, whose B matrices are random. Return folder and model."""
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    run = shutil.copytree(root / "lora", tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    adapted.save_pretrained(run / "adapter")
    return run, adapted


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 1,
            "lora_alpha": 2,
            "rank_pattern": {r"layers\.1\.\w+\.q_proj": 4},
            "alpha_pattern": {"1.self_attn.q_proj": 8},
        },
        {"r": 4, "lora_alpha": 0, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_an_adapter_is_as_strong_in_gguf_as_in_peft(root, tmp_path, monkeypatch, options):
    run, adapted = run_with_adapter(root, tmp_path, **options)
    (tmp_path / "convert_lora_to_gguf.py").write_text(PACKING_CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert export(run, "--gguf", "--adapter", tmp_path / "a.gguf") == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    shutil.unpack_archive(tmp_path / "a.gguf", tmp_path / "read", format="tar")
    alpha = json.loads((tmp_path / "read" / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(tmp_path / "read" / "adapter_model.safetensors")
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(tensors) == 2 * len(layers) > 0
    for name, layer in layers.items():
        a, b = (tensors[f"{name}.lora_{matrix}.weight"] for matrix in "AB")
        scale = alpha / b.shape[1] if alpha else 1.0  # as llama.cpp's engine computes it
        torch.testing.assert_close(scale * b @ a, layer.get_delta_weight("default"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "convert_lora_to_gguf.py", "read", "run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changed the weights of the base"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights='pissa_niter_2', which changed the weights of the"),
        ({"use_dora": True}, "beside those of LoRA, such as base_model.model.model.layers.0.self_attn.q_proj.lora_mag"),
        ({"modules_to_save": ["input_layernorm"]}, "such as base_model.model.model.layers.0.input_layernorm.weight"),
    ],
)
def test_an_adapter_that_gguf_cannot_hold_is_refused_without_a_converter_too(
    root, tmp_path, monkeypatch, capsys, options, message
):
    run, _ = run_with_adapter(root, tmp_path, r=2, **options)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert export(run, "--gguf", "--adapter") == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert message in said
    assert "leave --adapter off, for the merged model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_adapter_without_a_merged_model_is_to_be_merged_first(root, tmp_path, capsys):
    run, _ = run_with_adapter(root, tmp_path, r=2, init_lora_weights="olora")
    for file in (run / "adapter").iterdir():
        file.replace(run / file.name)
    (run / "gradselect-manifest.json").unlink()
    assert export(run, "--gguf") == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "merge it first, and convert that: python -c" in said
    assert "--adapter" not in said


def test_a_converter_that_fails_leaves_no_file(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert export(root / "run", "--gguf", tmp_path / "a.gguf", "--type", "bf16") == 2
    err = capsys.readouterr().err
    assert "convert_hf_to_gguf.py has failed with exit code 1" in err
    assert "pip install gguf" in err
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "give one of --hub ID and --gguf [FILE]"),
        (["run", "--hub", "you/a", "--gguf"], "give one of --hub ID and --gguf [FILE]"),
        (["run", "file.gguf", "--hub", "you/a"], "'file.gguf': a FILE is for --gguf"),
        (["run", "--gguf", "--dry-run"], "--dry-run is for --hub"),
        (["run", "--hub", "you/a", "--type", "f16"], "--type f16 is for --gguf"),
        (["run", "--gguf", "--type", "int1"], "--type 'int1' is not one of"),
        (["run", "--hub", "not an id"], "is no id on the hub"),
        (["run", "--gguf", "model/config.json"], "exists already"),
        (["run", "--gguf", "nowhere/a.gguf"], "there is no folder"),
        (["run", "--gguf", "new.gguf"], "git clone --depth 1 https://github.com/ggml-org/llama.cpp"),
        (["run", "--hub", "you/a", "--adapter"], "has no adapter beside its model"),
        (["run", "--hub", "you/a", "--evaluation", "nowhere"], "nowhere/result.json"),
        (["model", "--gguf"], "holds no run: it has no run.json"),
        (["unfinished", "--gguf"], "has not finished"),
        (["broken", "--gguf"], "lacks model.safetensors, which the run wrote"),
    ],
)
def test_what_cannot_be_is_refused(root, monkeypatch, capsys, words, message):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.chdir(root)
    if words[0] == "unfinished" and not Path("unfinished").exists():
        values = json.loads(Path("run/run.json").read_text())
        kept = {key: value for key, value in values.items() if key in RunRecord.model_fields}
        Path("unfinished").mkdir()
        Path("unfinished/run.json").write_text(json.dumps(sealed(kept | {"status": "started"})))
    if words[0] == "broken":
        shutil.copytree("run", "broken")
        Path("broken/model.safetensors").unlink()
    assert export(*words) == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_wrong_folder_of_llama_cpp_is_named(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert export(root / "run", "--gguf", tmp_path / "a.gguf") == 2
    assert "there is no convert_hf_to_gguf.py in this folder" in capsys.readouterr().err
