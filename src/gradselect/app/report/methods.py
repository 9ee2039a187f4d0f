"""Methods at their best learning rate, with figures over the seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gradselect.app.results import BlockSelection, Forgetting, MaskSelection, Result, Selection, StepSeconds

CATEGORIES = ("weights", "gradients", "masters", "state_on_device", "state_on_host")
"""Categories of exact bytes; "together" is their sum at one moment."""

PARTS = ("forward", "backward", "optimizer", "selection")
"""Parts of the time of a step."""


@dataclass(frozen=True)
class Method:
    """Scored runs of one method at one learning rate, one per seed, sorted by seed.

    Attributes:
        rates: union of the grids of all its runs, ascending.
    """

    name: str
    runs: tuple[Result, ...]
    rates: tuple[float, ...]

    @property
    def is_full(self) -> bool:
        """True for full fine-tuning, which speed and memory are relative to."""
        return self.runs[0].record.method_settings.get("name", self.name) == "full"

    @property
    def lr(self) -> float:
        return self.runs[0].record.lr

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.record.seed for run in self.runs)

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the best rate is at that edge of the grid, "only" for a grid of one rate."""
        if len(self.rates) < 2:
            return "only" if self.rates else None
        return {self.rates[0]: "lowest", self.rates[-1]: "highest"}.get(self.lr)

    @cached_property
    def validation_loss(self) -> float | None:
        return self._mean(lambda run: run.record.validation_loss)

    @property
    def forgetting_names(self) -> tuple[str, ...]:
        """Sets of text that the base model knew; the only one of a suite has an empty name."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.record.forgotten))

    def forgotten(self, name: str) -> list[Forgetting]:
        """Losses on one set before and after the training, one for each seed that has them."""
        return [run.record.forgotten[name] for run in self.runs if name in run.record.forgotten]

    def forgetting(self, name: str) -> float | None:
        """Rise of the loss on a set of text that the base model knew, in nats per token."""
        return self._mean(lambda run: one.rise if (one := run.record.forgotten.get(name)) is not None else None)

    @cached_property
    def step_seconds(self) -> float | None:
        """Median seconds of a step; several kinds are weighted by their number of steps."""
        return self.part_seconds("median")

    def part_seconds(self, part: str) -> float | None:
        """As `step_seconds`, for a part of a step; "median" is the whole step."""
        return self._median(
            lambda run: None if run.record.seconds is None else _typical(run.record.seconds.by_kind, part)
        )

    def kinds(self) -> tuple[str, ...]:
        """Kinds of steps: "explore" before "exploit", or "step"."""
        found = {kind for run in self.runs if run.record.seconds for kind in run.record.seconds.by_kind}
        return tuple(sorted(found, key=lambda kind: (kind != "explore", kind)))

    def kind_seconds(self, kind: str, part: str = "median") -> float | None:
        """Median seconds of a step of this kind, or of a part of it."""
        return self._median(lambda run: getattr(_kind(run, kind), part, None))

    def kind_steps(self, kind: str) -> int:
        """Number of steps of this kind in the run of the first seed."""
        found = _kind(self.runs[0], kind)
        return 0 if found is None else found.steps

    @cached_property
    def training_seconds(self) -> float | None:
        return self._mean(
            lambda run: (run.record.seconds and run.record.seconds.training) or run.content.train_info.train_time
        )

    @cached_property
    def tokens_per_second(self) -> float | None:
        return self._median(_tokens_per_second)

    @cached_property
    def flop_limit(self) -> float | None:
        """Upper limit of the speed-up over full fine-tuning; 1 for full fine-tuning."""
        limit = self._mean(lambda run: None if run.record.flop is None else run.record.flop.limit)
        return 1.0 if limit is None and self.is_full else limit

    def peak_bytes(self, category: str = "together") -> float | None:
        return self._most(lambda run: None if run.record.bytes is None else run.record.bytes.peak.get(category))

    @cached_property
    def average_bytes(self) -> float | None:
        return self._mean(lambda run: None if run.record.bytes is None else run.record.bytes.average.get("together"))

    @cached_property
    def reserved_average(self) -> float | None:
        """Average device memory reserved by torch, in bytes; None without a device."""
        return self._mean(lambda run: run.content.train_info.accelerator_memory_reserved_avg or None)

    def most_held(self, kind: str) -> float | None:
        """Peak bytes of "process", "allocated" or "reserved"."""
        return self._most(lambda run: None if run.record.bytes is None else getattr(run.record.bytes, kind) or None)

    @cached_property
    def file_size(self) -> float | None:
        return self._mean(lambda run: run.content.train_info.file_size)

    @cached_property
    def block_share(self) -> float | None:
        """Average share of the blocks that a step trains; 1 for full fine-tuning, None without blocks."""
        if self.is_full:
            return 1.0
        return self._mean(lambda run: _block_share(run.record.selection))

    @property
    def blocks(self) -> BlockSelection | None:
        """Blocks that the run of the first seed selected."""
        selection = self.runs[0].record.selection
        return selection if isinstance(selection, BlockSelection) else None

    @property
    def mask(self) -> MaskSelection | None:
        selection = self.runs[0].record.selection
        return selection if isinstance(selection, MaskSelection) else None

    def curve(self, name: str) -> list[tuple[float, float, float]]:
        """Step, seconds and loss: means over the seeds, at the steps that all seeds have."""
        curves = [run.record.curves[name] for run in self.runs if name in run.record.curves]
        tables = [
            {
                step: (seconds, loss)
                for step, seconds, loss in zip(curve.step, curve.seconds, curve.loss, strict=True)
                if loss is not None and math.isfinite(loss)
            }
            for curve in curves
        ]
        shared = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
        return [
            (step, _mean(table[step][0] for table in tables), _mean(table[step][1] for table in tables))
            for step in shared
        ]

    def _known(self, figure: Callable[[Result], float | None]) -> list[float]:
        values = [figure(run) for run in self.runs]
        return [value for value in values if value is not None and math.isfinite(value)]

    def _mean(self, figure: Callable[[Result], float | None]) -> float | None:
        known = self._known(figure)
        return _mean(known) if known else None

    def _median(self, figure: Callable[[Result], float | None]) -> float | None:
        known = self._known(figure)
        return statistics.median(known) if known else None

    def _most(self, figure: Callable[[Result], float | None]) -> float | None:
        return max(self._known(figure), default=None)


def collect_methods(runs: Sequence[Result]) -> tuple[list[Method], list[Result]]:
    """Return all methods, sorted by name, and the scored runs whose rate is not the best of their method."""
    methods, others = [], []
    scored = [run for run in runs if run.record.role == "score"]
    for name in sorted({run.record.method for run in scored}):
        of_method = [run for run in scored if run.record.method == name]
        best = _best_rate(of_method)
        chosen = sorted((run for run in of_method if run.record.lr == best), key=lambda run: run.record.seed)
        methods.append(Method(name=name, runs=tuple(chosen), rates=_rates(name, runs)))
        others += [run for run in of_method if run.record.lr != best]
    return methods, others


def find_full(methods: Sequence[Method]) -> Method | None:
    """Return full fine-tuning. If there are several, the one named "full", else the first by name."""
    full = sorted(
        (method for method in methods if method.is_full), key=lambda method: (method.name != "full", method.name)
    )
    return full[0] if full else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """Return `value / reference`, or None if one is unknown."""
    return None if value is None or not reference else value / reference


def _rates(method: str, runs: Sequence[Result]) -> tuple[float, ...]:
    tried = {rate for run in runs if run.record.method == method for rate in (*run.record.rates, run.record.lr)}
    return tuple(sorted(tried))


def _best_rate(runs: Sequence[Result]) -> float:
    """Return the rate with the lowest mean validation loss. If no loss is known: most seeds, then the lowest rate.

    Rates are compared over the seeds that they share, if they share any: each seed holds out other rows.
    """
    counts = Counter(run.record.lr for run in runs)
    losses: dict[float, dict[int, float]] = {lr: {} for lr in counts}
    for run in runs:
        if (loss := run.record.validation_loss) is not None and math.isfinite(loss):
            losses[run.record.lr][run.record.seed] = loss
    with_losses = [set(of_rate) for of_rate in losses.values() if of_rate]
    shared = set.intersection(*with_losses) if with_losses else set()

    def order(lr: float) -> tuple[float, int, float]:
        compared = [loss for seed, loss in losses[lr].items() if seed in shared or not shared]
        return (_mean(compared) if compared else math.inf, -counts[lr], lr)

    return min(counts, key=order)


def _typical(by_kind: Mapping[str, StepSeconds], part: str) -> float | None:
    steps = sum(kind.steps for kind in by_kind.values())
    values = [(kind.steps, getattr(kind, part)) for kind in by_kind.values()]
    if not steps or any(value is None for _, value in values):
        return None
    return sum(count * value for count, value in values) / steps


def _kind(run: Result, kind: str) -> StepSeconds | None:
    return None if run.record.seconds is None else run.record.seconds.by_kind.get(kind)


def _tokens_per_second(run: Result) -> float | None:
    rows = [row.get("tokens / sec") for row in run.content.train_info.metrics]
    known = [float(value) for value in rows if isinstance(value, int | float) and math.isfinite(value)]
    return statistics.median(known) if known else None


def _block_share(selection: Selection | None) -> float | None:
    if not isinstance(selection, BlockSelection) or not selection.selected:
        return None
    return _mean(len(step) for step in selection.selected) / len(selection.blocks)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
