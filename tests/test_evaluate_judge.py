"""Comparison of answers by math-verify, including hostile ones."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator

import pytest

from gradselect import UsageError
from gradselect.app.answers.answer_judge import Judge

EQUAL = [
    ("18", "18"),
    ("18", "18."),
    ("18", "18.0"),
    ("1234", "1,234"),
    ("12.5", "12.50"),
    ("50", "50%"),
    ("0.5", r"50\%"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    ("-3", "-3.00"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("x^2+1", "1+x^2"),
    (r"90^\circ", "90"),
    (r"\text{Evelyn}", r"\text{Evelyn}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("12", "12, as shown"),
    ("12", "12 dollars"),
    ("1200", "1,200 square meters, because 30 * 40 = 1200"),
    ("5 dollars", "5 dollars"),
]
DIFFERENT = [
    ("18", "19"),
    ("18", "-18"),
    ("0.333", "1/3"),
    ("1", "1/0"),
    (r"\text{east}", r"\text{west}"),
    ("x+1", "x-1"),
    ("5", "}{"),
    ("5", "\ud800"),
    ("5", "\x00"),
    ("5", "1" * 5000),
    ("12", "12 or 13"),
    ("12", "12 or -12"),
    ("12", "12, 13"),
    ("12", "12 million"),
    ("12", "12 and a half"),
    ("12", "12 choose five"),
    ("12", "-12 dollars"),
    ("12", "12 is wrong"),
    ("13", "12, as shown in 13"),
    ("5 dollars", "5 cents"),
]


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(timeout_seconds=60) as judge:
        yield judge


@pytest.mark.parametrize(("reference", "prediction"), EQUAL)
def test_the_same_value_is_equal_however_it_is_written(judge: Judge, reference: str, prediction: str) -> None:
    assert judge.equal(reference, prediction) is True


@pytest.mark.parametrize(("reference", "prediction"), DIFFERENT)
def test_other_values_and_nonsense_are_not_equal(judge: Judge, reference: str, prediction: str) -> None:
    assert judge.equal(reference, prediction) is False


def test_an_endless_comparison_is_undecided_and_the_next_one_is_not(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(judge, "_timeout_seconds", 0.5)
        assert judge.equal("5", "9^{9^{9^9}}") is None
    assert judge.equal("5", "5.0") is True


def test_the_time_between_two_comparisons_does_not_count(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating a batch may take longer than the time limit of one comparison."""
    with monkeypatch.context() as impatient:
        impatient.setattr(judge, "_timeout_seconds", 1)
        judge.equal("5", "5.0")
    time.sleep(1.5)
    assert judge.equal("5", "5.0") is True


def test_a_comparison_that_kills_its_process_is_undecided(judge: Judge) -> None:
    judge._running().kill()
    assert judge.equal("5", "5.0") is None
    assert judge.equal("5", "5.0") is True


def test_any_thread_can_ask(judge: Judge) -> None:
    """math-verify's own time limits need signals, which only the main thread receives."""
    verdicts: list[bool | None] = []
    thread = threading.Thread(target=lambda: verdicts.append(judge.equal("5", "5.0")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_no_process_outlives_the_judge() -> None:
    with Judge(timeout_seconds=60) as judge:
        judge.equal("5", "5.0")
        process = judge._running()
        assert process.poll() is None
    assert process.poll() is not None


def test_without_math_verify_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install math-verify"):
        Judge()
