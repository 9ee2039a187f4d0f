"""Texts against references: how rows become prompts with references, and how texts are scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import result as result_values
from report_fixtures import write as write_result
from train_fixtures import byte_tokenizer, write_model
from transformers import AutoModelForCausalLM

from gradselect import UsageError
from gradselect.app.compare.measure import items_of, score_of
from gradselect.app.compare.suite import Evaluation
from gradselect.app.evaluate import EvaluationResult, EvaluationSettings, answer_lines, evaluate, evaluate_model
from gradselect.app.evaluate.problems import read_source
from gradselect.app.evaluate.written_texts import referenced, with_templates
from gradselect.app.report.comparison import compare_results
from gradselect.app.report.read_results import read_results
from gradselect.app.stats import chrf, corpus_scores

ROWS = [
    {"fields": "name : Aromi", "references": ["Aromi is a pub .", "A pub , Aromi ."]},
    {"fields": "name : Zizzi", "references": ["Zizzi is a bar ."]},
]
PROMPT = "{fields}\nText:"
NEEDS_SACREBLEU = "sacrebleu is the extra gradselect[generation]"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(data: Path, **changes: Any) -> EvaluationSettings:
    values = {"model": "tiny", "task": "generation", "data": data, "prompt": PROMPT, "device": "cpu", **changes}
    return EvaluationSettings(**values)


def read(given: EvaluationSettings) -> list[Any]:
    source = read_source(given)
    return referenced(source, with_templates(given, source))


# Rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_prompt_with_all_its_references(data: Path) -> None:
    first, second = read(settings(data))
    assert (first.index, first.prompt, first.references) == (0, "name : Aromi\nText:", tuple(ROWS[0]["references"]))
    assert second.references == ("Zizzi is a bar .",)


def test_a_template_that_is_more_than_a_column_is_one_reference(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "Say it.", "a": "yes", "b": "no"}])
    (row,) = read(settings(data, prompt=None, completion=" {a} or {b}"))
    assert (row.prompt, row.references) == ("Say it.", ("yes or no",))


def test_a_prompt_of_empty_cells_names_the_row(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [ROWS[0], {"fields": "", "references": ["x"]}])
    with pytest.raises(UsageError, match="line 2: the prompt is empty"):
        read(settings(data))


@pytest.mark.parametrize("cell", [[], ["good", " "], ["good", 3], None, ""])
def test_a_missing_reference_names_the_row(cell: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [ROWS[0], {"fields": "x", "references": cell}])
    with pytest.raises(UsageError, match="line 2: "):
        read(settings(data))


def test_rows_without_a_usual_column_say_what_is_missing(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"fields": "x", "human": "y"}])
    with pytest.raises(UsageError, match="'references'"):
        read(settings(data))


def test_the_task_has_no_data_of_its_own() -> None:
    with pytest.raises(UsageError, match=r"the task generation has no data of its own; write data=test\.jsonl"):
        EvaluationSettings(model="tiny", task="generation")


# Scores ----------------------------------------------------------------------------------------------------------


def test_without_sacrebleu_nothing_is_loaded_and_the_message_says_what_to_install(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r"run: pip install 'gradselect\[generation\]'"):
        evaluate(settings(data))


def test_chrf_is_that_of_the_nearest_reference_and_bleu_that_of_all_texts() -> None:
    pytest.importorskip("sacrebleu", reason=NEEDS_SACREBLEU)
    texts = ["A pub , Aromi .", "Zizzi"]
    references = [row["references"] for row in ROWS]
    assert chrf(texts[0], references[0]) == pytest.approx(100)
    # by hand: the n-grams of "Zizzi" all stand in "Zizziisabar.": 5 of its 12, 4 of 11, ..., 1 of 8; it has no 6-gram
    precision, recall = 1.0, sum(matches / (matches + 7) for matches in range(1, 6)) / 5
    assert chrf(texts[1], references[1]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    scores = corpus_scores(texts, references)
    assert scores.keys() == {"chrf", "bleu"}
    assert corpus_scores([row["references"][0] for row in ROWS], references)["bleu"] == pytest.approx(100)
    assert scores["bleu"] < corpus_scores(["A pub , Aromi .", "Zizzi is a pub ."], references)["bleu"] < 100


def test_a_model_is_evaluated_text_by_text(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason=NEEDS_SACREBLEU)
    write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    given = settings(data, max_new_tokens=6, output=tmp_path / "out")
    result = evaluate_model(model, byte_tokenizer(), given)
    assert [item["references"] for item in result.items] == [row["references"] for row in ROWS]
    assert result.metrics is not None
    assert list(result.metrics) == ["mean_chrf", "chrf", "bleu"]
    scores = [chrf(item["prediction"].strip(), item["references"]) for item in result.items]
    assert [item["score"] for item in result.items] == scores
    assert result.metrics["mean_chrf"] == pytest.approx(sum(scores) / 2)
    assert result.settings["completion"] == "{references}"
    assert len((tmp_path / "out" / "items.jsonl").read_text("utf-8").splitlines()) == 2
    assert result.summary().startswith("generation: mean_chrf ")


def result_of(scores: list[float]) -> EvaluationResult:
    texts = {"question": "q", "references": ["a", "b", "c"], "prediction": " a", "finished": True}
    items = [{"index": index, "score": score, **texts} for index, score in enumerate(scores)]
    numbers = {"num_truncated": 0, "seconds": 1.0, "data": {}, "settings": {}, "versions": {}}
    metrics = {"mean_chrf": sum(scores) / len(scores), "chrf": 40.0, "bleu": 10.0}
    return EvaluationResult(
        task="generation", num_items=len(scores), metrics=metrics, interval=(1.0, 99.0), items=items, **numbers
    )


def test_the_score_of_a_result_is_the_mean_with_its_interval_or_the_one_that_the_suite_names() -> None:
    result = result_of([30.0, 60.0])
    assert (score_of(result).metric, score_of(result).value, score_of(result).interval) == ("mean_chrf", 45, (1, 99))
    assert (score_of(result, "bleu").value, score_of(result, "bleu").interval) == (10, None)
    assert [item.score for item in items_of(result)] == [30, 60]


def test_shown_answers_have_a_reference_and_their_score() -> None:
    lines = list(answer_lines(result_of([30.0])))
    assert lines[2:] == ["    expected  a (and 2 more)", "    given     a: chrF 30.0"]


def test_metrics_of_texts_are_for_generation_alone() -> None:
    assert Evaluation(task="generation", data="x.jsonl", metric="bleu").metric == "bleu"
    with pytest.raises(ValueError, match="metric=bleu is for task: generation, not gsm8k; leave metric out"):
        Evaluation(task="gsm8k", metric="bleu")
    with pytest.raises(ValueError, match="metric=f1 is for task: classification, not generation"):
        Evaluation(task="generation", data="x.jsonl", metric="f1")


def test_methods_are_compared_text_by_text(tmp_path: Path) -> None:
    """The second method is 5 better on each of the texts, whose own scores differ far more."""
    for name, gain in (("full", 0.0), ("other", 5.0)):
        values = result_values(name)
        scores = [40.0 * (index % 2) + gain for index in range(40)]
        values["gradselect"]["scores"] = {
            "texts": {"task": "generation", "metric": "mean_chrf", "value": sum(scores) / 40, "num_items": 40}
        }
        values["gradselect"]["items"] = {"texts": [{"index": i, "score": score} for i, score in enumerate(scores)]}
        write_result(tmp_path, values)
    (found,) = compare_results(read_results(tmp_path, include_dirty=False)).scores
    assert found.measure.title == "texts mean_chrf"
    (difference,) = found.pairs()
    assert (difference.first, difference.is_significant) == ("other", True)
    assert difference.value == pytest.approx(5)
    assert found.estimates["full"].source == "items"
