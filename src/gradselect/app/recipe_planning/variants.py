"""Variants of a recipe for `gradselect plan`: other methods, levers, and the best one that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gradselect import UsageError
from gradselect.app.recipe import (
    AbstractBlockMethod,
    AbstractMaskMethod,
    RandomData,
    Recipe,
    TokenData,
    merge,
    parse_override,
    parse_recipe,
)
from gradselect.app.runtime import Memory, device_memory
from gradselect.planning import Plan
from gradselect.usage import smallest_text, write_size

from .planner import RecipePlanner

FRACTIONS = (0.1, 0.2, 0.3)
DEFAULT_RANK = 16
RULE = (
    "the first method that fits, in this order: the recipe's own, full, AdaGradSelect with the embedding from the "
    "largest fraction down, AdaGradSelect without it, LoRA. Each is tried with levers that keep the training as is: "
    "gradient checkpointing, state on the host unless the CPU trains, smaller micro-batches. Of its settings that fit, "
    "the fastest, then fewest micro-batches a step, fewest changes, lowest peak. If no method fits, all are tried "
    "again in bfloat16. The length of rows stays"
)
"""Meaning of "best" for `--fit`."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One variant of the recipe.

    Args:
        name: as a table shows it.
        changes: overrides to add to the command line.
        plan: None if the method does not fit the model.
        fault: the reason if there is no plan.
    """

    name: str
    changes: tuple[str, ...] = ()
    plan: Plan | None = None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """Everything that `gradselect plan` shows.

    Args:
        own: the recipe as written.
        methods: other methods in the same recipe.
        levers: other settings of the same method.
        best: best setting for `--fit`; None without it.
    """

    own: Setting
    methods: tuple[Setting, ...]
    levers: tuple[Setting, ...]
    best: Setting | None = None


def plan_recipe(
    recipe: Recipe, *, fractions: Sequence[float] = FRACTIONS, fit: int | None = None, in_full: bool = True
) -> RecipePlan:
    """Plan the recipe, other methods in its place, and its levers one by one.

    Only the model's configuration is read, and no data.

    Args:
        recipe: as it would be trained.
        fractions: of AdaGradSelect.
        fit: bytes that the best setting may need; None: look for none.
        in_full: plan masks and levers too.

    Raises:
        UsageError: the recipe cannot be planned, a fraction is out of its range, or nothing fits (the message gives the
            smallest size that would).
    """
    planner = RecipePlanner()
    own = Setting(name=f"{recipe.method.name}, as written", plan=planner.plan(recipe))
    others = grid(recipe, fractions) if in_full else trained_methods(recipe, fractions)
    methods = tuple(_try(planner, recipe, name, changes) for name, changes in others)
    levers = tuple(_try(planner, recipe, name, changes) for name, changes in (levers_of(recipe) if in_full else ()))
    memory = device_memory(recipe.run.device, fit=fit)
    best = None if fit is None else find_best(planner, recipe, fractions=fractions, memory=memory)
    return RecipePlan(own=own, methods=methods, levers=levers, best=best)


def grid(recipe: Recipe, fractions: Sequence[float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the methods of the table: a name, and overrides for the command line."""
    yield from trained_methods(recipe, fractions)
    for name, options in (
        ("id3", "density: 0.01"),
        ("static", "density: 0.01"),
        ("lift", "density: 0.01"),
        ("gmt", "fraction: 0.2"),
        ("meprop", "density: 0.01"),
        ("bitfit", ""),
    ):
        words = f", {options}" if options else ""
        yield f"{name} {options.partition(': ')[2]}".strip(), (f"method={{name: {name}{words}}}",)


def trained_methods(recipe: Recipe, fractions: Sequence[float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield full fine-tuning, AdaGradSelect and LoRA, in the order in which `fit` prefers them."""
    rank = getattr(recipe.method, "rank", None) or DEFAULT_RANK
    yield "full", ("method={name: full}",)
    for always in (", always: [embedding]", ""):
        for fraction in sorted(fractions, reverse=True):
            text = f"method={{name: adagradselect, fraction: {fraction:g}{always}}}"
            yield f"adagradselect {fraction:.0%}{' + embedding' if always else ''}", (text,)
    yield f"lora rank {rank}", (f"method={{name: lora, rank: {rank}}}",)


def levers_of(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the settings that differ in one lever."""
    checkpointing = not recipe.model.gradient_checkpointing
    yield f"gradient checkpointing {'on' if checkpointing else 'off'}", (_checkpointing(checkpointing),)
    if isinstance(recipe.method, AbstractBlockMethod):
        for residency in ("keep", "offload", "drop"):
            if residency != recipe.method.residency:
                yield f"residency {residency}", (f"method.residency={residency}",)
        if recipe.method.moment_bits == 32:
            yield "moments in 8 bits", ("method.moment_bits=8",)
        if not recipe.method.update_in_backward and recipe.run.accumulation == 1:
            changes = ("optimizer.max_grad_norm=0", "method.update_in_backward=true")
            yield "update in the backward pass, no clipping", changes
    if recipe.run.batch_size > 1:
        yield "micro-batches of one row", _passes(recipe, size=1)
    if isinstance(recipe.data, TokenData):
        yield f"packing {'off' if recipe.data.packing else 'on'}", (f"data.packing={_yes(not recipe.data.packing)}",)
    length = recipe.data.max_length or 1024
    if length > 2:
        yield f"rows of {length // 2} tokens", (_half_length(recipe),)
    other = "float32" if recipe.model.dtype == "bfloat16" else "bfloat16"
    yield f"weights in {other}", (f"model.dtype={other}",)


def needed_bytes(plan: Plan, memory: Memory) -> int:
    """Return what a run needs of the memory that it trains in: on a CPU also what a card would keep on the host."""
    return plan.peak_bytes + (plan.bytes.state_on_host if memory.is_host else 0)


def find_best(planner: RecipePlanner, recipe: Recipe, *, fractions: Sequence[float], memory: Memory) -> Setting:
    """Return the best setting by `RULE` that fits into the memory.

    Raises:
        UsageError: nothing fits.
    """

    def needed(setting: Setting) -> int:
        assert setting.plan is not None
        return needed_bytes(setting.plan, memory)

    smallest: Setting | None = None
    for name, changes in _candidates(recipe, fractions):
        levers = sparing_levers(changed(recipe, changes), memory)
        settings = [_try(planner, recipe, name, (*changes, *sparing)) for sparing in levers]
        planned = [setting for setting in settings if setting.plan is not None]
        fitting = [setting for setting in planned if needed(setting) <= memory.num_bytes]
        if fitting:
            return min(fitting, key=lambda setting: (*_cost(setting, recipe), needed(setting)))
        smallest = min([*planned, *([smallest] if smallest else [])], key=needed, default=None)
    assert smallest is not None
    raise UsageError(
        f"nothing fits {write_size(memory.num_bytes)}; the smallest is {smallest.name} with "
        f"{' '.join(smallest.changes)}, which needs {write_size(needed(smallest))}: write "
        f"--fit {smallest_text(needed(smallest))}, or shorter rows, e.g. {_half_length(recipe)}"
    )


def _candidates(recipe: Recipe, fractions: Sequence[float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    methods = [(f"{recipe.method.name}, as written", ()), *trained_methods(recipe, fractions)]
    dtypes = ((),) if recipe.model.dtype == "bfloat16" else ((), ("model.dtype=bfloat16",))
    for dtype in dtypes:
        for name, changes in methods:
            yield name, (*changes, *dtype)


def sparing_levers(recipe: Recipe, memory: Memory) -> Iterator[tuple[str, ...]]:
    """Yield combinations of levers that save this memory and do not change the training, `()` first."""
    method = recipe.method
    keeps = isinstance(method, AbstractBlockMethod) and method.residency == "keep"
    places = ((), ("method.residency=offload",)) if keeps and not memory.is_host else ((),)
    again = ((),) if recipe.model.gradient_checkpointing else ((), (_checkpointing(True),))
    # A mask that is selected from one backward pass would differ with smaller micro-batches.
    may_split = not isinstance(method, AbstractMaskMethod) or not method.lean_accumulation
    size = recipe.run.batch_size
    passes = [
        () if part == size else _passes(recipe, size=part)
        for part in range(size, 0, -1)
        if size % part == 0 and (may_split or part == size)
    ]
    for place, checkpointing, batch in product(places, again, passes):
        yield (*place, *checkpointing, *batch)


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Return the recipe with these overrides. Another method replaces the whole section.

    Raises:
        UsageError: an override does not fit.
    """
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for change in changes:
        override = parse_override(change)
        if change.startswith("method={"):
            values["method"] = override["method"]
        else:
            values = merge(values, override)
    return parse_recipe(values, source="the recipe")


def _try(planner: RecipePlanner, recipe: Recipe, name: str, changes: tuple[str, ...]) -> Setting:
    """The setting with its plan, or with the reason why it has none: not every method fits every model."""
    try:
        return Setting(name=name, changes=changes, plan=planner.plan(changed(recipe, changes)))
    except UsageError as error:
        return Setting(name=name, changes=changes, fault=str(error).splitlines()[0])


def _cost(setting: Setting, recipe: Recipe) -> tuple[float, int, int]:
    assert setting.plan is not None
    return setting.plan.relative_time, changed(recipe, setting.changes).run.accumulation, len(setting.changes)


def _passes(recipe: Recipe, *, size: int) -> tuple[str, ...]:
    """Overrides for the same batch in micro-batches of `size` rows."""
    number = recipe.run.batch_size // size * recipe.run.accumulation
    return f"run.batch_size={size}", f"run.accumulation={number}"


def _half_length(recipe: Recipe) -> str:
    key = "data.length" if isinstance(recipe.data, RandomData) else "data.max_length"
    return f"{key}={(recipe.data.max_length or 1024) // 2}"


def _checkpointing(wanted: bool) -> str:
    return f"model.gradient_checkpointing={_yes(wanted)}"


def _yes(value: bool) -> str:
    return "true" if value else "false"
