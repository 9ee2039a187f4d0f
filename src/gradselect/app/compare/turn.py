"""One turn of a calibration: a few real training steps of one method, measured one by one."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from gradselect import BlockOptimizer, Drop, Keep
from gradselect.app.inputs import read_inputs
from gradselect.app.recipe import AbstractBlockMethod, Recipe
from gradselect.app.runtime import RunFolder, fast_bfloat16, keep_freed_memory, take_device
from gradselect.app.train import Meter, build_trainer, kind_of_step
from gradselect.blocks import StepCost
from gradselect.core import is_accelerator
from gradselect.planning import survey_policy

from .turns import EXPLORE_SHARE, WARM_UP, Turn

ON_CPU = "weights, gradients, masters and optimizer state"
ON_ACCELERATOR = "peak of torch's allocator"


def measure_turn(
    recipe: Recipe, *, method: str, number: int, steps: int, count_flops: bool = False, count_bytes: bool = False
) -> Turn:
    """Train for `WARM_UP` + `steps` steps and throw the model away.

    Args:
        recipe: recipe of the method. Its seed gives the batches, so all methods of a round have the same.
        method: name of the method.
        number: number of the round.
        steps: measured steps.
        count_flops: count FLOPs instead of seconds.
        count_bytes: count also the state that the rest of a run adds.

    Raises:
        UsageError: the method does not fit the model.
    """
    take_device(recipe.run.device)
    keep_freed_memory(recipe.run.device)
    gc.collect()  # the turn before leaves a trainer in cycles, also if it has failed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        return _measure(
            turn_recipe(recipe, number=number, steps=steps, output=folder),
            method=method,
            number=number,
            count_flops=count_flops,
            count_bytes=count_bytes,
        )


def turn_recipe(recipe: Recipe, *, number: int, steps: int, output: str | Path) -> Recipe:
    """Return the recipe of a turn: the same steps, without all that happens beside them.

    A turn is short, so what a run sees seldom is brought together: of a method with a phase of explore steps the first
    `EXPLORE_SHARE` of the measured steps explore and the others exploit, and a selection lasts for two steps at most.
    """
    run = recipe.run.model_copy(
        update={
            "steps": WARM_UP + steps,
            "epochs": None,
            "seed": number,
            "output": str(output),
            "log_every": 10**9,
            "evaluate_every": None,
            "save_every": None,
            "report_to": (),
            "sample_answers": 0,
        }
    )
    return recipe.model_copy(update={"run": run, "method": _brought_together(recipe.method, steps=steps)})


def _brought_together(method: Any, *, steps: int) -> Any:
    if not isinstance(method, AbstractBlockMethod):
        return method
    values = method.model_dump()
    explored = WARM_UP + max(1, round(EXPLORE_SHARE * steps))
    wanted = {"explore_steps": explored, "probe_steps": explored}
    changes: dict[str, Any] = {key: length for key, length in wanted.items() if key in values and values[key] != 0}
    if "explore_steps" in changes and "epsilon_end" in values:
        changes["epsilon_end"] = 1.0
    changes |= {key: min(2, values[key]) for key in ("every", "refresh") if isinstance(values.get(key), int)}
    return method.model_copy(update=changes)


def _measure(recipe: Recipe, *, method: str, number: int, count_flops: bool, count_bytes: bool) -> Turn:
    inputs = read_inputs(recipe)
    trainer = build_trainer(recipe, inputs, folder=RunFolder(Path(recipe.run.output)))
    meter, steps = Meter(trainer), _Steps(count_flops=count_flops)
    trainer.add_callback(meter)
    trainer.add_callback(steps)
    try:
        with _quiet(), fast_bfloat16(inputs.model, recipe.run.device):
            trainer.train()
    finally:
        meter.close()
        trainer.close()
    measured = meter.describe()  # reads the last step
    optimizer: Any = trainer.optimizer
    own = optimizer.optimizer
    parts: Any = trainer.optimizer_cls_and_kwargs
    options = parts[1] if isinstance(own, BlockOptimizer) else {}
    costs = steps.flops if count_flops else _in_order(steps.kinds, meter.step_seconds)
    peak, counted = _peak_bytes(measured)
    loader: Any = trainer.get_train_dataloader()
    return Turn(
        method=method,
        number=number,
        kinds=tuple(steps.kinds[WARM_UP:]),
        costs=tuple(costs[WARM_UP:]),
        bytes=peak + (_growth(trainer.model, own, options) if count_bytes and isinstance(own, BlockOptimizer) else 0),
        counted=counted,
        epoch_steps=max(1, -(-len(loader) // recipe.run.accumulation)),
        block_names=tuple(name for block in options.get("blocks", ()) for name in (block.name, *block.aliases)),
    )


class _Steps(TrainerCallback):
    """Kind of each step and, if wanted, its FLOPs."""

    def __init__(self, *, count_flops: bool) -> None:
        self.kinds: list[str] = []
        self.flops: list[float] = []
        self._count_flops = count_flops
        self._counter: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._count_flops:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops.append(float(self._counter.get_total_flops()))
            self._counter = None
        self.kinds.append(kind_of_step(parts["optimizer"].optimizer))


def _in_order(kinds: list[str], seconds: dict[str, list[float]]) -> list[float]:
    """Return the seconds of all steps in their order, from those of each kind."""
    left = {kind: iter(values) for kind, values in seconds.items()}
    return [next(left[kind]) for kind in kinds]


def _peak_bytes(measured: dict[str, Any]) -> tuple[int, str]:
    """Return the peak of what a memory budget counts on this device, and its name."""
    allocated = measured["bytes"].get("allocated")
    if allocated is not None:
        return int(allocated["peak"]), ON_ACCELERATOR
    return int(measured["bytes"]["peak"]["together"]), ON_CPU


def _growth(model: Any, optimizer: BlockOptimizer, options: Mapping[str, Any]) -> int:
    """Bytes of state and masters of blocks that a whole run trains and the turn has not trained yet."""
    residency = optimizer.residency
    on_accelerator = is_accelerator(next(model.parameters()).device)
    if isinstance(residency, Drop) or (on_accelerator and not isinstance(residency, Keep)):
        return 0  # the state of other blocks is nowhere, or in host memory
    blocks = options["blocks"]
    sizes = {block.name: block.num_elements for block in blocks}
    cost = StepCost.of_model(model, blocks)
    reached = survey_policy(options["policy"], blocks, options["always"], cost=cost).reached
    trained = {name for name, count in optimizer.update_counts.items() if count}
    held = optimizer.memory()
    state = held["masters"] + held["state_on_device"] + held["state_on_host"]
    missing = sum(sizes[name] for name in set(reached) - trained)
    return round(state * missing / sum(sizes[name] for name in trained)) if trained else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' logs of a turn to errors."""
    logger = logging.getLogger("gradselect")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
