"""A small language for writing many texts with one pattern, and the words that fill its blanks.

A pattern is English with three kinds of marks:

    <now|in all>     one of the alternatives, drawn at random; alternatives do not nest
    {name} {a}       a word of the cast, or a number
    [a + b]          a calculation: written out as "5 + 3 = 8"; its value is called x (then y, then z)
    [=a + b]         the same, but only the value is written: "8"

Numbers stay between `SMALLEST` and `LARGEST`, results too, so that a model of a million weights can know all its sums;
a larger model can do with a larger `largest`.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Mapping

SMALLEST, LARGEST = 2, 99
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

GIRLS, BOYS, THINGS = (
    tuple(words.split())
    for words in (
        "Ana Bea Cora Dina Emma Fay Gina Hana Ines Julia Kim Lea Mia Nora Olga Rosa",
        "Adam Ben Carl Dan Emil Finn Gus Hugo Ivan Jack Leo Max Noah Omar Paul Tom",
        "apples pears plums lemons cookies buttons stamps marbles stickers shells coins pencils books cards balloons "
        "flowers beads blocks nuts eggs tickets stones ribbons crayons",
    )
)
CONTAINERS = {"box": "boxes", "bag": "bags", "basket": "baskets", "jar": "jars", "tray": "trays", "drawer": "drawers"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PRONOUNS = {
    True: {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"},
    False: {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His"},
}

ALTERNATIVES = re.compile(r"<([^<>]*)>")
CALCULATION = re.compile(r"\[(=?)(\w) ([-+*/]) (\w)\]")


class Misfit(Exception):  # noqa: N818 - not an error: the numbers drawn do not suit the pattern; draw again
    """A result is not a whole number between `SMALLEST` and `LARGEST`."""


def draw_cast(generator: random.Random) -> dict[str, str]:
    """Draw people with pronouns for the first, two different kinds of things, a container and a day."""
    girl = generator.random() < 0.5
    name = generator.choice(GIRLS if girl else BOYS)
    other, third = generator.sample([person for person in GIRLS + BOYS if person != name], 2)
    things, stuff = generator.sample(THINGS, 2)
    box, boxes = generator.choice(list(CONTAINERS.items()))
    day = generator.choice(DAYS)
    words = {"name": name, "other": other, "third": third, "things": things, "stuff": stuff}
    return words | {"box": box, "boxes": boxes, "day": day} | PRONOUNS[girl]


def choose(pattern: str, generator: random.Random) -> str:
    """Draw one alternative of each `<...|...>` in `pattern`."""
    return ALTERNATIVES.sub(lambda match: generator.choice(match[1].split("|")), pattern)


def calculate(left: int, sign: str, right: int, *, largest: int = LARGEST) -> int:
    """Return left (sign) right, exactly.

    Raises:
        Misfit: it is not a whole number between `SMALLEST` and `largest`.
    """
    if sign == "/" and left % right:
        raise Misfit
    result = OPERATIONS[sign](left, right)
    if not SMALLEST <= result <= largest:
        raise Misfit
    return result


def fill(pattern: str, words: Mapping[str, str], numbers: dict[str, int], *, largest: int = LARGEST) -> str:
    """Fill in the calculations and blanks of `pattern`, which has no alternatives left; `numbers` gains the results.

    Raises:
        Misfit: a calculation has no fitting result.
    """

    def written(match: re.Match[str]) -> str:
        only_value, left, sign, right = match.groups()
        result = calculate(numbers[left], sign, numbers[right], largest=largest)
        numbers[next(name for name in "xyz" if name not in numbers)] = result
        return str(result) if only_value else f"{numbers[left]} {sign} {numbers[right]} = {result}"

    return CALCULATION.sub(written, pattern).format(**words, **numbers)
