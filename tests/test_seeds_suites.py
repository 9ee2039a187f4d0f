"""The suites of the methods of the literature: equal budgets as they claim, data and model that they find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import gradselect as gs
from gradselect.app.compare import load_suite
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import AbstractAdapterMethod, AbstractMaskMethod
from gradselect.entries.set_up import trainable_tensors
from gradselect.masks import SpaRTA
from gradselect.sparsegrad import choose_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import glue_tasks
import minilm

REPOSITORY = Path(__file__).resolve().parent.parent

# PEFT asks transformers 5 for a property that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ("rte", "mrpc", "stsb", "cola")
SUITES = {name: load_suite(REPOSITORY / "suites" / "seeds" / f"{name}.yaml") for name in (*TASKS, "decoder")}
MINILM = {"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
BUDGETS = {"mrpc": 84_480, "decoder": 34_816}
OWN = {
    "mrpc": {"Propulsion": 21_120, "ETHER": 21_120, "LoRTA r=8": 3_504, "LoRTA r=192": 84_096, "HiWi": 69_120},
    "decoder": {"Propulsion": 9_216, "ETHER": 8_192, "LoRTA r=8": 1_408, "LoRTA r=128": 22_528},
}
"""Numbers of entries of methods that have no budget, or cannot meet it."""


def empty_model(name: str) -> Any:
    """Return the model of a suite without its weights."""
    with torch.device("meta"):
        if name == "decoder":
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(REPOSITORY / "quickstart" / "base"))
        return BertForSequenceClassification(BertConfig(num_attention_heads=12, **MINILM))


def adapted_entries(method: Any, name: str) -> int:
    from peft import get_peft_model

    head = () if name == "decoder" else ("classifier",)
    model = get_peft_model(empty_model(name), method.peft_config(embedding="embed_tokens", head=head))
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad and "classifier" not in key}
    return sum(trained.values())


ADAPTERS = [
    (name, method)
    for name in BUDGETS
    for method, entry in SUITES[name].methods.items()
    if isinstance(entry.method, AbstractAdapterMethod)
]


@pytest.mark.parametrize(("name", "method"), ADAPTERS, ids=[f"{name}, {method}" for name, method in ADAPTERS])
def test_an_adapter_has_the_budget_or_the_size_that_the_suite_names(name: str, method: str) -> None:
    settings: Any = SUITES[name].methods[method].method
    num_entries = adapted_entries(settings, name)
    if settings.name == "adalora":  # it begins larger, with singular values; ranks fall to those of the LoRA
        assert settings.rank == SUITES[name].methods["LoRA"].method.rank
    else:
        assert num_entries == OWN[name].get(method, BUDGETS[name])


@pytest.mark.parametrize("name", BUDGETS)
def test_a_mask_selects_as_many_entries(name: str) -> None:
    budget, methods = BUDGETS[name], {key: entry.method for key, entry in SUITES[name].methods.items()}
    model = empty_model(name)
    tensors = [tensor for tensor in trainable_tensors(model) if "classifier" not in tensor.name]
    for method in ("PaFI", "ID3", "SPT"):
        assert methods[method].budget == budget
    sparta = gs.SpaRTA(density=methods["SpaRTA"].density).bind(tensors)
    assert isinstance(sparta, SpaRTA)
    assert abs(sparta.expected_entries - budget) <= 2
    names = {linear.weight_name for linear in choose_layers(model, layers=None, every=1)}
    in_mlps = [tensor.numel for tensor in tensors if tensor.name in names]
    assert abs(sum(round(methods["SparseGrad"].density * numel) for numel in in_mlps) - budget) <= len(in_mlps)
    half = methods["LoRA-SP"]
    assert half.density * adapted_entries(half.adapter, name) == budget
    assert not any(
        getattr(method, "always", ()) for method in methods.values() if isinstance(method, AbstractMaskMethod)
    )


def test_every_encoder_suite_has_the_same_methods_and_the_papers_degree() -> None:
    degrees = {task: SUITES[task].methods["Propulsion"].method.degree for task in TASKS}
    assert degrees == {"rte": 15, "mrpc": 55, "stsb": 20, "cola": 20}
    for task in TASKS:
        rest = {name: entry for name, entry in SUITES[task].methods.items() if name != "Propulsion"}
        assert rest == {name: entry for name, entry in SUITES["rte"].methods.items() if name != "Propulsion"}
    assert set(SUITES["rte"].methods) - set(SUITES["decoder"].methods) == {
        "HiWi",
        "AdaGradSelect 2 of 6",
        "LoRTA r=192",
    }


@pytest.mark.parametrize("name", SUITES)
def test_grids_hold_four_rates_a_factor_of_two_apart(name: str) -> None:
    for method, entry in SUITES[name].methods.items():
        assert [rate / entry.rates[0] for rate in entry.rates] == pytest.approx([1, 2, 4, 8]), method


def test_every_copy_of_glue_is_read_three_times() -> None:
    """Copies differ in their training rows, so a number of steps would be another number of epochs."""
    assert {(SUITES[task].recipe.run.steps, SUITES[task].recipe.run.epochs) for task in TASKS} == {(None, 3)}


def test_what_is_prepared_is_what_is_read() -> None:
    for task in TASKS:
        made = {str(preparation.makes) for preparation in SUITES[task].prepare}
        assert made == {"runs/seeds/minilm", "data/glue/stsb"}
        assert SUITES[task].recipe.model.path == "runs/seeds/minilm"
        assert str(SUITES[task].recipe.data.path) == f"data/glue/{task}/train.tsv"
        assert str(SUITES[task].evaluations["dev"].data) == f"data/glue/{task}/dev.tsv"


# Model and data ------------------------------------------------------------------------------------------------------


def test_the_encoder_is_taken_from_a_folder_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("GRADSELECT_MINILM", str(tmp_path / "mine"))
    minilm.main(["--out", str(tmp_path / "runs" / "minilm")])
    assert (tmp_path / "runs" / "minilm" / "config.json").read_text("utf-8") == "{}"
    monkeypatch.setenv("GRADSELECT_MINILM", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"GRADSELECT_MINILM=.*nowhere' names no folder with a config\.json"):
        minilm.main(["--out", str(tmp_path / "other")])


ROWS = {
    "rte": {"idx": 3, "sentence1": "A man.", "sentence2": "A\tcat.", "label": 1},
    "mrpc": {"idx": 3, "sentence1": "He ran.", "sentence2": 'Ran "he.', "label": 1},
    "cola": {"idx": 3, "sentence": "He ran.", "label": 0},
    "stsb": {"idx": 3, "sentence1": "A plane.", "sentence2": "A jet.", "label": 3.75},
}


@pytest.mark.parametrize("task", TASKS)
def test_files_written_from_the_hub_are_those_that_the_suites_read(task: str, tmp_path: Path) -> None:
    other = ROWS[task] | {"label": 0.5 if task == "stsb" else 1 - ROWS[task]["label"]}
    rows = [ROWS[task], other] * 10
    (tmp_path / "train.tsv").write_text(glue_tasks.text_of(glue_tasks.TASKS[task], rows), encoding="utf-8")
    suite = load_suite(REPOSITORY / "suites/seeds" / f"{task}.yaml", [f"recipe.data.path={tmp_path / 'train.tsv'}"])
    found = render_examples(suite.recipe.data, seed=0).rows["train"]
    assert len(found) == 18
    texts = {str(value) for row in found for value in row.values()}
    assert any(str(ROWS[task].get("sentence1", "He ran.")) in text for text in texts)


def test_files_are_copied_from_a_copy_of_glue_or_missing_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in {"rte": "RTE", "mrpc": "glue_mrpc", "cola": "cola"}.items():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for split in ("train", "dev"):
            (tmp_path / "glue" / folder / f"{split}.tsv").write_text(f"{name} {split}", encoding="utf-8")
    monkeypatch.setenv("GRADSELECT_GLUE", str(tmp_path / "glue"))
    with pytest.raises(SystemExit, match=r"has no stsb/train\.tsv and stsb/dev\.tsv"):
        glue_tasks.main(["--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "rte" / "dev.tsv").read_text("utf-8") == "rte dev"
    assert not (tmp_path / "out" / "stsb").exists()
