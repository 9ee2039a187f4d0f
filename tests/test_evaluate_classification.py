"""Evaluation of classifiers: the metrics by hand, and whole evaluations of a tiny model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from classification_fixtures import COLUMNS, classify, write_place
from tokenizers.processors import TemplateProcessing
from train_fixtures import byte_tokenizer, quiet, write_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from gradselect import UsageError
from gradselect.app.cli import main
from gradselect.app.evaluate import EvaluationSettings, evaluate, evaluate_model
from gradselect.app.stats.metrics import class_metrics, f1, matthews_correlation, pearson, spearman
from gradselect.app.train import train

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


# Metrics ---------------------------------------------------------------------------------------------------------

# TP 3, FN 1, FP 2, TN 4
REFERENCES = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_metrics_of_two_labels_are_those_computed_by_hand() -> None:
    assert f1(REFERENCES, PREDICTIONS) == 2 * 3 / (2 * 3 + 2 + 1)
    by_hand = (3 * 4 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert matthews_correlation(REFERENCES, PREDICTIONS) == pytest.approx(by_hand, rel=1e-15)
    metrics = class_metrics(REFERENCES, PREDICTIONS, num_labels=2)
    assert metrics["accuracy"] == 0.7
    assert metrics.keys() == {"accuracy", "matthews", "f1"}
    assert "f1" not in class_metrics(REFERENCES, PREDICTIONS, num_labels=3)


def test_matthews_of_two_labels_is_the_pearson_correlation() -> None:
    assert matthews_correlation(REFERENCES, PREDICTIONS) == pytest.approx(pearson(REFERENCES, PREDICTIONS), rel=1e-12)


def test_matthews_of_three_labels_is_that_computed_by_hand() -> None:
    """n 5, right 3, the references name (2, 2, 1) and the predictions (2, 1, 2): (15 - 8) / sqrt((25 - 9)²)."""
    assert matthews_correlation([0, 0, 1, 1, 2], [0, 2, 1, 0, 2]) == 7 / 16


def test_what_is_not_defined_is_none() -> None:
    assert matthews_correlation([1, 0, 1], [1, 1, 1]) is None
    assert f1([0, 0], [0, 0]) is None
    assert pearson([1.0, 2.0], [3.0, 3.0]) is None
    assert spearman([1.0, 2.0], [math.nan, 3.0]) is None


def test_equal_values_share_their_mean_rank() -> None:
    """The ranks of the first are (3.5, 1, 3.5, 2)."""
    assert spearman([3.0, 1.0, 3.0, 2.0], [3.5, 1.0, 3.5, 2.0]) == pytest.approx(1.0)


def test_correlations_are_those_computed_by_hand() -> None:
    """x - x̄ = (-1.5, -0.5, 0.5, 1.5), y - ȳ = (-2, -1, 3, 0): sums 5, 5 and 14; ranks of y are (1, 2, 4, 3)."""
    x, y = [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 5.0, 2.0]
    assert pearson(x, y) == pytest.approx(5 / math.sqrt(5 * 14), rel=1e-15)
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15), rel=1e-15)


# Whole evaluations -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and two models that have been trained for a moment: `labels` and `scores`."""
    folder = write_place(tmp_path_factory.mktemp("place"))
    data = {"text": "{sentence}.", "labels": ["good", "bad"]}
    train(classify(folder, folder / "labels", data=data, run={"steps": 30, "batch_size": 8}), console=quiet())
    scores = {"path": str(folder / "scores.tsv"), "regression": True}
    train(classify(folder, folder / "scores", data=scores, run={"steps": 30, "batch_size": 8}), console=quiet())
    return folder


def settings(place: Path, **changes: Any) -> EvaluationSettings:
    usual = {"model": place / "labels", "task": "classification", "data": place / "dev.tsv"}
    return EvaluationSettings(**{**usual, **changes})


def test_a_trained_classifier_is_evaluated_as_it_was_trained(place: Path, tmp_path: Path) -> None:
    result = evaluate(settings(place, output=tmp_path / "out"))
    assert result.accuracy == 1.0
    assert result.metrics == {"matthews": 1.0, "f1": 1.0}
    assert result.interval is not None
    assert 0.6 < result.interval[0] < result.interval[1] == 1.0
    assert result.summary().startswith("classification: accuracy 100.0 % (95 % interval ")
    assert result.summary().endswith("8 of 8, matthews 1.0000, f1 1.0000")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["settings"]["text"] == "{sentence}."
    assert written["settings"]["labels"] == ["good", "bad"]
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [item["index"] for item in items] == list(range(8))
    assert items[1]["text"].endswith("length.")
    assert (items[0]["reference"], items[1]["prediction"]) == ("bad", "good")
    assert sum(items[0]["probabilities"].values()) == pytest.approx(1.0)


def test_a_decoder_without_a_padding_token_is_padded_as_in_training(tmp_path: Path) -> None:
    """The tokenizer's error was a traceback; another padding token in the configuration gave wrong labels."""
    folder = write_model(tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=7).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    rows = [{"sentence": "word " * length, "label": f"LABEL_{length % 2}"} for length in (1, 3, 6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    together, alone = (
        evaluate(settings(tmp_path, model=folder, data=tmp_path / "a.jsonl", batch_size=size)).items for size in (3, 1)
    )
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"]["LABEL_1"] == pytest.approx(other["probabilities"]["LABEL_1"], rel=1e-4)


def write_encoder_decoder(folder: Path, kind: str) -> Path:
    """It reads the class at the end-of-text token, which its tokenizer appends."""
    tokenizer = byte_tokenizer()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", pair=f"$A $B {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(folder)
    shared = {"vocab_size": 258, "d_model": 16, "eos_token_id": end[1], "pad_token_id": 257, "num_labels": 2}
    if kind == "bart":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        config = BartConfig(**shared, **heads, **layers, forced_eos_token_id=None)
        BartForSequenceClassification(config).save_pretrained(folder)
    else:
        config = T5Config(**shared, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=257)
        T5ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_classifier_of_an_encoder_decoder_is_evaluated(place: Path, tmp_path: Path, kind: str) -> None:
    """It was trained and saved, and then refused."""
    recipe = classify(
        place,
        tmp_path / "out",
        model={"path": str(write_encoder_decoder(tmp_path / kind, kind))},
        data={"validation": str(place / "dev.tsv")},
        method={"name": "adagradselect", "fraction": 0.5},
        run={"steps": 2},
    )
    out = train(recipe, console=quiet())
    trained = json.loads((out / "run.json").read_text())["validation"]
    assert evaluate(settings(place, model=out)).accuracy == trained["accuracy"]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    with pytest.raises(UsageError, match=r"is an encoder-decoder model; .* task=classification"):
        evaluate_model(model, tokenizer, settings(place, task="loss", columns=COLUMNS, text="{sentence}"))


@pytest.mark.parametrize("name", ["lora", "lorta"])
@pytest.mark.parametrize("data", [{"label": "number"}, {"path": "scores.tsv", "regression": True}])
def test_a_classifier_on_a_quantised_base_is_evaluated(
    place: Path, tmp_path: Path, name: str, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an adapter without a config.json: the base was built with two outputs, whose names nothing had kept."""
    monkeypatch.setattr("gradselect.app.train.saving.is_quantised", lambda model: True)
    file = str(place / data.get("path", "dev.tsv"))
    recipe = classify(
        place,
        tmp_path / "out",
        base="model",
        data={**data, "path": file, "validation": file},
        method={"name": name, "rank": 2},
        run={"steps": 3, "batch_size": 8},
    )
    out = train(recipe, console=quiet())
    assert not (out / "config.json").exists()
    result = evaluate(settings(place, model=out, data=file))
    trained = json.loads((out / "run.json").read_text())["validation"]
    if "regression" in data:
        assert result.metrics["pearson"] == pytest.approx(trained["pearson"], abs=1e-4)  # of other batches
    else:
        assert result.accuracy == trained["accuracy"]
        assert result.settings["labels"] == tuple("01234567")
        (out / "run.json").unlink()  # as of an adapter from elsewhere
        named = settings(place, model=out, data=file, columns=COLUMNS, label="number", labels=tuple("01234567"))
        assert evaluate(named).accuracy == result.accuracy


def test_the_adapter_of_a_classifier_is_evaluated_alone(place: Path, tmp_path: Path) -> None:
    """It had no tokenizer, and the record of its run is one folder up."""
    recipe = classify(
        place,
        tmp_path / "out",
        base="model",
        data={"validation": str(place / "dev.tsv")},
        method={"name": "lora", "rank": 2},
        run={"steps": 3},
    )
    out = train(recipe, console=quiet())
    merged, alone = (evaluate(settings(place, model=folder)) for folder in (out, out / "adapter"))
    assert alone.settings["labels"] == merged.settings["labels"] == ("bad", "good")
    assert [item["prediction"] for item in alone.items] == [item["prediction"] for item in merged.items]


def test_the_columns_of_the_training_also_name_those_of_a_packed_table(place: Path, tmp_path: Path) -> None:
    """Its first row was taken for the names of the columns."""
    packed = tmp_path / "dev.tsv.gz"
    packed.write_bytes(gzip.compress((place / "dev.tsv").read_bytes()))
    assert evaluate(settings(place, data=packed)).num_items == 8


def test_the_figures_are_those_of_the_items(place: Path) -> None:
    """The template of another training makes it err; f1 is of the second label."""
    result = evaluate(settings(place, data=place / "train.tsv", text="{number}b{grade}"))
    wrong = [item for item in result.items if not item["correct"]]
    assert wrong
    assert result.accuracy == (24 - len(wrong)) / 24
    numbers = [(int(item["reference"] == "bad"), int(item["prediction"] == "bad")) for item in result.items]
    assert result.metrics is not None
    assert result.metrics["f1"] == f1(*map(list, zip(*numbers, strict=True)))


def test_predictions_do_not_depend_on_the_batch(place: Path) -> None:
    together, alone = (evaluate(settings(place, batch_size=size)).items for size in (8, 1))
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"]["bad"] == pytest.approx(other["probabilities"]["bad"], rel=1e-4)


def test_a_model_in_memory_gives_the_same(place: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(place / "labels").train()
    tokenizer = AutoTokenizer.from_pretrained(place / "labels")
    chosen = settings(place, model="mine", text="{sentence}.", label="grade", columns=tuple(COLUMNS))
    assert evaluate_model(model, tokenizer, chosen).items == evaluate(settings(place)).items
    assert model.training


def test_outputs_that_are_no_numbers_are_refused(place: Path) -> None:
    """Each NaN counted as the first label: a model that had diverged got the share of that label as its accuracy."""
    model = AutoModelForSequenceClassification.from_pretrained(place / "labels")
    tokenizer = AutoTokenizer.from_pretrained(place / "labels")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    chosen = settings(place, model="mine", text="{sentence}.", label="grade", columns=tuple(COLUMNS))
    with pytest.raises(UsageError, match=r"outputs of the model for 8 of 8 texts are NaN or infinite; the first: .*1"):
        evaluate_model(model, tokenizer, chosen)


def test_a_label_that_stands_for_two_outputs_is_refused(place: Path) -> None:
    """Predictions of both outputs became one label, and all of them were right."""
    with pytest.raises(UsageError, match="'good' stands for several outputs"):
        evaluate(settings(place, labels=("good", "good")))


def test_scores_are_correlated(place: Path) -> None:
    result = evaluate(settings(place, model=place / "scores", data=place / "scores.tsv"))
    references = [item["reference"] for item in result.items]
    predictions = [item["prediction"] for item in result.items]
    assert set(references) == {0.5, 1.5, 2.5}
    assert result.metrics == {
        "pearson": pearson(references, predictions),
        "spearman": spearman(references, predictions),
    }
    assert result.accuracy is None
    assert result.summary().startswith("classification: pearson ")
    assert "correct" not in result.items[0]


def test_texts_are_cut_where_the_training_cut_them(place: Path, tmp_path: Path) -> None:
    recipe = classify(place, tmp_path / "out", data={"max_length": 12, "text_pair": "{other}"}, run={"steps": 1})
    result = evaluate(settings(place, model=train(recipe, console=quiet())))
    assert result.num_truncated == 8
    assert result.settings["max_length"] == 12
    assert result.items[0]["text_pair"] == "0"


def test_the_command_line_takes_all_of_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(place / "labels"), "--task", "classification", "--data", str(place / "dev.tsv")]
    keys = ["--text", "{sentence}", "--label", "grade", "--labels", "good,bad", "--columns", ",".join(COLUMNS)]
    with pytest.raises(SystemExit) as raised:
        main([*words, *keys, "--text-pair", "{other}", "--output", str(tmp_path / "out")])
    assert raised.value.code == 0
    assert "classification: accuracy" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert (written["text"], written["text_pair"], written["columns"]) == ("{sentence}", "{other}", COLUMNS)


def test_the_command_line_takes_stop_strings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("gradselect.app.cli.evaluate._evaluate_task", lambda settings, *_, **__: seen.append(settings))
    for stop in ([], ["--stop", "\\n\\n", "--stop", "END"]):
        with pytest.raises(SystemExit):
            main(["evaluate", str(place / "labels"), "--task", "gsm8k", "--data", str(place / "dev.tsv"), *stop])
    assert seen[0].stop == ("\nQuestion:",)
    assert seen[1].stop == ("\n\n", "END")


@pytest.mark.parametrize("option", ["--prompt", "--text-pair", "--stop"])
def test_a_text_that_no_file_can_hold_is_refused_by_its_option(
    option: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["evaluate", str(place / "labels"), "--task", "loss", "--data", str(place / "dev.tsv"), option, "a\x1bb"])
    assert raised.value.code == 2
    assert f"{option}: 'a\\x1bb' holds a character that cannot be written" in capsys.readouterr().err


WRONG = {
    "no data": ({"data": None}, "has no data of its own"),
    "prompt": ({"prompt": "{sentence}"}, "is not for the task classification"),
    "text of another task": ({"task": "gsm8k", "text": "{sentence}"}, "is not for the task gsm8k"),
    "text without a column": ({"text": "always the same"}, "names no column"),
    "no such column": ({"label": "mark"}, "has no column 'mark'"),
    "too many labels": ({"labels": ("good", "bad", "fair")}, "names 3, but the model has 2 outputs"),
    "other labels": ({"labels": ("yes", "no")}, "line [12]: the label 'bad' is none of yes, no"),
    "labels of scores": ({"model": "scores", "labels": ("a", "b")}, "the model has one output"),
    "no head": ({"model": "bert"}, "a model with a classification head"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=list(WRONG))
def test_what_cannot_be_evaluated_is_said(place: Path, changes: dict[str, Any], said: str) -> None:
    if "model" in changes:
        changes = {**changes, "model": place / changes["model"], "columns": tuple(COLUMNS), "label": "other"}
    with torch.random.fork_rng(devices=[]), pytest.raises(UsageError, match=said):
        evaluate(settings(place, **changes))
