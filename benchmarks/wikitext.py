"""Make a small part of WikiText-2's test set, to measure what a fine-tuned model has forgotten.

    python benchmarks/wikitext.py --out runs/data/smollm2/known.jsonl

A line is {"text": ...}: consecutive sentences of one paragraph, 300 to 900 characters. Sentences in which the data has
<unk> for a rare word are left out, and the marks of its tokeniser are undone, so that a model reads ordinary text. The
passages are spread evenly over the file, which is found as benchmarks/public_files.py says.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from public_files import WIKITEXT, find, write_lines

NUM_PASSAGES = 40
SHORTEST, LONGEST = 300, 900
"""Characters of a passage."""
MARKS = (
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000
    (r" ([.,;:!?%)\]])", r"\1"),
    (r"([(\[$£€]) ", r"\1"),
    (r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1"),
    (r"\bs ' ", "s' "),
    (r'" ([^"]*?) "', r'"\1"'),
)


def ordinary(text: str) -> str:
    """Undo the marks of the data's tokeniser: 'the group 's top @-@ ten hit .' is "the group's top-ten hit."."""
    for pattern, replacement in MARKS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def passages(text: str) -> Iterator[str]:
    """Yield the longest run of sentences without a hole of each paragraph, if it is long enough."""
    for line in text.splitlines():
        if line.lstrip().startswith("= "):
            continue
        sentences = re.split(r"(?<= [.!?]) (?=[A-Z])", line.strip())
        runs = [list(run) for is_whole, run in groupby(sentences, lambda each: "<unk>" not in each) if is_whole]
        best = max((cut_at_sentence(run) for run in runs), key=len, default="")
        if len(best) >= SHORTEST:
            yield best


def cut_at_sentence(sentences: Sequence[str]) -> str:
    """Join as many of the sentences as fit into a passage."""
    joined = ""
    for sentence in sentences:
        longer = f"{joined} {ordinary(sentence)}".strip()
        if len(longer) > LONGEST:
            break
        joined = longer
    return joined


def spread(texts: Sequence[str], count: int) -> list[str]:
    """Return `count` of the texts, evenly spaced.

    Raises:
        SystemExit: there are too few.
    """
    if len(texts) < count:
        raise SystemExit(f"the file has {len(texts)} passages of {SHORTEST} characters or more; give a smaller --count")
    return [texts[place * len(texts) // count] for place in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the passages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--wikitext", type=Path, help=f"the data, default {WIKITEXT.place} in the data folder")
    parser.add_argument("--count", type=int, default=NUM_PASSAGES, help="number of passages")
    options = parser.parse_args(arguments)
    source = find(WIKITEXT, given=options.wikitext, option="--wikitext")
    found = list(passages(source.read_text(encoding="utf-8")))
    number = write_lines(options.out, ({"text": text} for text in spread(found, options.count)))
    print(f"{source.name}: {number} of {len(found):,} passages, in {options.out}")


if __name__ == "__main__":
    main()
