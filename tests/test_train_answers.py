"""Answers at validations: what is asked, shown and kept, and that the training does not notice."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classification_fixtures import classify, write_place
from rich.console import Console
from torch import nn
from train_fixtures import (
    ADAGRADSELECT,
    MARKED_CHAT_TEMPLATE,
    assert_same_weights,
    parse,
    quiet,
    write_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradselect.app.inputs import read_inputs
from gradselect.app.progress import Stage
from gradselect.app.recipe import Recipe, todays_recipe
from gradselect.app.runtime import RunFolder
from gradselect.app.train import answering, differences, train
from gradselect.app.train.answering import GreedyAnswerer, undisturbed
from gradselect.app.train.checkpoints import return_to
from gradselect.app.train.samples import UNKNOWN_BEGINNING, choose_samples, last_trained
from gradselect.usage import shortened

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

LENGTH = {"steps": 4, "evaluate_every": 2, "save_every": 2}
HELD_OUT = {"validation": 0.25}


def recipe(place: Path, output: Path, *, count: int, **sections: Any) -> Recipe:
    run = {"output": str(output), "sample_answers": count, **LENGTH, **sections.pop("run", {})}
    return parse(place, **{"method": ADAGRADSELECT, "data": HELD_OUT, **sections, "run": run})


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text("utf-8").splitlines()]


# The training does not notice -------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "blocks-bfloat16": {"model": {"dtype": "bfloat16"}},
    "mask": {"method": {"name": "id3", "budget": 200, "steps": 4}},
    "lora-dropout-checkpointing": {
        "method": {"name": "lora", "dropout": 0.3},
        "model": {"gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("sections", METHODS.values(), ids=list(METHODS))
def test_a_run_with_answers_equals_one_without_bitwise(place: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    with_answers, without = (
        train(recipe(place, tmp_path / str(count), count=count, **sections), console=quiet()) for count in (3, 0)
    )
    assert [line["step"] for line in lines(with_answers)] == [2, 2, 2, 4, 4, 4]
    assert not (without / "answers.jsonl").exists()
    assert_same_weights(with_answers, without)
    ours, theirs = (
        {name: torch.load(run / "checkpoints" / "step-4" / name, weights_only=False) for name in files}
        for run in (with_answers, without)
        for files in [("optimizer.pt", "rng_state.pth")]
    )
    assert plain(ours) == plain(theirs)
    history, other = (json.loads((run / "run.json").read_text())["history"] for run in (with_answers, without))
    losses = [[entry.get("loss", entry.get("eval_loss")) for entry in log] for log in (history, other)]
    assert losses[0] == losses[1]


def plain(value: Any) -> Any:
    """Return nested values with tensors and arrays as bytes."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.item()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_resumed_run_has_the_answers_of_a_whole_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(place, tmp_path / "whole", count=3), console=quiet())
    with monkeypatch.context() as patch:
        # After the answers of step 4, before its checkpoint.
        patch.setattr("gradselect.app.train.trainer.RunTrainer.check_weights", _stop_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(place, tmp_path / "stopped", count=3), console=quiet())
    stopped = tmp_path / "stopped"
    assert [line["step"] for line in lines(stopped)] == [2, 2, 2, 4, 4, 4]
    with (stopped / "answers.jsonl").open("a") as file:
        file.write('{"step": 4, "row"')  # killed while writing
    train(recipe(place, stopped, count=3), console=quiet(), resume=True)
    assert lines(stopped) == lines(whole)
    assert_same_weights(stopped, whole)


def test_answers_with_line_separators_inside_are_cut_at_a_resume(tmp_path: Path) -> None:
    """The run could not be resumed: a text with U+2028 or U+0085 was taken for several lines."""
    answers = [{"step": step, "prompt": "a\u2028b\x85c", "answer": "\u2029"} for step in (2, 2, 4)]
    texts = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    # Killed within a character.
    (tmp_path / "answers.jsonl").write_bytes("\n".join([*texts, '{"step": 4, "prompt": "ü']).encode()[:-1])
    folder = RunFolder(tmp_path)
    folder.checkpoint(2).mkdir(parents=True)
    return_to(folder, folder.checkpoint(2), damaged={}, keep=1)
    assert (tmp_path / "answers.jsonl").read_text("utf-8") == f"{texts[0]}\n{texts[1]}\n"


def _stop_at_step_4(trainer: Any) -> None:
    if trainer.state.global_step == 4:
        raise KeyboardInterrupt


def test_a_run_of_an_earlier_version_without_the_key_resumes(place: Path, tmp_path: Path) -> None:
    now = recipe(place, tmp_path / "out", count=3).model_dump(mode="json")
    before = {**now, "run": {key: value for key, value in now["run"].items() if key != "sample_answers"}}
    rest: dict[str, Any] = {"model": {}, "data": {}}
    assert list(differences({"recipe": before, **rest}, {"recipe": now, **rest})) == []
    # A comparison, whose runs ask for no answers, goes on with its old runs.
    assert todays_recipe(before) == {**now, "run": {**now["run"], "sample_answers": 0}}


class _Noting(nn.Module):
    """Notes the longest input in attributes and buffers, as some rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.longest = 0
        self.notes: torch.Tensor | None = None
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, size: int) -> torch.Tensor:
        self.longest = max(self.longest, size)
        self.notes = torch.ones(size)
        self.register_buffer("scale", torch.full((1,), float(size)), persistent=False)
        self.count += 1
        self.new_note = True
        return self.weight * torch.rand(2) * random.random() * np.random.rand()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_and_all_random_states_are_as_before(training: bool) -> None:
    model = _Noting().train(training)
    scale = model.scale
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    with undisturbed(model):
        assert not model.training
        assert not model(9).requires_grad
    assert (model.training, model.longest, model.notes) == (training, 0, None)
    assert not hasattr(model, "new_note")
    assert model.scale is scale
    assert (scale.item(), model.count.item()) == (1, 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # pyright: ignore


# What is asked -----------------------------------------------------------------------------------------------------


def test_rows_are_evenly_spaced_and_split_where_training_begins(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path, count=2)
    inputs = read_inputs(chosen)
    samples, notes = choose_samples(chosen, inputs)
    assert notes == []
    assert [sample.row for sample in samples] == [1, 4]  # of six
    row = inputs.examples.sources["validation"].rows[3]
    assert (samples[1].prompt, samples[1].reference) == (row["question"], f" {row['answer']}")
    assert inputs.tokenizer.decode(samples[1].ids) == row["question"]


def test_a_prompt_without_room_for_an_answer_is_passed_over(place: Path, tmp_path: Path) -> None:
    rows = [{"question": "q" * length, "answer": "a"} for length in (33, 5, 5, 33)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = recipe(place, tmp_path, count=2, data={"validation": str(tmp_path / "long.jsonl")})
    assert [sample.row for sample in choose_samples(chosen, read_inputs(chosen))[0]] == [2, 3]


@pytest.mark.parametrize("loss_on", ["last-answer", "answers"])
def test_of_a_conversation_the_last_answer_is_asked_for(tmp_path: Path, loss_on: str) -> None:
    template = MARKED_CHAT_TEMPLATE.replace("['role'] }}", "['role'][0] }}").replace("assistant: {", "a: {")
    write_model(tmp_path / "model", chat_template=template)
    words = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in words]}
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    data = {"format": "chat", "path": str(tmp_path / "chat.jsonl"), "loss_on": loss_on, **HELD_OUT}
    chosen = recipe(tmp_path, tmp_path / "out", count=1, data=data)
    (sample,) = choose_samples(chosen, read_inputs(chosen))[0]
    assert sample.prompt == "u: a<end>a: b<end>u: c<end>a: "
    assert sample.reference == "d"


def test_where_no_answer_begins_that_is_said(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path, count=3, data={**HELD_OUT, "loss_on": "all"})
    assert choose_samples(chosen, read_inputs(chosen)) == ([], [UNKNOWN_BEGINNING])


@pytest.mark.parametrize("data", [{}, {"format": "text", "text": "{question}", **HELD_OUT}])
def test_without_validation_data_and_for_texts_nothing_is_asked(place: Path, tmp_path: Path, data: Any) -> None:
    data = {**data, "path": str(place / "sums.jsonl")}
    chosen = recipe(place, tmp_path, count=3, data=data, run={"evaluate_every": None})
    assert choose_samples(chosen, read_inputs(chosen)) == ([], [])


@pytest.mark.parametrize(
    ("labels", "stretch"),
    [([-100, 5, -100, 7, 8], (3, 5)), ([-100, 7, 8, -100], (1, 3)), ([7, 8], (0, 2)), ([-100], (0, 0))],
)
def test_the_last_trained_stretch(labels: list[int], stretch: tuple[int, int]) -> None:
    assert last_trained(labels) == range(*stretch)


# What is answered --------------------------------------------------------------------------------------------------


def test_answers_are_the_most_probable_tokens(place: Path, tmp_path: Path) -> None:
    """One batch with padding and a cache, against one prompt at a time without."""
    chosen = recipe(place, tmp_path, count=3)
    samples, _ = choose_samples(chosen, read_inputs(chosen))
    assert len({len(sample.ids) for sample in samples}) > 1
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "model")
    slow = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        slow.append(tokenizer.decode(ids[0, len(sample.ids) :]))
    answerer, stage = GreedyAnswerer(samples, tokenizer=tokenizer, ends=(), max_new_tokens=8), Stage("answering")
    found = answerer.answers(model, stage, is_stopping=lambda: False)
    assert [answer.text for answer in found] == slow
    assert not any(answer.is_finished for answer in found)
    assert stage.numbers() == "8/8"


def test_a_token_that_ends_the_data_s_answers_ends_those_of_the_model(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path, count=1)
    samples, _ = choose_samples(chosen, read_inputs(chosen))
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "model")
    first = model(torch.tensor([samples[0].ids])).logits[0, -1].argmax().item()
    answerer = GreedyAnswerer(samples, tokenizer=tokenizer, ends=(first,), max_new_tokens=8)
    (answer,) = answerer.answers(model, Stage("answering"), is_stopping=lambda: False)
    assert (answer.text, answer.is_finished) == ("", True)


@pytest.mark.parametrize("reason", ["time", "signal"])
def test_answers_end_when_the_time_is_over_or_the_run_stops(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "time":
        monkeypatch.setattr(answering, "MAX_SECONDS", -1.0)
    chosen = recipe(place, tmp_path, count=2)
    inputs = read_inputs(chosen)
    samples, _ = choose_samples(chosen, inputs)
    answerer, stage = GreedyAnswerer(samples, tokenizer=inputs.tokenizer, ends=(), max_new_tokens=8), Stage("answering")
    answerer.answers(inputs.model.eval(), stage, is_stopping=lambda: reason == "signal")
    assert stage.done == 1


@pytest.mark.parametrize("regression", [False, True])
def test_of_classified_texts_labels_or_scores_are_predicted(tmp_path: Path, regression: bool) -> None:
    place = write_place(tmp_path)
    file = "scores" if regression else "train"
    data = {**HELD_OUT, "regression": regression, "path": str(place / f"{file}.tsv")}
    shown = io.StringIO()
    run = {"steps": 1, "log_every": 1}
    output = train(classify(place, tmp_path / "out", data=data, run=run), console=Console(file=shown, width=200))
    found = lines(output)
    assert [line["step"] for line in found] == [1, 1, 1]
    assert all("text of" in line["prompt"] and line["finished"] for line in found)
    for line in found:
        if regression:
            assert float(line["reference"]) in (0.5, 1.5, 2.5)
            float(line["answer"])
        else:
            assert {line["reference"], line["answer"]} <= {"good", "bad"}
    assert f"predicted {'scores' if regression else 'labels'}; all in" in shown.getvalue()


# What is shown -----------------------------------------------------------------------------------------------------


def test_answers_stand_below_the_validation_loss(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    train(recipe(place, tmp_path / "out", count=1), console=Console(file=shown, width=200))
    text = shown.getvalue().splitlines()
    place_of_loss = next(place for place, line in enumerate(text) if line.startswith("step 2/4  validation loss"))
    heading, prompt, reference, answer = text[place_of_loss + 1 : place_of_loss + 5]
    file = tmp_path / "out" / "answers.jsonl"
    assert heading == f"answers    after step 2, greedy, at most 32 tokens; all in {file}"
    first = lines(tmp_path / "out")[0]
    assert prompt == f"  row 1      {first['prompt']}"
    assert reference == f"    data     {first['reference'].strip()}"
    assert answer.startswith("    model    ")


def test_a_long_text_is_shown_without_its_middle() -> None:
    text = shortened("a" * 200 + "\n" + "b" * 299)
    assert text == f"{'a' * 120} ... 260 characters ... {'b' * 120}"
    assert shortened(" one\ntwo\x1b[2J ") == "one\\ntwo\\x1b[2J"


def test_a_model_that_cannot_answer_does_not_end_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no cache of this kind\nmore")

    monkeypatch.setattr(GreedyAnswerer, "answers", fail)
    shown = io.StringIO()
    output = train(recipe(place, tmp_path / "out", count=1), console=Console(file=shown, width=200))
    said = [line for line in shown.getvalue().splitlines() if "cannot answer" in line]
    assert said == ["note       the model cannot answer validation rows and is not asked again: no cache of this kind"]
    assert len(calls) == 1
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
