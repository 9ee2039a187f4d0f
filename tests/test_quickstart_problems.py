"""The problems of the quickstart are right, repeatable and split cleanly; its base is small and knows only stories."""

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradselect.app.word_problems import (
    LARGEST,
    SMALLEST,
    TEMPLATES,
    Misfit,
    calculate,
    main,
    make_problem,
    problems,
    split_of,
)

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"
BASE = QUICKSTART / "base"
sys.path.insert(0, str(QUICKSTART))

from pretrain import Recipe  # noqa: E402
from stories import documents  # noqa: E402

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
SAMPLE = tuple(problems(count=3000, seed=5, split="train"))


def evaluated(left: str, sign: str, right: str) -> float:
    """The calculation by other means than the generator's."""
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


# problems ---------------------------------------------------------------------------------------------------


def test_every_calculation_is_true_and_the_last_result_is_the_answer() -> None:
    for problem in SAMPLE:
        steps = CALCULATION.findall(problem["answer"])
        assert all(evaluated(*step[:3]) == int(step[3]) for step in steps), problem
        assert problem["answer"].splitlines()[-1] == f"#### {steps[-1][3]}", problem


def test_every_number_of_a_calculation_comes_from_the_question_or_from_an_earlier_step() -> None:
    for problem in SAMPLE:
        known = {*re.findall(r"\d+", problem["question"]), "2"}  # "half" and "between A and B" divide by two
        for left, _, right, result in CALCULATION.findall(problem["answer"]):
            assert {left, right} <= known, problem
            known.add(result)


def test_every_result_but_the_last_is_used_in_a_later_step() -> None:
    for problem in SAMPLE:
        steps = CALCULATION.findall(problem["answer"])
        for index, (*_, result) in enumerate(steps[:-1]):
            assert any(result in step[:3] for step in steps[index + 1 :]), problem


def test_every_number_of_the_question_is_used() -> None:
    for problem in SAMPLE:
        assert set(re.findall(r"\d+", problem["question"])) <= set(re.findall(r"\d+", problem["answer"])), problem


def test_a_worked_answer_has_one_calculation_a_line_and_one_to_three_of_them() -> None:
    lengths = set()
    for problem in SAMPLE:
        *lines, last = problem["answer"].splitlines()
        assert all(len(CALCULATION.findall(line)) == 1 for line in lines), problem
        assert re.fullmatch(r"#### \d+", last)
        lengths.add(len(lines))
    assert lengths == {1, 2, 3}


def test_all_operations_occur_and_every_result_is_in_range() -> None:
    steps = [step for problem in SAMPLE for step in CALCULATION.findall(problem["answer"])]
    assert {sign for _, sign, _, _ in steps} == set("+-*/")
    assert all(SMALLEST <= int(result) <= LARGEST for *_, result in steps)


@pytest.mark.parametrize(("left", "sign", "right"), [(7, "/", 2), (9, "-", 8), (50, "+", 50), (20, "*", 5)])
def test_a_result_that_is_not_a_whole_number_in_range_is_refused(left: int, sign: str, right: int) -> None:
    with pytest.raises(Misfit):
        calculate(left, sign, right)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.question[:40])
def test_every_template_gives_many_problems_of_plain_text(template) -> None:
    generator = random.Random(3)
    made = [make_problem(template, generator) for _ in range(20)]
    assert len({problem["question"] for problem in made}) == 20
    assert not re.search(r"[{}<>|\[\]]|  ", " ".join(p["question"] + p["answer"] for p in made))
    assert all(problem["question"].count("?") == 1 and problem["question"].endswith("?") for problem in made)


def test_no_two_problems_of_a_file_are_the_same() -> None:
    assert len({problem["question"] for problem in SAMPLE}) == len(SAMPLE)


def test_the_problems_follow_from_the_seed_alone() -> None:
    def draw(seed: int) -> list[dict[str, str]]:
        return list(problems(count=50, seed=seed, split="train"))

    first = draw(1)
    random.seed(99)
    state = random.getstate()
    assert draw(1) == first
    assert draw(2) != first
    assert random.getstate() == state


def test_a_larger_file_begins_with_the_smaller_one() -> None:
    assert tuple(problems(count=20, seed=5, split="train")) == SAMPLE[:20]


def test_the_splits_share_no_question_whatever_the_seeds() -> None:
    train = {problem["question"] for problem in SAMPLE}
    for seed in (5, 6):
        assert train.isdisjoint(problem["question"] for problem in problems(count=300, seed=seed, split="test"))
    assert {split_of(question) for question in train} == {"train"}


def test_the_command_writes_json_lines_with_question_and_answer(tmp_path: Path) -> None:
    out = tmp_path / "new" / "test.jsonl"
    main(["--count", "12", "--seed", "4", "--split", "test", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == list(problems(count=12, seed=4, split="test"))
    assert set(lines[0]) == {"question", "answer"}


# what the base has read -------------------------------------------------------------------------------------


def test_the_pretraining_text_never_asks_and_never_answers() -> None:
    for text in islice(documents(seed=8), 3000):
        assert not re.search(r"\?|Question|Answer|How ", text), text
        assert not re.search(r"####.*\d", text), text
        assert "####" not in text.lstrip("#"), text


def test_the_calculations_of_the_pretraining_text_are_true() -> None:
    steps = [step for text in islice(documents(seed=8), 3000) for step in CALCULATION.findall(text)]
    assert len(steps) > 3000
    assert all(evaluated(*step[:3]) == int(step[3]) for step in steps)


# the base ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE)


def render(problem: dict[str, str]) -> str:
    return f"Question: {problem['question']}\nAnswer: {problem['answer']}"


def test_the_base_folder_is_at_most_six_megabytes() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 6_000_000


def test_the_base_loads_as_what_the_recipe_says(model, tokenizer) -> None:
    recipe = Recipe()
    assert model.config.num_hidden_layers == recipe.num_layers
    assert model.config.hidden_size == recipe.hidden_size
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_text_survives_the_tokenizer(tokenizer) -> None:
    texts = [*map(render, SAMPLE[:200]), *islice(documents(seed=8), 200), "Ünknown wörds: 3,141.59 €\n\t\n"]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts] == texts


def test_every_digit_is_a_token_of_its_own(tokenizer) -> None:
    digits = {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    assert len(digits) == 10
    assert all(sum(char.isdigit() for char in token) <= 1 for token in tokenizer.get_vocab())
    assert sum(token in digits for token in tokenizer("There are 907 and 16.")["input_ids"]) == 5


def test_a_problem_with_its_answer_fits_in_128_tokens(tokenizer) -> None:
    assert max(map(len, tokenizer([render(problem) for problem in SAMPLE])["input_ids"])) < 128


def test_the_base_has_read_every_token_of_a_worked_answer(tokenizer) -> None:
    read = set().union(*tokenizer(list(islice(documents(seed=1), 5000)))["input_ids"])
    written = set().union(*tokenizer([f" {problem['answer']}" for problem in SAMPLE])["input_ids"])
    assert not {tokenizer.decode([token]) for token in written - read}


def test_the_base_predicts_its_kind_of_text(model, tokenizer) -> None:
    texts = list(islice(documents(seed=77), 16))
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        assert model(**batch, labels=labels).loss < 1.5
