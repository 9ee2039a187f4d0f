"""Model and tokenizer that a run starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from gradselect import UsageError
from gradselect.app.data import shown_columns
from gradselect.app.models import (
    able_to_pad,
    check_complete,
    context_of,
    draw_weights,
    load_configuration,
    load_text_tokenizer,
    load_weights,
    merge_command,
    num_trainable,
    quantisation_of,
)
from gradselect.app.recipe import (
    AbstractAdapterMethod,
    AbstractFreeMaskMethod,
    ChatData,
    ClassificationData,
    Data,
    FileData,
    ModelSettings,
    Recipe,
)
from gradselect.app.runtime import machine_bytes


def load_model(settings: ModelSettings, *, seed: int = 0, device: str = "cpu") -> PreTrainedModel:
    """Load the causal language model at `settings.path`, with all of its weights.

    Args:
        settings: section `model` of the recipe.
        seed: seed of random weights.
        device: device that draws random weights.

    Raises:
        UsageError: the model is missing or damaged, lacks weights, or could not be saved again.
    """
    model, missing = _load(AutoModelForCausalLM, settings, seed=seed, device=device)
    check_complete(missing, model, settings.path, key="model.path", wanted="a causal language model")
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = str(error).partition("If you're using")[0].replace("GenerationConfig is invalid:", "")
        raise UsageError(
            f"model.path={settings.path!r} cannot be used, its generation_config.json contradicts itself and could not "
            f"be saved again after training: {' '.join(reason.split())}. Put right the file in that folder: add "
            '"do_sample": true, or remove the flags of sampling'
        ) from error
    return model


def check_base_can_train(recipe: Recipe) -> None:
    """Check that the method trains something of a quantised base, before its weights are loaded.

    Raises:
        UsageError: the base is quantised, and the method trains its own weights.
    """
    settings, method = recipe.model, recipe.method
    adapter = method.adapter if isinstance(method, AbstractFreeMaskMethod) else method
    if settings.random_weights or isinstance(adapter, AbstractAdapterMethod):
        return
    origin = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = load_configuration(settings.path, key="model.path", **origin)
    except UsageError:
        return  # no configuration, or a damaged one: loading says more
    quantised = quantisation_of(config)
    if quantised is None:
        return
    is_classifier = isinstance(recipe.data, ClassificationData)
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    found = num_trainable(config, kind, trust_remote_code=settings.trust_remote_code)
    count = "few of its weights" if found is None else f"about {found[0]:,} of its {found[1]:,} weights"
    raise UsageError(
        f"model.path={settings.path!r} is quantised ({quantised}): {count} can train, its embeddings, head and norms; "
        f"no gradient moves the others, and method.name={method.name} trains the model's own weights. Write "
        "method.name=lora, which trains an adapter beside them; or give a copy of the model that is not quantised"
    )


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model with a classification head.

    Args:
        model: the model.
        head: names of the head's parameters.
        labels: names of its outputs, in their order. None: one output, a score.
        notes: what the user must know of a trained head of the checkpoint.
    """

    model: PreTrainedModel
    head: tuple[str, ...]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def load_classifier(
    settings: ModelSettings,
    *,
    labels: tuple[str, ...] | None,
    keeps_order: bool,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Classifier:
    """Load the model at `settings.path` with a classification head.

    The head is everything outside the base model, and BERT's pooler if the checkpoint lacks it or the settings say so:
    only classifiers use the pooler. `seed` draws what the checkpoint lacks. A head in the checkpoint is kept.

    Args:
        settings: section `model` of the recipe.
        labels: names of the outputs. None: one output, a score.
        keeps_order: False if the order of a trained head with the same labels comes before that of `labels`.
        tokenizer: gives the padding token, which decoders need to find the last token of a text.
        seed: seed of the new head.

    Raises:
        UsageError: the model is missing or damaged, lacks weights of the base model, has a head of another size, or no
            pooler that the settings name.
    """
    problem = "regression" if labels is None else "single_label_classification"
    set_seed(seed)
    model, missing = _load(
        AutoModelForSequenceClassification,
        settings,
        seed=seed,
        num_labels=1 if labels is None else len(labels),
        problem_type=problem,
    )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    base = f"{model.base_model_prefix}."
    lacking = tuple(name for name in missing if name.startswith(base) and "pooler" not in name)
    check_complete(lacking, model, settings.path, key="model.path", wanted="the model itself")
    config: Any = model.config
    notes: tuple[str, ...] = ()
    if labels is not None:
        if not settings.random_weights and all(name.startswith(base) for name in missing):
            own = tuple(str(config.id2label[number]) for number in range(len(labels)))
            labels, notes = labels_of_head(own, labels, keeps_order=keeps_order)
        config.id2label, config.label2id = dict(enumerate(labels)), _numbered(labels)
    return Classifier(model=model, head=head_names(model, settings, missing=missing), labels=labels, notes=notes)


def labels_of_head(
    own: tuple[str, ...], labels: tuple[str, ...], *, keeps_order: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels of the data in the order of a trained head's outputs, and what the user must know of it.

    Args:
        own: names that the checkpoint has for the outputs.
        labels: labels of the data.
        keeps_order: True if the user gave their order.

    Example:
        >>> labels_of_head(("No", "Maybe", "Yes"), ("maybe", "no", "yes"), keeps_order=False)[0]
        ('no', 'maybe', 'yes')
    """
    by_name = {label.casefold(): label for label in labels}
    in_order = tuple(by_name.get(name.casefold(), "") for name in own)
    theirs, ours = shown_columns(own), shown_columns(labels)
    if in_order == labels:
        return labels, ()
    if {*in_order} != {*labels}:
        note = f"the outputs of the checkpoint's trained head, {theirs}, are taken for the labels {ours}, in this order"
        return labels, (f"{note}; if they mean others, write data.labels in their order",)
    if keeps_order:
        note = f"data.labels, {ours}, renames the outputs of the checkpoint's trained head, {theirs}"
        return labels, (f"{note}: they change their meaning; write the labels in the order of the head to keep it",)
    return in_order, (f"the labels have the order of the checkpoint's trained head: {shown_columns(in_order)}",)


def head_names(model: Any, settings: ModelSettings, *, missing: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the parameters of a classification head.

    Args:
        model: the classifier.
        settings: section `model` of the recipe.
        missing: names of parameters that the checkpoint lacks.

    Raises:
        UsageError: the model has no pooler, and the settings name one.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))
        >>> head_names(model, ModelSettings(path="bert"))
        ('classifier.weight', 'classifier.bias')
    """
    base, names = f"{model.base_model_prefix}.", [name for name, _ in model.named_parameters()]
    pooler = {name for name in names if settings.pooler_in_head and "pooler" in name.split(".")}
    if settings.pooler_in_head and not pooler:
        raise UsageError(
            f"model.pooler_in_head=true, and {type(model).__name__} has no pooler; leave it out: everything outside of "
            f"{model.base_model_prefix!r} is its head and trains whole"
        )
    return tuple(name for name in names if not name.startswith(base) or name in missing or name in pooler)


def load_config(settings: ModelSettings) -> Any:
    """Return the configuration of the model at `settings.path`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    _check_configuration(settings.path)
    return load_configuration(
        settings.path, key="model.path", revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


def load_tokenizer(settings: ModelSettings, data: FileData) -> PreTrainedTokenizerBase:
    """Load the tokenizer at `settings.path` and check that it can end or pad a text, or render a chat, as `data` needs.

    Raises:
        UsageError: it cannot.
    """
    _check_folder(settings.path)
    tokenizer = load_text_tokenizer(
        settings.path, key="model.path", revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    if isinstance(data, ClassificationData):
        return able_to_pad(tokenizer, settings.path)
    if tokenizer.eos_token is None:
        raise UsageError(
            f"the tokenizer of {settings.path!r} has no end-of-text token, so a completion would never end; "
            'add "eos_token" to its tokenizer_config.json'
        )
    is_chat = isinstance(data, ChatData) or getattr(data, "as_chat", False)
    if is_chat and tokenizer.chat_template is None:
        advice = (
            "conversations need one: take a chat model, such as the -Instruct version of a base model"
            if isinstance(data, ChatData)
            else "leave data.as_chat out, or take a chat model"
        )
        raise UsageError(f"the tokenizer of {settings.path!r} has no chat template; {advice}")
    return tokenizer


def resolve_max_length(data: Data, *, config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of a row: `data.max_length`, or the context of the model with this `config` but at most 1024.

    Raises:
        UsageError: the model has too few positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(data, ClassificationData):
        positions = context_of(config, tokenizer)
    if data.max_length is not None and positions is not None and data.max_length > positions:
        raise UsageError(
            f"data.max_length={data.max_length} is more than the model's {positions} positions; write at most that"
        )
    return data.max_length or min(1024, positions or 1024)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and up to 256 evenly spaced values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.flatten()
        places = torch.linspace(0, values.numel() - 1, min(256, values.numel()), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[places.to(values.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model has embeddings for."""
    return next(iter(model.get_input_embeddings().parameters())).shape[0]


def _load(
    kind: Any, settings: ModelSettings, *, seed: int, device: str = "cpu", **options: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    attention = None if settings.attention == "auto" else settings.attention
    origin = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if settings.random_weights:
        _check_configuration(settings.path)
        config = load_configuration(settings.path, key="model.path", most_weights=machine_bytes(), **origin, **options)
        # Drawn weights are plain numbers, and the saved configuration must not say otherwise.
        config.__dict__.pop("quantization_config", None)
        set_seed(seed)
        with torch.device(device):
            model = draw_weights(kind, config, dtype=settings.dtype, attention=attention)
        return model, ()
    _check_folder(settings.path)
    model, missing = load_weights(
        kind,
        settings.path,
        key="model.path",
        trust_pickle=settings.trust_pickle,
        dtype=settings.dtype,
        attn_implementation=attention,
        **origin,
        **options,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(_adapter_as_base(settings.path))
    return model, missing


def _adapter_as_base(path: str) -> str:
    return (
        f"model.path={path!r} is an adapter: training would change its base too, and save the adapter only. Merge it "
        f"first, and give the merged model: {merge_command(path)}"
    )


def _numbered(labels: Sequence[str]) -> dict[str, int]:
    return {label: number for number, label in enumerate(labels)}


def _check_configuration(path: str) -> None:
    """Check that a path on the disk has a configuration. Anything else may be an id on the hub."""
    place = Path(path)
    if place.is_dir() and not (place / "config.json").is_file():
        raise UsageError(f"model.path={path!r} has no config.json; give a folder with one, or the file itself")
    if not place.exists() and (path.startswith((".", "/", "~")) or path.endswith(".json")):
        raise UsageError(
            f"model.path={path!r}: no such file or folder; paths are relative to the folder the command runs in"
        )


def _check_folder(path: str) -> None:
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UsageError(f"model.path={path!r}: no such folder; paths are relative to the folder the command runs in")
    if (Path(path) / "adapter_config.json").is_file():
        raise UsageError(_adapter_as_base(path))
