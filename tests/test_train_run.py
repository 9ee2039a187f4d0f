"""Whole runs of a tiny model: output, loss masks, and the parameters that each method trains."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraModel
from rich.console import Console
from safetensors.torch import load_file
from train_fixtures import (
    ADAGRADSELECT,
    CHAT_TEMPLATE,
    MARKED_CHAT_TEMPLATE,
    assert_same_weights,
    build,
    parse,
    quiet,
    weights,
    write_model,
    write_sums,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradselect import UsageError
from gradselect.app.inputs import row_notes
from gradselect.app.recipe import load_recipe
from gradselect.app.train import describe_start, train
from gradselect.app.train.trainer import RunTrainer

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_names_the_cpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    inputs: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), examples=SimpleNamespace(sources={}))
    for device, name in (("cpu", "cpu"), ("auto", "a card")):
        record = describe_start(parse(place, run={"device": device}), inputs, command=())
        assert record.machine.device == name


# What comes out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run with every option on; its console output is in `shown.txt` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shown = io.StringIO()
    recipe = parse(
        place,
        method=ADAGRADSELECT,
        data={"validation": 0.25, "max_length": 10},
        run={
            "output": str(folder / "out"),
            "steps": 5,
            "evaluate_every": 2,
            "save_every": 1,
            "accumulation": 2,
            "batch_size": 2,
            "report_to": ["tensorboard"],
        },
    )
    train(recipe, console=Console(file=shown, width=200), command=["gradselect", "train", "x.yaml"])
    (folder / "shown.txt").write_text(shown.getvalue(), "utf-8")
    return folder / "out"


def test_the_result_is_a_plain_checkpoint_that_has_learnt(place: Path, finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (finished / "generation_config.json").is_file()
    ours, before = weights(finished), weights(place / "model")
    assert ours.keys() == before.keys()
    assert any(not torch.equal(ours[name], before[name]) for name in ours)


def test_run_json_holds_what_is_needed_to_repeat_the_run(place: Path, finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["steps"] == 5
    assert run["command"] == ["gradselect", "train", "x.yaml"]
    assert run["recipe"]["method"]["fraction"] == 0.4
    assert run["recipe"]["optimizer"]["eps"] == 1e-8
    assert run["data"]["train"]["path"] == str(place / "sums.jsonl")
    assert len(run["data"]["train"]["fingerprint"]) == len(run["model"]["fingerprint"]) == 64
    assert (run["data"]["train"]["rows_used"], run["data"]["validation"]["rows_used"]) == (18, 6)
    assert {"torch", "transformers", "trl", "gradselect"} <= run["versions"].keys()
    assert run["training_loss"] > 0
    assert run["validation_loss"] > 0
    assert run["tokens"] > 0
    assert run["tokens_per_second"] > 0


def test_run_json_counts_bytes_and_blocks(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    peak, num_weights = run["peak_bytes"], run["model"]["parameters"]
    assert peak["weights"] == 4 * num_weights
    assert 0 < peak["state_on_device"] < 8 * num_weights
    assert 0 < peak["gradients"] < 4 * num_weights
    assert max(peak["weights"], peak["gradients"]) < peak["together"] <= 16 * num_weights
    assert sum(run["steps_by_kind"].values()) == 5
    records = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(5))
    assert sum(run["selection"]["updates"]) == sum(len(record["selected"]) for record in records)
    assert run["selection"]["entropy"][-1] == records[-1]["selection_entropy"]


def test_the_recipe_in_the_output_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    again = train(load_recipe(finished / "recipe.yaml", [f"run.output={tmp_path / 'again'}"]), console=quiet())
    assert_same_weights(finished, again)


def test_losses_are_measured_during_training_and_at_the_end(finished: Path) -> None:
    history = json.loads((finished / "run.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 5]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_are_kept(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_curves_lie_in_the_output(finished: Path) -> None:
    assert list((finished / "tensorboard").glob("events*"))


def test_progress_names_loss_speed_memory_and_blocks(finished: Path) -> None:
    lines = (finished.parent / "shown.txt").read_text().splitlines()
    (first,) = (line for line in lines if line.startswith("step 1/5"))
    assert all(word in first for word in ("loss ", "lr ", "tokens/s", "MiB: weights", "gradients", "explored"))
    assert any(line.startswith("step 2/5  validation loss") for line in lines)
    assert any("lose their end" in line for line in lines)
    assert f"gradselect evaluate {finished} --task loss" in lines[-1]


def test_a_warm_up_that_is_longer_than_the_run_is_said(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = parse(place, optimizer={"lr": 2e-3, "warmup": 10}, run={"output": str(tmp_path / "out")})
    train(recipe, console=Console(file=shown, width=200))
    said = "note       the warm-up takes 10 steps and the run ends after 4: the learning rate gets to 30 % of 0.002"
    assert said in shown.getvalue().splitlines()
    assert "lr 6.00e-04" in shown.getvalue()


def test_a_terminal_gets_a_bar_and_the_same_lines(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    method = {"name": "fixed", "names": ["norm"]}
    recipe = parse(place, method=method, run={"output": str(tmp_path / "out"), "steps": 2})
    train(recipe, console=Console(file=shown, force_terminal=True, width=200))
    lines = shown.getvalue().splitlines()
    assert any("step 1/2  loss" in line for line in lines)
    assert any("train " in line and "2/2" in line and "[norm]" in line for line in lines)


# What is learnt on -----------------------------------------------------------------------------------------------


def learnt(trainer: RunTrainer, tokenizer: Any) -> list[str]:
    """Return the text that counts in the loss, by example."""
    labels = trainer.train_dataset["labels"]  # pyright: ignore[reportOptionalSubscript, reportArgumentType, reportIndexIssue]
    return [tokenizer.decode([label for label in example if label != -100]) for example in labels]


def test_only_the_completion_and_the_end_of_the_text_count(place: Path, tmp_path: Path) -> None:
    trainer, inputs = build(place, tmp_path)
    assert learnt(trainer, inputs.tokenizer)[3] == " is 12<end>"


def test_prompts_count_too_where_the_recipe_says_so(place: Path, tmp_path: Path) -> None:
    trainer, inputs = build(place, tmp_path, data={"loss_on": "all"})
    assert learnt(trainer, inputs.tokenizer)[3] == "3+9? is 12<end>"


@pytest.fixture(scope="module")
def chat_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_model(folder / "model", chat_template=MARKED_CHAT_TEMPLATE)
    write_model(folder / "unmarked", chat_template=CHAT_TEMPLATE)
    write_sums(folder / "sums.jsonl")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "chat.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_questions_and_answers_can_go_through_the_chat_template(chat_place: Path, tmp_path: Path) -> None:
    trainer, inputs = build(chat_place, tmp_path, data={"as_chat": True, "completion": "{answer}"})
    assert learnt(trainer, inputs.tokenizer)[3] == "is 12<end>"


@pytest.mark.parametrize(
    ("model", "loss_on", "text"),
    [
        ("unmarked", "last-answer", "d<end>"),
        ("model", "last-answer", "d<end>"),
        ("model", "answers", "b<end>d<end>"),
        ("unmarked", "answers", "b<end>d<end>"),
    ],
)
def test_of_a_conversation_the_answers_count(
    chat_place: Path, tmp_path: Path, model: str, loss_on: str, text: str
) -> None:
    data = {"format": "chat", "path": str(chat_place / "chat.jsonl"), "loss_on": loss_on}
    trainer, inputs = build(chat_place, tmp_path, data=data, model={"path": str(chat_place / model)})
    assert learnt(trainer, inputs.tokenizer) == [text]


def test_conversations_need_a_chat_template(chat_place: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        build(place, tmp_path, data={"format": "chat", "path": str(chat_place / "chat.jsonl")})


def test_what_the_length_limit_does_is_said(place: Path, tmp_path: Path) -> None:
    trainer, inputs = build(place, tmp_path, data={"max_length": 5})
    cut, dropped = row_notes(trainer.token_counts, parse(place).data, max_length=inputs.max_length)
    assert "longer than data.max_length=5 and lose their end" in cut
    assert "were dropped" in dropped


def test_a_length_that_leaves_nothing_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.max_length=2 leaves nothing of data\.path"):
        build(place, tmp_path, data={"max_length": 2})
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "a long one", "answer": "yes"}))
    with pytest.raises(UsageError, match=r"data\.max_length=8 leaves nothing of data\.validation"):
        build(place, tmp_path, data={"max_length": 8, "validation": str(tmp_path / "long.jsonl")})


def test_packing_changes_no_loss(place: Path, tmp_path: Path) -> None:
    """All examples in one batch: attention across examples would change the mean."""
    losses = {}
    for packing in (False, True):
        output = tmp_path / str(packing)
        run = {"output": str(output), "steps": 1, "batch_size": 24}
        train(parse(place, data={"packing": packing}, run=run), console=quiet())
        losses[packing] = json.loads((output / "run.json").read_text())["training_loss"]
    # Another order of summation.
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


# Methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "uniform", "count": 2}, {"name": "lora"}])
def test_every_method_gets_the_optimizer_of_the_recipe(place: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    settings = {"lr": 3e-4, "weight_decay": 0.3, "betas": [0.7, 0.8], "eps": 1e-5, "max_grad_norm": 0.5}
    trainer, _ = build(
        place,
        tmp_path,
        method=method,
        optimizer={**settings, "schedule": "constant", "warmup": 2},
        run={"steps": 3, "accumulation": 2},
    )
    trainer.train()
    groups = trainer.optimizer.param_groups  # pyright: ignore[reportOptionalMemberAccess]
    assert {(group["lr"], group["betas"], group["eps"]) for group in groups} == {(3e-4, (0.7, 0.8), 1e-5)}
    assert 0.3 in {group["weight_decay"] for group in groups} <= {0.0, 0.3}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1.5e-4, 3e-4])
    assert (trainer.args.max_grad_norm, trainer.args.gradient_accumulation_steps) == (0.5, 2)


def test_full_fine_tuning_is_every_block_selected(place: Path, tmp_path: Path) -> None:
    """Fused AdamW and ours sum in another order, so equal to rounding."""
    everything = {"name": "fixed", "names": ["*"]}
    full = train(parse(place, run={"output": str(tmp_path / "full")}), console=quiet())
    fixed = train(parse(place, method=everything, run={"output": str(tmp_path / "fixed")}), console=quiet())
    for name, value in weights(full).items():
        torch.testing.assert_close(weights(fixed)[name], value, rtol=1e-4, atol=1e-6)


LAYERS = {"layers.0", "layers.1", "layers.2", "layers.3"}
REACH: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gradnorm": ({"count": 2}, {*LAYERS, "embed_tokens", "norm"}),
    "grass": ({"count": 1, "probe_steps": 1, "refresh": 1}, LAYERS),
    "uniform": ({"count": 2, "among": ["layer.0", "layer.1"]}, {"layers.0", "layers.1"}),
    "lisa": ({"count": 1}, {*LAYERS, "embed_tokens", "norm"}),
    "badam": ({"every": 1}, LAYERS),
    "last": ({"count": 2}, {"layers.2", "layers.3"}),
    "fixed": ({"names": ["norm"]}, {"norm"}),
    "rslora": ({}, LAYERS),
    "dora": ({"rank": 2}, LAYERS),
}


@pytest.mark.parametrize(("name", "keys", "reach"), [(name, *rest) for name, rest in REACH.items()], ids=list(REACH))
def test_a_method_trains_what_it_says_and_nothing_else(
    place: Path, tmp_path: Path, name: str, keys: dict[str, Any], reach: set[str]
) -> None:
    """With recomputed activations, which freezing within a backward pass could change."""
    recipe = parse(
        place,
        method={"name": name, **keys},
        model={"gradient_checkpointing": True},
        run={"output": str(tmp_path / "out")},
    )
    ours, before = weights(train(recipe, console=quiet())), weights(place / "model")
    assert ours.keys() == before.keys()
    moved = {block_of(key) for key in ours if not torch.equal(ours[key], before[key])}
    assert moved
    assert moved <= reach


def block_of(parameter: str) -> str:
    """ "layers.2" of "model.layers.2.mlp.up_proj.weight", "norm" of "model.norm.weight"."""
    _, first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if first == "layers" else first


def test_full_fine_tuning_in_bfloat16_keeps_master_weights(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, model={"dtype": "bfloat16"})
    trainer.train()
    held = trainer.optimizer.optimizer.memory()  # pyright: ignore[reportOptionalMemberAccess]
    assert held["masters"] == 2 * held["weights"] > 0
    assert held["state_on_device"] == 4 * held["weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_and_kept(place: Path, tmp_path: Path, dtype: str) -> None:
    method = {"name": "lora", "rank": 2, "train_embedding": True}
    out = train(
        parse(place, method=method, model={"dtype": dtype}, run={"output": str(tmp_path / "out")}), console=quiet()
    )
    ours, before = weights(out), weights(place / "model")
    assert ours.keys() == before.keys()
    moved = {name.split(".")[-2] for name in ours if not torch.equal(ours[name], before[name].to(ours[name].dtype))}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved == {*linears, "embed_tokens"}
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for name, value in adapter.items() if "lora_" in name} == {torch.float32}


def test_an_embedding_beside_an_adapter_has_master_weights(place: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 2, "train_embedding": True}
    trainer, _ = build(place, tmp_path, method=method, model={"dtype": "bfloat16"})
    trainer.train()
    held = trainer.optimizer.optimizer.memory()  # pyright: ignore[reportOptionalMemberAccess]
    assert held["masters"] == 4 * 258 * 16


def test_an_adapter_that_peft_does_not_know_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PEFT refuses this adapter"):
        build(place, tmp_path, method={"name": "peft", "type": "LORRA"})
    with pytest.raises(UsageError, match="PEFT refuses this adapter"):
        build(place, tmp_path, method={"name": "lora", "targets": ["no_such_layer"]})


UNMERGEABLE = [
    ("PROMPT_TUNING", {"num_virtual_tokens": 2}),
    ("LILY", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    ("POLY", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    ("BEFT", {"target_modules": ["q_proj", "v_proj"]}),
    ("SHADOW", {}),
]


@pytest.mark.parametrize(("kind", "options"), UNMERGEABLE)
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_that_cannot_be_merged_is_refused(
    place: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """It trained to its end, and then ended in a traceback."""
    with pytest.raises(UsageError, match=f"method.type={kind} cannot be merged into a plain model.*choose another"):
        build(place, tmp_path, method={"name": "peft", "type": kind, "options": options})


SHARED = [
    (
        {
            "name": "peft",
            "type": "lora",
            "options": {"target_modules": ["q_proj"], "layer_replication": [[0, 1], [0, 2]]},
        },
        "q_proj",
    ),
    ({"name": "lora", "targets": ["q_proj", "embed_tokens"]}, "embed_tokens"),
]


@pytest.mark.parametrize(("method", "layer"), SHARED, ids=["replicated", "tied"])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_whose_merge_would_change_another_layer_too_is_refused(
    place: Path, tmp_path: Path, method: dict[str, Any], layer: str
) -> None:
    """It trained to its end, and the merged model was another one than that which had trained."""
    with pytest.raises(UsageError, match=rf"'[\w.]*{layer}' shares its weight with another layer, which merging would"):
        build(place, tmp_path, method=method)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
def test_rows_of_single_tokens_train_where_embedding_and_head_are_tied(place: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    trainer, inputs = build(place, tmp_path, method={"name": "peft", "type": "lora", "options": options})
    assert inputs.model.config.tie_word_embeddings
    assert any("token_adapter" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_merge_that_fails_says_where_the_adapter_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("no merge today")

    monkeypatch.setattr(LoraModel, "merge_and_unload", fail)
    recipe = parse(place, method={"name": "lora", "rank": 2}, run={"output": str(tmp_path / "out"), "steps": 1})
    with pytest.raises(UsageError, match=r"ValueError: no merge today\); it is kept in .*out/adapter"):
        train(recipe, console=quiet())
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_any_other_adapter_of_peft_runs(place: Path, tmp_path: Path) -> None:
    method = {"name": "peft", "type": "ia3", "options": {"target_modules": ["k_proj"], "feedforward_modules": []}}
    out = train(parse(place, method=method, run={"output": str(tmp_path / "out"), "steps": 2}), console=quiet())
    ours, before = weights(out), weights(place / "model")
    assert {name.split(".")[-2] for name in ours if not torch.equal(ours[name], before[name])} == {"k_proj"}
