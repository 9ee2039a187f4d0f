"""Display of a training: a line for each log, and below them how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from gradselect import BlockOptimizer, SparseOptimizer
from gradselect.app.progress import LINE_SECONDS, Stage, Stages, fitted
from gradselect.app.runtime import num_processes

from .meter import Meter
from .time_left import Calendar, TimeLeft

logger = logging.getLogger(__name__)


class ProgressDisplay(TrainerCallback):
    """Shows step, loss, learning rate, tokens per second, active blocks and bytes of weights, gradients and state.

    Args:
        stages: shows the lines, and the progress below them.
        meter: source of bytes and seconds. It must be called before this callback.
        count_tokens: returns the number of tokens that this session has trained on, on this rank.
        evaluates_last: an evaluation follows the last step.
    """

    def __init__(
        self, stages: Stages, *, meter: Meter, count_tokens: Callable[[], int], evaluates_last: bool = False
    ) -> None:
        self._stages = stages
        self._meter = meter
        self._count_tokens = count_tokens
        self._evaluates_last = evaluates_last
        self._time_left = TimeLeft(Calendar(last_step=0))
        self._stage = Stage("train")
        self._opened = ExitStack()
        self._last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        warmup, num_steps = args.get_warmup_steps(state.max_steps), state.max_steps
        if warmup > num_steps:
            logger.warning(
                "the warm-up takes %d steps and the run ends after %d: the learning rate gets to %.0f %% of %g",
                *(warmup, num_steps, 100 * (num_steps - 1) / warmup, args.learning_rate),
            )
        self._last = (self._meter.total_seconds, self._count_tokens())
        calendar = Calendar(
            last_step=state.max_steps,
            evaluate_every=state.eval_steps if args.eval_strategy == "steps" else None,
            evaluates_last=self._evaluates_last,
            save_every=state.save_steps if args.save_strategy == "steps" else None,
        )
        self._time_left = TimeLeft(calendar)
        opening = self._stages.open("train", total=state.max_steps, first_line_seconds=LINE_SECONDS)
        self._stage = self._opened.enter_context(opening)
        # Not from done steps: a resumed run begins with many.
        self._stage.done, self._stage.left = state.global_step, ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._time_left.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        # The Trainer's own callback comes first, and has set what is to be done now.
        self._time_left.end_step(
            before="evaluation" if control.should_evaluate else "checkpoint" if control.should_save else None
        )
        self._stage.done = state.global_step
        self._stage.note = _selected(parts["optimizer"].optimizer)
        self._stage.left = self._time_left.text_after(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **parts: Any) -> None:
        if "loss" in logs:
            self._say(self._line(state, logs, parts))
        elif "eval_loss" in logs:
            figures = _shown(validation_figures(logs))
            self._say(f"step {state.global_step}/{state.max_steps}  validation {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress, also after an error."""
        self._opened.close()

    def _say(self, line: str) -> None:
        self._stages.say(fitted(line, self._stages.console, indent=2))

    def _line(self, state: Any, logs: Mapping[str, float], parts: Mapping[str, Any]) -> str:
        fields = [
            f"step {state.global_step}/{state.max_steps}",
            f"loss {logs['loss']:.4f}",
            _shown({name: logs[name] for name in SHOWN if name in logs}),
            f"lr {logs['learning_rate']:.2e}",
            f"{self._rate():,.0f} tokens/s",
            _memory(self._meter.held_bytes),
            _selected(parts["optimizer"].optimizer),
        ]
        return "  ".join(field for field in fields if field)

    def _rate(self) -> float:
        """Return tokens per second of all steps since the last line, without evaluations and checkpoints.

        With several processes the other ranks are taken to have as many tokens as this one.
        """
        then, before = self._last
        self._last = (self._meter.total_seconds, self._count_tokens())
        return num_processes() * (self._last[1] - before) / max(self._last[0] - then, 1e-9)


SHOWN = {
    "reward": "reward",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
    "kl": "divergence",
    "completions/mean_length": "answer tokens",
    "completions/clipped_ratio": "cut off",
}
"""Metrics of trainers of TRL that a line shows, and their names in it. The record of the run has all of them."""

OF_TOKENS = {"entropy": "token entropy", "mean_token_accuracy": "token accuracy"}
"""Names of TRL's metrics of supervised training: the entropy of a selection is another thing."""


def _shown(figures: Mapping[str, float | None]) -> str:
    """Format figures; of those that only trainers of TRL have, a few.

    The loss of drawn answers is no measure of the model, so their reward stands alone.
    """
    shown = {*SHOWN} if "reward" in figures else {"loss", *SHOWN}
    is_long = any(name in SHOWN for name in figures)
    names = OF_TOKENS | SHOWN
    named = {names.get(name, name): value for name, value in figures.items() if not is_long or name in shown}
    return "  ".join(f"{name} {value:.4f}" for name, value in named.items() if value is not None)


def _memory(held: Mapping[str, int]) -> str:
    """Format the MiB of each category that is not empty."""
    names = {"weights": "weights", "gradients": "gradients", "masters": "masters"}
    names |= {"state_on_device": "state", "state_on_host": "state on host"}
    return "MiB: " + ", ".join(f"{label} {held[name] / 2**20:.1f}" for name, label in names.items() if held.get(name))


def _selected(optimizer: Any) -> str:
    """Format the selection of the last step: its blocks, marked if they were explored, or its number of entries."""
    if isinstance(optimizer, SparseOptimizer) and optimizer.last_record is not None:
        return f"[{sum(optimizer.last_record.num_entries.values()):,} entries, {optimizer.last_record.num_new:,} new]"
    if not isinstance(optimizer, BlockOptimizer) or optimizer.last_record is None:
        return ""
    record = optimizer.last_record
    names = " ".join(record.selected) if len(record.selected) <= 6 else f"{len(record.selected)} blocks"
    return f"[{names}]{' explored' if record.explored else ''}"


def validation_figures(logs: Mapping[str, float]) -> dict[str, float]:
    """Return loss and metrics of an evaluation from the Trainer's log."""
    skipped = ("runtime", "per_second", "num_tokens")
    figures = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return {name: value for name, value in figures.items() if not name.endswith(skipped)}
