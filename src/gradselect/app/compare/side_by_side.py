"""Runs side by side: several processes at a time, each with its share of the processor or of an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from gradselect import UsageError

from .subprocesses import Running, run_job

DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Item = TypeVar("Item")
Found = TypeVar("Found")


class SideBySide:
    """A number of places for runs.

    Args:
        count: number of runs at a time, at least 2.
        device: of the recipe: "auto" or "cpu".
        per_device: most runs at a time on one accelerator.

    Raises:
        UsageError: the machine has fewer threads or accelerators.

    Attributes:
        count: number of runs at a time.
        text: the places in words.
        alone: environment of a process before the runs, such as a calibration: one accelerator, if there are several.
    """

    def __init__(self, count: int, *, device: str, per_device: int = 1) -> None:
        self.count = count
        num_devices = 0 if device == "cpu" else torch.cuda.device_count()
        if per_device > 1 and not num_devices:
            raise UsageError(f"--per-device={per_device}: runs are on the processor here; write --jobs {count} alone")
        places = _of_devices(count, num_devices, per_device) if num_devices else _of_threads(count)
        shares = [f"{places[0][THREADS[0]]} of {torch.get_num_threads()} threads"] if THREADS[0] in places[0] else []
        if num_devices:
            shares.insert(0, "an accelerator" if per_device == 1 else f"an accelerator for {per_device}")
        self.text = f"{count} runs side by side, each with {' and '.join(shares)}"
        self.alone = {DEVICES: places[0][DEVICES]} if num_devices > 1 else {}
        self._places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for place in places:
            self._places.put(place)
        self._running = Running()
        self._is_over = False

    def map(self, act: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """Return `act` of each item, in their order. Several run at a time, in threads.

        A signal goes on to all jobs. After it, and after an error of one item, the jobs that run end and none begins.

        Raises:
            Preempted: a signal came, and all jobs have ended.
        """
        with self._running.passing_signals_on(), ThreadPoolExecutor(self.count) as pool:
            futures: list[Future[Found]] = [pool.submit(act, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._is_over = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def run_job(self, job_file: Path, log: Path) -> str | None:
        """Run a job in the next free place, as `subprocesses.run_job` does."""
        if self._is_over:
            raise UsageError("another run has ended the comparison")
        place = self._places.get()
        try:
            return run_job(job_file, log, environment=place, running=self._running)
        finally:
            self._places.put(place)


def _of_threads(count: int) -> list[dict[str, str]]:
    """Return the environment of each place on a processor: an equal share of the threads that torch would use."""
    threads = torch.get_num_threads()
    if count > threads:
        raise UsageError(f"--jobs={count}: torch has {threads} threads here; write --jobs {threads} or less")
    return [dict.fromkeys(THREADS, str(threads // count)) for _ in range(count)]


def _of_devices(count: int, num_devices: int, per_device: int) -> list[dict[str, str]]:
    """Return the environment of each place: one of the visible accelerators, and where they are shared some threads."""
    if count > num_devices * per_device:
        raise UsageError(
            f"--jobs={count}: {num_devices} accelerators are visible here, and --per-device is {per_device}; write "
            f"--jobs {num_devices * per_device} or less, or --per-device {-(-count // num_devices)} if the memory of "
            "each holds so many"
        )
    visible = os.environ.get(DEVICES)
    names = visible.split(",") if visible else [str(number) for number in range(num_devices)]
    threads = dict.fromkeys(THREADS, str(max(1, torch.get_num_threads() // count))) if per_device > 1 else {}
    return [{DEVICES: names[number % num_devices].strip(), **threads} for number in range(count)]
