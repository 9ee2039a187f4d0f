"""The suite `lab`: its problems are right and split cleanly, its base can be stopped, its methods fit a model."""

import json
import random
import re
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from train_fixtures import write_model, write_sums
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradselect.app.compare.suite import load_suite
from gradselect.app.inputs import read_inputs
from gradselect.app.runtime.run_folder import RunFolder
from gradselect.app.train.setup import build_trainer
from gradselect.app.word_problems import split_of as short_split_of

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "quickstart")]

import lab_base  # noqa: E402
import lab_presets  # noqa: E402
import lab_problems  # noqa: E402
import lab_text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
SAMPLES = {
    largest: tuple(lab_problems.problems(count=400, seed=5, split="train", num_steps=(2, 3, 4, 5), largest=largest))
    for largest in (99, 999)
}
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 512,
    "window": 16,
    "batch_size": 2,
    "steps": 6,
    "save_steps": 3,
    "cooldown_steps": 2,
    "num_tokens": 3000,
    "shard_tokens": 1000,
    "num_train": 12,
    "num_valid": 6,
    "num_test": 6,
    "num_known": 4,
    "tokenizer_texts": 60,
}
SUITES = {name: load_suite(REPOSITORY / "suites" / f"{name}.yaml") for name in ("lab", "lab-cpu")}


# problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", SAMPLES)
def test_every_step_is_true_in_range_and_follows_from_what_was_told(largest):
    for problem in SAMPLES[largest]:
        known = set(re.findall(r"\d+", problem["question"]))
        *lines, last = problem["answer"].splitlines()
        steps = [CALCULATION.findall(line) for line in lines]
        assert [len(found) for found in steps] == [1] * problem["num_steps"], problem
        for ((left, sign, right, result),) in steps:
            assert {left, right} <= known, problem
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}.get(
                sign, int(left) / int(right)
            ) == int(result), problem
            assert 2 <= int(result) <= largest
            known.add(result)
        assert last == f"#### {steps[-1][0][3]}"


def test_each_step_goes_on_with_the_result_of_the_one_before():
    for problem in SAMPLES[99]:
        steps = CALCULATION.findall(problem["answer"])
        assert all(step[3] in (after[0], after[2]) for step, after in pairwise(steps)), problem


def test_problems_of_all_lengths_and_operations_are_equally_and_often_there():
    lengths = [problem["num_steps"] for problem in SAMPLES[99]]
    assert {length: lengths.count(length) for length in set(lengths)} == dict.fromkeys((2, 3, 4, 5), 100)
    signs = [step[1] for problem in SAMPLES[99] for step in CALCULATION.findall(problem["answer"])]
    assert all(signs.count(sign) > 0.04 * len(signs) for sign in "+-*/")


def test_large_numbers_are_really_used():
    assert max(int(number) for p in SAMPLES[999] for number in re.findall(r"\d+", p["question"])) > 900


def test_problems_are_plain_text_that_asks_once():
    for problem in SAMPLES[99]:
        assert not re.search(r"[{}<>|\[\]]|  ", problem["question"] + problem["answer"]), problem
        assert problem["question"].count("?") == 1
        assert problem["question"].endswith("?")


def test_the_splits_share_no_question_and_follow_the_quickstart_s():
    of = {
        split: {p["question"] for p in lab_problems.problems(count=100, seed=seed, split=split, num_steps=(2,))}
        for seed, split in enumerate(lab_problems.SPLITS)
    }
    for split, questions in of.items():
        assert {lab_problems.split_of(question) for question in questions} == {split}
        expected = "test" if split == "test" else "train"
        assert {short_split_of(question) for question in questions} == {expected}


def test_the_problems_follow_from_the_seed_alone():
    def draw(seed):
        return list(lab_problems.problems(count=30, seed=seed, split="valid", num_steps=(3,)))

    random.seed(1)
    state = random.getstate()
    assert draw(1) == draw(1) != draw(2)
    assert random.getstate() == state


def test_the_base_reads_no_question_and_no_worked_answer():
    for text in islice(lab_text.documents(seed="x", largest=999), 1500):
        assert not re.search(r"\?|Question|Answer|How ", text), text
        assert "####" not in text.lstrip("#"), text


# the base ---------------------------------------------------------------------------------------------------


def make(out, files=None, **changes):
    preset = lab_presets.changed(lab_presets.PRESETS["cpu"], {**TINY, **changes})
    torch.set_num_threads(1)
    lab_base.make("cpu", preset, files=files or lab_base.Files(), out=out, device=torch.device("cpu"), workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab") / "whole"
    make(out)
    return out


def test_what_the_suite_needs_is_made(made):
    counts = {name: len((made / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "valid", "test")}
    assert counts == {"train": 12, "valid": 6, "test": 6}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made / "base"), AutoTokenizer.from_pretrained(made / "base")
    assert model.config.vocab_size == len(tokenizer) == 512
    assert [set(json.loads(line)) for line in (made / "known.jsonl").read_text().splitlines()] == [{"text"}] * 4
    assert {path.name for path in made.iterdir()} == {
        *("base", "tokenizer", "made_by.json", "train.jsonl", "valid.jsonl", "test.jsonl", "known.jsonl")
    }


def test_a_stopped_pretraining_goes_on_to_the_same_weights(made, tmp_path, monkeypatch):
    update = lab_base.Run.update

    def stopping(run, tokens):
        if run.step == 4:
            raise KeyboardInterrupt
        update(run, tokens)

    monkeypatch.setattr(lab_base.Run, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "lab")
    assert not (tmp_path / "lab" / "base").exists()
    monkeypatch.setattr(lab_base.Run, "update", update)
    make(tmp_path / "lab")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(out / "base") for out in (made, tmp_path / "lab"))
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_folder_of_other_settings_is_refused(made):
    with pytest.raises(SystemExit, match="other settings"):
        make(made, steps=7)


def test_files_are_half_of_what_is_read_and_held_out_files_are_not_read(tmp_path):
    for name, word in (("read", "ocean"), ("held", "desert")):
        (tmp_path / f"{name}.txt").write_text(f"The {word} is wide and nobody counts it.\n" * 400)
    files = lab_base.Files(text=[tmp_path / "read.txt"], known=[tmp_path / "held.txt"])
    preset = lab_presets.changed(lab_presets.PRESETS["cpu"], TINY)
    tokenizer, tokens = lab_text.load_text(preset, files.text, tmp_path, workers=1)
    text = tokenizer.decode(tokens.tolist())
    assert tokens.numel() == 3000
    assert "ocean" in text[len(text) // 2 :]
    assert "desert" not in text
    lab_text.write_known(preset, tmp_path, files.known)
    known = (tmp_path / "known.jsonl").read_text().splitlines()
    assert (len(known), sum("desert" in line for line in known)) == (8, 4)


# the suite --------------------------------------------------------------------------------------------------


def test_both_sizes_compare_the_same_methods():
    gpu, cpu = SUITES.values()
    assert list(gpu.methods) == list(cpu.methods)
    assert gpu.seeds == cpu.seeds == 3
    assert all(len(entry.rates) >= 3 for suite in SUITES.values() for entry in suite.methods.values())


@pytest.mark.parametrize(("name", "preset"), [("lab", "gpu"), ("lab-cpu", "cpu")])
def test_the_suite_reads_what_the_preset_makes_and_an_example_fits(name, preset):
    suite, made = SUITES[name], lab_presets.PRESETS[preset]
    (preparation,) = suite.prepare
    folder = f"runs/lab/{preset}"
    assert preparation.command == f"python benchmarks/lab_base.py --preset {preset} --out {folder}"
    assert preparation.makes == suite.recipe.model.path == f"{folder}/base"
    assert suite.recipe.data.limit <= made.num_train
    assert suite.recipe.data.max_length <= made.base.max_length
    longest = {"question": 0, "answer": 0}
    tokenizer = lab_text.build_tokenizer(lab_presets.changed(made, {"tokenizer_texts": 300}), ())
    for problem in SAMPLES[made.largest]:
        if problem["num_steps"] in made.num_steps:
            for key, length in longest.items():
                longest[key] = max(length, len(tokenizer(problem[key])["input_ids"]))
    assert longest["answer"] < suite.evaluations["test"].max_new_tokens
    assert sum(longest.values()) + 10 < suite.recipe.data.max_length


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    # Wide enough for the ranks of the suite.
    config = LlamaConfig.from_pretrained(folder / "model", hidden_size=64, head_dim=32, intermediate_size=64)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


@pytest.mark.parametrize("method", SUITES["lab"].methods)
def test_every_method_fits_a_model_with_a_tied_head(tiny, tmp_path, method):
    places = {"model.path": "model", "data.path": "sums.jsonl", "data.validation": "sums.jsonl"}
    overrides = [f"recipe.{key}={tiny / name}" for key, name in places.items()]
    suite = load_suite(REPOSITORY / "suites" / "lab-cpu.yaml", [*overrides, "recipe.data.max_length=48"])
    recipe = suite.training_recipe(method, lr=1e-3, seed=0, output=tmp_path / "out")
    trainer = build_trainer(recipe, read_inputs(recipe), folder=RunFolder(tmp_path / "out"))
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())
