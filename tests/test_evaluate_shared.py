"""Real models and data; skipped without the folder that holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gradselect.app.answers.answer_judge import Judge
from gradselect.app.answers.answers import gsm8k_answer, math_answer, trimmed
from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.evaluate.problems import problems, read_source

SHARED = Path(os.environ.get("GRADSELECT_SHARED", Path(__file__).parents[2] / "shared"))
GSM8K = SHARED / "data" / "gsm8k" / "test.jsonl"
MATH = SHARED / "data" / "math" / "test.jsonl"
MATH500 = SHARED / "data" / "math" / "math500.jsonl"
MODEL = SHARED / "models" / "stories260K"


def needs(*paths: Path) -> pytest.MarkDecorator:
    missing = [path for path in paths if not path.exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{missing[0] if missing else ''} is not at hand")


@needs(MODEL, GSM8K)
def test_a_story_teller_solves_no_problem_but_writes_an_answer_to_each(tmp_path: Path) -> None:
    result = evaluate(
        EvaluationSettings(
            model=MODEL, task="gsm8k", data=GSM8K, limit=4, max_new_tokens=24, device="cpu", output=tmp_path / "out"
        )
    )
    assert result.accuracy == 0
    assert result.interval is not None
    assert 0.4 < result.interval[1] < 0.6
    assert [item["reference"] for item in result.items] == ["18", "3", "70000", "540"]
    assert all(len(item["prediction"].split()) > 3 for item in result.items)
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))["num_items"] == 4


@needs(MODEL, GSM8K)
def test_a_story_teller_finds_problems_strange_but_not_beyond_measure() -> None:
    """Its vocabulary has 512 tokens: a uniform guess costs ln 512 = 6.2 nats, a model sure of stories more."""
    settings = EvaluationSettings(model=MODEL, task="loss", data=GSM8K, limit=8, dtype="float32", device="cpu")
    result = evaluate(settings)
    assert result.loss is not None
    assert result.interval is not None
    assert 5 < result.loss < 10
    assert result.interval[0] < result.loss < result.interval[1]
    assert result.num_tokens is not None
    assert result.num_tokens > 500


@needs(GSM8K)
def test_every_problem_of_gsm8k_has_a_number_that_its_own_answer_holds() -> None:
    settings = EvaluationSettings(model="any", task="gsm8k", data=GSM8K)
    asked = problems(read_source(settings), settings)
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text("utf-8").splitlines()]
    assert len(asked) == 1319
    for problem, answer in zip(asked, answers, strict=True):
        assert problem.reference == answer.split("#### ")[1].replace(",", "")
        assert gsm8k_answer(answer) == problem.reference
        # Most worked answers end in their result even without the marker; a few say more after it.
    unmarked = [gsm8k_answer(answer.split("####")[0]) == gsm8k_answer(answer) for answer in answers]
    assert sum(unmarked) > 0.9 * len(unmarked)


@needs(MATH)
def test_every_problem_of_math_has_a_boxed_answer() -> None:
    settings = EvaluationSettings(model="any", task="math", data=MATH)
    asked = problems(read_source(settings), settings)
    assert len(asked) == 5000
    assert max(len(problem.reference) for problem in asked) < 250


@needs(MATH500)
def test_the_box_of_every_solution_is_the_answer_beside_it() -> None:
    rows = [json.loads(line) for line in MATH500.read_text("utf-8").splitlines()]
    for row in rows:
        assert math_answer(row["solution"]) == trimmed(row["answer"])


@needs(MATH500)
def test_math_verify_finds_real_answers_equal_to_themselves_and_not_to_others() -> None:
    """A thin space keeps the judge from comparing strings, so math-verify must decide."""
    answers = [json.loads(line)["answer"] for line in MATH500.read_text("utf-8").splitlines()[:20]]
    with Judge(timeout_seconds=60) as judge:
        assert all(judge.equal(answer, rf"{answer}\,") for answer in answers)
        assert not any(judge.equal(answer, f"{answer} + 1") for answer in answers if answer.isdecimal())
