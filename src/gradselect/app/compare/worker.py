"""The process of one run: train, evaluate, write the result.

    python -m gradselect.app.compare.worker JOB.json

Exit code 2 with a message: something that the user can put right.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from gradselect import UsageError
from gradselect.app.runtime import RunFolder, collected_messages
from gradselect.app.train import train
from gradselect.files import locked, read_sealed

from .job import Job
from .measure import measure_forgetting, measure_scores, measure_shipment
from .result_record import Outcome, describe_success
from .results import write_result

USAGE_EXIT_CODE = 2
RUN_KEYS = ("status", "recipe")


def main(job_file: str) -> None:
    """Carry out the job in this file."""
    job = Job.model_validate_json(Path(job_file).read_text("utf-8"))
    try:
        carry_out(job)
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(USAGE_EXIT_CODE) from None


def carry_out(job: Job) -> None:
    """From the job to its result file.

    Raises:
        UsageError: training or evaluation came to nothing.
    """
    started = time.perf_counter()
    run = train_once(job)
    with collected_messages(Console()):
        outcome = Outcome(
            run=run,
            scores=measure_scores(job),
            forgetting=measure_forgetting(job),
            shipment=measure_shipment(job, run),
            total_seconds=time.perf_counter() - started,
        )
    write_result(job.result, describe_success(job, outcome))
    if not job.keep_training:
        shutil.rmtree(job.training)


def train_once(job: Job) -> dict[str, Any]:
    """What `run.json` says of the training: of one that is there and may be taken over, or of a new one."""
    folder = RunFolder(job.training)
    if not (job.may_reuse and _has_trained(folder, job)):
        goes_on = job.resume and folder.newest_checkpoint() is not None
        if not goes_on and folder.root.exists():
            # One that a comparison before this one has left behind may still train there.
            with locked(folder.root):
                shutil.rmtree(folder.root)
        train(job.recipe, resume=goes_on, command=job.command)
    return read_sealed(folder.run_file, needed=RUN_KEYS)


def _has_trained(folder: RunFolder, job: Job) -> bool:
    """Whether the training in the folder has finished, and is the one that the job asks for."""
    if not folder.run_file.is_file():
        return False
    run = read_sealed(folder.run_file, needed=RUN_KEYS)
    return run["status"] == "finished" and run["recipe"] == job.recipe.model_dump(mode="json")


if __name__ == "__main__":
    main(*sys.argv[1:])
