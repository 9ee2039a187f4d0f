"""Sequence classification with gradselect train: labels and heads, and that the head trains with every method."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from classification_fixtures import COLUMNS, classify, write_bert, write_place
from rich.console import Console
from train_fixtures import assert_same_weights, byte_tokenizer, quiet, recipe_values, train_until, weights
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
)

from gradselect import UsageError
from gradselect.app.data.labels import label_names
from gradselect.app.data.rows import read_rows
from gradselect.app.inputs import read_inputs, row_notes
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import dump_recipe
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.runtime.run_folder import RunFolder
from gradselect.app.train import train
from gradselect.app.train.setup import build_trainer
from gradselect.app.train.trainer import RunTrainer

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models and data; no test changes it."""
    return write_place(tmp_path_factory.mktemp("place"))


def build(recipe: Any) -> RunTrainer:
    return build_trainer(recipe, read_inputs(recipe), folder=RunFolder(Path(recipe.run.output)))


# What comes out --------------------------------------------------------------------------------------------------


def test_the_result_is_a_plain_checkpoint_with_a_head_that_has_learnt(place: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = classify(
        place,
        tmp_path / "out",
        data={"validation": str(place / "dev.tsv")},
        method={"name": "adagradselect", "fraction": 0.4, "explore_steps": 3},
        run={"steps": 30, "batch_size": 8, "evaluate_every": 15},
    )
    out = train(recipe, console=Console(file=shown, width=200))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "single_label_classification"
    run = json.loads((out / "run.json").read_text())
    assert run["model"]["class"] == "BertForSequenceClassification"
    assert run["validation"]["accuracy"] == run["validation"]["matthews"] == 1.0
    assert run["validation"]["loss"] == run["validation_loss"] < 0.3
    assert run["selection"]["updates"][run["selection"]["blocks"].index("head")] == 30
    assert "step 15/30  validation loss" in shown.getvalue()
    assert "accuracy 1.0000" in shown.getvalue()
    assert "--task classification" in shown.getvalue()


def test_scores_have_one_output_and_correlations(place: Path, tmp_path: Path) -> None:
    data = {"path": str(place / "scores.tsv"), "regression": True, "validation": str(place / "scores.tsv")}
    out = train(classify(place, tmp_path / "out", data=data, run={"steps": 60}), console=quiet())
    config = AutoModelForSequenceClassification.from_pretrained(out).config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    validation = json.loads((out / "run.json").read_text())["validation"]
    assert validation["pearson"] > 0.7
    assert validation.keys() == {"loss", "pearson", "spearman"}


def test_a_classifier_that_stops_goes_on_as_if_it_had_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "adagradselect", "fraction": 0.4, "explore_steps": 3}
    run = {"save_every": 2, "accumulation": 2}
    recipes = [classify(place, tmp_path / name, method=method, run=run) for name in ("whole", "stopped")]
    train(recipes[0], console=quiet())
    train_until(recipes[1], step=3, monkeypatch=monkeypatch)
    train(recipes[1], console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["resumed_from"] == "step-2"


# The head --------------------------------------------------------------------------------------------------------


def head_of(recipe: Any) -> torch.Tensor:
    inputs = read_inputs(recipe)
    return torch.cat([value.flatten() for name, value in inputs.model.named_parameters() if name in inputs.head])


def test_a_new_head_is_drawn_from_the_seed(place: Path, tmp_path: Path) -> None:
    first, again, other = (head_of(classify(place, tmp_path, run={"seed": seed})) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_head_that_the_checkpoint_has_goes_on(place: Path, tmp_path: Path) -> None:
    out = train(classify(place, tmp_path / "out", run={"steps": 2}), console=quiet())
    again = head_of(classify(place, tmp_path / "again", model={"path": str(out)}, run={"seed": 7}))
    kept = weights(out)
    assert torch.equal(again, torch.cat([kept["classifier.weight"].flatten(), kept["classifier.bias"]]))


def write_head(place: Path, folder: Path, names: list[str]) -> Path:
    """Write a BERT with a head, and its outputs' names."""
    options: dict[str, Any] = {"id2label": dict(enumerate(names)), "num_labels": len(names)}
    AutoModelForSequenceClassification.from_pretrained(place / "bert", **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", ["good", "Good"])
def test_the_labels_of_a_trained_head_keep_their_order(place: Path, tmp_path: Path, first: str) -> None:
    """They were sorted, so that a head began with the meanings of its outputs exchanged."""
    head = write_head(place, tmp_path / "head", [first, "bad"])
    data = {"validation": str(place / "dev.tsv")}
    inputs = read_inputs(classify(place, tmp_path / "out", model={"path": str(head)}, data=data))
    assert inputs.examples.labels == ("good", "bad")
    assert inputs.model.config.id2label == {0: "good", 1: "bad"}
    assert inputs.model.config.label2id == {"good": 0, "bad": 1}
    assert inputs.examples.train["labels"][:3] == [1, 0, 0]
    assert inputs.examples.validation is not None
    assert inputs.examples.validation["labels"][:3] == [1, 0, 0]
    assert "the labels have the order of the checkpoint's trained head: good, bad" in inputs.examples.notes


HEADS = {
    "the same": (["bad", "good"], {}, None),
    "in capitals": (["BAD", "GOOD"], {}, None),
    "another order": (["good", "bad"], {"labels": ["bad", "good"]}, "data.labels, bad, good, renames the outputs"),
    "no names": (["LABEL_0", "LABEL_1"], {}, "head, LABEL_0, LABEL_1, are taken for the labels bad, good"),
    "one of them": (["good", "fair"], {"labels": ["good", "bad"]}, "head, good, fair, are taken for the labels good"),
}


@pytest.mark.parametrize(("names", "data", "said"), HEADS.values(), ids=list(HEADS))
def test_new_names_of_a_trained_head_are_said(
    place: Path, tmp_path: Path, names: list[str], data: dict[str, Any], said: str | None
) -> None:
    head = write_head(place, tmp_path / "head", names)
    inputs = read_inputs(classify(place, tmp_path / "out", model={"path": str(head)}, data=data))
    labels = tuple(data.get("labels", ["bad", "good"]))
    assert inputs.examples.labels == tuple(inputs.model.config.id2label.values()) == labels
    notes = [note for note in inputs.examples.notes if "trained head" in note]
    assert [said in note for note in notes] == [True] if said else notes == []


def test_a_new_head_has_no_order(place: Path, tmp_path: Path) -> None:
    inputs = read_inputs(classify(place, tmp_path / "out"))
    assert (inputs.examples.labels, inputs.examples.notes) == (("bad", "good"), ())
    drawn = {"path": str(place / "bert"), "random_weights": True}
    assert read_inputs(classify(place, tmp_path / "out", model=drawn)).examples.notes == ()


def test_of_a_checkpoint_without_pooler_the_pooler_belongs_to_the_head(place: Path, tmp_path: Path) -> None:
    write_bert(tmp_path / "bare", pooler=False)
    inputs = read_inputs(classify(place, tmp_path / "out", model={"path": str(tmp_path / "bare")}))
    assert {name.rpartition(".")[0] for name in inputs.head} == {"bert.pooler.dense", "classifier"}


def test_a_pooler_that_is_to_train_whole_belongs_to_the_head(place: Path, tmp_path: Path) -> None:
    recipe = classify(place, tmp_path / "out", model={"pooler_in_head": True})
    inputs = read_inputs(recipe)
    assert {name.rpartition(".")[0] for name in inputs.head} == {"bert.pooler.dense", "classifier"}
    was = AutoModelForSequenceClassification.from_pretrained(place / "bert").bert.pooler.dense.weight
    assert torch.equal(inputs.model.bert.pooler.dense.weight, was)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), source="recipe") == recipe
    assert "pooler_in_head" not in dump_recipe(classify(place, tmp_path / "out"))


def test_a_pooler_that_is_not_there_is_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pooler_in_head=true, and LlamaForSequenceClassification has no pooler"):
        read_inputs(classify(place, tmp_path / "out", base="model", model={"pooler_in_head": True}))
    values = recipe_values(place) | {"model": {"path": str(place / "model"), "pooler_in_head": True}}
    with pytest.raises(UsageError, match=r"pooler_in_head=true is for a classifier, and data.format=prompt-completion"):
        parse_recipe(values, source="recipe")


METHODS: dict[str, dict[str, Any]] = {
    "fixed": {"names": ["layer.0"]},
    "adagradselect": {"count": 1, "among": ["layer.*"]},
    "badam": {"every": 1},
    "last": {"count": 1},
    "full": {},
    "lora": {"rank": 2},
    "etherplus": {},
    "peft": {"type": "ia3", "options": {"target_modules": ["key", "k_proj"], "feedforward_modules": []}},
}


ON_A_DECODER = ("adagradselect", "lora")
RUNS = [*((name, "bert") for name in METHODS), *((name, "model") for name in ON_A_DECODER)]


@pytest.mark.parametrize(("name", "model"), RUNS)
def test_the_head_trains_with_every_method(place: Path, tmp_path: Path, name: str, model: str) -> None:
    recipe = classify(place, tmp_path / "out", base=model, method={"name": name, **METHODS[name]}, run={"steps": 2})
    before = {key: value.detach().clone() for key, value in read_inputs(recipe).model.named_parameters()}
    after = weights(train(recipe, console=quiet()))
    assert after.keys() == before.keys()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    head = {"bert": {"classifier.weight", "classifier.bias"}, "model": {"score.weight"}}[model]
    assert head <= moved
    if name == "fixed":
        assert all(".0." in key for key in moved - head)


def write_other(folder: Path, kind: str) -> Path:
    """Classifiers whose head is more than one module."""
    sizes = {"vocab_size": 258, "max_position_embeddings": 64, "pad_token_id": 257}
    write_bert(folder)
    if kind == "deberta":
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **shape, pooler_hidden_size=16)).save_pretrained(
            folder
        )
    else:
        DistilBertModel(DistilBertConfig(**sizes, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(folder)
    return folder


IA3 = {"name": "peft", "type": "ia3", "options": {"target_modules": ".*(key|k_lin).*", "feedforward_modules": []}}


@pytest.mark.parametrize(("kind", "head"), [("deberta", {"pooler", "classifier"}), ("distil", {"pre_classifier"})])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float32"), ("lora", "bfloat16"), ("propulsion", "float32"), ("ia3", "float32")],
)
def test_beside_an_adapter_all_of_the_head_trains_whole(
    place: Path, tmp_path: Path, kind: str, head: set[str], method: str, dtype: str
) -> None:
    """Merging ended in an AttributeError where a head is a module of several layers, as DeBERTa's pooler is."""
    path = write_other(tmp_path / kind, kind)
    recipe = classify(
        place,
        tmp_path / "out",
        model={"path": str(path), "dtype": dtype},
        method={"lora": {"name": "lora", "rank": 2}, "ia3": IA3}.get(method, {"name": method}),
        run={"steps": 2},
    )
    before = {key: value.detach().clone() for key, value in read_inputs(recipe).model.named_parameters()}
    after = weights(train(recipe, console=quiet()))
    moved = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert head | {"classifier"} <= moved


# The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{}, {"path": "scores.tsv", "regression": True}], ids=["labels", "scores"])
@pytest.mark.parametrize("model", ["bert", "model"])
def test_accumulation_is_a_larger_batch(place: Path, tmp_path: Path, model: str, data: dict[str, Any]) -> None:
    """Some models divide by the number of items, others do not; the loss must be divided exactly once."""
    found = []
    for batch_size, accumulation in ((24, 1), (8, 3)):
        output = tmp_path / str(batch_size)
        recipe = classify(
            place,
            output,
            base=model,
            data=data | ({"path": str(place / data["path"])} if data else {}),
            optimizer={"eps": 1.0, "max_grad_norm": 0},
            run={"steps": 2, "batch_size": batch_size, "accumulation": accumulation},
        )
        found.append(weights(train(recipe, console=quiet())))
    for name, value in found[0].items():
        # Another order of summation.
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_model_that_returns_more_than_logits_is_validated(place: Path, tmp_path: Path) -> None:
    """The run was lost to a TypeError in its first validation, which is behind the last step by default."""
    write_bert(tmp_path / "bert")
    file = tmp_path / "bert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"output_hidden_states": True}))
    model, data = {"path": str(tmp_path / "bert")}, {"validation": str(place / "dev.tsv")}
    recipe = classify(place, tmp_path / "out", model=model, data=data, run={"steps": 30, "batch_size": 8})
    run = json.loads((train(recipe, console=quiet()) / "run.json").read_text())
    assert run["validation"]["accuracy"] == 1.0


def test_scores_can_be_learnt_in_bfloat16(place: Path, tmp_path: Path) -> None:
    data = {"path": str(place / "scores.tsv"), "regression": True}
    recipe = classify(place, tmp_path / "out", model={"dtype": "bfloat16"}, data=data, run={"steps": 2})
    assert weights(train(recipe, console=quiet()))["classifier.weight"].dtype == torch.bfloat16


def test_texts_of_unequal_length_do_not_disturb_each_other(place: Path, tmp_path: Path) -> None:
    """A decoder classifies by its last token that is not padding."""
    recipe = classify(place, tmp_path / "out", base="model", data={"validation": str(place / "dev.tsv")})
    trainer = build(recipe)
    dataset: Any = trainer.eval_dataset
    assert len({len(ids) for ids in dataset["input_ids"]}) > 1
    together = torch.as_tensor(trainer.predict(dataset).predictions)
    for index, logits in enumerate(together):
        alone = trainer.predict(dataset.select([index])).predictions
        torch.testing.assert_close(torch.as_tensor(alone)[0], logits, rtol=1e-5, atol=1e-5)


# The data --------------------------------------------------------------------------------------------------------


def test_labels_are_numbered_by_size_or_by_the_alphabet() -> None:
    assert label_names(["10", "9", "10"], path="x") == ("9", "10")
    assert label_names([1, 0], path="x") == ("0", "1")
    assert label_names(["no", "yes", "10"], path="x") == ("10", "no", "yes")


def test_the_recipe_can_order_the_labels(place: Path, tmp_path: Path) -> None:
    recipe = classify(place, tmp_path, data={"labels": ["good", "bad"]})
    examples = render_examples(recipe.data, seed=0)
    assert examples.labels == ("good", "bad")
    assert [row["labels"] for row in examples.rows["train"][:3]] == [1, 0, 0]


def test_a_file_without_a_header_has_the_columns_of_the_recipe(place: Path, tmp_path: Path) -> None:
    plain = read_rows(place / "dev.tsv", columns=COLUMNS)
    assert plain[0] == {"number": "0", "grade": "bad", "sentence": 'b "text of length', "other": "0"}
    (tmp_path / "named.tsv").write_text("\t".join(COLUMNS) + "\n" + (place / "dev.tsv").read_text())
    assert read_rows(tmp_path / "named.tsv", columns=COLUMNS) == plain == read_rows(tmp_path / "named.tsv")


def test_pairs_are_read_together(place: Path, tmp_path: Path) -> None:
    trainer = build(classify(place, tmp_path, data={"text_pair": "{number}{other}"}))
    dataset: Any = trainer.train_dataset
    text = trainer.processing_class.decode(dataset[1]["input_ids"])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert text == 'a "text of some length11'


def test_texts_beyond_the_length_are_cut_and_counted(place: Path, tmp_path: Path) -> None:
    recipe = classify(place, tmp_path, data={"max_length": 16})
    inputs = read_inputs(recipe)
    trainer = build_trainer(recipe, inputs, folder=RunFolder(tmp_path))
    dataset: Any = trainer.train_dataset
    assert max(len(ids) for ids in dataset["input_ids"]) == 16
    (note,) = row_notes(trainer.token_counts, recipe.data, max_length=inputs.max_length)
    assert note.startswith("24 of 24 texts are longer than data.max_length=16 and lose their end: ")


BAD_DATA = {
    "unknown label": ({"labels": ["good", "fine"]}, "line [12]: the label 'bad' is none of good, fine"),
    "scores without a word": ({"path": "{place}/scores.tsv"}, r"write data\.regression=true"),
    "words as scores": ({"regression": True}, "line [12]: the score 'bad' is no finite number"),
    "one label": ({"limit": 1}, "two or more"),
    "no such column": ({"label": "mark"}, "has no column 'mark'"),
    "no such text": ({"text": "{words}"}, "has no column 'words'"),
    "too few columns": ({"columns": ["grade", "sentence"]}, "line 1: expected 2 fields as in columns"),
    "scores with labels": ({"regression": True, "labels": [0, 1]}, "regression=true and no labels"),
    "the same label twice": ({"labels": [0, 0]}, "two or more different labels"),
    "too long": ({"max_length": 65}, "more than the model's 64 positions"),
    "packed": ({"packing": True}, "packing: unknown key"),
}


@pytest.mark.parametrize(("data", "said"), BAD_DATA.values(), ids=list(BAD_DATA))
def test_data_that_make_no_sense_are_refused(place: Path, tmp_path: Path, data: dict[str, Any], said: str) -> None:
    data = {key: value.replace("{place}", str(place)) if type(value) is str else value for key, value in data.items()}
    with pytest.raises(UsageError, match=said):
        read_inputs(classify(place, tmp_path, data=data))


def test_columns_are_for_tables_only(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"is for \.csv and \.tsv files"):
        read_rows(tmp_path / "rows.jsonl", columns=COLUMNS)


def test_a_head_of_another_size_is_refused(place: Path, tmp_path: Path) -> None:
    out = train(classify(place, tmp_path / "out", run={"steps": 1}), console=quiet())
    with pytest.raises(UsageError, match="cannot be used"):
        read_inputs(classify(place, tmp_path, model={"path": str(out)}, data={"labels": ["good", "bad", "fair"]}))
