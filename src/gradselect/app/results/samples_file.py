"""`samples/` of a comparison: answers of the base model and of trained models to a few prompts, for people to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gradselect.files import json_files, sealed, writing_aside
from gradselect.usage import UsageError

from .record import Number, Record
from .result_file import Skipped

SAMPLES = "samples"
"""Name of the folder, in the folder of the results."""

BASE = "base.json"
"""Name of the file with the answers of the base model."""


class SampledAnswer(Record):
    """Greedy answer to one prompt.

    Attributes:
        prompt: as it stands in the file of prompts.
        answer: text without special tokens.
        finished: False if the answer was longer than `max_new_tokens`.
        truncated: True if the prompt lost its beginning, because it is longer than the model's context.
    """

    prompt: str
    answer: str
    finished: bool
    truncated: bool = False


class SampleFile(Record):
    """Answers of one model.

    Attributes:
        protocol: fingerprint of what the runs share.
        method: in the suite; None for the base model.
        lr: learning rate of the run; None for the base model.
        seed: of the run; None for the base model.
        chat: True if each prompt was a user's message in the model's chat template.
        max_new_tokens: limit on the tokens of an answer.
        answers: in the order of the prompts.
    """

    format: int = 1
    protocol: str
    method: str | None = None
    lr: Number | None = None
    seed: int | None = None
    chat: bool
    max_new_tokens: int
    answers: list[SampledAnswer]

    @property
    def asked(self) -> tuple[bool, int, tuple[str, ...]]:
        """Question that was asked: only answers to the same can stand beside one another."""
        return self.chat, self.max_new_tokens, tuple(each.prompt for each in self.answers)


@dataclass(frozen=True, kw_only=True)
class SampledAnswers:
    """Answers that a folder of results holds.

    Args:
        base: of the base model; None if there are none.
        methods: of trained models, by the names of their files.
        skipped: damaged files.
    """

    base: SampleFile | None = None
    methods: tuple[SampleFile, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def read_sample_file(path: Path) -> SampleFile:
    """Read the answers of one model.

    Raises:
        UsageError: the file is damaged.
    """
    return SampleFile.read(path, name=f"{SAMPLES}/{path.name}")


def read_samples(folder: Path) -> SampledAnswers:
    """Read the answers in a folder of results; damaged files are skipped, with the reason."""
    found, skipped = [], []
    for path in json_files(folder / SAMPLES):
        try:
            found.append(read_sample_file(path))
        except UsageError as error:
            name = f"{SAMPLES}/{path.name}"
            skipped.append(Skipped(file=name, reason=str(error).removeprefix(f"{name}: ")))
    return SampledAnswers(
        base=next((each for each in found if each.method is None), None),
        methods=tuple(each for each in found if each.method is not None),
        skipped=tuple(skipped),
    )


def write_samples(path: Path, content: SampleFile) -> None:
    """Write the answers of one model atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed(content.model_dump(mode="json")), indent=1, ensure_ascii=False)
    with writing_aside(path) as aside:
        aside.write_text(text + "\n", "utf-8")
