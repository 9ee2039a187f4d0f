"""Make the arithmetic task of the suites on SmolLM2: word problems of ASDiv with their formula, and MAWPS for transfer.

    python benchmarks/asdiv.py --out runs/data/smollm2
    python benchmarks/asdiv.py --out runs/data/smollm2 --asdiv asdiv.jsonl --mawps mawps_singleop.jsonl

    train.jsonl test.jsonl   problems of ASDiv whose formula is plain arithmetic that gives the answer
    transfer.jsonl           problems of MAWPS in one operation that are not in ASDiv, with the bare answer

A line is {"question": ..., "answer": "92-56=36 #### 36"}. The test takes 400 problems by a fixed shuffle. No question
of the test, of transfer and of training is another one with other numbers. Files are found as
benchmarks/public_files.py says; everything that is left out is counted. ASDiv also stands on the hub, as
EleutherAI/asdiv, but with other rows: figures then do not compare.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from public_files import ASDIV, MAWPS, find, in_fixed_order, read_lines, write_lines

NUM_TEST = 400
ARITHMETIC = re.compile(r"[\d\s.+\-*/()]+", re.ASCII)
NUMBER = re.compile(r"-?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", re.ASCII)
MOST_DECIMALS = 2
"""Decimals of an answer of the transfer set: nobody can guess how far 3.33333 is written out."""
OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}
IN_MATH10K = (
    "0fa5540eca 3128cc87a9 3e9d725e75 4916a90755 492d166de2 55ef16b9d0 64798a343e 78b873e429 7c8e9a7f88 "
    "7d1eff5308 800cd5cea8 8aa24f382e 8db9592b3c 9e22be4992 9fd54ace77 a59958708f a97d3f8440 b216413890 "
    "bc93ca57bd d92b50c73a db4c6a85a4 debdb4686a e0ff2df8d8 e9d8f5acd6 ed7db30cda fdeae0e876"
)
"""Problems of MAWPS that also stand in Math10K, on which published adapters were trained, by `fingerprint`."""


class MisfitError(ValueError):
    """A problem is not for this task; the message is the reason that is counted."""


def value_of(formula: str) -> Fraction:
    """Return the exact value of numbers joined by + - * / and parentheses. Nothing is executed.

    Raises:
        MisfitError: the text is anything else, or divides by zero.
    """
    if not ARITHMETIC.fullmatch(formula):
        raise MisfitError("the formula is no plain arithmetic")
    try:
        return _value(ast.parse(formula.strip(), mode="eval").body, formula.strip())
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        raise MisfitError("the formula is no plain arithmetic") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(ast.get_source_segment(text, node) or "")
        case ast.BinOp() if type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](_value(node.left, text), _value(node.right, text))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
    raise ValueError(ast.dump(node))


def number_in(text: str) -> str:
    """Return a number without thousands separators: "1,234 (apples)" is "1234".

    Raises:
        MisfitError: the text is no number, with at most a unit in parentheses behind it.
    """
    bare = re.sub(r"\(.*\)\s*$", "", text).strip()
    if not NUMBER.fullmatch(bare) or not bare.strip("-"):
        raise MisfitError("the answer is no number")
    return bare.replace(",", "")


def problem(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of ASDiv as a question with its worked answer: "7+2=9 #### 9".

    Raises:
        MisfitError: the formula is no equation of plain arithmetic, or its value is not the answer.
    """
    sides = str(row["formula"]).split("=")
    if len(sides) != 2:
        raise MisfitError("the formula is not one equation")
    left, right = ("".join(side.split()) for side in sides)
    answer = number_in(str(row["answer"]))
    if not value_of(left) == value_of(right) == Fraction(answer):
        raise MisfitError("the value of the formula is not the answer")
    question = f"{str(row['body']).strip()} {str(row['question']).strip()}"
    return {"question": question, "answer": f"{left}={right} #### {answer}"}


def transfer_problem(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of MAWPS as a question with its bare answer.

    Raises:
        MisfitError: the answer has many decimals.
    """
    text = repr(float(row["target"]))
    whole, _, decimals = text.partition(".")
    if len(decimals) > MOST_DECIMALS or "e" in text:
        raise MisfitError(f"the answer has more than {MOST_DECIMALS} decimals")
    return {"question": str(row["input"]).strip(), "answer": whole if decimals == "0" else text}


def normalised(question: str) -> str:
    """Return the text in small letters, with 0 for each number, without punctuation."""
    return re.sub(r"[^a-z0]+", " ", re.sub(r"\d+([.,]\d+)*", "0", question.lower())).strip()


def fingerprint(question: str) -> str:
    """Return the first 10 digits of the SHA-256 of the normalised question."""
    return hashlib.sha256(normalised(question).encode()).hexdigest()[:10]


def sort_out(
    rows: Iterable[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], dict[str, str]]
) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return what `read` makes of the rows, each question once, and how many are left out for which reason."""
    kept: dict[str, dict[str, str]] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            made = read(row)
        except MisfitError as error:
            dropped[str(error)] += 1
            continue
        if kept.setdefault(made["question"].lower(), made) is not made:
            dropped["the question stands there twice"] += 1
    return list(kept.values()), dropped


def split(problems: Sequence[dict[str, str]], *, num_test: int) -> dict[str, list[dict[str, str]]]:
    """Divide into train and test by a fixed shuffle, without training problems that are test problems otherwise.

    Raises:
        SystemExit: there are too few problems.
    """
    if len(problems) <= num_test:
        raise SystemExit(f"{len(problems)} problems are left, too few for a test of {num_test}; give a smaller --test")
    by_question = {each["question"]: each for each in problems}
    shuffled = [by_question[question] for question in in_fixed_order(by_question)]
    test, train = shuffled[:num_test], shuffled[num_test:]
    tested = {normalised(each["question"]) for each in test}
    return {"train": [each for each in train if normalised(each["question"]) not in tested], "test": test}


def transfer(
    problems: Sequence[dict[str, str]], known: Iterable[Mapping[str, Any]]
) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return the problems whose question is none of ASDiv or Math10K, and how many are left out for which reason."""
    seen = {normalised(f"{row['body']} {row['question']}") for row in known}
    dropped: Counter[str] = Counter()
    kept = []
    for each in problems:
        if normalised(each["question"]) in seen:
            dropped["the question is one of ASDiv"] += 1
        elif fingerprint(each["question"]) in IN_MATH10K:
            dropped["the question is one of Math10K"] += 1
        else:
            kept.append(each)
    return kept, dropped


def make(asdiv: Path, mawps: Path, out: Path, *, num_test: int) -> None:
    """Write the three files and print what they hold."""
    rows = read_lines(asdiv)
    problems, dropped = sort_out(rows, problem)
    parts = split(problems, num_test=num_test)
    dropped["it is a test problem with other numbers"] = len(problems) - sum(map(len, parts.values()))
    report(asdiv, len(rows), dropped, kept=len(problems) - dropped["it is a test problem with other numbers"])
    singles = read_lines(mawps)
    single, odd = sort_out(singles, transfer_problem)
    parts["transfer"], known = transfer(single, rows)
    report(mawps, len(singles), odd + known, kept=len(parts["transfer"]))
    for name, part in parts.items():
        print(f"{write_lines(out / f'{name}.jsonl', part):,} problems in {out / name}.jsonl")


def report(source: Path, count: int, dropped: Counter[str], *, kept: int) -> None:
    """Print how many rows are left out for which reason."""
    print(f"{source.name}: {kept:,} of {count:,} rows; left out:")
    for reason, number in dropped.most_common():
        print(f"  {number:>5,}  {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the files of the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--asdiv", type=Path, help=f"ASDiv, default {ASDIV.place} in the data folder")
    parser.add_argument("--mawps", type=Path, help=f"MAWPS, default {MAWPS.place} in the data folder")
    parser.add_argument("--test", type=int, default=NUM_TEST, help="number of test problems")
    options = parser.parse_args(arguments)
    asdiv = find(ASDIV, given=options.asdiv, option="--asdiv")
    mawps = find(MAWPS, given=options.mawps, option="--mawps")
    make(asdiv, mawps, options.out, num_test=options.test)


if __name__ == "__main__":
    main()
