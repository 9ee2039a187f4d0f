"""Selective training inside LLaMA-Factory, by its own command with a section `gradselect` in the YAML file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import BASE, ROWS, check_moved, difference, read_records, untied_model

from gradselect.integrations.llamafactory.command import main

STEPS = 8
STOP = 3
ADAGRADSELECT = {"name": "adagradselect", "preset": "paper", "fraction": 0.3}
ID3 = {"name": "id3", "density": 0.01}
METHODS = {"adagradselect": ADAGRADSELECT, "id3": ID3}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder with data of every kind, and make it the current one."""
    for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    pairs = [{"instruction": question, "input": "", "chosen": a, "rejected": a[::-1]} for question, a in ROWS]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in ROWS]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    about = {
        "rows": {"file_name": "rows.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    for name, value in {"rows.json": rows, "pairs.json": pairs, "dataset_info.json": about}.items():
        Path(name).write_text(json.dumps(value), encoding="utf-8")
    Path("v1.yaml").write_text(
        yaml.safe_dump({"rows": {"path": str(tmp_path / "rows.json"), "source": "local", "converter": "alpaca"}})
    )
    return tmp_path


def write(**keys: Any) -> str:
    """Write a file for `train`; every step is saved."""
    common = {
        "model_name_or_path": str(BASE),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "rows",
        "dataset_dir": ".",
        "template": "alpaca",
        "cutoff_len": 128,
        "output_dir": "whole",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "preprocessing_num_workers": 1,
    }
    Path("run.yaml").write_text(yaml.safe_dump({**common, **keys}), encoding="utf-8")
    return "run.yaml"


def write_v1(**keys: Any) -> str:
    common = {
        "model": untied_model(Path("untied")),
        "train_dataset": "v1.yaml",
        "output_dir": "whole",
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "cutoff_len": 128,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "batching_workers": 0,
        "save_steps": 1,
    }
    Path("run.yaml").write_text(yaml.safe_dump({**common, **keys}), encoding="utf-8")
    return "run.yaml"


def checkpoints(model: str = "") -> list[Path]:
    return [Path(f"whole/checkpoint-{step}", model) for step in range(1, STEPS + 1)]


def filled_explore_steps(path: str) -> int | None:
    return torch.load(path, weights_only=True)["selection"]["policy_state"]["filled_explore_steps"]


@each_method
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_moves_what_its_records_say_and_resumes_bitwise(stage: str, method: dict[str, Any]) -> None:
    data = "pairs" if stage == "dpo" else "rows"
    file = write(stage=stage, dataset=data, gradselect={**method, "jsonl": "whole.jsonl"})
    assert main(["train", file]) == 0
    records = read_records(Path("whole.jsonl"))
    assert [record["step"] for record in records] == list(range(STEPS))
    check_moved(records[1:], checkpoints())

    words = [f"resume_from_checkpoint=whole/checkpoint-{STOP}", "output_dir=cut", "gradselect.jsonl=cut.jsonl"]
    assert main(["train", file, *words]) == 0
    assert difference(Path("whole"), Path("cut")) == 0.0
    assert read_records(Path("cut.jsonl")) == records[STOP:]


def test_the_first_epoch_explores_and_the_selection_is_in_the_log() -> None:
    assert main(["train", write(gradselect=ADAGRADSELECT)]) == 0
    assert filled_explore_steps("whole/checkpoint-8/optimizer.pt") == STEPS // 2
    logs = read_records(Path("whole/trainer_log.jsonl"))
    assert [log["selection/blocks"] for log in logs if "loss" in log] == [3.0] * STEPS
    assert logs[-1]["selection/updates/layer.7"] > 0


def test_lora_trains_the_adapters_of_the_selected_layers() -> None:
    section = {"name": "uniform", "count": 2, "jsonl": "whole.jsonl"}
    assert main(["train", write(finetuning_type="lora", lora_rank=4, gradselect=section)]) == 0
    check_moved(read_records(Path("whole.jsonl"))[1:], checkpoints())


@each_method
def test_version_1_needs_nothing_by_hand(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("USE_V1", "1")
    file = write_v1(gradselect={**method, "jsonl": "whole.jsonl"})
    assert main(["sft", file]) == 0
    records = read_records(Path("whole.jsonl"))
    assert [record["step"] for record in records] == list(range(STEPS))
    check_moved(records[1:], checkpoints("model"))
    logs = read_records(Path("whole/trainer_log.jsonl"))
    if method is ADAGRADSELECT:
        assert filled_explore_steps("whole/checkpoint-8/optimizer/state_dict.pt") == STEPS // 2
        assert all(log["selection/blocks"] == 2 for log in logs)
        trained = {name for record in records for name in record["selected"]}
        assert len(trained) < 7
        assert f"{7 - len(trained)} of 7 candidate blocks trained in none of the {STEPS} steps" in caplog.text
    else:
        assert [log["grad_norm"] for log in logs] == [record["grad_norm"] for record in records]

    words = [f"resume_from_checkpoint=whole/checkpoint-{STOP}", "output_dir=cut", "gradselect.jsonl=cut.jsonl"]
    assert main(["sft", file, *words]) == 0
    assert difference(Path("whole"), Path("cut")) == 0.0
    assert read_records(Path("cut.jsonl")) == records[STOP:]


def test_two_processes_train_the_same_model(folder: Path) -> None:
    file = write(output_dir="two", per_device_train_batch_size=2, num_train_epochs=1, gradselect=ADAGRADSELECT)
    words = ["gradselect.always=[norm, embedding]", "gradselect.jsonl=two/selection.jsonl"]
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": os.defpath}
    command = [sys.executable, "-m", "gradselect.integrations.llamafactory", "train", file, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(Path("two/selection.jsonl"))
    assert len(records) == STEPS // 2
    assert all({"norm", "embedding"} < set(record["selected"]) for record in records)
    check_moved(records[1:], [Path(f"two/checkpoint-{step}") for step in range(1, 5)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gradselect.fractoin=0.3"], "error: gradselect.fractoin: unknown key, did you mean 'fraction'?"),
        (["gradselect.fraction=3"], "error: gradselect: fraction=3.0 is outside (0, 1]"),
        (["gradselect=lora"], "error: gradselect.name='lora' does not select blocks or entries"),
        (["gradselect.jsonl=3"], "error: gradselect.jsonl=3 is no file name"),
        (["use_badam=true"], "error: use_badam: True and gradselect both choose the optimizer"),
        (["stage=ppo"], "error: stage: ppo: gradselect trains in trainers of transformers"),
        (["gradselect.always=[layers.7]"], "error: 'layers.7' matches no block; nearest: 'layer.7'"),
    ],
)
def test_a_wrong_value_is_one_message_and_exit_code_2(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", write(gradselect=ADAGRADSELECT), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: python -m gradselect.integrations.llamafactory trains (commands: train), and got 'nothing'"),
        (["chat"], "got 'chat'; usage: python -m gradselect.integrations.llamafactory train FILE.yaml [key=value ...]"),
        (["train", "--stage"], "error: train needs a YAML file with a section 'gradselect', and got '--stage'"),
        (["train", "none.yaml"], "error: none.yaml cannot be read: No such file or directory"),
        (["train", "run.yaml"], "error: run.yaml has no section 'gradselect', so nothing says what to select; add"),
    ],
)
def test_a_command_that_says_nothing_of_a_method_is_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write()
    assert main(arguments) == 2
    assert message in capfd.readouterr().err


def test_version_1_refuses_a_second_optimizer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USE_V1", "1")
    assert main(["sft", write_v1(gradselect=ADAGRADSELECT, optim_config={"name": "gradselect"})]) == 2
    assert "optim_config and gradselect both choose the optimizer" in capfd.readouterr().err
