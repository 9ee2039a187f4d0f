"""The folder that a run leaves: what its base's folder is, trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedTokenizerBase

from gradselect import sparsegrad, spt
from gradselect.app.inputs import Inputs, end_of_turn_tokens
from gradselect.app.models import files_beside_weights, is_quantised
from gradselect.app.recipe import ChatData, PreferenceData, PromptCompletionData, RandomData, Recipe
from gradselect.app.results import SavedModel
from gradselect.app.runtime import RunFolder, is_rank_0
from gradselect.files import BesideWeights, flush_names, remove, write_manifest, writing_aside
from gradselect.usage import UsageError, first_line, parent

from .failures import is_out_of_memory
from .restoring import unplaced_notes
from .trainer import RunTrainer

NUM_EXAMPLES = 1000
"""Examples that are looked at for the tokens that end a turn; templates do not change from one to the next."""
LAST_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class SavingPlan:
    """Files of the trained folder beside the weights, known before training.

    Args:
        beside: files beside the weights of the base; those that belong to the model are copied. None: it has no folder.
        ends: tokens that end what the model learns to write. `generate()` will stop at them.
        notes: what will be missing.
        is_kept: False for a model trained on random tokens.
    """

    beside: BesideWeights | None = None
    ends: Sequence[int] = ()
    notes: Sequence[str] = ()
    is_kept: bool = True


def plan_saving(recipe: Recipe, inputs: Inputs) -> SavingPlan:
    """Look at the base's folder and at the examples. Call it before an adapter is put on the model."""
    if isinstance(recipe.data, RandomData) or not is_rank_0():
        return SavingPlan(is_kept=False)
    beside = files_beside_weights(recipe.model.path, revision=recipe.model.revision)
    ends = _turn_ends(recipe, inputs)
    folder = None if beside is None or recipe.model.random_weights else beside.folder
    notes = [*unplaced_notes(inputs.model, folder), *_turn_end_notes(recipe, ends)]
    return SavingPlan(beside=beside, ends=ends, notes=notes)


def _turn_ends(recipe: Recipe, inputs: Inputs) -> tuple[int, ...]:
    """Return the tokens that end what the model learns to write; none for texts, which go on."""
    if not isinstance(recipe.data, ChatData | PreferenceData | PromptCompletionData):
        return ()
    examples = inputs.examples.train
    some = examples.select(range(0, len(examples), max(1, len(examples) // NUM_EXAMPLES)))
    return end_of_turn_tokens(inputs.tokenizer, some)


def _turn_end_notes(recipe: Recipe, ends: Sequence[int]) -> list[str]:
    """Say that nothing in the data teaches the model to end its turn with a token that `generate()` can stop at."""
    data = recipe.data
    is_chat = isinstance(data, ChatData) or (isinstance(data, PromptCompletionData) and data.as_chat)
    if ends or not is_chat:
        return []
    return [
        "the trained part of the answers ends with ordinary text, not with a special token: generate() will not know "
        "where an answer ends. Let the chat template end it with eos_token, inside {% generation %} if it has that mark"
    ]


def save_model(trainer: RunTrainer, inputs: Inputs, *, folder: RunFolder, plan: SavingPlan | None = None) -> SavedModel:
    """Write a plain checkpoint into the folder of the run. An adapter is merged into it and also kept beside it.

    On a quantised base, whose weights cannot take the sum, the adapter alone is written. Folds the rotations of
    `sparsegrad` and the adapters of `spt`, so the model cannot train after this.

    Args:
        trainer: after its last step.
        inputs: their tokenizer is written beside the weights, and beside those of the adapter.
        folder: folder of the run.
        plan: what else to write.

    Raises:
        UsageError: the adapter cannot be merged.
    """
    beside, ends = (None, ()) if plan is None else (plan.beside, plan.ends)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if any(isinstance(module, sparsegrad.RotatedLinear) for module in model.modules()):
        cast(Any, trainer.optimizer).optimizer.close()
        sparsegrad.fold(model)
    if spt.is_converted(model) and not isinstance(model, PeftModel):
        cast(Any, trainer.optimizer).optimizer.close()
        spt.fold(model)
    adapter, form = model, "model"
    if isinstance(model, PeftModel):
        with writing_aside(folder.adapter) as aside:
            model.save_pretrained(str(aside))
            inputs.tokenizer.save_pretrained(aside)
        form = "adapter" if is_quantised(model.get_base_model()) else "model"
        model = model.get_base_model() if form == "adapter" else _merged(model, kept=folder.adapter)
    added = _stop_at(model, ends)
    with writing_aside(folder.root / "model") as aside:
        aside.mkdir()
        if form == "adapter":
            adapter.save_pretrained(str(aside))
            remove(aside / "README.md")  # an empty form
            if model.can_generate():
                model.generation_config.save_pretrained(aside)
        else:
            model.save_pretrained(aside)
        inputs.tokenizer.save_pretrained(aside)
        copied = {} if form == "adapter" or beside is None else _copy_beside(aside, model, beside)
        write_manifest(aside, step=trainer.state.global_step)
    _move_up(folder.root / "model")
    is_adapted = isinstance(adapter, PeftModel)
    labels = {"labels": list(model.config.id2label.values())} if is_adapted and inputs.head else {}
    return SavedModel.model_validate(
        {"form": form, **copied, **labels, **_described_ends(model, inputs.tokenizer, added)}
    )


def _merged(model: Any, *, kept: Path) -> Any:
    """Merge the adapter, of which a copy is `kept`, in place.

    Most adapters of PEFT fail on a head of several layers, which has no weight.
    Ours do not: users merge them without this function, so `gradselect.adapters` has its own way, within a merge.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and not hasattr(module.original_module, "weight"):
            wrapper: Any = module
            own = wrapper.modules_to_save[wrapper.active_adapter] if wrapper.active_adapters else module.original_module
            setattr(model.get_submodule(parent(name)), name.rpartition(".")[2], own)
    try:
        return model.merge_and_unload()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"the trained adapter cannot be merged into the model ({type(error).__name__}: {first_line(error)}); it is "
            f"kept in {kept}"
        ) from error


def _stop_at(model: Any, ends: Sequence[int]) -> list[int]:
    """Add tokens to those that end a generated text; keep what is there. Return the new ones."""
    if not ends or not model.can_generate():
        return []
    known = _eos_ids(model)
    added = [token for token in ends if token not in known]
    if added:
        model.generation_config.eos_token_id = [*known, *added]
    return added


def _eos_ids(model: Any) -> list[int]:
    known = model.generation_config.eos_token_id
    return [] if known is None else [known] if isinstance(known, int) else list(known)


def _described_ends(model: Any, tokenizer: PreTrainedTokenizerBase, added: Sequence[int]) -> dict[str, Any]:
    if not model.can_generate():
        return {}
    return {
        "eos_token_ids": _eos_ids(model),
        **({"turn_ends": [str(tokenizer.convert_ids_to_tokens(token)) for token in added]} if added else {}),
    }


def _copy_beside(target: Path, model: Any, beside: BesideWeights) -> dict[str, list[str]]:
    """Copy the base's files beside its weights. Return the entries of the record."""
    copied = beside.copy_to(target, leave=() if model.can_generate() else ("generation_config.json",))
    lists = {
        "beside_the_weights": copied,
        "left_out": [*beside.other_weights, *beside.others],
        "untrained_weights": list(beside.other_weights),
    }
    return {key: names for key, names in lists.items() if names}


def _move_up(ready: Path) -> None:
    """Move the content of a folder up one level. The configuration comes last: a folder without it is no model."""
    for file in sorted(ready.iterdir(), key=lambda file: file.name in LAST_FILES):
        target = ready.parent / file.name
        if target.is_dir():
            remove(target)
        os.replace(file, target)
    flush_names(ready.parent)
    ready.rmdir()
