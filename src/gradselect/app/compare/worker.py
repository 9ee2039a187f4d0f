"""Process of one run: train, evaluate, write the result.

    python -m gradselect.app.compare.worker JOB.json

Exit code 2 with a message: an error that the user can correct.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from gradselect import UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import todays_recipe
from gradselect.app.results import FinishedRun, read_finished_run, read_run, write_result
from gradselect.app.runtime import RunFolder, collected_messages
from gradselect.app.train import describe_start, differences, train
from gradselect.files import locked

from .job import Job
from .measure import measure_forgetting, measure_scores, measure_shipment
from .result_record import Outcome, describe_success
from .sampling import sample_answers

USAGE_EXIT_CODE = 2


def main(job_file: str) -> None:
    """Carry out the job in this file."""
    job = Job.model_validate_json(Path(job_file).read_text("utf-8"))
    try:
        carry_out(job)
    except UsageError as error:
        _say(Console(stderr=True), f"error: {error}")
        raise SystemExit(USAGE_EXIT_CODE) from None


def carry_out(job: Job) -> None:
    """Train, evaluate and write the result file.

    Raises:
        UsageError: training or evaluation failed.
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
        sample_answers(job)  # not in the seconds of the run
    write_result(job.result, describe_success(job, outcome))
    if not job.keep_training:
        shutil.rmtree(job.training)


def train_once(job: Job) -> FinishedRun:
    """Return the record of the training: of a finished one that the job may reuse, or of a new one."""
    folder = RunFolder(job.training)
    finished = job.may_reuse and folder.run_file.is_file() and read_run(folder.run_file).status == "finished"
    if not (finished and _has_trained(folder, job)):
        resumes = job.resume and not finished and folder.newest_checkpoint() is not None and not _changed(folder, job)
        if not resumes and folder.root.exists():
            # A process of an earlier comparison may still train there.
            with locked(folder.root):
                shutil.rmtree(folder.root)
        train(job.recipe, resume=resumes, command=job.command)
    return read_finished_run(folder.run_file)


def _has_trained(folder: RunFolder, job: Job) -> bool:
    """True if the finished training in the folder used the recipe of the job, and its model and data of today."""
    is_recipe = todays_recipe(read_run(folder.run_file).recipe) == job.recipe.model_dump(mode="json")
    return is_recipe and not _changed(folder, job)


def _changed(folder: RunFolder, job: Job) -> bool:
    """True if the training in the folder began with other settings, model or data than the job has; say which."""
    # Where paths are the same, the contents may have changed.
    today = describe_start(job.recipe, read_inputs(job.recipe), command=job.command)
    changed = list(differences(read_run(folder.run_file).values(), today.values()))
    for line in changed:
        _say(Console(), f"the training in {folder.root} is made again: {line}")
    return bool(changed)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
