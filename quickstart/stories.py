"""The text the base model is pretrained on: short stories with quantities, arithmetic facts, small talk.

Nobody asks anything in it: there is no "Question:", no "Answer:", no "How many", and `####` stands only at the start
of some documents, as the mark of a heading. What fine-tuning on `problems` has to add is to read a question, to solve
it in steps and to close with the answer.

A document is one of

    facts    "17 + 5 = 22. 9 times 4 is 36."          sums, differences, products and quotients of numbers up to 99
    story    one event with a quantity, its outcome told, often as a calculation; see `STORIES`
    chat     what people like and where they keep it, without numbers; see `CHAT`

    python quickstart/stories.py --count 200 --seed 9 --out stories.jsonl    # {"text": ...} a line
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from gradselect.app.word_problems import LARGEST, OPERATIONS, Misfit, choose, draw_cast, fill

FACTS = {
    "+": ("[a + b]", "{a} plus {b} is [=a + b]", "{a} and {b} make [=a + b]"),
    "-": ("[a - b]", "{a} minus {b} is [=a - b]", "{a} less {b} leaves [=a - b]"),
    "*": ("[a * b]", "{a} times {b} is [=a * b]", "{a} groups of {b} make [=a * b]"),
    "/": ("[a / b]", "{a} divided by {b} is [=a / b]", "{a} split in {b} parts gives [=a / b]"),
}

STORIES = (
    # more
    "{name} had {a} {things}. <Then {other} gave {him} {b} more|{He} found {b} more|{He} bought another {b}>. "
    "<Now|After that|So> {he} had <[a + b]|[=a + b]> {things}.",
    "{other} saw {a} {things} in a {box} and {b} in another. "
    "<Together|In all|With both> there were <[a + b]|[=a + b]> {things}.",
    "{name} and {other} <put their|have> {things}: {a} and {b}. "
    "<That makes|Together they have> <[a + b]|[=a + b]> {things}.",
    "{other} got {a} {things} on {day}. {name} got {b} more than that, so {he} got <[a + b]|[=a + b]> {things}.",
    "{name} counted {a} {things}, {b} {stuff} and {c} nuts. The {things} and {stuff} were [a + b], "
    "and with the nuts there were [x + c] things.",
    "{a} {things} and {b} {stuff} are <[a + b]|[=a + b]> things.",
    "The <train|walk> took {a} minutes and the way home {b} minutes, together <[a + b]|[=a + b]> minutes.",
    "{name} is {a} years old. {other} is {b} years older, so {other} is <[a + b]|[=a + b]> years old.",
    # less
    "{name} had {a} {things}. <{He} gave {b} to {other}|{He} lost {b}|{He} sold {b} on {day}>. "
    "<Then|After that> {he} had <[a - b]|[=a - b]> {things} left.",
    "There were {a} {things} in the {box}. {other} took {b} out. <[a - b]|[=a - b]> {things} <remained|remain>.",
    "{name} had {a} {things}. {other} had {b} fewer, <that was|only> <[a - b]|[=a - b]> {things}.",
    "{name} had {a} {things} and {other} had {b}. {name} had <[a - b]|[=a - b]> more {things} than {other}.",
    "{name} needed {a} {things} and had {b}. {He} still needed <[a - b]|[=a - b]> {things}.",
    "{name} had {a} {things}. {He} gave {b} to {other} and had [a - b] left. Then {he} lost {c} and had [x - c] left.",
    "{name} had {a} {things}. {other} brought {b}, so there were [a + b]. Then they used {c} and [x - c] remained.",
    "<First|On {day}> there were {a} people in the park. Then {b} people left and <[a - b]|[=a - b]> were still there.",
    "{other} is {a} years old and {name} is {b}. {name} is <[a - b]|[=a - b]> years younger.",
    "A plank of {a} meters was cut. One part was {b} meters long, the rest <[a - b]|[=a - b]> meters.",
    # groups
    "{name} had <{a} {boxes} with {b} {things} in each|{a} {boxes} of {b} {things}>. "
    "{He} had <[a * b]|[=a * b]> {things}.#ab",
    "{other} bought {a} {things} at {b} dollars each and paid <[a * b]|[=a * b]> dollars.#ab",
    "One of the {things} costs {a} dollars. {b} of them cost <[a * b]|[=a * b]> dollars.#ab",
    "There were {a} rows of {b} chairs, that is <[a * b]|[=a * b]> chairs.#ab",
    "{other} had {a} {things}. {name} had {b} times as many, <[a * b]|[=a * b]> {things}.#ab",
    "{name} read {a} pages a day. In <{b}|two or more: {b}> days {he} read <[a * b]|[=a * b]> pages.#ab",
    "{a} {things} were shared equally among {b} children. Each of them got <[a / b]|[=a / b]> {things}.#b",
    "{a} {things} are shared by {b} friends. Each child gets <[a / b]|[=a / b]> {things}.#b",
    "Half of {a} {things} are <[a / d]|[=a / d]> {things}.",
    "{name} put {a} {things} into {boxes}, {b} in each. {He} filled <[a / b]|[=a / b]> {boxes}.#b",
    "{name} had {a} {boxes} of {b} {things}, that is [a * b] {things}. {He} got {c} more and had [x + c].#ab",
    "{name} had {a} {boxes} of {b} {things}, that is [a * b] {things}. {He} gave away {c} and [x - c] remained.#ab",
)

CHAT = (
    "{name} likes {things}. {He} keeps <the new ones|them all|all of them> in a {box}.",
    "There are always {things} in the {boxes} of {other}. In those days {third} <has|gets back|needs> {stuff}.",
    "On {day} {name} met {other} <at the market|in the park|at school>. They talked about {things}.",
    "{other} has a <red|blue|green|small|big> {box}. There are {things} and {stuff} in it.",
    "{third} asked {name} a question about {things}, and {he} gave an answer.",
    "<First|Then> {name} will visit {other} on {day}. {He} brings {things} for {his} friend.",
)

HEADINGS = ("The {box}", "{day}", "{name} and {other}", "At the shop", "{things}")


def draw_numbers(small: str, generator: random.Random, *, largest: int = LARGEST) -> dict[str, int]:
    """Draw a, b, c, up to 9 if `small` names them, else up to `largest`; d is two, for "half"."""
    return {name: generator.randint(2, 9 if name in small else largest) for name in "abc"} | {"d": 2}


def write(pattern: str, small: str, generator: random.Random, *, largest: int = LARGEST) -> str:
    """Fill `pattern` with words, and with numbers that fit."""
    words, pattern = draw_cast(generator), choose(pattern, generator)
    while True:
        numbers = draw_numbers(small, generator, largest=largest)
        try:
            return fill(pattern, words, numbers, largest=largest)
        except Misfit:
            continue


def facts(generator: random.Random, *, largest: int = LARGEST) -> str:
    """Write four to eight arithmetic facts."""

    def fact() -> str:
        sign = generator.choice("++--*/")
        assert sign in OPERATIONS
        small = {"*": "b", "/": "b"}.get(sign, "")
        return write(generator.choice(FACTS[sign]), small, generator, largest=largest) + "."

    return " ".join(fact() for _ in range(generator.randint(4, 8)))


def story(generator: random.Random, *, largest: int = LARGEST) -> str:
    """Write one story, now and then under a heading or with one sentence a line."""
    pattern, _, small = generator.choice(STORIES).partition("#")
    text = write(pattern, small, generator, largest=largest)
    if generator.random() < 0.2:
        text = text.replace(". ", ".\n")
    if generator.random() < 0.1:
        heading = "#" * generator.randint(1, 4) + " " + write(generator.choice(HEADINGS), "", generator)
        return f"{heading}\n{text}"
    return text


def chat(generator: random.Random) -> str:
    """Write two remarks without numbers."""
    return " ".join(write(generator.choice(CHAT), "", generator) for _ in range(2))


def documents(*, seed: int) -> Iterator[str]:
    """Yield documents without end; a pure function of `seed`."""
    generator = random.Random(f"stories/{seed}")
    while True:
        kind = generator.choices((facts, story, chat), weights=(0.35, 0.6, 0.05))[0]
        yield kind(generator)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file of documents."""
    parser = argparse.ArgumentParser(description="Write documents like those of the base model as JSON lines.")
    parser.add_argument("--count", type=int, required=True, help="how many documents")
    parser.add_argument("--seed", type=int, required=True, help="the base model has seen those of seeds 0 and 1")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in islice(documents(seed=options.seed), options.count))
    options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
