"""Word problems that take two to five steps, for the suite `lab`: harder than the quickstart's, which are short.

    python benchmarks/lab_problems.py --count 1000 --split test --out test.jsonl

A problem follows the things of one person through events: some are given, lost, multiplied, divided. It may end in a
comparison with somebody else, or hold a number that has nothing to do with the question. Every line is
{"question": ..., "answer": ..., "num_steps": ...} in the form of GSM8K. As in the quickstart a hash of the question
decides its split, so no test problem is a training problem, whatever the seeds; here there is a third split, for the
choice of learning rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradselect.app.word_problems import LARGEST, Misfit, calculate, choose, draw_cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))  # of others: pretrain, stories

SPLITS = {"test": 0.1, "valid": 0.15, "train": 1.0}
"""Upper ends of the buckets; the quickstart's test problems are the same tenth of all questions."""
DISTRACTOR_SHARE = 0.3
END_SHARE = 0.35


@dataclass(frozen=True)
class Event:
    """Something that happens to what a person has.

    Args:
        text: sentence of the problem, with the number {n}.
        line: step of the worked answer, with the calculation {sum}.
        sign: sign of the calculation: the amount before (sign) n.
        most: largest n.
    """

    text: str
    line: str
    sign: str
    most: int | None = None


EVENTS = (
    Event("{other} <gives|brings|sends> {him} {n} more.", "With these {he} has {sum} {things}.", "+"),
    Event("{He} <finds|buys|picks up> another {n}.", "Then there are {sum} {things}.", "+"),
    Event("On {day} {he} <gets|wins> {n} {things} more.", "On {day} that makes {sum} {things}.", "+"),
    Event("{He} <gives {n} of them to {other}|lends {n} of them to {other}>.", "{He} keeps {sum} {things}.", "-"),
    Event("{He} <loses|sells|uses> {n}.", "There remain {sum} {things}.", "-"),
    Event("On {day} {n} of the {things} <break|get lost>.", "After {day} there are {sum} {things}.", "-"),
    Event("{He} <swaps|trades> each one for {n} new ones.", "After that there are {sum} {things}.", "*", 5),
    Event("Soon {he} has {n} times as many.", "Soon {he} has {sum} {things}.", "*", 5),
    Event(
        "{He} shares them equally among {n} {boxes} and keeps one {box}.", "In one {box} are {sum} {things}.", "/", 9
    ),
    Event("{He} sorts them in {n} equal heaps and takes one.", "One heap has {sum} {things}.", "/", 9),
)

STARTS = (
    ("{name} <has|owns> {n} {things}.", None),
    ("{name} has {m} {boxes} with {n} {things} in each.", "In the {boxes} there are {sum} {things}."),
    ("{name} buys {m} <packs|sets> of {n} {things}.", "{name} buys {sum} {things}."),
)

ENDS = (
    Event(
        "{third} has {n} more {things} than {name} has now. How many {things} does {third} have?",
        "{third} has {sum} {things}.",
        "+",
    ),
    Event(
        "{third} has {n} {things}. How many {things} do {name} and {third} have together?",
        "Together they have {sum} {things}.",
        "+",
    ),
    Event(
        "{name} needs {n} {things} <in all|for a party>. How many are still missing?",
        "There are {sum} {things} missing.",
        "n -",
    ),
)
"""Last steps besides the plain question. The sign "n -" means n less the amount."""

PLAIN_END = "How many {things} does {name} have <now|in the end|then>?"

DISTRACTORS = (
    "{third} is {d} years old.",
    "A {box} costs {d} dollars.",
    "{other} has {d} {stuff}.",
    "It takes {d} minutes to walk to {third}.",
)


class Chain:
    """A problem in the making: its sentences, the lines of its answer, and the amount of things so far."""

    def __init__(self, words: Mapping[str, str], generator: random.Random, *, largest: int) -> None:
        self.words, self.generator, self.largest = words, generator, largest
        self.told, self.lines = list[str](), list[str]()
        self.amount = 0

    def tell(self, text: str, **numbers: int) -> None:
        self.told.append(self.write(text, **numbers))

    def write(self, text: str, **values: object) -> str:
        return choose(text, self.generator).format(**self.words, **values)

    def step(self, line: str, left: int, sign: str, right: int) -> None:
        """Calculate, write the line, and keep the result as the amount."""
        self.amount = calculate(left, sign, right, largest=self.largest)
        self.lines.append(self.write(line, sum=f"{left} {sign} {right} = {self.amount}"))

    def number(self, most: int | None = None) -> int:
        return self.generator.randint(2, most or self.largest // 2)

    def happen(self, event: Event) -> None:
        """Add an event. Its day is the same in the text and in the answer."""
        number = self.number(event.most)
        before, self.words = self.words, {**self.words, "day": draw_cast(self.generator)["day"]}
        self.tell(event.text, n=number)
        self.step(event.line, self.amount, event.sign, number)
        self.words = before


def make_problem(generator: random.Random, *, num_steps: int, largest: int = LARGEST) -> dict[str, str | int]:
    """Make one problem of `num_steps` steps, with numbers up to `largest`."""
    while True:
        chain = Chain(draw_cast(generator), generator, largest=largest)
        try:
            question = _narrate(chain, num_steps)
        except Misfit:
            continue
        answer = "\n".join([*chain.lines, f"#### {chain.amount}"])
        return {"question": question, "answer": answer, "num_steps": num_steps}


def _narrate(chain: Chain, num_steps: int) -> str:
    """Write start, events and end. Returns the question.

    Raises:
        Misfit: a result is not a whole number in range.
    """
    generator = chain.generator
    start, line = generator.choice(STARTS)
    chain.amount = chain.number(9 if line else None)
    size = chain.amount
    if line is None:
        chain.tell(start, n=size)
    else:
        count = generator.randint(2, 9)
        chain.tell(start, m=count, n=size)
        chain.step(line, count, "*", size)
    has_end = generator.random() < END_SHARE
    num_events = num_steps - len(chain.lines) - has_end
    last: Event | None = None
    for _ in range(num_events):
        last = generator.choice([event for event in EVENTS if event is not last])
        chain.happen(last)
    if generator.random() < DISTRACTOR_SHARE:
        distractor = chain.write(generator.choice(DISTRACTORS), d=chain.number())
        chain.told.insert(generator.randint(1, len(chain.told)), distractor)
    _ask(chain, has_end=has_end)
    return " ".join(chain.told)


def _ask(chain: Chain, *, has_end: bool) -> None:
    if not has_end:
        chain.tell(PLAIN_END)
        return
    end = chain.generator.choice(ENDS)
    if end.sign == "n -":
        number = chain.number(chain.largest)
        chain.tell(end.text, n=number)
        chain.step(end.line, number, "-", chain.amount)
    else:
        number = chain.number()
        chain.tell(end.text, n=number)
        chain.step(end.line, chain.amount, end.sign, number)


def told_event(generator: random.Random, *, largest: int = LARGEST) -> str:
    """Write one event as a story with its outcome, for the base to read. It asks nothing."""
    while True:
        chain = Chain(draw_cast(generator), generator, largest=largest)
        chain.amount = chain.number()
        chain.tell("{name} had {n} {things}.", n=chain.amount)
        try:
            chain.happen(generator.choice(EVENTS))
        except Misfit:
            continue
        return " ".join([*chain.told, *chain.lines])


def split_of(question: str) -> str:
    """Return "test", "valid" or "train", a property of the question alone."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if bucket < end)


def problems(
    *, count: int, seed: int, split: str, num_steps: Sequence[int], largest: int = LARGEST
) -> Iterator[dict[str, str | int]]:
    """Yield `count` different problems of `split`, numbers of steps in turn; a pure function of `seed`."""
    generator, seen = random.Random(f"lab/{seed}/{split}"), set[str]()
    while len(seen) < count:
        problem = make_problem(generator, num_steps=num_steps[len(seen) % len(num_steps)], largest=largest)
        question = str(problem["question"])
        if split_of(question) == split and question not in seen:
            seen.add(question)
            yield problem


def write_problems(path: Path, **options: object) -> None:
    """Write problems as JSON lines; `options` are those of `problems`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems(**options))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file of problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--steps", type=int, nargs="+", default=(2, 3, 4, 5), help="how many steps problems take")
    parser.add_argument("--largest", type=int, default=LARGEST, help="the largest number that occurs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    write_problems(
        options.out,
        count=options.count,
        seed=options.seed,
        split=options.split,
        num_steps=options.steps,
        largest=options.largest,
    )


if __name__ == "__main__":
    main()
