"""Public data files that the suites on a real model are made from: where they lie, and where they are fetched from.

A file is taken from the first of these places that has it:

    the path that an option of the command names
    $GRADSELECT_DATA/<place>, or data/<place> if the variable is not set
    its public repository, at one commit; it is then kept under that name
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.files import write_atomically

GITHUB = "https://raw.githubusercontent.com"
MATH = f"{GITHUB}/ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5/data"
LORA = f"{GITHUB}/microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data"
PYTORCH = f"{GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data"
TIMEOUT_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file of a public repository.

    Args:
        place: its path below the data folder.
        url: where it is fetched from.
        sha256: of its content.
    """

    place: str
    url: str
    sha256: str


ASDIV = PublicFile(
    place="word_problems/asdiv.jsonl",
    url=f"{MATH}/asdiv/test.jsonl",
    sha256="5759580385e706f961a30d4c07d6925b35c3f7c86d6c50bc413957169693dad2",
)
MAWPS = PublicFile(
    place="word_problems/mawps_singleop.jsonl",
    url=f"{MATH}/mawps/singleop.jsonl",
    sha256="feb012e7ed5503cdb96fd127d539692b033000e9134655acaf4f4e0091328e94",
)
E2E_TRAIN = PublicFile(
    place="e2e_nlg/valid.txt",
    url=f"{LORA}/e2e/valid.txt",
    sha256="ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d",
)
E2E_TEST = PublicFile(
    place="e2e_nlg/test.txt",
    url=f"{LORA}/e2e/test.txt",
    sha256="81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13",
)
WIKITEXT = PublicFile(
    place="wikitext2/test.txt",
    url=f"{PYTORCH}/wikitext-2/test.txt",
    sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
)


def find(file: PublicFile, *, given: Path | None, option: str) -> Path:
    """Return a path where the file lies, after fetching it if it is nowhere.

    Args:
        file: the file.
        given: path that the user names.
        option: option for that path, for errors: "--asdiv".

    Raises:
        SystemExit: there is no such file, or it cannot be fetched; says what to do.
    """
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"{option} {given}: no such file")
        return _checked(given, file)
    path = Path(os.environ.get("GRADSELECT_DATA", "data")) / file.place
    if path.is_file():
        return _checked(path, file)
    return _fetch(file, path, option=option)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, all of them or no file. Return their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines))
    return len(lines)


def in_fixed_order(texts: Iterable[str]) -> list[str]:
    """Shuffle by the SHA-256 of each text: the same on every machine, whatever the order of the source."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def _checked(path: Path, file: PublicFile) -> Path:
    """Say so if the content is another one: figures then do not compare with the committed ones."""
    if _digest(path.read_bytes()) != file.sha256:
        print(f"note: {path} is not the file that the committed results were made from ({file.url})")
    return path


def _fetch(file: PublicFile, path: Path, *, option: str) -> Path:
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except OSError as error:
        raise SystemExit(
            f"{path}: no such file, and it cannot be fetched from {file.url} ({error}). Copy it there by hand, name a "
            f"copy with {option} FILE, or set GRADSELECT_DATA to a folder that holds {file.place}"
        ) from None
    if _digest(content) != file.sha256:
        raise SystemExit(f"{file.url} is not the file that it was: its SHA-256 is not {file.sha256}; nothing is kept")
    write_atomically(path, content)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
