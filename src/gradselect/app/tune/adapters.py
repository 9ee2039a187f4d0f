"""Search for the layers that get a LoRA and for their ranks (`--space adapters`), by BIPEFT."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import set_seed

from gradselect import UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.progress import Stages
from gradselect.app.recipe import LoraMethod, Recipe, dump_recipe, parse_recipe
from gradselect.app.runtime import RunFolder
from gradselect.app.train import build_trainer, loss_of_batch, num_steps_of
from gradselect.files import locked, write_atomically
from gradselect.integrations.bipeft import (
    AdapterSearch,
    Allocation,
    SearchSettings,
    Site,
    budget_of_rank,
    check_ranks,
    sites_of,
)
from gradselect.integrations.transformers import checkpoint_selected

from .description import check_search, described
from .study_folder import StudyFolder, check_folder


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """Result of a search for adapters.

    Args:
        recipe: the recipe with the adapter that was found; also in `path`.
        path: file of that recipe, ready for `gradselect train`.
        allocation: layers and ranks.
    """

    recipe: Recipe
    path: Path
    allocation: Allocation


def search_adapters(
    recipe: Recipe, *, folder: StudyFolder, budget: int | None, ranks: Sequence[int], seed: int, console: Console
) -> AdapterResult:
    """Search and write the recipe; see `tune_adapters`."""
    method = _lora_of(recipe)
    check_ranks(ranks)  # before a model of the widest is built
    check_search(recipe)
    stages = Stages(console)
    inputs = read_inputs(recipe, stages=stages)
    asked = {"space": "adapters", "budget": budget, "ranks": list(ranks), "seed": seed}
    description = {**described(recipe, inputs), "adapters": asked}
    check_folder(folder, description)
    # A search that is refused or interrupted leaves nothing behind that would refuse the next one.
    with locked(folder.root, name="--study"), TemporaryDirectory() as scratch:
        widest = _with_lora(recipe, _widest(method, ranks[-1]), output=scratch)
        trainer = build_trainer(widest, inputs, folder=RunFolder(Path(scratch)), stages=stages)
        assert trainer.model is not None
        sites = sites_of(trainer.model)
        limit = budget_of_rank(sites, rank=method.rank) if budget is None else budget
        settings = SearchSettings(budget=limit, num_steps=num_steps_of(trainer, recipe), ranks=tuple(ranks), seed=seed)
        stages.say(*_opening(settings, sites, rank=method.rank if budget is None else None, folder=folder))
        found = _search(recipe, trainer, settings, stages=stages)
        tuned = _with_lora(recipe, {**found.options(), "lora_dropout": method.dropout}, output=str(folder.best_output))
        write_atomically(folder.description, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        _write(found, tuned, sites, folder=folder)
    stages.say(*_closing(found, sites), f"next: gradselect train {folder.best_recipe}")
    return AdapterResult(recipe=tuned, path=folder.best_recipe, allocation=found)


def _lora_of(recipe: Recipe) -> LoraMethod:
    method = recipe.method
    if not isinstance(method, LoraMethod) or method.name != "lora" or method.train_embedding:
        has_more = isinstance(method, LoraMethod) and method.train_embedding
        name = f"{method.name} with method.train_embedding" if has_more else method.name
        raise UsageError(
            f"--space adapters searches the layers of a plain LoRA, not of method.name={name}; write method.name=lora "
            "method.rank=2 (without --budget, the rank gives the budget)"
        )
    if recipe.trainer is not None:
        raise UsageError(f"--space adapters has no loss for trainer.name={recipe.trainer.name}; leave the section out")
    return method


def _widest(method: LoraMethod, rank: int) -> dict[str, Any]:
    """Return PEFT's options for a LoRA of the largest rank with the recipe's alpha / rank."""
    alpha = 2 * method.rank if method.alpha is None else method.alpha
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    return {
        "r": rank,
        "lora_alpha": alpha * rank / method.rank,
        "lora_dropout": method.dropout,
        "target_modules": targets,
    }


def _with_lora(recipe: Recipe, options: dict[str, Any], *, output: str) -> Recipe:
    values = recipe.model_dump(mode="json")
    values["method"] = {"name": "peft", "type": "LORA", "options": options}
    values["run"] |= {"output": output}
    return parse_recipe(values, source="the recipe with the adapter that was found")


def _search(recipe: Recipe, trainer: Any, settings: SearchSettings, *, stages: Stages) -> Allocation:
    set_seed(recipe.run.seed)
    scheduler = trainer.create_scheduler(num_training_steps=settings.num_steps, optimizer=trainer.optimizer)
    if recipe.model.gradient_checkpointing:
        checkpoint_selected(trainer.model)
    loss = loss_of_batch(trainer, recipe)
    search = AdapterSearch(
        trainer.model,
        settings,
        **({} if loss is None else {"loss": loss}),
        optimizer=trainer.optimizer,
        max_grad_norm=recipe.optimizer.max_grad_norm,
    )
    train, validation = _endless(trainer.get_train_dataloader()), _endless(trainer.get_eval_dataloader())
    with stages.open("searching adapters", total=settings.num_steps) as stage:
        while not search.is_done:
            losses = search.step([next(train) for _ in range(recipe.run.accumulation)], next(validation))
            scheduler.step()
            stage.advance()
            stage.note = "loss {:.3f}, on validation examples {:.3f}".format(*losses)
    return search.finish()


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(repeat(loader))


def _write(found: Allocation, tuned: Recipe, sites: Sequence[Site], *, folder: StudyFolder) -> None:
    write_atomically(folder.allocation, json.dumps(asdict(found), indent=2) + "\n")
    heading = (
        f"# LoRA on {len(found.ranks)} of {len(sites)} layers, {found.num_parameters:,} parameters of a budget of "
        f"{found.budget:,}. Ranks by layer: allocation.json.\n"
    )
    write_atomically(folder.best_recipe, heading + dump_recipe(tuned))


def _opening(
    settings: SearchSettings, sites: Sequence[Site], *, rank: int | None, folder: StudyFolder
) -> Iterator[str]:
    origin = "" if rank is None else f", as rank {rank} on all {len(sites)} layers"
    yield f"study      {folder.root}"
    yield f"budget     {settings.budget:,} parameters{origin}"
    ranks = ", ".join(map(str, settings.ranks))
    yield f"search     ranks {ranks} or none on {len(sites)} layers, at most {settings.num_steps} steps"


def _closing(found: Allocation, sites: Sequence[Site]) -> Iterator[str]:
    stable = "the best set was never stable" if found.stable_from is None else f"stable from step {found.stable_from}"
    yield (
        f"found      LoRA on {len(found.ranks)} of {len(sites)} layers, {found.num_parameters:,} parameters; {stable}, "
        f"{found.num_steps} steps"
    )
    ranks = defaultdict[str, list[int]](list)
    for site in sites:
        ranks[site.name.rpartition(".")[2]].append(found.ranks.get(site.name, 0))
    for kind, values in ranks.items():
        yield f"           {kind}: rank {' '.join(map(str, values))}"
