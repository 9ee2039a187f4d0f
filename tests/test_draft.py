"""`gradselect train MODEL DATA`: a recipe from a model and data alone, the format from the columns."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import CHAT_TEMPLATE, assert_same_weights, write_model, write_sums

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.draft import draft_recipe
from gradselect.app.draft.formats import guess_format
from gradselect.app.draft.rates import RATES, scaled_rate
from gradselect.app.recipe import load_recipe, parse_recipe, with_overrides
from gradselect.app.train.trainer import RunTrainer

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

TINY_WIDTH = 16
FORMATS = ("prompt-completion", "chat", "text", "classification")
USER = {"role": "user", "content": "2 + 3?"}
HUMAN = {"from": "human", "value": "2 + 3?"}
ALPACA = "### Instruction:\n{instruction}\n\n{?input:### Input:\n{input}\n\n}### Response:\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    write_model(folder / "model")
    write_model(folder / "chat-model", chat_template=CHAT_TEMPLATE)
    write_sums(folder / "sums.jsonl", rows=120)
    (folder / "few.txt").write_text("one\ntwo\n", "utf-8")
    (folder / "empty").mkdir()
    return folder


def guess(row: dict[str, Any], **given: Any) -> dict[str, Any]:
    return dict(guess_format([row], path="a.jsonl", given=given, formats=FORMATS).data)


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"format": "prompt-completion", "prompt": prompt, "completion": completion}


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"question": "q", "answer": "a"}, pair("Question: {question}\nAnswer:", " {answer}")),
        ({"problem": "q", "solution": "a", "level": 1}, pair("Question: {problem}\nAnswer:", " {solution}")),
        ({"prompt": "q", "completion": "a"}, pair("{prompt}", "{completion}")),
        ({"prompt": "q", "response": "a"}, pair("{prompt}\n", "{response}")),
        ({"instruction": "q", "input": "", "output": "a", "text": "all"}, pair(ALPACA, "{output}")),
        (
            {"instruction": "q", "response": "a"},
            pair("### Instruction:\n{instruction}\n\n### Response:\n", "{response}"),
        ),
        ({"input": "q", "target": "a"}, pair("Question: {input}\nAnswer:", " {target}")),
        ({"messages": [USER], "prompt": "q", "completion": "a"}, {"format": "chat", "messages": "messages"}),
        ({"conversations": [HUMAN], "id": 3}, {"format": "chat", "messages": "conversations"}),
        ({"talk": json.dumps([USER])}, {"format": "chat", "messages": "talk"}),
        ({"prompt": [USER], "completion": [USER]}, {"format": "chat", "messages": ["prompt", "completion"]}),
        ({"text": "t", "id": 3}, {"format": "text", "text": "{text}"}),
    ],
)
def test_the_format_is_found_from_the_columns(row: dict[str, Any], data: dict[str, Any]) -> None:
    assert guess(row) == data


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "q", "solution": "s", "answer": "a"}, "data.completion= {solution}"),
        ({"question": "q", "prompt": "p", "answer": "a"}, "data.prompt=Question: {question}\\nAnswer:"),
        ({"first": [USER], "second": [USER]}, "data.messages=second"),
        ({"question1": "a", "question2": "b", "label": 1}, "data.format=classification"),
        ({"sentence": "a", "label": 1}, "data.label=label"),
        ({"text": "a", "label": 1}, "data.format=text"),
        ({"frage": "q", "antwort": "a"}, "data.completion={antwort}"),
        ({"number": 3}, "data.text={number}"),
        ({"frage": "q", " antwort": "a"}, "columns: frage, ' antwort'."),
        (
            {"frage;antwort": "q;a"},
            "columns: frage;antwort (separated by semicolons; save it with commas",
        ),
    ],
)
def test_what_is_not_clear_is_refused_with_words_to_type(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        guess(row)
    said = str(refused.value)
    assert f"'{words}'" in said or f" {words}" in said


def test_words_of_the_user_decide_where_columns_do_not() -> None:
    row = {"problem": "q", "solution": "s", "answer": "a"}
    assert guess(row, completion=" {solution}") == pair("Question: {problem}\nAnswer:", " {solution}")
    assert guess({"frage": "q", "antwort": "a"}, prompt="{frage}", completion="{antwort}") == pair(
        "{frage}", "{antwort}"
    )
    assert guess({"a": [USER], "b": [USER]}, messages="a") == {"format": "chat"}
    assert guess({"question": "q", "answer": "a"}, text="{question}")["format"] == "text"


def test_preferences_need_a_trainer_where_a_recipe_knows_them() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = guess_format([row], path="a", given={}, formats=(*FORMATS, "preference"))
    assert (found.data["format"], found.trainer, found.unused) == ("preference", {"name": "dpo"}, ())


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "prompt, completion and label"),
        ({"prompt": "q", "completion": "a", "label": 1}, "prompt, completion and label"),
        ({"prompt": [USER], "completion": [USER], "label": True}, "prompt, completion and label"),
        ({"question": "q", "answer": "a", "label": True}, "question, answer and label"),
    ],
)
def test_answers_that_a_label_calls_bad_are_not_learnt_as_good(row: dict[str, Any], columns: str) -> None:
    found = guess_format([row], path="a", given={}, formats=(*FORMATS, "preference"))
    assert (str(found), found.trainer) == (f"preference, found from the columns {columns}", {"name": "kto"})
    typed = guess_format([row], path="a", given={"completion": "{answer}"}, formats=(*FORMATS, "preference"))
    assert typed.data["format"] != "preference"


def test_a_label_of_another_kind_is_not_taken_for_a_verdict() -> None:
    for row in ({"prompt": "q", "completion": "a", "label": "cat"}, {"question": "q", "answer": "a", "label": 1}):
        found = guess_format([row], path="a", given={}, formats=(*FORMATS, "preference"))
        assert (found.data["format"], found.unused) == ("prompt-completion", ("label",))


def test_no_column_is_named_that_the_data_lacks() -> None:
    row = {"chosen": [USER], "rejected": [USER]}
    found = guess_format([row], path="a", given={}, formats=(*FORMATS, "preference"))
    assert str(found) == "preference, found from the columns chosen and rejected"
    assert dict(found.data) == {"format": "preference"}


def test_unused_columns_are_said() -> None:
    found = guess_format([{"question": "q", "answer": "a", "id": 1}], path="a", given={}, formats=FORMATS)
    assert str(found) == "prompt-completion, found from the columns question and answer; not used: id"
    unnamed = guess_format([{"": "0", "question": "q", "answer": "a"}], path="a", given={}, formats=FORMATS)
    assert str(unnamed).endswith("; not used: ''")


@pytest.mark.parametrize(("name", "run"), [("Sums.JSONL", "Sums"), ("v1.json.csv", "v1.json"), ("a.jsonl.gz", "a")])
def test_a_run_is_named_after_its_data_however_the_ending_is_spelled(place: Path, name: str, run: str) -> None:
    data = (place / "sums.jsonl").read_bytes()
    data = b"question,answer\n1,2\n" if name.endswith(".csv") else gzip.compress(data) if ".gz" in name else data
    (place / name).write_bytes(data)
    assert draft_recipe(str(place / "model"), str(place / name)).recipe.run.output == f"runs/model-{run}"


def test_the_words_of_a_draft_make_the_same_recipe(place: Path) -> None:
    """What is printed can be typed."""
    draft = draft_recipe(str(place / "model"), str(place / "sums.jsonl"), ["run.steps=5", "method.always=embedding"])
    lines = [line for line in draft.lines() if "=" in line and not line.startswith("note")]
    words = shlex.split(" ".join(line[10:] for line in lines))
    assert parse_recipe(with_overrides({}, words), source="words") == draft.recipe
    assert (draft.recipe.run.steps, draft.recipe.run.epochs) == (5, None)


@pytest.mark.parametrize(
    ("words", "saves"),
    [([], 200), (["method.name=adalora"], None), (["method.name=galore"], None), (["run.save_every=null"], None)],
)
def test_a_method_that_cannot_resume_saves_no_checkpoints(words: list[str], saves: int | None, place: Path) -> None:
    """The draft asked for checkpoints, and the run refused them after the model was loaded."""
    assert draft_recipe(str(place / "model"), str(place / "sums.jsonl"), words).recipe.run.save_every == saves
    with pytest.raises(UsageError, match=r"method\.name=adalora cannot resume .* \(it was 5\)"):
        draft_recipe(str(place / "model"), str(place / "sums.jsonl"), ["method.name=adalora", "run.save_every=5"])


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["method.name=full"], scaled_rate("full", TINY_WIDTH)),
        ([], scaled_rate("blocks", TINY_WIDTH)),
        (["method.name=lora"], scaled_rate("lora", TINY_WIDTH)),
        (["method.name=ether"], scaled_rate("lora", TINY_WIDTH)),
        (["method={name: id3, density: 0.1}"], scaled_rate("lora", TINY_WIDTH)),
        (["method.name=hiwi"], 1e-4),
    ],
)
def test_the_learning_rate_follows_the_method_and_the_width(words: list[str], rate: float, place: Path) -> None:
    model, data = str(place / "model"), str(place / "sums.jsonl")
    draft = draft_recipe(model, data, words)
    assert draft.recipe.optimizer.lr == rate
    (note,) = [line for line in draft.lines() if "to begin with" in line]
    assert f"optimizer.lr={rate:g}" in note
    named = draft_recipe(model, data, [*words, "optimizer.lr=3e-3"])
    assert named.recipe.optimizer.lr == 3e-3
    assert not any("to begin with" in line for line in named.lines())


FULL_AND_BLOCKS = [scaled_rate(kind, TINY_WIDTH) for kind in ("full", "blocks")]
LORA = scaled_rate("lora", TINY_WIDTH)
TWICE_FULL = float(f"{2 * FULL_AND_BLOCKS[0]:.0e}")


@pytest.mark.parametrize(
    ("words", "rate", "said"),
    [
        ("name=full", FULL_AND_BLOCKS[0], "with, from runs of"),
        ("name=adagradselect", FULL_AND_BLOCKS[1], "with, from runs of"),
        ("name=uniform method.count=2", FULL_AND_BLOCKS[1], "with, from runs of"),
        ("name=gradnorm method.count=2 method.refresh=null", FULL_AND_BLOCKS[1], "with, from runs of"),
        ("name=gradnorm method.count=2", FULL_AND_BLOCKS[1], "not measured for gradnorm: AdaGradSelect's, from runs"),
        ("name=lisa", FULL_AND_BLOCKS[1], "not measured for lisa: AdaGradSelect's, from runs of"),
        ("name=badam", FULL_AND_BLOCKS[1], "not measured for badam: AdaGradSelect's, from runs of"),
        ("name=hft", FULL_AND_BLOCKS[0], "not measured for hft: that of full fine-tuning, from runs of"),
        ("name=lora", LORA, "with, ten times that of full fine-tuning, from runs of"),
        ("name=dora", LORA, "not measured for dora: LoRA's, ten times that of full fine-tuning, from runs of"),
        (
            "name=rslora method.rank=4",
            LORA / 2,
            "not measured for rslora: LoRA's divided by the root of the rank, from",
        ),
        ("name=ether", LORA, "not measured for ether: LoRA's, ten times that of full fine-tuning, from runs of"),
        ("name=sparta method.density=0.1", LORA, "not measured for sparta: LoRA's, ten times that of full"),
        ("name=gmt", FULL_AND_BLOCKS[0], "not measured for gmt: that of full fine-tuning, from runs of"),
        ("name=propulsion", float(f"{LORA / 3:.0e}"), "not measured for propulsion: a third of LoRA's, from runs of"),
        ("name=hiwi", 1e-4, "with, cautious, not measured"),
    ],
)
def test_a_rate_that_is_not_measured_for_the_method_is_said_not_to_be(
    words: str, rate: float, said: str, place: Path
) -> None:
    draft = draft_recipe(str(place / "model"), str(place / "sums.jsonl"), f"method.{words}".split())
    assert draft.recipe.optimizer.lr == pytest.approx(rate, rel=0.05)  # of one digit
    (note,) = [line for line in draft.lines() if "to begin with" in line]
    assert said in note


@pytest.mark.parametrize(
    ("method", "rate", "said"),
    [
        ("adagradselect", TWICE_FULL, "with, twice that of full fine-tuning, as on STS-B, from runs of"),
        ("full", FULL_AND_BLOCKS[0], "with, from runs of"),
        ("lora", LORA, "with, ten times that of full fine-tuning, from runs of"),
    ],
)
def test_a_classifier_begins_with_the_rate_of_full_fine_tuning_or_lora(
    method: str, rate: float, said: str, place: Path, tmp_path: Path
) -> None:
    """It began with 1e-5 whatever the model, an eighth of the best rate of a small encoder on STS-B."""
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": n % 2}) + "\n" for n in range(4)))
    words = ["data.format=classification", "data.text={text}", "data.label=label", f"method.name={method}"]
    draft = draft_recipe(str(place / "model"), str(path), words)
    assert draft.recipe.optimizer.lr == rate
    (note,) = [line for line in draft.lines() if "to begin with" in line]
    assert said in note


@pytest.mark.parametrize(
    ("num_layers", "words", "method"),
    [
        (8, [], {"name": "adagradselect", "fraction": 0.33, "blocks": "matrix"}),
        (8, ["method.fraction=0.5"], {"name": "adagradselect", "fraction": 0.5, "blocks": "matrix"}),
        (8, ["method.blocks=layer"], {"name": "adagradselect", "fraction": 0.2, "blocks": "layer"}),
        (8, ["method={name: uniform, fraction: 0.5}"], {"name": "uniform", "fraction": 0.5}),
        (9, [], {"name": "adagradselect", "fraction": 0.2}),
    ],
)
def test_with_few_layers_matrices_are_selected(
    num_layers: int, words: list[str], method: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """A fifth of a six-layer encoder was one layer, and of two layers AdaGradSelect trained the last two."""
    config = json.loads((place / "model" / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}), "utf-8")
    draft = draft_recipe(str(tmp_path), str(place / "sums.jsonl"), words)
    assert draft.written["method"] == method
    said = [line for line in draft.lines() if "as the model has 8 layers" in line]
    assert len(said) == (method.get("blocks") == "matrix")


@pytest.mark.parametrize(("method", "rate"), [("full", 5e-7), ("adagradselect", 5e-7), ("lora", 1e-5), ("id3", 1e-5)])
def test_rewards_begin_with_the_rate_of_preferences_and_not_with_that_of_text(
    method: str, rate: float, place: Path
) -> None:
    words = ["data.format=prompts", "data.prompt={question}", "data.answer={answer}", "trainer.name=grpo"]
    words += ["trainer.reward=gsm8k", f"method={{name: {method}{', density: 0.1' * (method == 'id3')}}}"]
    draft = draft_recipe(str(place / "model"), str(place / "sums.jsonl"), words)
    assert draft.recipe.optimizer.lr == rate
    assert any("to begin with, cautious, not measured" in line for line in draft.lines())


def test_first_rates_are_half_of_the_best_of_the_real_model() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "smollm2"

    def best(name: str) -> float:
        (rate,) = {path.name.split(".lr-")[1].split(".seed")[0] for path in results.glob(f"{name}.lr-*.score.json.gz")}
        return float(rate)

    assert RATES["full"] == best("full") / 2
    for name in ("adagradselect-20", "uniform-20", "six-by-the-first-gradient"):
        assert RATES["blocks"] == best(name) / 2
    assert RATES["lora"] == 10 * RATES["full"]
    assert best("lora-r-256") / 2 < RATES["lora"] < best("lora-r-16-e") / 2


@pytest.mark.parametrize("suite", ["seeds-decoder", "seeds-stsb"])
def test_masks_of_few_entries_want_at_least_what_they_begin_with(suite: str) -> None:
    """They began with the rate of no width, far below the best ones that were measured."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / suite

    def best(name: str) -> float:
        (rate,) = {path.name.split(".lr-")[1].split(".seed")[0] for path in results.glob(f"{name}.lr-*.score.json.gz")}
        return float(rate)

    for mask in ("id3", "sparta", "pafi", "sparsegrad"):
        assert best(mask) >= 8 * best("full")
    assert best("lora") >= 4 * best("full")


def test_rates_fall_with_the_width() -> None:
    """Figures that people use: 2e-5 and 1e-5 for full fine-tuning of models of one and eight billion weights."""
    assert [scaled_rate("full", width) for width in (576, 2048, 4096)] == [5e-5, 2e-5, 1e-5]
    assert [scaled_rate("blocks", width) for width in (576, 896, 2048, 3072)] == [2e-4, 1e-4, 7e-5, 5e-5]
    assert [scaled_rate("lora", width) for width in (2048, 4096)] == [2e-4, 1e-4]


def test_the_table_of_rates_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "choose.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for width, *rates in rows:
        assert [float(rate) for rate in rates] == [scaled_rate(kind, int(width)) for kind in ("full", "blocks", "lora")]


def test_a_width_that_is_not_known_is_said(place: Path) -> None:
    draft = draft_recipe("no-such-model", str(place / "sums.jsonl"))
    assert draft.recipe.optimizer.lr == scaled_rate("blocks", 2048)
    assert any("since the model's is not known" in line for line in draft.lines())


def test_few_rows_are_all_trained_on(place: Path) -> None:
    few = draft_recipe(str(place / "model"), str(place / "few.txt")).recipe
    assert (few.data.format, few.data.validation, few.run.evaluate_every) == ("text", None, None)
    many = draft_recipe(str(place / "model"), str(place / "sums.jsonl")).recipe
    assert (many.data.validation, many.run.evaluate_every) == (0.02, 200)
    none = draft_recipe(str(place / "model"), str(place / "sums.jsonl"), ["data.validation=null"]).recipe
    assert (none.run.evaluate_every, getattr(none.data, "validation_limit", 0)) == (None, None)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_none_is_refused_as_in_a_recipe(limit: int, place: Path) -> None:
    with pytest.raises(UsageError, match=f"data.limit = {limit}: "):
        draft_recipe(str(place / "model"), str(place / "sums.jsonl"), [f"data.limit={limit}"])


def test_a_chat_template_is_mentioned(place: Path) -> None:
    data = str(place / "sums.jsonl")
    assert "data.as_chat=true" in " ".join(draft_recipe(str(place / "chat-model"), data).lines())
    assert "as_chat" not in " ".join(draft_recipe(str(place / "model"), data).lines())
    pairs = {"text": {"prompt": "q", "chosen": "a", "rejected": "b"}, "talk": {"chosen": [USER], "rejected": [USER]}}
    for name, row in pairs.items():
        (place / f"{name}.jsonl").write_text(json.dumps(row), "utf-8")
        shown = " ".join(draft_recipe(str(place / "chat-model"), str(place / f"{name}.jsonl")).lines())
        assert ("as_chat" in shown) == (name == "text")


ROWS = {
    "alpaca": ({"instruction": "Add", "input": "2 3", "output": "5"}, "### Response:\n  ⟦5<end>⟧"),
    "sharegpt": ({"conversations": [HUMAN, {"from": "gpt", "value": "It is 5"}]}, "assistant: ⟦It is 5<end>⟧"),
    "text": ({"text": "It is 5"}, "I⟦t is 5<end>⟧"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_draft_are_read_as_they_would_be_trained(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, text = ROWS[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)), "utf-8")
    run("data", str(place / "chat-model"), str(tmp_path / "rows.jsonl"), "data.max_length=64", "--examples", "1")
    shown = capsys.readouterr()
    assert text in shown.out
    assert "found from the column" in shown.err


def run(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code


def test_a_run_without_a_recipe_leaves_one_and_resumes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(place / "model"), str(place / "sums.jsonl"), "run.device=cpu", "run.report_to=[]"]
    words += ["run.steps=4", "run.save_every=2", "optimizer.lr=1e-2"]
    output, again, whole = (tmp_path / name for name in ("out", "again", "whole"))
    run(*words, f"run.output={whole}")
    assert "format     prompt-completion, found from the columns question and answer" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", stopping_at_step(3))
        run(*words, f"run.output={output}", code=130)
    assert (output / "checkpoints/step-2").is_dir()
    assert not (output / "model.safetensors").exists()
    assert "sums.jsonl run.device=cpu" in capsys.readouterr().err
    run(*words, f"run.output={output}", "--resume")
    assert json.loads((output / "run.json").read_text("utf-8"))["resumed_from"] == "step-2"
    assert_same_weights(output, whole)

    run("train", str(output / "recipe.yaml"), f"run.output={again}")
    assert_same_weights(again, whole)
    assert load_recipe(output / "recipe.yaml").run.steps == 4


def stopping_at_step(step: int) -> Any:
    """Return a step of training that the user interrupts."""
    whole = RunTrainer.training_step

    def stop(self: RunTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    return stop


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{place}/model"], "is a model; name the data to train it on as well: gradselect train {place}/model DATA"),
        (["{place}/model", "run.steps=3"], "name the data to train it on as well"),
        (["{place}/sums.jsonl", "{place}/model"], "the model comes first: gradselect train MODEL {place}/sums.jsonl"),
        (["model.path=m", "data.path=d"], "'model.path=m' stands where a recipe or a model is expected"),
        (["{place}/empty", "{place}/sums.jsonl"], "is a folder without config.json, so no model, and no recipe"),
        (["some/model"], "name the data as well: gradselect train some/model DATA"),
        (
            ["{place}/a.yaml", "{place}/sums.jsonl"],
            "stands behind a recipe, which names its own data; write data.path=",
        ),
        (["nothing.yaml", "run.steps=1"], "nothing.yaml: no such recipe"),
        (["nothing.yaml", "{place}/sums.jsonl"], "stands behind a recipe"),
        (["{place}/model", "{place}/sums.jsonl", "3"], "'3' is no override; after MODEL and DATA write key=value"),
        (["{place}/model", "{place}/sums.jsonl", "run.stepz=3"], "did you mean 'steps'"),
        (["{place}/model", "{place}/none.jsonl"], "no such file"),
        (["some/model", "{place}/sums.jsonl"], "MODEL='some/model' cannot be used"),
    ],
)
def test_words_that_are_not_clear_are_refused(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", *(word.replace("{place}", str(place)) for word in words), code=2)
    assert said.replace("{place}", str(place)) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["plan", "data"])
def test_other_commands_take_a_model_and_data_too(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, str(place / "model"), str(place / "sums.jsonl"), "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)
    assert "found from the columns" in said.err
