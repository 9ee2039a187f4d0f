"""Plan of a recipe for people: the answer first, then a table, then notes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.console import Console

from gradselect.app.runtime import Memory
from gradselect.planning import CATEGORIES, Bytes, Plan, Step
from gradselect.usage import smallest_text, write_size

from .tables import FULL, HEADINGS, SHORT, print_settings
from .variants import RULE, RecipePlan, Setting, needed_bytes

MOMENTS = {
    "loss": "the loss",
    "layers": "the start of the backward pass",
    "backward": "the end of the backward pass",
    "update": "the update",
}


def show(found: RecipePlan, console: Console, *, memory: Memory, in_full: bool = False) -> None:
    """Print the answer, a table of methods and notes; in full, also all categories and the levers."""
    for line in _answer(found.own, memory=memory):
        console.print(line, highlight=False, markup=False)
    console.print()
    if found.best is not None and found.best.plan is not None:
        for line in _best(found.best):
            # One line, so that it can be copied.
            console.print(line, highlight=False, markup=False, soft_wrap=line.startswith("add"))
        console.print()
    columns = FULL if in_full else SHORT
    print_settings(console, "method", [found.own, *found.methods], columns)
    if in_full:
        print_settings(console, f"levers of {found.own.name.partition(',')[0]}", found.levers, columns)
    for note in _notes(found, in_full=in_full):
        console.print(note, style="dim", highlight=False, markup=False)


def _answer(own: Setting, *, memory: Memory) -> Iterator[str]:
    plan = own.plan
    assert plan is not None
    room, waiting = memory.num_bytes, plan.bytes.state_on_host
    place, needed = f"{write_size(room)} of {memory.name}", f"peak {write_size(plan.peak_bytes)}"
    if waiting and memory.is_host:
        needed += f" and {write_size(waiting)} of state that waits beside it"
    if needed_bytes(plan, memory) <= room:
        yield f"{own.name}: {needed}, fits into {place}"
    else:
        yield f"{own.name}: {needed}, DOES NOT FIT into {place}"
        here = "run.device=cpu " if memory.is_host else ""  # without it, SIZE is that of a card
        yield f"{here}--fit {smallest_text(room * 9 // 10)} looks for a setting that does"
    yield f"time: {_times(plan)}"
    step, moment, held = _largest_moment(plan)
    parts = {HEADINGS.get(name, name): getattr(held, name) for name in CATEGORIES if name != "state_on_host"}
    listed = [f"{name} {write_size(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size]
    yield f"at the peak, {_moment(step, moment, len(plan.steps))}: {', '.join(listed)}"
    if waiting and not memory.is_host:
        yield f"in host memory, beside the peak: {write_size(waiting)} of moments and masters"


def _moment(step: Step, moment: str, num_kinds: int) -> str:
    if step.kind == "look":
        return "the look at batches before the first step"
    if step.kind == "refresh":
        return _refresh(step)
    return MOMENTS[moment] + (f" of an {step.kind} step" if num_kinds > 1 and step.kind != "step" else "")


def _refresh(step: Step) -> str:
    return (
        "the look at batches after every step" if step.every == 1 else f"the look at batches every {step.every} steps"
    )


def _times(plan: Plan) -> str:
    """Return the time of each kind of step."""
    steps = [step for step in plan.steps if step.kind not in ("look", "refresh")]
    if len(steps) > 1:
        each = ", ".join(f"{step.relative_time:.2f} in {step.kind} steps" for step in steps)
        return f"{each} (full fine-tuning: 1)"
    shares = [f"{step.relative_time / step.every:.2f} of it for {_refresh(step)}" for step in plan.steps if step.every]
    return ", ".join([f"{plan.relative_time:.2f} of full fine-tuning", *shares])


def _largest_moment(plan: Plan) -> tuple[Step, str, Bytes]:
    """Return the step, and name and bytes of the moment, at which the device holds most."""
    moments = ((step, name, moment) for step in plan.steps for name, moment in step.moments.items())
    return max(moments, key=lambda found: found[2].device)


def _best(best: Setting) -> Iterator[str]:
    assert best.plan is not None
    waiting = best.plan.bytes.state_on_host
    beside = f", and {write_size(waiting)} of state in host memory" if waiting else ""
    yield f"best that fits: {best.name}, peak {write_size(best.plan.peak_bytes)}{beside}"
    yield f"time: {_times(best.plan)}"
    words = " ".join(map(shlex.quote, best.changes))
    yield f"add to the command: {words}" if best.changes else "the recipe fits as written"
    yield f"best: {RULE}."


def _notes(found: RecipePlan, *, in_full: bool) -> Iterator[str]:
    settings = [found.own, *found.methods, *(found.levers if in_full else ())]
    yield (
        "time: operations of an exploit step, which trains blocks that were selected before; full fine-tuning is 1. "
        "Peak: an estimate"
    )
    for note in dict.fromkeys(note for setting in settings if setting.plan for note in setting.plan.notes):
        yield f"note: {note}"
    if not in_full:
        fit = "" if found.best is not None else ", --fit 12GiB (best setting that fits)"
        yield f"more: --all (every category, masks, levers){fit}"
