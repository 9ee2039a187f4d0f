"""W&B, MLflow and trackio, offline: two fractions can be told apart in each, and each shows the picture of the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

FRACTIONS = (0.3, 0.6)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "selection",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        monkeypatch.setenv(name, value)


def train(tracker: str, fraction: float, **settings) -> Trainer:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    args = TrainingArguments(
        f"out-{fraction}",
        run_name=f"fraction-{fraction}",
        max_steps=3,
        per_device_train_batch_size=1,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[tracker],
        **{"save_strategy": "no", **settings},
    )
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]} for _ in range(4)]
    policy = gs.Uniform(fraction=fraction, seed=0)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"policy": policy, "args": args, "always": ["norm"]}),
        callbacks=[SelectionCallback()],
    )
    trainer.train()
    return trainer


def test_wandb(tmp_path):
    import wandb  # pyright: ignore[reportMissingImports]

    found = []
    for fraction in FRACTIONS:
        train("wandb", fraction)
        found.append(dict(wandb.config))
        wandb.finish()
    assert [config["selection/policy/fraction"] for config in found] == list(FRACTIONS)
    assert all(config["selection/always"] == "model.norm.weight" for config in found)
    # What is sent later is in these files.
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        assert b"selection/policy/fraction" in file.read_bytes()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/selection/picture*.png"))
    assert len(pictures) == len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_mlflow(tmp_path):
    import mlflow  # pyright: ignore[reportMissingImports]

    for fraction in FRACTIONS:
        train("mlflow", fraction)
    runs = mlflow.search_runs(experiment_names=["selection"], output_format="list")
    assert sorted(run.data.params["selection/policy/fraction"] for run in runs) == [str(f) for f in FRACTIONS]
    assert {run.data.params["selection/policy"] for run in runs} == {"Uniform"}
    for run in runs:
        files = mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="selection")
        assert [file.path for file in files] == ["selection/picture-step-3.png"]


def test_trackio(tmp_path):
    import trackio  # pyright: ignore[reportMissingImports]

    for fraction in FRACTIONS:
        train("trackio", fraction)
    runs = list(trackio.Api().runs("huggingface"))
    assert sorted(run.config["selection/policy/fraction"] for run in runs) == list(FRACTIONS)
    assert len(list(Path(os.environ["TRACKIO_DIR"]).rglob("*.png"))) == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
