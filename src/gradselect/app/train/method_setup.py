"""Changes that a method makes to a trainer: model, optimizer, callbacks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from gradselect import UsageError
from gradselect.app.inputs import Inputs
from gradselect.app.models import is_quantised, quantisation_of
from gradselect.app.recipe import (
    AbstractAdapterMethod,
    AbstractBlockMethod,
    AbstractFreeMaskMethod,
    AbstractMaskMethod,
    AbstractPeerMethod,
    AdaLoraMethod,
    AllMethod,
    FullMethod,
    PeerFactory,
    Recipe,
    RunFacts,
)
from gradselect.app.runtime import RunFolder
from gradselect.integrations.transformers import AdaLoraCallback, SelectionCallback, SelectiveOptimizerFactory
from gradselect.usage import first_line

from .adalora import OrthogonalityPenalty
from .failures import is_out_of_memory


@dataclass(frozen=True, kw_only=True)
class MethodParts:
    """Changes that a method makes to a trainer.

    Args:
        model: model to train.
        optimizer: factory and arguments. None: the trainer's own AdamW, or a mask's optimizer, which is built after the
            trainer because it may need batches and the number of steps.
        callbacks: callbacks beside the trainer's own.
        penalty: term that the method adds to the loss of each step.
    """

    model: nn.Module
    optimizer: tuple[Any, dict[str, Any]] | None
    callbacks: list[TrainerCallback]
    penalty: Callable[[], Tensor] | None = None


def method_parts(recipe: Recipe, inputs: Inputs, *, folder: RunFolder) -> MethodParts:
    """Return the changes that the recipe's method makes. A classification head trains with every method.

    Raises:
        UsageError: the method does not fit the model.
    """
    method, model = recipe.method, inputs.model
    if isinstance(method, FullMethod) and recipe.model.dtype != "float32":
        method = method.with_masters()
    match method:
        case AbstractBlockMethod():
            return MethodParts(
                model=model,
                optimizer=(SelectiveOptimizerFactory, _block_options(method, recipe, model, head=inputs.head)),
                callbacks=[SelectionCallback(jsonl=folder.records_file)],
            )
        case AbstractMaskMethod():
            model = _adapt(inputs, adapter, seed=recipe.run.seed) if (adapter := _adapter_of(method)) else model
            return MethodParts(model=model, optimizer=None, callbacks=[SelectionCallback(jsonl=folder.records_file)])
        case AdaLoraMethod():
            return _adalora_parts(method, recipe, inputs)
        case AbstractPeerMethod():
            return MethodParts(model=model, optimizer=_peer_optimizer(method, recipe, inputs), callbacks=[])
        case AbstractAdapterMethod():
            return _adapter_parts(method, recipe, inputs)
        case FullMethod():
            return MethodParts(model=model, optimizer=None, callbacks=[])


def mask_optimizer(
    method: AbstractMaskMethod, recipe: Recipe, inputs: Inputs, model: nn.Module, facts: RunFacts
) -> tuple[Any, dict[str, Any]]:
    """Return factory and arguments of a mask's `SparseOptimizer`. It clips, because the trainer sees no gradients.

    Raises:
        UsageError: the mask does not fit the model.
    """
    # With an adapter, the head that trains is PEFT's copy.
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [name for name in names if name in inputs.head or ".modules_to_save." in name]
    return SelectiveOptimizerFactory, {
        **method.optimizer_options(model, facts, head=head),
        "max_grad_norm": recipe.optimizer.max_grad_norm or None,
        "master_dtype": torch.float32,
        **_adamw_options(recipe),
    }


def _adapter_of(method: AbstractMaskMethod) -> AbstractAdapterMethod | None:
    return method.adapter if isinstance(method, AbstractFreeMaskMethod) else None


def _adapter_parts(method: AbstractAdapterMethod, recipe: Recipe, inputs: Inputs) -> MethodParts:
    adapted = _adapt(inputs, method, seed=recipe.run.seed)
    if all(parameter.dtype == torch.float32 for parameter in adapted.parameters() if parameter.requires_grad):
        return MethodParts(model=adapted, optimizer=None, callbacks=[])
    # PEFT keeps a copied embedding or head in the model's dtype, so it needs masters as in full fine-tuning.
    options = _block_options(AllMethod(), recipe, adapted, head=())
    return MethodParts(model=adapted, optimizer=(SelectiveOptimizerFactory, options), callbacks=[SelectionCallback()])


def _adalora_parts(method: AdaLoraMethod, recipe: Recipe, inputs: Inputs) -> MethodParts:
    parts = _adapter_parts(method, recipe, inputs)
    assert isinstance(parts.model, PeftModel)
    if recipe.run.steps is not None:
        # Now, so that a bad schedule fails before training; with epochs only the trainer knows the number of steps.
        method.write_schedule(parts.model.active_peft_config, recipe.run.steps)
    return replace(
        parts,
        callbacks=[*parts.callbacks, AdaLoraCallback(schedule=method.write_schedule)],
        penalty=OrthogonalityPenalty(parts.model, weight=method.orthogonality) if method.orthogonality else None,
    )


def _peer_optimizer(method: AbstractPeerMethod, recipe: Recipe, inputs: Inputs) -> tuple[Any, dict[str, Any]]:
    adamw = _adamw_options(recipe)
    del adamw["accumulation_steps"]
    return PeerFactory, {"method": method, "head": tuple(inputs.head), "adamw": adamw}


def _block_options(
    method: AbstractBlockMethod, recipe: Recipe, model: nn.Module, *, head: Collection[str]
) -> dict[str, Any]:
    """Return arguments of `gradselect.BlockOptimizer`; `head` names parameters that train at every step."""
    return {
        **method.optimizer_options(model, RunFacts(seed=recipe.run.seed), head=head),
        "master_dtype": torch.float32,
        **_adamw_options(recipe),
    }


def _adamw_options(recipe: Recipe) -> dict[str, Any]:
    return {
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "betas": recipe.optimizer.betas,
        "eps": recipe.optimizer.eps,
        "accumulation_steps": recipe.run.accumulation,
    }


def _adapt(inputs: Inputs, method: AbstractAdapterMethod, *, seed: int) -> PeftModel:
    """Return the model with an adapter, initialised with `seed`. Only adapter and classification head train."""
    model, head = inputs.model, _modules_of_head(inputs)
    _check_takes_adapter(model)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]
    set_seed(seed)
    try:
        config = method.peft_config(embedding=name, head=head)
        with warnings.catch_warnings():
            # method.train_embedding asks for it whether or not the model has a tied head.
            warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`, but no tied modules")
            adapted = get_peft_model(model, config)
    except UsageError as error:  # an adapter of our own, with PEFT's names of keys
        raise UsageError(f"method: {str(error).replace('target_modules', 'targets')}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"method: PEFT refuses this adapter: {error}") from error
    kind = PeftType(config.peft_type).value
    if config.is_prompt_learning:
        raise UsageError(f"method.type={kind} cannot be merged into a plain model; choose another adapter")
    assert isinstance(adapted, PeftModel)
    if isinstance(outputs := model.get_output_embeddings(), BaseTunerLayer):
        name = next(name for name, module in model.named_modules() if module is outputs)
        raise UsageError(
            f"method: the adapter is on {name!r} too, and the loss is computed from its weight alone, so that nothing "
            "would train it; leave it out of the targets"
        )
    if not is_quantised(model):
        _check_unshared(adapted, kind)
        _check_merges(adapted, kind)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for module in head:
        if not any(f".{module}.modules_to_save." in name for name in trained):
            raise UsageError(
                f"method.type={kind} does not train {module!r} of the classification head; "
                f"add method.options.modules_to_save={head}"
            )
    return adapted


def _check_unshared(adapted: PeftModel, kind: str) -> None:
    """Check that no weight that the merge changes is used by another layer too. PEFT merges into it all the same.

    Raises:
        UsageError: one is, because `layer_replication` copied its layer or it is the embedding of a tied head.
    """
    uses = Counter(id(weight) for module in adapted.modules() for weight in module.parameters(recurse=False))
    for path, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
            continue  # rows of single tokens are meant for a tied head too
        if uses[id(getattr(module.get_base_layer(), "weight", None))] > 1:
            raise UsageError(
                f"method.type={kind} cannot be merged into a plain model: {path!r} shares its weight with another "
                "layer, which merging would change too; leave out of the targets what is tied (embedding, head), and "
                "out of method.options layer_replication"
            )


def _check_merges(adapted: PeftModel, kind: str) -> None:
    """Merge a copy of one layer of each sort, because PEFT has no other way to tell whether an adapter can be merged.

    Raises:
        UsageError: it cannot, which would otherwise be found after the training.
    """
    sorts: dict[Any, Any] = {}
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            sorts.setdefault((type(module), type(base), getattr(base, "bias", None) is None), module)
    tuner: Any = adapted.base_model
    try:
        with warnings.catch_warnings(action="ignore"):  # the merge after the training says them
            tuner._check_merge_allowed()
            for module in sorts.values():
                deepcopy(module).merge()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"method.type={kind} cannot be merged into a plain model ({type(error).__name__}: {first_line(error)}); "
            "choose another adapter"
        ) from error


def _check_takes_adapter(model: Any) -> None:
    """Check that gradients pass through the weights of a quantised base."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        name = quantisation_of(model.config) or type(quantizer).__name__
        raise UsageError(
            f"the base is quantised ({name}), and transformers cannot train through weights of that kind; give a copy "
            "of the model that is not quantised, or one in bitsandbytes 4-bit"
        )


def _modules_of_head(inputs: Inputs) -> list[str]:
    """Return the names that PEFT uses for the modules of the classification head: "classifier", "pooler"."""
    base = f"{inputs.model.base_model_prefix}."
    return list(dict.fromkeys(name.removeprefix(base).split(".")[0] for name in inputs.head))
