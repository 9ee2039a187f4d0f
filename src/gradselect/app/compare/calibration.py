"""Calibration of a suite under a budget: measure what is not known yet, repeat what varies, keep the medians."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradselect import UsageError
from gradselect.app.results import Calibration, MethodCalibration

from .allotment import kind_shares
from .protocol import has_settings
from .suite import Suite
from .turns import NOISY, Turn, kind_costs, mean_cost, spread

MOST_REPEATS = 2
"""Number of times that the rounds of a varying method are repeated."""

OTHER_SPEED = 3.0
"""From this factor on a slower or faster reference is worth a note: it may be another machine."""

PACKAGES = ("torch", "transformers", "trl", "peft")
"""Packages that decide how long a step takes."""

Measure = Callable[[Sequence[str], int], Sequence[Turn]]
"""Measures some methods in turn, in rounds that begin with this number."""


class Calibrator:
    """Measures the step costs of a suite's methods.

    Args:
        suite: with a budget.
        measure: measures methods in turn.
        shared: fingerprint of what the methods share.
        machine: facts of this machine.
        say: shows a line.
    """

    def __init__(
        self, suite: Suite, *, measure: Measure, shared: str, machine: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        assert suite.budget is not None
        self._suite, self._budget = suite, suite.budget
        self._measure = measure
        self._shared = shared
        self._machine = dict(machine)
        self._say = say
        self._turns: list[Turn] = []

    def missing(self, methods: Sequence[str], known: Calibration | None) -> list[str]:
        """Return the methods to measure: the reference too if any is to be, and all if `known` is of elsewhere."""
        wanted = [self.reference, *(name for name in methods if name != self.reference)]
        if known is None or self.difference(known) is not None:
            return wanted
        new = [name for name in wanted if not self._is_known(name, known)]
        if self.reference in new:
            return wanted
        return [self.reference, *new] if new else []

    def difference(self, known: Calibration) -> str | None:
        """Return why no measurement of an earlier calibration counts here; None if they do."""
        unit = self.unit
        packages = {name: number for name, number in known.versions.items() if _versions().get(name) != number}
        if {**self._machine, **known.machine} != self._machine:  # an older calibration may have fewer facts
            there, here = (describe_machine(machine) for machine in (known.machine, self._machine))
            return f"it was made on another machine: {there} there, {here} here"
        if packages:
            return f"it was made with other packages: {', '.join(f'{name} {n}' for name, n in packages.items())}"
        if known.shared != self._shared:
            return "what the methods share has changed"
        if (known.reference, known.unit) != (self.reference, unit):
            return f"it counts {known.unit} relative to {known.reference!r}, this suite {unit} to {self.reference!r}"
        if self.reference in known.methods and not self._is_known(self.reference, known):
            return f"{self.reference!r}, which all are compared with, has other settings"
        return None

    @property
    def reference(self) -> str:
        """Method that ratios are relative to: that of `time_of`, else full fine-tuning, else the first one."""
        if self._budget.time_of is not None:
            return self._budget.time_of
        names = list(self._suite.methods)
        full = [name for name in names if self._suite.methods[name].method.name == "full"]
        return next(iter([*full, *names]))

    @property
    def unit(self) -> str:
        return "seconds" if self._budget.flops is None else "FLOPs"

    def calibrate(self, names: Sequence[str], known: Calibration | None) -> Calibration:
        """Measure these methods, the reference first, beside those that are known.

        Raises:
            UsageError: the reference cannot be measured.
        """
        self._rounds(names)
        self._repeat(names)
        own_rounds = [mean_cost(turn) for turn in self._of(self.reference)]
        keeps = known is not None and self.difference(known) is None
        fresh = {name: self._entry(name) for name in names}
        old = dict(known.methods) if keeps and known is not None else {}
        if keeps and known is not None and self.reference in old:
            self._compare_speeds(known, own_rounds)
            # Ratios are relative; the seconds of the first calibration stay, or the steps of all would change.
            fresh[self.reference], own_rounds = old[self.reference], list(known.reference_rounds)
        return Calibration(
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=self._machine,
            versions=_versions(),
            shared=self._shared,
            unit="seconds" if self.unit == "seconds" else "FLOPs",
            counted=self._of(self.reference)[0].counted,
            reference=self.reference,
            reference_rounds=own_rounds,
            reference_cost=statistics.median(own_rounds),
            methods={**old, **fresh},
        )

    def _compare_speeds(self, known: Calibration, rounds: Sequence[float]) -> None:
        """Say if the reference is several times as fast or slow as it was: other processors share time differently."""
        now, then = statistics.median(rounds), known.reference_cost
        if not 1 / OTHER_SPEED <= now / then <= OTHER_SPEED:
            self._say(
                f"note       a step of {self.reference!r} takes {now:.3g} {self.unit} and took {then:.3g} in the "
                "calibration that this adds to: if it is another processor, and not a busy one, begin another folder "
                "with --results DIR, for shares of time hold for one machine"
            )

    def _is_known(self, name: str, known: Calibration) -> bool:
        own = known.methods.get(name)
        return own is not None and not own.error and has_settings(self._suite.methods[name].method, own.settings)

    def _settings(self, name: str) -> dict[str, Any]:
        return self._suite.methods[name].method.model_dump(mode="json")

    def _rounds(self, names: Sequence[str]) -> None:
        first = 1 + max((turn.number for turn in self._turns), default=-1)
        turns = self._measure(names, first)
        # Whatever the round: the others have nothing to be compared with.
        if error := next((turn.error for turn in turns if turn.method == self.reference and turn.error), ""):
            raise UsageError(f"the calibration of {self.reference!r} failed: {error}")
        self._turns.extend(turns)

    def _repeat(self, names: Sequence[str]) -> None:
        """Repeat the rounds of the methods that vary by more than `NOISY`, up to `MOST_REPEATS` times."""
        first = 0
        for repeat in range(MOST_REPEATS + 1):
            varying = {name: found for name in names if (found := self._spread(name, first=first)) > NOISY}
            if not varying:
                return
            words = ", ".join(f"{name} by {100 * found:.0f} %" for name, found in varying.items())
            if repeat == MOST_REPEATS:
                self._say(f"note       the rounds still vary: {words}; the medians of all rounds are kept")
                return
            self._say(f"note       the rounds vary: {words}; they are repeated, and the medians are kept")
            first = 1 + max(turn.number for turn in self._turns)
            self._rounds([self.reference, *(name for name in varying if name != self.reference)])

    def _spread(self, name: str, *, first: int) -> float:
        """Return the spread of the rounds from `first` on; 0 if there are none."""
        entry = self._entry(name, first=first)
        if entry.error or name == self.reference:
            return 0.0
        recipe = self._suite.training_recipe(name, lr=1.0, seed=0, output="-")
        return spread(entry.by_kind, kind_shares(recipe, entry, steps=recipe.run.steps or entry.epoch_steps or 1))

    def _entry(self, name: str, *, first: int = 0) -> MethodCalibration:
        turns = [turn for turn in self._of(name) if turn.number >= first]
        errors = [turn.error for turn in self._turns if turn.method == name and turn.error]
        if errors or not turns:
            return MethodCalibration(settings=self._settings(name), error=errors[0] if errors else "not measured")
        references = {turn.number: turn for turn in self._of(self.reference)}
        return MethodCalibration(
            settings=self._settings(name),
            by_kind=kind_costs(turns, references),
            epoch_steps=turns[0].epoch_steps,
            block_names=list(turns[0].block_names),
            bytes=max(turn.bytes for turn in turns),
        )

    def _of(self, name: str) -> list[Turn]:
        return [turn for turn in self._turns if turn.method == name and not turn.error]


def machine_facts(device: str) -> dict[str, Any]:
    """Return what decides how fast this machine trains on "auto" or "cpu"."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": _gpu_name() if device != "cpu" and torch.cuda.is_available() else "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Return the facts of a machine in one line."""
    device = machine.get("device", "cpu")
    name = machine.get("processor", "") if device == "cpu" else device
    instructions = f" with {machine['instructions']}" if "instructions" in machine and device == "cpu" else ""
    return (
        f"{name or 'an unnamed processor'}{instructions}, {machine.get('cpus')} CPUs, {machine.get('threads')} threads"
    )


def _processor() -> str:
    """Return the name of the processor."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8", errors="replace").splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpu_name() -> str:
    """Return the name of the GPU, read in another process: a context here would take memory from the runs."""
    words = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "cuda"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
