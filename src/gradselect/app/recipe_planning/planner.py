"""Plan of one recipe: its model on the meta device, with what its method adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradselect import Borders, Keep, UsageError
from gradselect.app.inputs import Inputs, check_base_can_train, head_names
from gradselect.app.models import draw_weights, load_configuration, quantisation_of
from gradselect.app.recipe import (
    AbstractBlockMethod,
    AbstractMaskMethod,
    AbstractPeerMethod,
    ClassificationData,
    DpoSettings,
    OrpoSettings,
    Recipe,
    RunFacts,
    SparseGradMethod,
    SPTMethod,
    is_packed,
)
from gradselect.app.runtime import RunFolder
from gradselect.app.train import mask_optimizer, method_parts
from gradselect.blocks import StepCost
from gradselect.core import num_bytes
from gradselect.planning import (
    ActivationCounter,
    ForwardPass,
    Loss,
    Plan,
    Rows,
    Survey,
    Training,
    look_step,
    plan_steps,
    survey_policy,
)
from gradselect.sparsegrad import choose_layers
from gradselect.usage import write_size

from .trainer_notes import trainer_notes

ASSUMED_STEPS = 1000
"""Steps of a run whose length is given in epochs. They decide some bytes of a mask's bookkeeping."""


@dataclass(frozen=True)
class _Prepared:
    """A model as a method trains it, and the arguments of the method's optimizer; empty for torch's AdamW."""

    model: nn.Module
    options: dict[str, Any]

    @property
    def num_adapters(self) -> int:
        """Number of matrices with a LoRA."""
        return sum(name.endswith("lora_A.default.weight") for name, _ in self.model.named_parameters())

    @cached_property
    def counter(self) -> ActivationCounter:
        """Counter of the model's activations. It keeps its results, so variants of a recipe share them."""
        return ActivationCounter(self.model)

    @cached_property
    def survey(self) -> Survey | None:
        """Survey of the policy, if there is one. It takes a while."""
        if "policy" not in self.options:
            return None
        blocks = self.options["blocks"]
        cost = StepCost.of_model(self.model, blocks)
        return survey_policy(self.options["policy"], blocks, self.options["always"], cost=cost)


class RecipePlanner:
    """Plans variants of a recipe. They share the configuration and, where possible, the model."""

    def __init__(self) -> None:
        self._prepared: dict[str, _Prepared] = {}

    def plan(self, recipe: Recipe) -> Plan:
        """Return the bytes and the time of the recipe's run.

        Raises:
            UsageError: there is no such configuration, the method does not fit the model, or it cannot be planned.
        """
        _check_method(recipe)
        if isinstance(recipe.method, SPTMethod):
            return self._plan_spt(recipe, recipe.method)
        return self._plan(recipe, self._prepare(recipe))

    def _plan(self, recipe: Recipe, prepared: _Prepared) -> Plan:
        options = prepared.options
        training = Training(
            model=prepared.model,
            always=tuple(options.get("always", ())),
            # Variants that differ in residency share one prepared model, so this comes from the recipe.
            residency=recipe.method.place() if isinstance(recipe.method, AbstractBlockMethod) else Keep(),
            blocks=options.get("blocks"),
            accumulation_steps=recipe.run.accumulation,
            num_steps=recipe.run.steps or ASSUMED_STEPS,
            rule=options.get("rule"),
            update_in_backward=options.get("update_in_backward", False),
            borders=options.get("borders", Borders()),
            survey=prepared.survey,
        )
        choice = options.get("policy", options.get("mask"))
        steps = plan_steps(training, choice, _forward_pass(recipe, prepared))
        notes = (*_notes(recipe, cast(Any, prepared.model).config), *trainer_notes(recipe, prepared.model))
        return Plan(steps=steps, notes=notes)

    def _plan_spt(self, recipe: Recipe, method: SPTMethod) -> Plan:
        """Plan the larger of two choices that the batches of SPT may lead to, and the look at them."""
        adapted, masked = (self._prepare(recipe, with_adapters=choice) for choice in (True, False))
        plans = {f"adapters where the budget pays them ({adapted.num_adapters:,})": self._plan(recipe, adapted)}
        plans["masks alone"] = self._plan(recipe, masked)
        largest = max(plans.values(), key=lambda plan: plan.peak_bytes)
        look = look_step(
            Training(model=masked.model, accumulation_steps=recipe.run.accumulation),
            method.scored_names(masked.model),
            _forward_pass(recipe, masked),
            num_batches=method.num_batches,
        )
        cases = " and ".join(
            f"{name}, {write_size(plan.peak_bytes)} at {plan.relative_time:.2f} of the time of full fine-tuning"
            for name, plan in plans.items()
        )
        note = (
            f"method.name=spt: {method.num_batches} batches decide what trains, and the plan takes the larger of "
            f"{cases}. The look at them before the first step is counted: {write_size(look.peak_bytes)}"
        )
        return Plan(steps=(look, *largest.steps), notes=(*largest.notes, note))

    def _prepare(self, recipe: Recipe, *, with_adapters: bool | None = None) -> _Prepared:
        method = recipe.method.model_dump(mode="json", exclude={"residency"})
        model = recipe.model.model_dump(mode="json", exclude={"gradient_checkpointing"})
        key = json.dumps([model, method, recipe.run.steps, with_adapters])
        if key not in self._prepared:
            self._prepared[key] = _prepare(recipe, with_adapters=with_adapters)
        return self._prepared[key]


def rows_of(recipe: Recipe, model: nn.Module) -> Rows:
    """Return the tokens of a forward pass in which every row has `data.max_length` tokens.

    Padded rows need an attention mask. Packed rows form one long row, which needs one too.

    Raises:
        UsageError: rows longer than the model's context.
    """
    length, batch = _length(recipe, model), recipe.run.batch_size
    needs_mask = recipe.model.attention != "flash_attention_2"
    if is_packed(recipe.data):
        return Rows(batch=1, length=batch * length, masked=needs_mask)
    is_padded = recipe.data.format != "random" and batch > 1
    # DPO and ORPO read both answers of a row in one forward pass.
    batch *= 2 if isinstance(recipe.trainer, DpoSettings | OrpoSettings) else 1
    return Rows(batch=batch, length=length, masked=needs_mask and is_padded)


def _length(recipe: Recipe, model: nn.Module) -> int:
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = recipe.data.max_length
    if wanted is not None and positions is not None and wanted > positions:
        raise UsageError(f"data.max_length={wanted} is more than the model's {positions} positions; write at most that")
    return wanted or min(1024, positions or 1024)


def _prepare(recipe: Recipe, *, with_adapters: bool | None) -> _Prepared:
    """Return the model and the options; `with_adapters` says which of two choices SPT makes."""
    model = meta_model(recipe)
    check_base_can_train(recipe)
    head = head_names(model, recipe.model) if isinstance(recipe.data, ClassificationData) else ()
    if isinstance(recipe.method, SPTMethod):
        return _Prepared(model, recipe.method.forecast_options(model, head=head, with_adapters=with_adapters is True))
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
    return _Prepared(parts.model, {} if parts.optimizer is None else parts.optimizer[1])


def _forward_pass(recipe: Recipe, prepared: _Prepared) -> ForwardPass:
    return ForwardPass(
        prepared.counter,
        rows_of(recipe, prepared.model),
        loss=_loss(recipe),
        checkpointing=recipe.model.gradient_checkpointing,
    )


def meta_model(recipe: Recipe) -> Any:
    """Return the recipe's model on the meta device, from its configuration alone.

    Raises:
        UsageError: there is no configuration, or transformers has no such model.
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
        model = draw_weights(kind, config, dtype=settings.dtype, attention=attention)
    model.config.use_cache = False
    text = model.config.get_text_config()
    if text.pad_token_id is None:  # training takes the tokenizer's; a classifier does not run without one
        text.pad_token_id = 0
    return model.train()


def _check_method(recipe: Recipe) -> None:
    if isinstance(recipe.method, AbstractPeerMethod):
        raise UsageError(
            f"method.name={recipe.method.name} cannot be planned: its bytes are up to another package; plan e.g. "
            "method.name=badam"
        )
    if isinstance(recipe.method, SparseGradMethod):
        bases, copies = _rotation_bytes(meta_model(recipe), recipe.method)
        raise UsageError(
            "method.name=sparsegrad cannot be planned: what the eigenvectors of its bases take before the first step "
            "is up to the libraries of the device; plan method.name=meprop, which trains as many entries, and add "
            f"{write_size(bases)} for the bases and up to {write_size(copies)} for plain copies of the rotated weights"
        )


def _rotation_bytes(model: nn.Module, method: SparseGradMethod) -> tuple[int, int]:
    """Return the bytes of the bases, one pair for each kind of layer, and of the weights that they rotate."""
    layers = choose_layers(model, layers=method.layers, every=method.every)
    kinds = {layer.kind: layer.matrix for layer in layers}
    bases = sum(matrix.element_size() * sum(size**2 for size in matrix.shape) for matrix in kinds.values())
    return bases, sum(num_bytes(layer.weight) for layer in layers)


def _loss(recipe: Recipe) -> Loss:
    """Return the way in which the trainer computes the loss."""
    if isinstance(recipe.data, ClassificationData):
        return "none"
    if isinstance(recipe.trainer, OrpoSettings):
        return "whole"
    return "chunked"


def _notes(recipe: Recipe, config: Any) -> tuple[str, ...]:
    notes = []
    if recipe.data.max_length is None:
        notes.append(
            "data.max_length is not set: the plan assumes the longest rows that the model allows, at most 1024"
        )
    if isinstance(recipe.data, ClassificationData) and recipe.data.labels is None and not recipe.data.regression:
        notes.append("data.labels is not set: the plan assumes a head with two outputs")
    if not recipe.model.random_weights and (quantised := quantisation_of(config)):
        notes.append(
            f"the base is quantised ({quantised}), and the plan counts its weights in {recipe.model.dtype}: they will "
            "take less"
        )
    if getattr(recipe.method, "salience", None) == "grasp":
        notes.append(
            "method.salience=grasp differentiates the backward pass, and what that keeps of a batch is not counted: "
            "its look at batches takes more than the plan says. method.salience=snip is counted whole"
        )
    return tuple(notes)
