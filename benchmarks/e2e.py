"""Make the data-to-text task of the suite e2e: restaurants, given by their fields, described in a sentence or two.

    python benchmarks/e2e.py --out runs/data/e2e

    train.jsonl valid.jsonl   {"fields": "name : ... | area : ...", "text": ...}, by different restaurants
    test.jsonl                {"fields": ..., "references": [...]}: each restaurant once, with all its texts
    test_texts.jsonl          {"fields": ..., "text": ...}: the first text of each of them, for a loss

Training and validation come from the development file of the task, whose 547 restaurants are none of the test's 630;
its training file has 42,061 rows, more than a short run reads. Every file is in a fixed shuffled order, so the first
rows of it are a fair sample. The data is found as benchmarks/public_files.py says.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from public_files import E2E_TEST, E2E_TRAIN, find, in_fixed_order, write_lines

NUM_VALID = 60
VALID_TEXTS = 2
"""Texts of each restaurant of the validation file: some have forty, others four."""

Texts = dict[str, list[str]]
"""Texts of each restaurant, by its fields."""


def read_texts(path: Path) -> Texts:
    """Read a file with `fields||text` a line; a text that stands twice counts once.

    Raises:
        SystemExit: a line is not of this form.
    """
    found: Texts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields, bar, text = (" ".join(part.split()) for part in line.partition("||"))
        if not (fields and bar and text):
            raise SystemExit(f"{path}, line {number}: not of the form fields||text")
        texts = found.setdefault(fields, [])
        if text not in texts:
            texts.append(text)
    return found


def rows(texts: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return a row for each text, in the fixed order of fields and texts together."""
    by_both = {f"{fields}||{text}": {"fields": fields, "text": text} for fields in texts for text in texts[fields]}
    return [by_both[both] for both in in_fixed_order(by_both)]


def make(development: Texts, test: Texts, out: Path, *, num_valid: int) -> None:
    """Write the files and print what they hold.

    Raises:
        SystemExit: a restaurant stands in both, or there are too few.
    """
    if both := development.keys() & test.keys():
        raise SystemExit(f"{len(both)} restaurants stand in both files, e.g. {min(both)!r}; give other files")
    if len(development) <= num_valid:
        raise SystemExit(f"the development file has {len(development)} restaurants; give a --valid below that")
    order = in_fixed_order(development)
    valid = {fields: development[fields][:VALID_TEXTS] for fields in order[:num_valid]}
    train = {fields: development[fields] for fields in order[num_valid:]}
    tested = [{"fields": fields, "references": test[fields]} for fields in in_fixed_order(test)]
    first = [{"fields": row["fields"], "text": row["references"][0]} for row in tested]
    for name, part in {"train": rows(train), "valid": rows(valid), "test_texts": first, "test": tested}.items():
        restaurants = len({row["fields"] for row in part})
        print(f"{write_lines(out / f'{name}.jsonl', part):,} rows of {restaurants:,} restaurants in {out / name}.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the files of the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--development", type=Path, help=f"default {E2E_TRAIN.place} in the data folder")
    parser.add_argument("--test", type=Path, help=f"default {E2E_TEST.place} in the data folder")
    parser.add_argument("--valid", type=int, default=NUM_VALID, help="restaurants of the validation file")
    options = parser.parse_args(arguments)
    development = find(E2E_TRAIN, given=options.development, option="--development")
    test = find(E2E_TEST, given=options.test, option="--test")
    make(read_texts(development), read_texts(test), options.out, num_valid=options.valid)


if __name__ == "__main__":
    main()
