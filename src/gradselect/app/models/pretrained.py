"""Checkpoints of transformers, loaded with every fault turned into a `UsageError`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradselect.app.runtime import check_hub, machine_bytes
from gradselect.files import MANIFEST_NAME, check_no_pointer, digests_of_model, sha256
from gradselect.usage import UsageError, first_line, matches_any

from .adapters import base_of_shared_adapter, register_own_adapters, saved_modules
from .size_limits import MOST_WEIGHTS, check_sizes

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_weights(
    kind: Any, path: str | Path, *, key: str, trust_pickle: bool = False, **options: Any
) -> tuple[Any, tuple[str, ...]]:
    """Return a model of an auto class of transformers, and the names of weights that the checkpoint lacks.

    Args:
        kind: e.g. `AutoModelForCausalLM`.
        path: a folder, or an id on the hub.
        key: name of the setting in errors: "model.path".
        trust_pickle: also load weights that are a torch pickle.
        options: arguments of `from_pretrained`.

    Raises:
        UsageError: the model is missing or damaged, or would run code.
    """
    folder, origin = Path(path), _only_origin(options)
    check_hub(str(path), key=key, kind="model")
    if folder.is_dir():
        _check_no_pointers(folder)
        _check_weight_files(folder, key=key, trust_pickle=trust_pickle)
        register_own_adapters(folder)
        _check_manifest(folder, "*")
        if (base := base_of_shared_adapter(folder)) is not None:
            model, missing = load_weights(kind, base, key=key, trust_pickle=trust_pickle, **options)
            with _as_usage_error(f"{key}={str(path)!r} cannot be used"):
                from peft import PeftModel

                own = saved_modules(folder)
                missing = tuple(name for name in missing if not any(f".{each}." in f".{name}" for each in own))
                return PeftModel.from_pretrained(model, folder).get_base_model(), missing
    if not folder.is_dir() or (folder / "config.json").is_file():
        config = load_configuration(path, key=key, most_weights=machine_bytes(), **origin)
        kind = class_for(kind, config, name=f"{key}={str(path)!r}")
    with _as_usage_error(f"{key}={str(path)!r} cannot be used"):
        model, report = kind.from_pretrained(
            path, output_loading_info=True, use_safetensors=None if trust_pickle else True, **(options | origin)
        )
    return model, tuple(sorted(report["missing_keys"]))


def load_configuration(path: str | Path, *, key: str, most_weights: int = MOST_WEIGHTS, **options: Any) -> Any:
    """Return the configuration in a folder, in a file, or of an id on the hub; `options` change its values.

    To load the model too, pass `machine_bytes()` as `most_weights`.

    Raises:
        UsageError: there is none, it is damaged, or its model fits no machine.
    """
    from transformers import AutoConfig

    check_hub(str(path), key=key, kind="model")
    with _as_usage_error(f"{key}={str(path)!r} cannot be used, there is no configuration of a model"):
        config = AutoConfig.from_pretrained(path, **(options | _only_origin(options)))
    check_sizes(config, name=f"{key}={str(path)!r}", most_weights=most_weights)
    return config


def draw_weights(kind: Any, config: Any, *, dtype: str, attention: str | None) -> Any:
    """Return a model of an auto class of transformers with random weights, as at the start of training.

    Raises:
        UsageError: the auto class has no model of this configuration.
    """
    kind = class_for(kind, config, name=f"model.path={config.name_or_path!r}")
    with _as_usage_error("model.path cannot be used"):
        return kind.from_config(config, dtype=dtype, attn_implementation=attention)


def class_for(kind: Any, config: Any, *, name: str) -> Any:
    """Return the auto class that has a model of a configuration: `kind`, or, for a language model, the one with images.

    A model that reads images and text trains on text alone; what the loss never reaches is no candidate.

    Args:
        kind: e.g. `AutoModelForCausalLM`.
        config: configuration of the model.
        name: name of the model in errors: "model.path='base'".

    Raises:
        UsageError: there is none, such as a language model of an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mapping = getattr(kind, "_model_mapping", None)
    has_own_code = kind.__name__ in (getattr(config, "auto_map", None) or {})
    if mapping is None or has_own_code or type(config) in mapping:
        return kind
    both = AutoModelForImageTextToText
    is_decoder = not (config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)
    if kind is AutoModelForCausalLM and is_decoder and type(config) in both._model_mapping:
        return both
    raise UsageError(
        f"{name} cannot be used: it is of the type {config.model_type!r}, for which transformers has no class in "
        f"{kind.__name__}; give a model with a decoder only, or, with data.format=classification, also an encoder"
    )


def load_text_tokenizer(path: str | Path, *, key: str, **options: Any) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    check_hub(str(path), key=key, kind="model")
    _check_no_pointers(Path(path))
    _check_manifest(Path(path), "config.json", "*token*", "vocab*", "merges.txt", "*.jinja")
    with _as_usage_error(f"{key}={str(path)!r} cannot be used, there is no tokenizer"):
        return AutoTokenizer.from_pretrained(path, **(options | _only_origin(options)))


def check_complete(missing: tuple[str, ...], model: Any, path: str | Path, *, key: str, wanted: str) -> None:
    """Check that the checkpoint has all weights.

    Raises:
        UsageError: it lacks some; names the first, and `wanted`, the model to give instead.
    """
    if missing:
        raise UsageError(
            f"{key}={str(path)!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]!r} among them, "
            f"which would be random; give the checkpoint of {wanted}"
        )


def check_tokens(model: Any, tokenizer: Any) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UsageError: it has not.
    """
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: they do not belong together; "
            "give the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer)) before training"
        )


def context_of(config: Any, tokenizer: Any) -> int | None:
    """Return the number of tokens that the model can read at once; None where the architecture sets no limit.

    The tokenizer's limit counts too: models like RoBERTa never use two of their positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit stores a huge number.
    known = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**9]
    return min(known, default=None)


def _only_origin(options: dict[str, Any]) -> dict[str, Any]:
    """Return revision and trust in code. If they were left out, transformers would ask at the terminal."""
    return {"revision": options.get("revision"), "trust_remote_code": options.get("trust_remote_code", False)}


@contextmanager
def _as_usage_error(what: str) -> Iterator[None]:
    """Turn an error of transformers into a `UsageError`: a damaged checkpoint raises any kind of exception."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{what}: {first_line(error)}{_hint(error)}") from error


def _hint(error: Exception) -> str:
    if "custom code" in str(error):
        return " If you have read it and trust it, train with model.trust_remote_code=true; nothing else runs such code"
    if "use_safetensors=True" in str(error):
        return (
            " (that is not yours to set). A torch pickle can run code when it is read: if you trust it, train with "
            "model.trust_pickle=true, or save the model anew in safetensors"
        )
    if "deserializing header" in str(error):
        return "; a file of its weights is damaged or was cut off: copy or download it again"
    return ""


def _check_manifest(folder: Path, *patterns: str) -> None:
    """Check files against the manifest that `gradselect train` wrote; models from elsewhere have none.

    Raises:
        UsageError: a file is missing or damaged; names the first.
    """
    digests = digests_of_model(folder)
    for name in sorted(name for name in digests if matches_any(name, patterns)):
        path = folder / name
        problem = None if path.is_file() else "is missing"
        if problem is None and sha256(path) != digests[name]:
            problem = "is not as it was written: its SHA-256 is another"
        if problem is not None:
            raise UsageError(
                f"{path} {problem}. Put a copy back; if you changed it yourself, delete {folder / MANIFEST_NAME}"
            )


def _check_no_pointers(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        check_no_pointer(path)


def _check_weight_files(folder: Path, *, key: str, trust_pickle: bool) -> None:
    """Check that the weights lie in the folder and that reading them runs no code.

    Raises:
        UsageError: they do not, or it does.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        _check_index(index)
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not has_weights and not trust_pickle:
        raise UsageError(
            f"{key}={str(folder)!r} has its weights as a torch pickle only ({pickles[0]}), which can run code when "
            "it is read. If you trust it, convert it: AutoModelForCausalLM.from_pretrained("
            f"{str(folder)!r}, dtype='auto').save_pretrained(new_folder), and copy the files of its tokenizer there"
            + ("; or write model.trust_pickle=true" if key == "model.path" else "")
        )


def _check_index(index: Path) -> None:
    try:
        names = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is no index of shards ({error!r}); save the model again") from None
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{index} names {name!r}, which is no safetensors file beside it")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index} names {name}, and there is no such file; copy or save the model again")
