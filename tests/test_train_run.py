"""Whole runs of a tiny model: what comes out, what is learnt on, and how a run that stopped goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from train_fixtures import CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE, parse, write_model, write_recipe, write_sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradselect import UsageError
from gradselect.train import _run as run_module
from gradselect.train import load_recipe, train
from gradselect.train._data import load_examples
from gradselect.train._folder import RunFolder
from gradselect.train._model import load_model, load_tokenizer
from gradselect.train._result import save_model
from gradselect.train._setup import Inputs, build_trainer, length_notes
from gradselect.train._trainer import RunTrainer

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

ADAGRADSELECT = {"name": "adagradselect", "fraction": 0.4, "explore_steps": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data, which no test changes."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def build(folder: Path, output: Path, **sections: dict[str, Any]) -> tuple[RunTrainer, Inputs]:
    """The trainer of a recipe, not run."""
    recipe = parse(folder, **{**sections, "run": {"output": str(output), **sections.get("run", {})}})
    inputs = Inputs(
        model=load_model(recipe.model),
        tokenizer=load_tokenizer(recipe.model, recipe.data),
        examples=load_examples(recipe.data, seed=0),
        max_length=recipe.data.max_length or 64,
    )
    return build_trainer(recipe, inputs, folder=RunFolder(output)), inputs


# What comes out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with everything switched on, and what it showed in `shown.txt` beside it."""
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
    assert sum(run["updates"].values()) == sum(len(record["selected"]) for record in records)


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
    assert any("may have lost their end" in line for line in lines)
    assert f"gradselect evaluate {finished} --task loss" in lines[-1]


def test_a_terminal_gets_a_bar_and_the_same_lines(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = parse(place, run={"output": str(tmp_path / "out"), "steps": 2})
    train(recipe, console=Console(file=shown, force_terminal=True, width=200))
    assert "step 1/2" in shown.getvalue()
    assert "\x1b[" in shown.getvalue()


# What is learnt on -----------------------------------------------------------------------------------------------


def learnt(trainer: RunTrainer, tokenizer: Any) -> list[str]:
    """The text that counts in the loss, example by example."""
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
    [("unmarked", "last-answer", "d<end>"), ("model", "last-answer", "d<end>"), ("model", "answers", "b<end>d<end>")],
)
def test_of_a_conversation_the_answers_count(
    chat_place: Path, tmp_path: Path, model: str, loss_on: str, text: str
) -> None:
    data = {"format": "chat", "path": str(chat_place / "chat.jsonl"), "loss_on": loss_on}
    trainer, inputs = build(chat_place, tmp_path, data=data, model={"path": str(chat_place / model)})
    assert learnt(trainer, inputs.tokenizer) == [text]


def test_answers_need_a_template_that_marks_them(chat_place: Path, tmp_path: Path) -> None:
    data = {"format": "chat", "path": str(chat_place / "chat.jsonl"), "loss_on": "answers"}
    with pytest.raises(UsageError, match=r"write data\.loss_on=last-answer"):
        build(chat_place, tmp_path, data=data, model={"path": str(chat_place / "unmarked")})


def test_conversations_need_a_chat_template(chat_place: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        build(place, tmp_path, data={"format": "chat", "path": str(chat_place / "chat.jsonl")})


def test_what_the_length_limit_does_is_said(place: Path, tmp_path: Path) -> None:
    trainer, inputs = build(place, tmp_path, data={"max_length": 5})
    cut, dropped = length_notes(trainer, inputs, packing=False)
    assert "reach data.max_length=5" in cut
    assert "were left out" in dropped


def test_a_length_that_leaves_nothing_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.max_length=2 leaves nothing to learn"):
        build(place, tmp_path, data={"max_length": 2})


def test_packing_changes_no_loss(place: Path, tmp_path: Path) -> None:
    """All examples in one batch: attention that looked into the neighbour would show in the mean."""
    losses = {}
    for packing in (False, True):
        output = tmp_path / str(packing)
        run = {"output": str(output), "steps": 1, "batch_size": 24}
        train(parse(place, data={"packing": packing}, run=run), console=quiet())
        losses[packing] = json.loads((output / "run.json").read_text())["training_loss"]
    # Another order of summation.
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


# Methods ---------------------------------------------------------------------------------------------------------


def test_full_fine_tuning_is_every_block_selected(place: Path, tmp_path: Path) -> None:
    """Fused AdamW and ours sum in another order: equal to rounding."""
    everything = {"name": "fixed", "blocks": ["*"]}
    full = train(parse(place, run={"output": str(tmp_path / "full")}), console=quiet())
    fixed = train(parse(place, method=everything, run={"output": str(tmp_path / "fixed")}), console=quiet())
    for name, value in weights(full).items():
        torch.testing.assert_close(weights(fixed)[name], value, rtol=1e-4, atol=1e-6)


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


def test_an_adapter_that_cannot_be_merged_is_refused(place: Path, tmp_path: Path) -> None:
    method = {"name": "peft", "type": "PROMPT_TUNING", "options": {"num_virtual_tokens": 2}}
    with pytest.raises(UsageError, match="cannot be merged into a plain model"):
        build(place, tmp_path, method=method)


def test_any_other_adapter_of_peft_runs(place: Path, tmp_path: Path) -> None:
    method = {"name": "peft", "type": "ia3", "options": {"target_modules": ["k_proj"], "feedforward_modules": []}}
    out = train(parse(place, method=method, run={"output": str(tmp_path / "out"), "steps": 2}), console=quiet())
    ours, before = weights(out), weights(place / "model")
    assert {name.split(".")[-2] for name in ours if not torch.equal(ours[name], before[name])} == {"k_proj"}


# Stopping and going on -------------------------------------------------------------------------------------------

LENGTH = {"steps": 4, "save_every": 2, "accumulation": 2}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a full fine-tuning of `LENGTH` that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return train(parse(place, run={"output": str(output), **LENGTH}), console=quiet())


RESUMED: dict[str, dict[str, Any]] = {
    "full-bfloat16": {"model": {"dtype": "bfloat16"}},
    "adagradselect": {"method": ADAGRADSELECT},
    "lora": {"method": {"name": "lora", "dropout": 0.1}},
}


@pytest.mark.parametrize("sections", RESUMED.values(), ids=list(RESUMED))
def test_a_run_that_stops_goes_on_as_if_it_had_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    whole, stopped = (
        parse(place, **sections, run={"output": str(tmp_path / name), **LENGTH}) for name in ("whole", "stopped")
    )
    train(whole, console=quiet())
    with monkeypatch.context() as patch:
        stop_before(patch, step=3, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, console=quiet())
    train(stopped, console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["resumed_from"] == "step-2"
    if (tmp_path / "whole" / "records.jsonl").exists():
        ours, theirs = ((tmp_path / name / "records.jsonl").read_text() for name in ("whole", "stopped"))
        assert ours == theirs


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
torch.set_num_threads(1)
save, calls = torch.save, []

def save_or_die(*args, **options):
    calls.append(1)
    if len(calls) == {fatal_call}:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **options)

torch.save = save_or_die
from gradselect.cli import main
main(sys.argv[1:])
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    place: Path, tmp_path: Path, whole: Path
) -> None:
    """Nothing of ours runs after SIGKILL: what is on the disk at that moment has to do."""
    killed = tmp_path / "killed"
    recipe = write_recipe(place, tmp_path / "recipe.yaml", run={"output": str(killed), **LENGTH})
    # Each checkpoint saves its parts with several calls; the sixth is in the middle of the second one.
    script = KILLED_WHILE_SAVING.format(fatal_call=6)
    done = subprocess.run([sys.executable, "-c", script, "train", str(recipe)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-2", ".step-4.partial"}
    train(load_recipe(recipe), console=quiet(), resume=True)
    assert_same_weights(whole, killed)


def test_a_finished_run_is_not_resumed(finished: Path) -> None:
    before = (finished / "run.json").read_bytes()
    with pytest.raises(UsageError, match="has finished after 5 steps"):
        train(load_recipe(finished / "recipe.yaml"), console=quiet(), resume=True)
    assert (finished / "run.json").read_bytes() == before


@pytest.fixture
def stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that stopped after its first checkpoint."""
    with monkeypatch.context() as patch:
        stop_before(patch, step=1, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(parse(place, run={"output": str(tmp_path / "out"), "save_every": 1}), console=quiet())
    return tmp_path / "out"


def test_another_recipe_does_not_resume_it(stopped: Path) -> None:
    overrides = ["optimizer.lr=0.5", "method.name=uniform", "method.count=1", "run.log_every=3"]
    with pytest.raises(UsageError, match="is another one") as raised:
        train(load_recipe(stopped / "recipe.yaml", overrides), console=quiet(), resume=True)
    said = str(raised.value)
    assert "optimizer.lr: 0.01 then, 0.5 now" in said
    assert "method.name: 'full' then, 'uniform' now" in said
    assert "log_every" not in said


def test_another_model_does_not_resume_it(stopped: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match=r"model\.fingerprint: .* then"):
        train(load_recipe(stopped / "recipe.yaml", [f"model.path={other}"]), console=quiet(), resume=True)


def test_other_data_do_not_resume_it(stopped: Path, tmp_path: Path) -> None:
    other = write_sums(tmp_path / "other.jsonl", rows=23)
    with pytest.raises(UsageError, match=r"data\.train\.fingerprint: .* then"):
        train(load_recipe(stopped / "recipe.yaml", [f"data.path={other}"]), console=quiet(), resume=True)


def test_a_moved_model_resumes_it(stopped: Path, tmp_path: Path) -> None:
    moved = write_model(tmp_path / "moved", seed=0)
    train(load_recipe(stopped / "recipe.yaml", [f"model.path={moved}"]), console=quiet(), resume=True)


def test_resume_begins_a_run_that_has_not_begun(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = parse(place, run={"output": str(tmp_path / "out"), "steps": 1})
    train(recipe, console=Console(file=shown), resume=True)
    assert "no checkpoint yet" in shown.getvalue()


# What goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bad step changes nothing: going on without the cause is going on from before it."""
    recipe = parse(place, run={"output": str(tmp_path / "out"), **LENGTH})
    with monkeypatch.context() as patch:
        spoil_loss(patch, step=2)
        with pytest.raises(UsageError, match=r"the loss of step 3 is nan; .* last good checkpoint is .*step-2"):
            train(recipe, console=quiet())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same_weights(whole, train(recipe, console=quiet(), resume=True))


def test_weights_that_are_no_numbers_are_never_saved(place: Path, tmp_path: Path) -> None:
    trainer, _ = build(place, tmp_path, run={"save_every": 1, "steps": 1})
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = float("inf")  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(UsageError, match="weights are NaN or infinite"):
        trainer._save_checkpoint(trainer.model, None)
    assert RunFolder(tmp_path).complete_checkpoints() == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn_archive(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


FULL_DISK: dict[str, tuple[str, Callable[..., None]]] = {
    "weights": ("transformers.modeling_utils.safe_save_file", no_space),
    "optimizer": ("torch.save", torn_archive),
    "state": ("transformers.trainer_callback.TrainerState.save_to_json", no_space),
}


@pytest.mark.parametrize(("writer", "failure"), FULL_DISK.values(), ids=list(FULL_DISK))
def test_a_full_disk_leaves_the_last_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, failure: Callable[..., None]
) -> None:
    recipe = parse(place, run={"output": str(tmp_path / "out"), **LENGTH})
    with monkeypatch.context() as patch:
        fail_at_step(patch, writer, failure, step=4)
        with pytest.raises(UsageError, match=r"could not write .*step-4: .* MiB free on the disk"):
            train(recipe, console=quiet())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]


def test_a_disk_that_is_full_at_the_end_leaves_the_last_checkpoint(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(place, run={"output": str(tmp_path / "out"), **LENGTH})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_model", fails_to_save(patch))
        with pytest.raises(UsageError, match=r"could not write .*model"):
            train(recipe, console=quiet())
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"messages.log"}
    assert left == {"checkpoints", "recipe.yaml", "run.json"}
    assert_same_weights(whole, train(recipe, console=quiet(), resume=True))


# Helpers ---------------------------------------------------------------------------------------------------------


def quiet() -> Console:
    return Console(file=io.StringIO())


def stop_before(patch: pytest.MonkeyPatch, *, step: int, error: type[BaseException]) -> None:
    """Raise where the forward pass of step `step` (from 0) would begin."""
    compute_loss = RunTrainer.compute_loss

    def stop(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise error
        return compute_loss(self, *args, **options)

    patch.setattr(RunTrainer, "compute_loss", stop)


def spoil_loss(patch: pytest.MonkeyPatch, *, step: int) -> None:
    """Make TRL's loss NaN at step `step`."""
    parent = RunTrainer.__mro__[1]
    compute_loss = parent.compute_loss

    def spoiled(self: RunTrainer, *args: Any, **options: Any) -> Any:
        loss = compute_loss(self, *args, **options)
        return loss * float("nan") if self.state.global_step == step else loss

    patch.setattr(parent, "compute_loss", spoiled)


def fail_at_step(patch: pytest.MonkeyPatch, writer: str, failure: Callable[..., None], *, step: int) -> None:
    """Replace a writer with `failure` while the checkpoint of this step is written."""
    save = RunTrainer._save_checkpoint

    def failing(self: RunTrainer, *args: Any) -> None:
        if self.state.global_step == step:
            patch.setattr(writer, failure)
        save(self, *args)

    patch.setattr(RunTrainer, "_save_checkpoint", failing)


def fails_to_save(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`save_model` on a disk that has just become full."""

    def save(*args: Any, **options: Any) -> None:
        patch.setattr("transformers.modeling_utils.safe_save_file", no_space)
        save_model(*args, **options)

    return save
