"""Check of what a folder of results holds, before a comparison adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradselect import UsageError
from gradselect.app.results import SAMPLES, read_sample_file
from gradselect.files import plain_or_packed

from .protocol import protocol_differences, protocol_hash
from .results import ResultsFolder
from .samples import Samples, read_prompts
from .schedule import PlannedRun


def check_protocol(folder: ResultsFolder, protocol: Mapping[str, Any], *, say: Callable[[str], None]) -> None:
    """Say which files are no results.

    Raises:
        UsageError: the folder holds results of another protocol.
    """
    results, skipped = folder.read()
    for line in skipped:
        say(f"skipped    {line}")
    for result in results:
        if result.record.protocol != protocol_hash(protocol):
            different = protocol_differences(result.record.protocol_settings, protocol)
            lines = [
                f"{folder.root} holds results of another protocol, e.g. {result.path.name}; figures of both "
                "cannot stand in one table. Choose another folder: --results DIR. What differs:",
                *different,
            ]
            raise UsageError("\n  ".join(lines))


def missing_samples(samples: Samples | None, folder: ResultsFolder, run: PlannedRun) -> str | None:
    """Return why a scored run has no answers to the prompts of the suite; None if it has them, or none are wanted.

    Its model is deleted, so they can only come from a new training.
    """
    result = folder.existing_result(run)
    if samples is None or result is None:
        return None
    path = plain_or_packed(folder.samples_file(run))
    reason = "has no answers to samples.prompts: it was scored without them"
    if path is not None:
        try:
            known = read_sample_file(path)
        except UsageError as error:
            reason = f"has no answers to samples.prompts: {error}"
        else:
            if known.asked == (samples.chat, samples.max_new_tokens, read_prompts(samples)):
                return None
            reason = f"has answers to other samples, in {SAMPLES}/{path.name}"
    return f"note       {run.method} {reason}; delete {result} to train and ask it again"
