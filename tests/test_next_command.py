"""What a run names to type next, its lines in a narrow terminal, and folders that cannot be made."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answer_support import preference_recipe, prompt_recipe
from rich.console import Console

from gradselect import UsageError
from gradselect.app.evaluate.results import ItemWriter
from gradselect.app.progress import fitted
from gradselect.app.recipe import RandomData
from gradselect.app.report import write_run_report
from gradselect.app.train.progress import _next_command, show_summary

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
TALK = [{"role": "user", "content": "q"}]
RATED = {"prompt": "q", "completion": "a", "label": True}


def next_words(recipe: Any, row: dict[str, Any]) -> list[str]:
    return shlex.split(_next_command(recipe, recipe.data, row))[1:]


def test_pairs_of_text_are_evaluated_by_their_better_answer(tmp_path: Path) -> None:
    words = next_words(preference_recipe(tmp_path, tmp_path / "out"), PAIR)
    assert words[0] == "evaluate"
    assert words[words.index("--completion") + 1] == "{chosen}"


@pytest.mark.parametrize("row", [RATED, {"chosen": TALK, "rejected": TALK}, {**PAIR, "prompt": TALK}])
def test_answers_that_no_evaluation_reads_lead_to_a_chat(row: dict[str, Any], tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path, tmp_path / "out", trainer="kto")
    assert next_words(recipe, row) == ["chat", str(tmp_path / "out")]


def test_an_answer_checker_judges_only_what_it_has_rewarded(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "prompt": "p"}
    checked = prompt_recipe(tmp_path, tmp_path / "out", trainer={"reward": "math"})
    assert next_words(checked, row)[2:4] == ["--task", "math"]
    assert next_words(checked, {"prompt": TALK}) == ["chat", str(tmp_path / "out")]
    own = prompt_recipe(tmp_path, tmp_path / "out", trainer={"reward": "mine.py:short"})
    assert next_words(own, row) == ["chat", str(tmp_path / "out")]


def test_long_lines_end_at_words_in_a_terminal_and_stay_whole_in_a_file() -> None:
    line = "note       " + "as many words as a note has " * 5
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    first, *more = fitted(line, terminal, indent=11).splitlines()
    assert max(map(len, (first, *more))) <= 80
    assert all(part.startswith(" " * 11 + "a") or part[11:].strip() for part in more)
    assert " ".join([first, *map(str.strip, more)]) == line.strip()
    assert fitted(line, Console(file=io.StringIO(), width=80), indent=11) == line
    assert fitted("short", terminal, indent=2) == "short"


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    record = {"step": 0, "selected": ["a"], "explored": False, "state_bytes": 1, "moved_bytes": 0}
    (tmp_path / "selection.jsonl").write_text(json.dumps(record) + "\n")
    message = r"output=.*out cannot be made: Not a directory; name another folder"
    with pytest.raises(UsageError, match=message):
        ItemWriter(output).__enter__()
    with pytest.raises(UsageError, match=message):
        write_run_report(tmp_path / "selection.jsonl", output=output)


def test_a_resume_without_a_step_names_no_peak() -> None:
    file = io.StringIO()
    numbers: dict[str, Any] = {"steps": 4, "training_seconds": 0.2, "training_loss": None, "validation_loss": None}
    end: Any = SimpleNamespace(**numbers, peak_bytes={"together": 0}, saved=None)
    recipe: Any = SimpleNamespace(data=RandomData(format="random", length=2))
    folder: Any = SimpleNamespace(run_file="run.json")
    show_summary(Console(file=file), end, recipe=recipe, folder=folder, messages=[], first_row={})
    assert file.getvalue().splitlines()[0] == "finished 4 steps in 0 s"
    assert "peak" not in file.getvalue()
