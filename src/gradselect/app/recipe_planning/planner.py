"""The model of a recipe without its weights, and what the recipe's method makes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradselect import UsageError
from gradselect.app.inputs import Inputs
from gradselect.app.models import draw_weights, load_configuration
from gradselect.app.recipe import (
    AbstractBlockMethod,
    AbstractMaskMethod,
    AbstractPeerMethod,
    ClassificationData,
    Recipe,
    RunFacts,
    SparseGradMethod,
    is_packed,
)
from gradselect.app.runtime import RunFolder
from gradselect.app.train import mask_optimizer, method_parts
from gradselect.planning import Choices, ForwardPass, Loss, Plan, Rows, choices_of, plan_steps

ASSUMED_STEPS = 1000
"""Of a run whose length is given in epochs; it decides some bytes of bookkeeping of masks."""


@dataclass(frozen=True)
class _Prepared:
    """A model as a method trains it, and the arguments of the method's optimizer; none: torch's AdamW."""

    model: nn.Module
    options: dict[str, Any] | None

    @cached_property
    def choices(self) -> Choices | None:
        """Of the policy, if there is one: it takes a while to ask it."""
        if self.options is None or "policy" not in self.options:
            return None
        return choices_of(self.options["policy"], self.options["blocks"], self.options["always"])


class RecipePlanner:
    """Plans variants of a recipe; they share the configuration and, where they can, the model."""

    def __init__(self) -> None:
        self._prepared: dict[str, _Prepared] = {}
        self._forwards: dict[str, ForwardPass] = {}

    def plan(self, recipe: Recipe) -> Plan:
        """Bytes and time of the recipe's run.

        Raises:
            UsageError: there is no such configuration, the method does not fit the model, or nobody can foresee it.
        """
        _check_method(recipe)
        prepared = self._prepare(recipe)
        forward = self._forward(recipe, prepared.model)
        options = prepared.options or {}
        steps = plan_steps(
            prepared.model,
            options.get("policy", options.get("mask")),
            forward,
            always=options.get("always", ()),
            # The residency is no part of what is shared.
            residency=recipe.method.place() if isinstance(recipe.method, AbstractBlockMethod) else None,
            master_dtype=torch.float32,
            blocks=options.get("blocks"),
            accumulation_steps=recipe.run.accumulation,
            num_steps=recipe.run.steps or ASSUMED_STEPS,
            rule=options.get("rule"),
            update_in_backward=options.get("update_in_backward", False),
            choices=prepared.choices,
        )
        return Plan(steps=steps, notes=(*forward.notes, *_notes(recipe)))

    def _prepare(self, recipe: Recipe) -> _Prepared:
        method = recipe.method.model_dump(mode="json", exclude={"residency"})
        model = recipe.model.model_dump(mode="json", exclude={"gradient_checkpointing"})
        key = json.dumps([model, method, recipe.run.steps])
        if key not in self._prepared:
            self._prepared[key] = _prepare(recipe)
        return self._prepared[key]

    def _forward(self, recipe: Recipe, model: nn.Module) -> ForwardPass:
        rows, loss = rows_of(recipe, model), _loss(recipe)
        key = f"{id(model)} {rows} {loss} {recipe.model.gradient_checkpointing}"
        if key not in self._forwards:
            self._forwards[key] = ForwardPass(
                model, rows, loss=loss, checkpointing=recipe.model.gradient_checkpointing, keeps_cache=False
            )
        return self._forwards[key]


def rows_of(recipe: Recipe, model: nn.Module) -> Rows:
    """The tokens of a forward pass of which no row is shorter than `data.max_length`.

    Rows of unequal length are padded, which asks for a mask; packed rows are laid behind one another and have one.

    Raises:
        UsageError: rows longer than the model's context.
    """
    length, batch = _length(recipe, model), recipe.run.batch_size
    shape = {"batch": batch, "length": length, "masked": recipe.data.format != "random" and batch > 1}
    if is_packed(recipe.data):
        shape = {"batch": 1, "length": batch * length, "masked": True}
    if recipe.model.attention == "flash_attention_2":
        shape["masked"] = False
    return Rows(
        **shape,
        itemsize=2 if recipe.model.dtype == "bfloat16" else 4,
        attention="eager" if recipe.model.attention == "eager" else "fused",
    )


def _length(recipe: Recipe, model: nn.Module) -> int:
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = recipe.data.max_length
    if wanted is not None and positions is not None and wanted > positions:
        raise UsageError(f"data.max_length={wanted} is more than the model's {positions} positions; write at most that")
    return wanted or min(1024, positions or 1024)


def _prepare(recipe: Recipe) -> _Prepared:
    model = meta_model(recipe)
    base = f"{model.base_model_prefix}."
    is_classifier = isinstance(recipe.data, ClassificationData)
    head = [name for name, _ in model.named_parameters() if not name.startswith(base)] if is_classifier else []
    nothing = cast(Any, None)
    inputs = Inputs(model=model, tokenizer=nothing, examples=nothing, max_length=0, head=head)
    parts = method_parts(recipe, inputs, folder=RunFolder(Path(recipe.run.output)))
    if isinstance(recipe.method, AbstractMaskMethod):
        facts = RunFacts(
            seed=recipe.run.seed,
            num_steps=recipe.run.steps or ASSUMED_STEPS,
            batches=[{}] * recipe.method.num_batches,
        )
        return _Prepared(parts.model, mask_optimizer(recipe.method, recipe, inputs, parts.model, facts)[1])
    return _Prepared(parts.model, None if parts.optimizer is None else parts.optimizer[1])


def meta_model(recipe: Recipe) -> Any:
    """The recipe's model on the meta device, from its configuration alone.

    Raises:
        UsageError: there is none, or transformers has no such model.
    """
    settings, data = recipe.model, recipe.data
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    kind: Any = AutoModelForCausalLM
    if isinstance(data, ClassificationData):
        kind = AutoModelForSequenceClassification
        options["num_labels"] = 1 if data.regression else len(data.labels or "01")
    config = load_configuration(settings.path, key="model.path", **options)
    attention = "eager" if settings.attention == "eager" else None
    with torch.device("meta"):
        model = draw_weights(kind, config, dtype=settings.dtype, attention=attention, key="model.path")
    model.config.use_cache = False
    return model.train()


def _check_method(recipe: Recipe) -> None:
    if isinstance(recipe.method, SparseGradMethod | AbstractPeerMethod):
        raise UsageError(
            f"method.name={recipe.method.name} cannot be planned: what it holds is known only once it has seen batches "
            "or runs in its own package; plan e.g. method.name=meprop or method.name=badam"
        )


def _loss(recipe: Recipe) -> Loss:
    """As the installed trainer computes it."""
    if isinstance(recipe.data, ClassificationData):
        return "none"
    return "chunked" if _trainer_has_chunks() else "whole"


def _trainer_has_chunks() -> bool:
    import trl.trainer.utils

    return "add_fused_lm_head" in vars(trl.trainer.utils)


def _notes(recipe: Recipe) -> tuple[str, ...]:
    notes = []
    if recipe.data.max_length is None:
        notes.append("data.max_length is not set: rows are taken to be as long as the model allows, at most 1024")
    if isinstance(recipe.data, ClassificationData) and recipe.data.labels is None and not recipe.data.regression:
        notes.append("data.labels is not set: the head is taken to have two outputs")
    return tuple(notes)
