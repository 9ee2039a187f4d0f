"""Damage files as a disk, a copy or a hand can, and check that their readers notice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect import UsageError, delta
from gradselect.app.evaluate import EvaluationSettings, evaluate, read_evaluation
from gradselect.app.evaluate.language_model import load
from gradselect.app.results import read_result, write_result
from gradselect.files.checked_json import read_sealed
from gradselect.files.manifest import MANIFEST_NAME, verify

PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Files that belong together, and their reader.

    Args:
        name: name of the kind of files.
        folder: holds them intact.
        read: reads the copy in a folder; raises `UsageError` where it notices damage.
        files: names of the files to damage.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    files: tuple[str, ...]


def subjects(place: Path, run: Path, *, result: Path) -> Iterator[Subject]:
    """Yield the files of a run and its evaluation, copied below `place`.

    Args:
        place: folder to write to; `place/model` is the base of the run.
        run: output of a finished run with checkpoints.
        result: a result file of `gradselect compare`.
    """
    checkpoint = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    yield _subject("checkpoint", checkpoint, _read_checkpoint)

    delta.diff(place / "model", run, place / "delta" / "d.safetensors")
    yield _subject("delta", place / "delta", lambda folder: _read_delta(place / "model", folder))

    trained = place / "trained"
    trained.mkdir()
    for name in [*json.loads((run / MANIFEST_NAME).read_text())["files"], MANIFEST_NAME, "run.json"]:
        shutil.copy(run / name, trained)
    yield _subject("model", trained, _read_model, but=("run.json",))
    yield Subject(
        name="run.json",
        folder=trained,
        read=lambda folder: read_sealed(folder / "run.json", needed=("status", "recipe")),
        files=("run.json",),
    )

    settings = EvaluationSettings(model=str(run), task="loss", data=str(place / "known.txt"), output=place / "scores")
    evaluate(settings)
    yield _subject("evaluation", place / "scores", read_evaluation)

    name = result.name.removesuffix(".gz")
    write_result(place / "compared" / name, read_result(result).content)
    yield _subject("comparison", place / "compared", lambda folder: read_result(folder / name).content.values())


def _subject(name: str, folder: Path, read: Callable[[Path], Any], *, but: tuple[str, ...] = ()) -> Subject:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Subject(name=name, folder=folder, read=read, files=tuple(file for file in files if file not in but))


def _read_checkpoint(folder: Path) -> Any:
    if problem := verify(folder):
        raise UsageError(problem)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _read_delta(base: Path, folder: Path) -> Any:
    """Apply the delta. Returns digests of every file that it makes, and its own figures."""
    out = folder / "applied"
    figures = delta.apply(base, folder / "d.safetensors", out)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
    return {"figures": str(figures), **files}


def _read_model(folder: Path) -> Any:
    loaded = load(EvaluationSettings(model=str(folder), task="loss", data="none.txt", device="cpu"))
    weights = {name: tensor.numpy().tobytes() for name, tensor in loaded.model.state_dict().items()}
    config = loaded.model.config.to_dict() | {"_name_or_path": ""}
    tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
    return {"config": config, "generation": loaded.model.generation_config.to_dict(), "tokenizer": tokenizer, **weights}


# Damage --------------------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random, _: Path) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def swap(path: Path, _: random.Random, other: Path) -> None:
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def empty(path: Path, _: random.Random, __: Path) -> None:
    os.truncate(path, 0)


def zero_page(path: Path, draw: random.Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    start = PAGE * draw.randrange(-(-len(content) // PAGE))
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


def other_type(path: Path, draw: random.Random, _: Path) -> None:
    """Replace the file by a folder, or by as many random bytes."""
    size = path.stat().st_size
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()
    else:
        path.write_bytes(draw.randbytes(size))


def remove(path: Path, _: random.Random, __: Path) -> None:
    path.unlink()


WAYS = {
    "flip": flip,
    "truncate": truncate,
    "swap": swap,
    "empty": empty,
    "zero a page": zero_page,
    "wrong type": other_type,
    "remove": remove,
}
SHARES = (4, 2, 1, 1, 2, 1, 1)
"""Weights of the draw: a flipped bit is the hardest to notice."""


def damage_files(subject: Subject, *, count: int, scratch: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage one file of a copy, `count` times.

    Returns:
        Counts of "detected" (a message names the file), "harmless" (the content reads as it was written), "silent" and
        "crashed"; and a line for each of the last two.
    """
    draw = random.Random(f"{subject.name}/{seed}")
    expected = subject.read(_copy(subject, scratch))
    outcomes: Counter[str] = Counter()
    failures = []
    for _ in range(count):
        copy = _copy(subject, scratch)
        name, way = draw.choice(subject.files), draw.choices(list(WAYS), weights=SHARES)[0]
        others = [file for file in subject.files if file != name]
        if not others and way == "swap":
            way = "flip"
        second = draw.choice(others) if others else name
        WAYS[way](copy / name, draw, copy / second)
        outcome, said = _outcome(subject, copy, expected, names={name, second} if way == "swap" else {name})
        outcomes[outcome] += 1
        if outcome in ("silent", "crashed"):
            failures.append(f"{subject.name}: {name}: {way}: {outcome}: {said}")
    return outcomes, failures


def _outcome(subject: Subject, copy: Path, expected: Any, *, names: set[str]) -> tuple[str, str]:
    try:
        found = subject.read(copy)
    except UsageError as error:
        is_named = any(Path(name).name in str(error) for name in names)
        return ("detected", "") if is_named else ("silent", f"the message does not name the file: {error}")
    except Exception as error:
        return "crashed", repr(error)
    same = all(found.get(key) == value for key, value in expected.items())
    return ("harmless", "") if same else ("silent", "it reads as something else")


def _copy(subject: Subject, scratch: Path) -> Path:
    # The reader knows a checkpoint by its folder's name.
    copy = scratch / subject.folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(subject.folder, copy)
    return copy
