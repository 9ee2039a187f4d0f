"""The suites of the methods of the literature: equal budgets as they claim, data and model that they find."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import with_biases
from classification_fixtures import classify, write_place
from train_fixtures import quiet, weights
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import gradselect as gs
from gradselect.app.compare import load_suite
from gradselect.app.inputs import read_inputs
from gradselect.app.inputs.examples import render_examples
from gradselect.app.recipe import AbstractAdapterMethod, AbstractMaskMethod
from gradselect.app.train import train
from gradselect.entries.set_up import trainable_tensors
from gradselect.masks import SpaRTA
from gradselect.sparsegrad import choose_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import glue_tasks
import minilm

REPOSITORY = Path(__file__).resolve().parent.parent

# PEFT asks transformers 5 for a property that was renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # TRL 1.16 uses names that transformers 5.23 has replaced.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

TASKS = ("rte", "mrpc", "stsb", "cola")
SUITES = {name: load_suite(REPOSITORY / "suites" / "seeds" / f"{name}.yaml") for name in (*TASKS, "decoder")}
MINILM = {"vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
BUDGETS = {"mrpc": 82_944, "decoder": 34_816}
OF_LAYERS = ("AdaGradSelect 2 of 6", "AdaGradSelect 2 of 6, coverage 6", "uniform 2 of 6")
OF_BLOCKS = (*OF_LAYERS, "AdaGradSelect 14 of 42 matrices")
HEAD = ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias")


def stated_counts() -> dict[str, int]:
    """Return the table of numbers of entries that the suites of the encoder hold as a comment."""
    text = (REPOSITORY / "suites" / "seeds" / "_seeds.yaml").read_text("utf-8")
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"(?m)^#     (\w.*?) +([\d,]{5,})\b", text)}


COUNTS = {"mrpc": stated_counts(), "decoder": {"Propulsion": 9_216, "ETHER": 8_192, "LoRTA r=8": 1_408}}
COUNTS["decoder"]["LoRTA r=128"] = 22_528
"""Numbers of entries by method; those that are not named have the budget."""


def empty_model(name: str) -> Any:
    """Return the model of a suite without its weights."""
    with torch.device("meta"):
        if name == "decoder":
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(REPOSITORY / "quickstart" / "base"))
        return BertForSequenceClassification(BertConfig(num_attention_heads=12, **MINILM))


def adapted_entries(method: Any, name: str) -> int:
    from peft import get_peft_model

    head = () if name == "decoder" else ("classifier", "pooler")
    model = get_peft_model(empty_model(name), method.peft_config(embedding="embed_tokens", head=head))
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    of_head = {key: numel for key, numel in trained.items() if ".modules_to_save." in key}
    assert sum(of_head.values()) == (0 if name == "decoder" else 770 + 147_840)
    return sum(trained.values()) - sum(of_head.values())


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
        assert num_entries == COUNTS[name].get(method, BUDGETS[name])


@pytest.mark.parametrize("name", BUDGETS)
def test_a_mask_selects_as_many_entries(name: str) -> None:
    budget, methods = BUDGETS[name], {key: entry.method for key, entry in SUITES[name].methods.items()}
    model = empty_model(name)
    tensors = [tensor for tensor in trainable_tensors(model) if tensor.name not in HEAD]
    for method in ("PaFI", "ID3", "SPT"):
        assert methods[method].budget == budget == COUNTS[name].get(method, budget)
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
    assert set(SUITES["rte"].methods) - set(SUITES["decoder"].methods) == {"HiWi", "LoRTA r=189", *OF_BLOCKS}


def test_the_comment_counts_every_method() -> None:
    counts, model = COUNTS["mrpc"], empty_model("mrpc")
    assert counts.keys() == SUITES["mrpc"].methods.keys()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name not in HEAD}
    assert counts["full"] == sum(sizes.values())
    assert counts["GMT"] == sum(sizes.values()) // 5
    assert {counts[name] for name in OF_LAYERS} == {2 * sum(n for name, n in sizes.items() if ".layer.0." in name)}
    matrices = [block for block in gs.partition(model, by="matrix") if block.name.startswith("layer.")]
    assert len(matrices) == 42
    largest = sorted(sum(parameter.numel() for parameter in block.parameters) for block in matrices)[-14:]
    assert counts["AdaGradSelect 14 of 42 matrices"] == sum(largest)
    assert counts["BitFit"] == sum(size for name, size in sizes.items() if name.endswith(".bias"))
    budgeted = ("PaFI", "ID3", "SpaRTA", "SparseGrad", "SPT", "LoRA", "LoRA-SP", "LoRA-SP, each step", "AdaLoRA")
    assert {counts[name] for name in (*budgeted, "ETHER plus")} == {BUDGETS["mrpc"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("place"))
    with_biases(AutoModel.from_pretrained(folder / "bert")).save_pretrained(folder / "bert")
    return folder


FOR_A_TINY_MODEL: dict[str, dict[str, Any]] = {
    **{name: {"count": 1} for name in OF_LAYERS},
    "AdaGradSelect 14 of 42 matrices": {"count": 2},
    "LoRTA r=189": {"rank": 4},
    "SparseGrad": {"calibration_batches": 1},
    **{name: {"budget": 200} for name in ("PaFI", "ID3")},
    "SPT": {"budget": 500, "rank": 2, "calibration_batches": 1},
}


@pytest.mark.parametrize("method", SUITES["mrpc"].methods)
def test_beside_its_own_entries_every_method_trains_classifier_and_pooler_whole(
    place: Path, tmp_path: Path, method: str
) -> None:
    settings = SUITES["mrpc"].methods[method].method
    values = settings.model_dump(exclude_unset=True) | FOR_A_TINY_MODEL.get(method, {})
    head = {"pooler_in_head": SUITES["mrpc"].recipe.model.pooler_in_head}
    recipe = classify(place, tmp_path / "out", method=values, model=head, run={"steps": 3, "batch_size": 4})
    before = {name: p.detach().clone() for name, p in read_inputs(recipe).model.named_parameters()}
    after = weights(train(recipe, console=quiet()))
    moved = {name: int((after[name] != before[name]).sum()) for name in before}
    assert all(moved[name] == before[name].numel() for name in HEAD)
    num_own = sum(moved.values()) - sum(moved[name] for name in HEAD)
    assert num_own > 0
    if not isinstance(settings, AbstractMaskMethod) or getattr(settings, "adapter", None):
        return
    selection = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["selection"]
    adapters_and_vectors = selection["whole_entries"] - sum(before[name].numel() for name in HEAD)
    if method == "SPT":
        assert selection["entries"] + adapters_and_vectors == 500
    else:
        assert adapters_and_vectors == 0
        if method not in ("SparseGrad", "GMT"):  # which select others at each step
            assert num_own <= selection["entries"]  # rows of words that do not occur have no gradient


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
        assert made == {"runs/seeds/minilm", f"data/glue/{task}"}
        assert SUITES[task].prepare[-1].command.endswith(f"glue_tasks.py --out data/glue --task {task}")
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
    glue_tasks.main(["--out", str(tmp_path / "one"), "--task", "rte"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["rte"]
    with pytest.raises(SystemExit, match=r"has no stsb/train\.tsv and stsb/dev\.tsv"):
        glue_tasks.main(["--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "rte" / "dev.tsv").read_text("utf-8") == "rte dev"
    assert not (tmp_path / "out" / "stsb").exists()
