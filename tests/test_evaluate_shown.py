"""`gradselect evaluate` shows some answers: question, expected, given, right or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import write_model

from gradselect.app.cli import main
from gradselect.app.evaluate import NUM_SHOWN, EvaluationResult, answer_lines


def result(items: list[dict[str, Any]], *, task: str = "gsm8k") -> EvaluationResult:
    numbers: dict[str, Any] = {"num_truncated": 0, "seconds": 1.0, "data": {}, "settings": {}, "versions": {}}
    return EvaluationResult(task=task, num_items=len(items), items=items, **numbers)


def problem(index: int, **changes: Any) -> dict[str, Any]:
    item = {"index": index, "question": f"{index} + 1?", "reference": str(index + 1), "prediction": f" It is\n{index}."}
    return {**item, "extracted": str(index), "correct": False, "finished": True, **changes}


def test_answers_are_spread_over_the_data() -> None:
    lines = list(answer_lines(result([problem(index) for index in range(101)])))
    assert lines[0] == "answers    5 of 101, spread over the data"
    assert [line.split()[1] for line in lines if line.startswith("  item")] == ["1", "26", "51", "76", "101"]
    assert len(lines) == 1 + 3 * NUM_SHOWN


def test_an_answer_has_question_expected_given_and_verdict_in_a_line_each() -> None:
    right = problem(1, extracted="2", correct=True)
    silent = problem(2, extracted=None, prediction="\x1b[2J" + "a" * 999, finished=False)
    lines = [" ".join(line.split()) for line in answer_lines(result([problem(0), right, silent]))]
    assert lines[0] == "answers 3 of 3"
    assert lines[1:4] == ["item 1 0 + 1?", "expected 1", "given 0: wrong; the whole answer: It is\\n0."]
    assert lines[6].startswith("given 2: right")
    assert lines[9].startswith("given no answer: wrong; the whole answer (cut off by max_new_tokens): \\x1b[2Jaaa")
    assert len(lines[9]) < 400


def test_labels_and_scores_are_shown_too() -> None:
    label = {"index": 0, "text": "one", "text_pair": "two", "reference": "yes", "prediction": "no", "correct": False}
    score = {"index": 1, "text": "one", "reference": 2.5, "prediction": 2.123456}
    lines = [" ".join(line.split()) for line in answer_lines(result([label, score], task="classification"))]
    assert lines[1:4] == ["item 1 one | two", "expected yes", "given no: wrong"]
    assert lines[4:] == ["item 2 one", "expected 2.5", "given 2.123"]


def test_a_loss_has_no_answers_to_show() -> None:
    assert list(answer_lines(result([{"index": 0, "row": 0, "loss": 1.0, "num_tokens": 3}], task="loss"))) == []


@pytest.mark.parametrize(("words", "shown"), [(["--show", "2"], 2), ([], 0), (["--show", "0"], 0)])
def test_the_command_shows_answers_on_a_terminal_or_on_demand(
    words: list[str], shown: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    command = ["evaluate", str(tmp_path / "model"), "--task", "gsm8k", "--data", str(tmp_path / "test.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-new-tokens", "4", "--device", "cpu", *words])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.count("    expected  ") == shown
    assert said.splitlines()[-1].startswith("gsm8k: accuracy ")
