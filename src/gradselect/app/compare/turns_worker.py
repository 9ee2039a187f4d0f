"""Process of a calibration: the methods take turns, one after another, in every round.

    python -m gradselect.app.compare.turns_worker JOB.json

Exit code 2 with a message: an error that the user can correct.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from gradselect import UsageError
from gradselect.app.runtime import collected_messages
from gradselect.files import write_atomically
from gradselect.usage import first_line

from .turn import measure_turn
from .turns import TURN_OF, Turn, Turns, TurnsJob

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)


def main(job_file: str) -> None:
    """Carry out the job in this file."""
    job = TurnsJob.model_validate_json(Path(job_file).read_text("utf-8"))
    with collected_messages(Console()):
        turns = tuple(take_turns(job))
    write_atomically(job.result, Turns(turns=turns).model_dump_json(indent=1))


def take_turns(job: TurnsJob) -> Iterator[Turn]:
    """Yield the turns of all rounds. A method that fails has no further turns.

    Each round begins with another method, so none is always the first. On an accelerator each has an uncounted turn
    before: the first of a process page-locks host memory and loads kernels, which a run does once and not at each step.
    """
    names, failed = list(job.recipes), set[str]()
    rounds = [(number, number % len(names), True) for number in range(job.first, job.first + job.rounds)]
    if torch.cuda.is_available() and any(recipe.run.device != "cpu" for recipe in job.recipes.values()):
        rounds.insert(0, (job.first, 0, False))
    for number, begin, counts in rounds:
        for method in names[begin:] + names[:begin]:
            if method in failed:
                continue
            # If the process is ended, the log says whose turn it was.
            sys.stdout.write(f"{TURN_OF}{method}\n")
            sys.stdout.flush()
            turn = _take(job, method, number)
            if turn.error:
                failed.add(method)
            if counts or turn.error:
                yield turn


def _take(job: TurnsJob, method: str, number: int) -> Turn:
    try:
        return measure_turn(
            job.recipes[method],
            method=method,
            number=number,
            steps=job.steps,
            count_flops=job.count_flops,
            count_bytes=number == job.first,
        )
    except UsageError as error:
        return Turn(method=method, number=number, error=str(error))
    except MEMORY_ERRORS as error:
        return Turn(method=method, number=number, error=f"out of memory: {first_line(error)}")
    except Exception as error:
        # As in a comparison without a budget, the other methods go on; the log has the traceback.
        traceback.print_exc()
        return Turn(method=method, number=number, error=f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
