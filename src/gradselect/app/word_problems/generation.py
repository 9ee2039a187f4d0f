"""Grade-school word problems with worked answers, in the form of GSM8K.

    python quickstart/problems.py --count 4000 --seed 1 --split train --out train.jsonl
    python quickstart/problems.py --count 200 --seed 1 --split test --out test.jsonl

Every line is {"question": ..., "answer": ...}; the answer shows each calculation and ends in a line `#### N`, N a whole
number. A problem takes one to three steps. Its split follows from a hash of the question, so a test problem is never
a training problem, whatever the seeds; the same templates, words and ranges of numbers serve both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .grammar import Misfit, choose, draw_cast, fill

TEST_SHARE = 0.1
"""The share of all possible questions that are test questions."""


@dataclass(frozen=True)
class Template:
    """A family of problems that are solved by the same steps.

    Args:
        question: the pattern of the text (see `grammar`), with the drawn numbers {a}, {b}, {c}.
        steps: one pattern per line of the worked answer, each with one calculation; the last result is the answer.
        small: which of the numbers are small (2 to 9), as factors and group sizes are; the others go up to 60.
    """

    question: str
    steps: tuple[str, ...]
    small: str = ""


TEMPLATES = (
    # one step: more and less
    Template(
        "{name} <has|owns> {a} {things}. {other} gives {him} {b} <more|more {things}>. "
        "How many {things} does {name} have <now|in all>?",
        ("{name} has [a + b] {things}.",),
    ),
    Template(
        "On {day} {name} <picked|found|bought> {a} {things}. The next day {he} <picked|found|bought> {b} more. "
        "<How many {things} is that in all?|How many {things} did {name} get in the two days?>",
        ("In two days that is [a + b] {things}.",),
    ),
    Template(
        "There are {a} {things} and {b} {stuff} on the table. "
        "<How many things are on the table?|How many is that together?>",
        ("Together there are [a + b] things.",),
    ),
    Template(
        "{name} had {a} {things} and <gave {b} of them to {other}|lost {b} of them>. "
        "How many {things} <are left|does {name} have left>?",
        ("{name} has [a - b] {things} left.",),
    ),
    Template(
        "A shop has {a} {things}. <By noon|On {day}> it sells {b} of them. "
        "How many {things} <are still in the shop|remain>?",
        ("There remain [a - b] {things}.",),
    ),
    Template(
        "It takes {name} {a} minutes to <walk|ride> to school and {b} minutes to come home. "
        "How many minutes is that <together|in all>?",
        ("That is [a + b] minutes.",),
    ),
    Template(
        "A <rope|plank|pipe> is {a} meters long. {name} cuts off {b} meters. How long is the rest?",
        ("The rest is [a - b] meters.",),
    ),
    # one step: comparing
    Template(
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        ("{name} has [a - b] more {things}.",),
    ),
    Template(
        "{other} has {b} {things}. {name} wants {a} {things} <on {day}|for a party>, but has only as many as {other}. "
        "How many more does {he} need?",
        ("{name} needs [a - b] more {things}.",),
    ),
    Template(
        "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} does {other} have?",
        ("{other} has [a + b] {things}.",),
    ),
    Template(
        "{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?",
        ("{other} has [a - b] {things}.",),
    ),
    Template(
        "{name} is {a} years old. {other} is {b} years older. How old is {other}?",
        ("{other} is [a + b] years old.",),
    ),
    Template(
        "{name} is {a} years old and {other} is {b}. How many years younger is {other}?",
        ("{other} is [a - b] years younger.",),
    ),
    # one step: groups
    Template(
        "{name} <fills|packs> {a} {boxes}. <Each {box} holds|In each {box} there are> {b} {things}. "
        "How many {things} <is that|are there in all>?",
        ("There are [a * b] {things}.",),
        small="ab",
    ),
    Template(
        "{name} buys {b} {things}. <One of them costs|The price of one is> {a} dollars. "
        "How many dollars <does {he} pay|is that>?",
        ("They cost [a * b] dollars.",),
        small="ab",
    ),
    Template(
        "{other} has {a} {things}. {name} has {b} times as many. How many {things} does {name} have?",
        ("{name} has [a * b] {things}.",),
        small="ab",
    ),
    Template(
        "{name} <shares|divides> {a} {things} <equally|evenly> among {b} friends. "
        "How many {things} does each friend get?",
        ("Each friend gets [a / b] {things}.",),
        small="b",
    ),
    Template(
        "{name} puts {a} {things} into {boxes}, {b} in each {box}. How many {boxes} does {he} <need|fill>?",
        ("{He} needs [a / b] {boxes}.",),
        small="b",
    ),
    Template(
        "<On {day}|In the hall> {name} sets up {a} rows of {b} chairs. How many chairs <are there|is that>?",
        ("There are [a * b] chairs.",),
        small="ab",
    ),
    Template(
        "{name} has {a} {things} and gives half of them to {other}. How many {things} does {other} get?",
        ("{other} gets [a / d] {things}.",),
    ),
    # two steps
    Template(
        "{name} had {a} {things}. {He} got {b} from {other} and then <lost|gave away|sold> {c}. "
        "How many {things} <does {he} have now|are left>?",
        ("First {name} had [a + b] {things}.", "Then {he} had [x - c] {things}."),
    ),
    Template(
        "{name} <had|began with> {a} {things}. {He} gave {b} to {other} and {c} to {third}. "
        "How many {things} <does {he} still have|are left>?",
        ("{He} gave away [b + c] {things}.", "{name} has [a - x] {things} left."),
    ),
    Template(
        "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have <together|in all>?",
        ("{other} has [a + b] {things}.", "Together they have [a + x] {things}."),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} times as many. How many do they have <together|in all>?",
        ("{other} has [a * b] {things}.", "Together they have [a + x] {things}."),
        small="ab",
    ),
    Template(
        "{name} buys {a} {boxes} of {things} with {b} in each {box}. {He} <uses|sells|gives away> {c} {things}. "
        "How many are left?",
        ("There are [a * b] {things}.", "There remain [x - c] {things}."),
        small="ab",
    ),
    Template(
        "{name} has {a} {boxes} with {b} {things} each, and {c} {things} <more|in a bowl>. "
        "How many {things} does {name} have?",
        ("In the {boxes} there are [a * b] {things}.", "{name} has [x + c] {things}."),
        small="ab",
    ),
    Template(
        "{name} has {a} {things} and {other} has {b}. They share them <equally|evenly> among {c} children. "
        "How many does each child get?",
        ("Together they have [a + b] {things}.", "Each child gets [x / c] {things}."),
        small="c",
    ),
    Template(
        "{name} had {a} dollars. {He} bought {b} {things} for {c} dollars each. <How much is left?|What is left?>",
        ("The {things} cost [b * c] dollars.", "{name} has [a - x] dollars left."),
        small="bc",
    ),
    Template(
        "{name} <reads|writes> {a} pages a day for {b} days. The book has {c} pages. How many pages are left?",
        ("In {b} days that is [a * b] pages.", "There remain [c - x] pages."),
        small="ab",
    ),
    Template(
        "There are {a} people on a <bus|train>. At the <station|market> {b} people get off and {c} get on. "
        "How many people are on it <now|then>?",
        ("First there remain [a - b] people.", "Then there are [x + c] people."),
    ),
    Template(
        "{name} <saves|earns> {a} dollars a week for {b} weeks. {He} wants a <game|lamp|coat> for {c} dollars. "
        "How many dollars does {he} still need?",
        ("{name} has [a * b] dollars.", "{He} needs [c - x] more dollars."),
        small="ab",
    ),
    Template(
        "{name} had {a} {things}. {He} kept {b} and shared the others <equally|evenly> among {c} friends. "
        "How many did each friend get?",
        ("{name} shared [a - b] {things}.", "Each friend gets [x / c] {things}."),
        small="c",
    ),
    # three steps
    Template(
        "{name} has {a} {boxes} with {b} {things} each. {He} <finds|buys> {c} more {things} and shares all of them "
        "equally between {other} and {third}. How many {things} does {other} get?",
        (
            "In the {boxes} there are [a * b] {things}.",
            "With the new ones there are [x + c] {things}.",
            "{other} gets [y / d] {things}.",
        ),
        small="abc",
    ),
    Template(
        "{name} had {a} {things}, {other} had {b} and {third} had {c}. They put them together and "
        "<sold|used|lost> {e}. How many {things} <remain|are left>?",
        (
            "{name} and {other} had [a + b] {things}.",
            "With {third} they had [x + c] {things}.",
            "There remain [y - e] {things}.",
        ),
        small="ce",
    ),
    Template(
        "{name} buys {a} {things} for {b} dollars each and a <pen|cake|toy> for {c} dollars. "
        "{He} pays with {e} dollars. How many dollars does {he} get back?",
        ("The {things} cost [a * b] dollars.", "Together that is [x + c] dollars.", "{He} gets back [e - y] dollars."),
        small="abc",
    ),
    Template(
        "{name} has {a} {things}. {other} has {b} times as many, and {third} has {c} fewer than {other}. "
        "How many {things} do {name} and {third} have <together|in all>?",
        (
            "{other} has [a * b] {things}.",
            "{third} has [x - c] {things}.",
            "Together {name} and {third} have [a + y] {things}.",
        ),
        small="ab",
    ),
)


def draw_numbers(template: Template, generator: random.Random) -> dict[str, int]:
    """Draw a, b, c, e in the template's ranges; d is two, for "between two people"."""
    numbers = {name: generator.randint(2, 9 if name in template.small else 60) for name in "abce"}
    return numbers | {"d": 2}


def make_problem(template: Template, generator: random.Random) -> dict[str, str]:
    """Make one problem of the family, in the form of GSM8K."""
    words = draw_cast(generator)
    question, steps = choose(template.question, generator), [choose(step, generator) for step in template.steps]
    while True:
        numbers = draw_numbers(template, generator)
        try:
            lines = [fill(step, words, numbers) for step in steps]
        except Misfit:
            continue
        answer = numbers["xyz"[len(steps) - 1]]
        return {"question": fill(question, words, numbers), "answer": "\n".join([*lines, f"#### {answer}"])}


def split_of(question: str) -> str:
    """Return "test" or "train", a property of the question alone."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    return "test" if bucket < TEST_SHARE else "train"


def problems(*, count: int, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Yield `count` different problems of `split`, templates equally often on average; a pure function of `seed`."""
    generator, seen = random.Random(f"problems/{seed}/{split}"), set[str]()
    while len(seen) < count:
        problem = make_problem(generator.choice(TEMPLATES), generator)
        question = problem["question"]
        if split_of(question) == split and question not in seen:
            seen.add(question)
            yield problem


def write_problems(path: Path, *, count: int, seed: int = 1, split: str = "train") -> None:
    """Write a file of problems as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems(count=count, seed=seed, split=split))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file of problems."""
    parser = argparse.ArgumentParser(description="Write grade-school word problems with worked answers as JSON lines.")
    parser.add_argument("--count", type=int, required=True, help="how many problems")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same file (default: 0)")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="the splits share no question")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_problems(options.out, count=options.count, seed=options.seed, split=options.split)


if __name__ == "__main__":
    main()
