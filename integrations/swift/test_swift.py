"""Selective training inside ms-swift, by the file that `gradselect plugin-path swift` names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import BASE, ROWS, check_moved, difference, read_records

from gradselect.integrations.plugin_path import plugin_path

STEPS = 8
STOP = 3
METHODS = {"adagradselect": "adagradselect preset=paper fraction=0.3", "id3": "id3 density=0.01"}
PLUGIN = ("--external_plugins", str(plugin_path("swift")))
SELECT = (*PLUGIN, "--callbacks", "gradselect")
LORA = ("--tuner_type", "lora", "--lora_rank", "4", "--lora_dropout", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder with data of every kind, and make it the current one."""
    for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    rows = []
    for question, answer in ROWS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns, "rejected_response": answer[::-1]}))
    Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def arguments(folder: str, *more: str) -> list[str]:
    """Return the arguments of a run of 8 steps, each of which is saved."""
    own = {
        "model": BASE,
        "model_type": "llama",
        "template": "default",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "dataset": "rows.jsonl",
        "split_dataset_ratio": 0,
        "max_length": 128,
        "output_dir": folder,
        "add_version": "false",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "check_model": "false",
    }
    given = set(more)
    pairs = [(f"--{name}", str(value)) for name, value in own.items() if f"--{name}" not in given]
    return [*(word for pair in pairs for word in pair), *more]


def run(folder: str, *more: str, method: str, jsonl: str, trains: str = "sft") -> None:
    """Run in this process."""
    from swift import rlhf_main, sft_main

    words = (*SELECT, "--optim_args", f"{method} jsonl={jsonl}")
    {"sft": sft_main, "dpo": rlhf_main}[trains](arguments(folder, *words, *more))


def checkpoints() -> list[Path]:
    return [Path(f"whole/checkpoint-{step}") for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("trains", "more"),
    [("sft", ()), ("sft", LORA), ("dpo", ("--rlhf_type", "dpo"))],
    ids=["full", "lora", "dpo"],
)
def test_a_run_moves_what_its_records_say_and_resumes_bitwise(trains: str, more: tuple[str, ...], method: str) -> None:
    run("whole", *more, method=method, jsonl="whole.jsonl", trains=trains)
    records = read_records(Path("whole.jsonl"))
    assert [record["step"] for record in records] == list(range(STEPS))
    check_moved(records[1:], checkpoints())
    if method == METHODS["adagradselect"]:
        state = torch.load(f"whole/checkpoint-{STEPS}/optimizer.pt", weights_only=True)
        assert state["selection"]["policy_state"]["filled_explore_steps"] == STEPS // 2
    logs = read_records(Path("whole/logging.jsonl"))
    assert all("selection/state_bytes" in log for log in logs if "loss" in log)

    resume = ("--resume_from_checkpoint", f"whole/checkpoint-{STOP}")
    run("cut", *resume, *more, method=method, jsonl="cut.jsonl", trains=trains)
    assert difference(checkpoints()[-1], Path(f"cut/checkpoint-{STEPS}")) == 0.0
    assert read_records(Path("cut.jsonl")) == records[STOP:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PLUGIN,), "error: the plug-in of gradselect is loaded, and nothing uses it; add --callbacks gradselect"),
        ((*SELECT,), "error: --optim_args='' names no method; write e.g. --optim_args 'adagradselect fraction=0.2"),
        (
            (*SELECT, "--optim_args", "adagradselect fractoin=0.3"),
            "error: --optim_args.fractoin: unknown key, did you mean 'fraction'?",
        ),
        (
            (*SELECT, "--optim_args", "adagradselect", "--optimizer", "muon"),
            "error: --optimizer muon and gradselect both choose what is trained; leave one of them out",
        ),
    ],
    ids=["callback", "method", "key", "optimizer"],
)
def test_a_wrong_command_line_is_one_message_and_exit_code_2(
    words: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from swift import sft_main

    with pytest.raises(SystemExit) as stop:
        sft_main(arguments("out", *words))
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_reentrant_checkpoints_train_right_too() -> None:
    asked = ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}')
    run("whole", *asked, *LORA, method=METHODS["adagradselect"], jsonl="whole.jsonl")
    check_moved(read_records(Path("whole.jsonl"))[1:], checkpoints())


def test_the_command_line_of_two_processes_trains(folder: Path) -> None:
    env = {**os.environ, "NPROC_PER_NODE": "2", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath])}
    words = (*SELECT, "--optim_args", "adagradselect fraction=0.3 always=[norm,embedding] jsonl=two.jsonl")
    rows = ("--per_device_train_batch_size", "2", "--num_train_epochs", "1", "--ddp_find_unused_parameters", "true")
    command = [str(Path(sys.executable).with_name("swift")), "sft", *arguments("whole", *rows, *words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(Path("two.jsonl"))
    assert len(records) == STEPS // 2
    assert all({"norm", "embedding"} < set(record["selected"]) for record in records)
    check_moved(records[1:], checkpoints()[: len(records)])
