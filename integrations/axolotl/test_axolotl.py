"""Selective training inside axolotl: its own command reads the YAML, trains, saves and resumes."""

# axolotl reads the environment when it is imported.

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1", CUDA_VISIBLE_DEVICES="")

import pytest
import torch
import yaml
from axolotl.cli.train import do_cli
from safetensors.torch import load_file

import gradselect as gs
from gradselect.integrations import axolotl as ours
from gradselect.integrations.axolotl import SelectiveArguments

BASE = Path(__file__).parents[2] / "quickstart" / "base"
PLUGIN = "gradselect.integrations.axolotl.SelectivePlugin"
METHODS = {
    "ada": {"name": "adagradselect", "preset": "paper", "fraction": 0.3},
    "id3": {"name": "id3", "density": 0.01},
}
ROWS, EPOCHS, STOP = 16, 3, 5  # 4 rows a step: 4 steps an epoch, 12 in the run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    questions = [(f"Tom has {n} pens and buys {n + 2}. How many?", f"He has {2 * n + 2} pens.") for n in range(ROWS)]
    sft = [{"instruction": question, "input": "", "output": answer} for question, answer in questions]
    dpo = [{"prompt": question, "chosen": answer, "rejected": "None."} for question, answer in questions]
    for name, rows in {"sft": sft, "dpo": dpo}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(out: Path, data: Path, section: object, *, kind: str = "sft", **more: object) -> Path:
    values = {
        "base_model": str(BASE),
        "datasets": [{"path": str(data / "sft.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(out / "prepared"),
        "output_dir": str(out / "model"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": EPOCHS,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        **dict.fromkeys(("bf16", "fp16", "tf32", "flash_attention", "sample_packing", "gradient_checkpointing"), False),
        "logging_steps": 1,
        "save_steps": STOP,
        "val_set_size": 0,
        "seed": 1,
        **more,
    }
    if kind == "dpo":
        names = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
        columns = {"type": {**names, "prompt_format": "{prompt}"}}
        row = {"path": str(data / "dpo.jsonl"), "ds_type": "json", "split": "train", **columns}
        values |= {"rl": "dpo", "datasets": [row]}
    if section is not None:
        values |= {"plugins": [PLUGIN], "gradselect": section}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_and_resume(folder: Path, data: Path, method: dict | None, *, kind: str) -> tuple[dict, dict, Path, Path]:
    """Weights of a whole run and of one resumed in the middle, and the files of their records."""
    files = [folder / "whole.jsonl", folder / "resumed.jsonl"]
    sections = [None if method is None else {**method, "jsonl": str(file)} for file in files]
    do_cli(str(config(folder / "whole", data, sections[0], kind=kind)))
    checkpoint = folder / "whole" / "model" / f"checkpoint-{STOP}"
    do_cli(str(config(folder / "again", data, sections[1], kind=kind, resume_from_checkpoint=str(checkpoint))))
    whole, resumed = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "again"))
    return whole, resumed, *files


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_records_and_resumes_bitwise(name, kind, data, tmp_path):
    whole, resumed, records, again = train_and_resume(tmp_path, data, METHODS[name], kind=kind)
    found = records_of(records)
    assert len(found) == 12
    assert records_of(again) == found[STOP:]
    base = load_file(BASE / "model.safetensors")
    moved = {tensor for tensor in base if not torch.equal(base[tensor], whole[tensor])}
    if name == "ada":
        from transformers import AutoModelForCausalLM

        # As many of the steps may explore as an epoch has.
        assert any(record["explored"] for record in found[:4])
        assert not any(record["explored"] for record in found[4:])
        selected = {block for record in found for block in record["selected"]}
        blocks = gs.partition(AutoModelForCausalLM.from_pretrained(BASE))
        members = {block.name: block.parameter_names for block in blocks}
        assert moved == {tensor for block in selected for tensor in members[block]}
        assert 0 < len(selected) < len(blocks)
    else:
        num_entries = sum(tensor.numel() for tensor in base.values())
        assert sum(found[-1]["num_entries"].values()) == pytest.approx(0.01 * num_entries, rel=0.1)
        assert sum(int((base[key] != whole[key]).sum()) for key in base) <= sum(found[-1]["num_entries"].values())
    assert difference(whole, resumed) == 0.0


def test_control_adamw_resumes_bitwise(data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradselect.integrations.axolotl.SelectivePlugin.post_trainer_create", lambda *parts: None)
        whole = tmp_path / "whole"
        do_cli(str(config(whole, data, {"name": "full"})))
        checkpoint = whole / "model" / f"checkpoint-{STOP}"
        do_cli(str(config(tmp_path / "again", data, {"name": "full"}, resume_from_checkpoint=str(checkpoint))))
    ends = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")]
    assert difference(*ends) == 0.0


WRONG = {
    "fractoin": ({"name": "adagradselect", "fractoin": 0.3}, "gradselect.fractoin"),
    "method": ({"name": "lora"}, "write gradselect.name='adagradselect'"),
    "value": ({"name": "adagradselect", "fraction": 3}, "gradselect: fraction=3.0 is outside (0, 1]"),
    "no section": (None, "needs a section gradselect"),
    "file": ({"name": "uniform", "jsonl": 3}, "gradselect.jsonl=3 is no file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_keys_fail_when_the_configuration_is_read(case):
    section, message = WRONG[case]
    with pytest.raises(ValueError, match=r"gradselect") as caught:
        SelectiveArguments(gradselect=section)
    assert message in str(caught.value)


def test_rates_of_their_own_are_refused_not_dropped(data, tmp_path):
    path = config(tmp_path, data, {"name": "uniform", "count": 1}, embedding_lr=1e-5)
    with pytest.raises(ValueError, match="embedding_lr beside gradselect"):
        do_cli(str(path))


def test_a_mistyped_key_ends_the_command_with_our_message_before_anything_is_written(data, tmp_path):
    path = config(tmp_path, data, {"name": "adagradselect", "fractoin": 0.3})
    command = [sys.executable, "-m", "axolotl.cli.train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "fractoin" in done.stderr
    assert "did you mean 'fraction'" in done.stderr
    assert not (tmp_path / "model").exists()


def test_examples_of_the_module_run():
    assert doctest.testmod(ours).failed == 0
