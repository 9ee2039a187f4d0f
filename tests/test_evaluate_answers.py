"""Extraction of the answer from a text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradselect.app.answers.answers import gsm8k_answer, last_boxed, last_number, math_answer, trimmed

NUMBERS = {
    "18": "18",
    "1,234": "1234",
    "12,345,678.90": "12345678.90",
    "$12": "12",
    "$ 12": "12",
    r"\$12": "12",
    "€5": "5",
    "12.50": "12.50",
    ".5": "0.5",
    "-3": "-3",
    "\u22123": "-3",
    "-$3": "-3",
    "$-3": "-3",
    "(-3)": "-3",
    "50%": "50%",
    r"50\%": "50%",
    "5 %": "5%",
    "1/2": "1/2",
    "-1/2": "-1/2",
    "3 1/2": "7/2",
    "-3 1/2": "-7/2",
    "1{,}234": "1234",
    r"1,\!234": "1234",
    "12.": "12",
    "18 dollars": "18",
    "7km": "7",
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_a_number_is_found_and_written_plainly(text: str, number: str) -> None:
    assert last_number(text) == number
    assert gsm8k_answer(f"So it makes {text} in all.") == number
    assert gsm8k_answer(f"1 + 1 = 2\n#### {text}") == number


@pytest.mark.parametrize("text", ["", "none", "####", "#### ", "no number - at all.", "...", "$", "%"])
def test_a_text_without_a_number_has_no_answer(text: str) -> None:
    assert gsm8k_answer(text) is None
    assert math_answer(text) is None


@pytest.mark.parametrize(
    ("text", "difference"), [("16-3", "3"), ("16 - 3", "3"), ("(2)-3", "3"), ("x-3", "3"), ("50%-3", "3")]
)
def test_a_minus_after_an_operand_is_no_sign(text: str, difference: str) -> None:
    assert last_number(text) == difference


def test_the_number_after_the_marker_wins_over_later_ones() -> None:
    assert gsm8k_answer("3 * 6 = <<3*6=18>>18\n#### 18\n\nHe has 4 left") == "18"
    assert gsm8k_answer("#### 18\nQuestion: 2 + 2?\n#### 4") == "18"


def test_without_a_marker_the_last_number_counts() -> None:
    assert gsm8k_answer("First 3, then 4, so 7 apples.") == "7"
    assert gsm8k_answer("It is 7.\n#### unknown") == "7"


def test_a_list_with_commas_is_no_large_number() -> None:
    assert last_number("1,2,3") == "3"
    assert last_number("100, 200") == "200"
    assert last_number("1234,567") == "567"
    assert last_number("1,2345") == "2345"


@settings(deadline=None, derandomize=True)
@given(
    st.integers(-(10**12), 10**12), st.integers(0, 10**6), st.sampled_from(["", "$"]), st.sampled_from(["", ",", "_"])
)
def test_every_way_to_write_a_number_keeps_its_value(whole: int, cents: int, currency: str, separator: str) -> None:
    digits = f"{abs(whole):{separator}}".replace("_", "{,}")
    text = f"{'-' if whole < 0 else ''}{currency}{digits}.{cents:06d}"
    found = gsm8k_answer(f"The total is {text} today.")
    assert found is not None
    assert Fraction(found) == Fraction(f"{'-' if whole < 0 else ''}{abs(whole)}.{cents:06d}")


BOXED = {
    r"\boxed{5}": "5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\sqrt{\frac{a}{\sqrt{b}}}}": r"\sqrt{\frac{a}{\sqrt{b}}}",
    r"first \boxed{1}, at last \boxed{2}.": "2",
    r"\boxed{3} and \boxed{4": "3",
    r"\boxed{3} and \boxed{}": "3",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"\boxed{1 \\{2}}": r"1 \\{2}",
    r"\boxed 7$": "7",
    r"\boxed {7}": "7",
    r"\fbox{A}": "A",
    r"$\boxed{ x^2 + 1.}$": "x^2 + 1",
    r"\boxed{$5$}": "5",
    r"\boxed{\left( 3, \dfrac{\pi}{2} \right)}": r"( 3, \frac{\pi}{2} )",
    "\\boxed{1\n+ 2}": "1 + 2",
    r"\boxed{\text{Evelyn}}": r"\text{Evelyn}",
}


@pytest.mark.parametrize(("text", "inside"), BOXED.items())
def test_the_last_complete_box_is_read_to_its_closing_brace(text: str, inside: str) -> None:
    assert last_boxed(text) == inside
    assert math_answer(f"The answer is: 99. {text}") == inside


SAID = {
    "The answer is: 18": "18",
    "The answer is 18.": "18",
    "The answer is: $\\frac12$.": "\\frac12",
    "The final answer is $x + 1$. I hope it is correct.": "x + 1",
    "The answer is x + 1. I hope it is correct.": "x + 1",
    "the ANSWER IS\n\\(3.5\\) metres": "3.5",
    "The answer is 3.5": "3.5",
    "The answer is 1. No, the answer is 2": "2",
    "The answer is **12**.": "12",
    "The answer is **12.** Good": "12",
    "The answer is: **$x + 1$**.": "x + 1",
    "**The answer is** 12": "12",
    "**The answer is**: 12": "12",
    "*The answer is* 12*3": "12*3",
    "The answer is 2**3": "2**3",
    "The answer is **12** or **13**": "12 or **13**",
    "so 6 in all": "6",
}


@pytest.mark.parametrize(("text", "answer"), SAID.items())
def test_without_a_box_the_announced_answer_counts_and_then_the_last_number(text: str, answer: str) -> None:
    assert math_answer(text) == answer


@settings(deadline=None, derandomize=True)
@given(st.recursive(st.sampled_from(["x", "1", r"\{", r"\}", r"\frac"]), lambda inner: inner.map("{{{0}}}".format)))
def test_braces_nest_to_any_depth(inside: str) -> None:
    assert last_boxed(rf"so \boxed{{{inside}}} it is") == inside


@settings(deadline=None, derandomize=True)
@given(
    st.text(alphabet=st.sampled_from("\\boxed{}#$%-\u22120123456789,. /answer is:\n\ud800\u0663\u00bd"), max_size=200)
)
def test_no_text_makes_extraction_fail(text: str) -> None:
    for extract in (gsm8k_answer, math_answer, last_boxed):
        assert extract(text) is None or isinstance(extract(text), str)


def test_what_only_typesets_an_answer_is_taken_off() -> None:
    assert trimmed(r"$\left(1,\tfrac12\right)$.") == r"(1,\frac12)"
    assert trimmed(r"\leftarrow 5") == r"\leftarrow 5"
    assert trimmed("1 1/2") == "1 1/2"
