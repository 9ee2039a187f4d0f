"""Output of a search: trials as lines and as a table, and the best recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console

from gradselect.app.progress import print_table
from gradselect.app.recipe import Recipe, dump_recipe
from gradselect.files import write_atomically

from .ranges import SearchRange, with_values
from .study_folder import StudyFolder

EDGE = 0.05
"""A value this close to an end of its range, as a share of the range, lies at the edge."""


@dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """One trial of a search.

    Args:
        number: Optuna's number. Interrupted trials have numbers too and are left out.
        values: the values tried, by key of the recipe.
        end: "finished", "pruned", "stopped" or "vetoed".
        loss: the last validation loss; None if there is none.
        step: the step of that loss.
        seconds: wall-clock time.
        reason: why it was stopped or vetoed.
    """

    number: int
    values: dict[str, Any]
    end: str
    loss: float | None
    step: int | None
    seconds: float
    reason: str

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialSummary:
        """Make the summary of a trial in the study."""
        step = trial.last_step
        assert trial.duration is not None
        return cls(
            number=trial.number,
            values=dict(trial.params),
            end=trial.user_attrs["end"],
            loss=None if step is None else trial.intermediate_values[step],
            step=step,
            seconds=trial.duration.total_seconds(),
            reason=trial.user_attrs["reason"],
        )

    def line(self) -> str:
        """Return the trial as one line."""
        values = "  ".join(f"{key} {_short(value)}" for key, value in self.values.items())
        loss = "" if self.loss is None else f"  validation loss {self.loss:.4f} at step {self.step}"
        end = "" if self.end == "finished" else f"  {self.end}{': ' if self.reason else ''}{self.reason}"
        return f"trial {self.number}  {values}{loss}{end}"


def best_of(trials: Sequence[TrialSummary]) -> TrialSummary | None:
    """Return the finished trial with the smallest validation loss; the earlier one if two are equal."""
    finished = [trial for trial in trials if trial.end == "finished"]
    return min(finished, key=lambda trial: (trial.loss, trial.number), default=None)


def write_best(recipe: Recipe, best: TrialSummary, *, num_trials: int, folder: StudyFolder) -> Recipe:
    """Return the recipe with the best values, and write it as `best.yaml`."""
    values = {**best.values, "run.output": str(folder.best_output)}
    tuned = with_values(recipe, values, source=str(folder.best_recipe))
    heading = f"# Trial {best.number}, the best of {num_trials}: validation loss {best.loss:.4f} at step {best.step}.\n"
    write_atomically(folder.best_recipe, heading + dump_recipe(tuned))
    return tuned


def show_table(console: Console, trials: Sequence[TrialSummary], best: TrialSummary) -> None:
    """Print every trial, the best one with a star: finished ones by loss, then the others."""
    headings = _headings(list(best.values))
    rows = {
        f"{trial.number}{' *' if trial is best else ''}": {
            **dict(zip(headings, map(_short, trial.values.values()), strict=True)),
            "loss": "" if trial.loss is None else f"{trial.loss:.4f}",
            "step": "" if trial.step is None else str(trial.step),
            "seconds": f"{trial.seconds:.0f}",
            "end": trial.end,
        }
        for trial in sorted(trials, key=_rank)
    }
    print_table(console, "trial", rows)


def edge_notes(best: TrialSummary, ranges: Sequence[SearchRange]) -> Iterator[str]:
    """Yield a note for each best value at an edge of its range: a better one may lie outside."""
    for searched in ranges:
        value = best.values[searched.key]
        position = searched.position(value)
        end = "lower" if position < EDGE else "upper" if position > 1 - EDGE else None
        if end is not None:
            yield f"the best {searched.key}, {_short(value)}, lies at the {end} edge of --search {searched}: widen it"


def _headings(keys: Sequence[str]) -> list[str]:
    """Return the last words of the keys, or the whole keys where two last words are equal."""
    words = [key.rpartition(".")[2] for key in keys]
    return words if len(set(words)) == len(words) else list(keys)


def _rank(trial: TrialSummary) -> tuple[bool, float, int]:
    return trial.end != "finished", float("inf") if trial.loss is None else trial.loss, trial.number


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
