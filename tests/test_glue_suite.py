"""The suites of GLUE: they are valid, read its files, and rank each task by its own score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from gradselect import UsageError
from gradselect.app.compare import load_suite
from gradselect.app.compare.measure import score_of
from gradselect.app.compare.protocol import _evaluation_settings
from gradselect.app.compare.suite import Evaluation
from gradselect.app.evaluate import EvaluationResult
from gradselect.app.inputs import head_names
from gradselect.app.inputs.examples import render_examples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from encoder_text import Recipe as EncoderRecipe

SUITES = Path(__file__).parents[1] / "suites" / "glue"
METRICS = {"cola": "matthews", "rte": None, "mrpc": "f1", "stsb": "spearman"}
HEADERS = {
    "rte": "index\tsentence1\tsentence2\tlabel\n",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
}
LINES = {
    "cola": ('gj04\t1\t\tHe said "no\n', "gj04\t0\t*\tHe said so\n"),
    "rte": ("0\tA man.\tA cat.\tnot_entailment\n", "1\tA man.\tA man.\tentailment\n"),
    "mrpc": ("1\t7\t8\tHe ran.\tRan he.\n", "0\t7\t8\tHe ran.\tShe ate.\n"),
    "stsb": (
        "0\tg\tf\ty\t0001\tnone\tnone\tA plane.\tA jet.\t3.750\n",
        "1\tg\tf\ty\t0001\tnone\tnone\tA plane.\tA cat.\t0.5\n",
    ),
}


@pytest.mark.parametrize("task", METRICS)
def test_a_suite_of_each_task_reads_its_files_and_has_its_score(task: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(HEADERS.get(task, "") + "".join(LINES[task]) * 10, encoding="utf-8")
    suite = load_suite(SUITES / f"{task}.yaml", [f"recipe.data.path={tmp_path / 'train.tsv'}"])
    assert suite.name == f"glue-{task}"
    assert list(suite.methods) == ["full", "LoRA", "BitFit", "PaFI", "ID3", "SparseGrad", "MeProp", "GMT"]
    assert suite.evaluations["dev"].metric == METRICS[task]
    assert len(render_examples(suite.recipe.data, seed=0).rows["train"]) == 18


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("task", METRICS)
def test_classifier_and_pooler_train_whole_and_lora_has_the_entries_of_the_budget(task: str) -> None:
    suite, shape = load_suite(SUITES / f"{task}.yaml"), EncoderRecipe()
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    config = BertConfig(num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, **sizes)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    head = head_names(model, suite.recipe.model)
    assert [name.rpartition(".")[0] for name in head[::2]] == ["bert.pooler.dense", "classifier"]
    methods: dict[str, Any] = {name: entry.method for name, entry in suite.methods.items()}
    assert not any(getattr(method, "always", ()) for method in methods.values())
    adapted = get_peft_model(model, methods["LoRA"].peft_config(embedding="", head=("classifier", "pooler")))
    own = {name: weight.numel() for name, weight in adapted.named_parameters() if weight.requires_grad}
    num_own = sum(count for name, count in own.items() if ".modules_to_save." not in name)
    assert num_own == methods["PaFI"].budget == methods["ID3"].budget == 18_432
    in_mlps = 2 * shape.num_layers * shape.hidden_size * shape.intermediate_size
    assert methods["SparseGrad"].density * in_mlps == methods["MeProp"].density * in_mlps == num_own


def test_a_metric_is_for_classifications_alone() -> None:
    with pytest.raises(ValueError, match="metric=f1 is for task: classification, not loss; leave metric out"):
        Evaluation(task="loss", data="known.txt", metric="f1")


def test_a_protocol_without_a_metric_is_what_it_was_before_there_was_one(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("One and one is two.", encoding="utf-8")
    plain = {"task": "classification", "data": str(tmp_path / "known.txt")}
    assert "metric" not in _evaluation_settings(Evaluation.model_validate(plain))
    assert _evaluation_settings(Evaluation.model_validate({**plain, "metric": "f1"}))["metric"] == "f1"


def test_a_score_is_the_metric_asked_for_and_only_accuracy_has_an_interval() -> None:
    figures = {"accuracy": 0.75, "interval": (0.3, 0.95), "metrics": {"matthews": 0.5}}
    rest = {"num_truncated": 0, "seconds": 1.0, "data": {}, "settings": {}, "versions": {}, "items": []}
    result = EvaluationResult(task="classification", num_items=4, **figures, **rest)
    assert score_of(result).model_dump(exclude={"task", "num_items"}) == {
        "metric": "accuracy",
        "value": 0.75,
        "interval": (0.3, 0.95),
    }
    other = score_of(result, "matthews")
    assert (other.metric, other.value, other.interval) == ("matthews", 0.5, None)
    with pytest.raises(UsageError, match="metric=f1: this evaluation has accuracy, matthews; write one of them"):
        score_of(result, "f1")
