"""Weights of a checkpoint, copied into a model that is in use."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, __version__

# transformers offers its conversion only inside `from_pretrained`, which builds a second model and cannot know modules
# that were exchanged after loading. These are the functions that it is made of.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from gradselect.app.models import is_quantised
from gradselect.slices import SlicedLinear, sliced_linears
from gradselect.usage import UsageError

NUM_NAMED = 3
"""Tensors that an error names of each kind."""
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
DERIVED = re.compile(r"(inv_freq|position_ids|token_type_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Tensors of old checkpoints that a model computes by itself."""
_NOT_SHARDED: Any = (
    {"tp_plan": None} if "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters else {}
)
"""transformers 5.6 asks for a plan of tensor parallelism, later versions read it from the model."""


@torch.no_grad()
def restore_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy every weight of the checkpoint in `folder` into `model`, in place.

    transformers saves many architectures under other names and in other shapes than the model has: each expert by
    itself, another prefix. Those are turned back. Parameters stay the same objects with their dtype, device and ties.

    Raises:
        UsageError: a weight is missing, is unknown, has another shape, or did not arrive as it was saved.
    """
    conversions: list[Any] = get_model_conversion_mapping(model)
    with _opened(folder) as saved:
        receiver = _Receiver(model)
        found, _ = convert_and_load_state_dict_in_model(
            model=cast(Any, receiver),
            state_dict=saved,
            load_config=LoadStateDictConfig(weight_mapping=conversions),
            **_NOT_SHARDED,
        )
        misshapen = {name for name, *_ in found.mismatched_keys}
        faults: dict[str, Collection[str]] = {
            "are missing": _missing(model, receiver.arrived) - misshapen,
            "have no place in the model": found.unexpected_keys,
            "have another shape": misshapen,
            "cannot be converted": set(found.conversion_errors),
        }
        if conversions and not any(faults.values()):
            faults["did not arrive as they were saved"] = _changed(saved_state(model), saved)
    if any(faults.values()):
        raise UsageError(_refusal(type(model).__name__, folder, faults))


@torch.no_grad()
def check_adapter(model: PeftModel, folder: Path) -> None:
    """Check that the adapter of `model` is the one in `folder`, tensor by tensor; copy in place what PEFT left out.

    Raises:
        UsageError: a tensor is missing, has no place in the adapter, or has another shape.
    """
    with _opened(folder) as saved:
        state = _adapter_state(model)
        for name in _changed(state, saved):
            # PEFT converts names of adapters as if they came from an older transformers.
            if state[name].shape == tuple(saved[name].get_shape()):
                state[name].copy_(saved[name][...])
        state = _adapter_state(model)
        faults = {
            "are missing": state.keys() - saved.keys(),
            "have no place in the model": saved.keys() - state.keys(),
            "did not arrive as they were saved": _changed(state, saved),
        }
    if any(faults.values()):
        raise UsageError(_refusal("adapter", folder, faults))


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that `model.save_pretrained` writes, by the names that it gives them."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def unplaced_notes(model: PreTrainedModel, folder: Path | None) -> list[str]:
    """Say which weights in a base's folder the model has no place for. transformers drops some kinds in silence."""
    if folder is None or is_quantised(model):
        return []
    with _opened(folder, required=False) as saved:
        names = [name for name in _unplaced(model, saved) if not DERIVED.search(name)]
    if not names:
        return []
    return [
        f"{len(names):,} of the base's {len(saved):,} weights have no place in a {type(model).__name__} "
        f"({_some(names)}): they are neither trained nor in the trained folder"
    ]


def _unplaced(model: PreTrainedModel, names: Iterable[str]) -> Iterator[str]:
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name not in state:
            yield name


class _Receiver:
    """A model as transformers' loader sees it: a tensor that is assigned to a module is copied into the live one.

    Attributes:
        arrived: ids of the live tensors that have been written.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Not plain assignments: those are the loader's, and dropped.
        self.__dict__.update(model=model, arrived=set())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Drop the loader's notes: the model keeps those of the base checkpoint, which decide how it is saved."""

    def get_submodule(self, path: str) -> _ReceivingModule:
        return _ReceivingModule(self.model.get_submodule(path), self.arrived)


class _ReceivingModule:
    """A module whose tensors are overwritten in place by assignment."""

    def __init__(self, module: nn.Module, arrived: set[int]) -> None:
        self.__dict__.update(module=module, arrived=arrived)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def __setattr__(self, name: str, value: Tensor) -> None:
        target = {**self.module._parameters, **self.module._buffers, **_whole_weight(self.module)}.get(name)
        # Others are computed from these, as the plain weight of a rotated layer.
        if target is not None:
            target.copy_(value)
            self.arrived.add(id(target))


def _whole_weight(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensor that the slices of a linear layer are parts of, by its name in a checkpoint."""
    return {"weight": module.whole_weight} if isinstance(module, SlicedLinear) else {}


@contextmanager
def _opened(folder: Path, *, required: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the tensors of a folder by name, not read yet."""
    names = [name for name in (ADAPTER, SINGLE_FILE) if (folder / name).is_file()][:1]
    if not names and (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
    if not names and required:
        raise UsageError(f"the checkpoint {folder} has no weights in safetensors; put back a copy of it")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in names]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118  # no mapping


def _missing(model: PreTrainedModel, arrived: Collection[int]) -> set[str]:
    """Return names of tensors that were not written, under this name or under another one that they are tied to."""
    stored = model.state_dict().keys() - set(model._keys_to_ignore_on_save or ())
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors += [(f"{path}.weight", module.whole_weight) for path, module in sliced_linears(model).items()]
    return {name for name, tensor in tensors if name in stored and id(tensor) not in arrived}


def _changed(state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> list[str]:
    """Return names of tensors that are not equal on both sides; NaN equals itself."""
    return [name for name in sorted(state.keys() & saved.keys()) if not _is_equal(state[name], saved[name])]


def _is_equal(tensor: Tensor, saved: Any) -> bool:
    if tensor.shape != tuple(saved.get_shape()):
        return False
    value = saved[...].to(tensor.device, tensor.dtype)
    return torch.equal(tensor, value) or bool(((tensor == value) | (tensor.isnan() & value.isnan())).all())


def _adapter_state(model: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])


def _refusal(what: str, folder: Path, faults: Mapping[str, Collection[str]]) -> str:
    found = [f"{len(names):,} {words} ({_some(names)})" for words, names in faults.items() if names]
    return (
        f"the checkpoint {folder} does not hold the weights of this {what}: of its tensors {'; '.join(found)}. Nothing "
        f"has been trained. {_advice(folder)}"
    )


def _advice(folder: Path) -> str:
    config = folder / "config.json"
    wrote = json.loads(config.read_text("utf-8")).get("transformers_version") if config.is_file() else None
    if wrote not in (None, __version__):
        return (
            f"It was written by transformers {wrote}, this is {__version__}; resume with that: "
            f"pip install transformers=={wrote}"
        )
    return f"To resume from the checkpoint before it, move {folder} away and repeat this command"


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:NUM_NAMED]) + (", ..." if len(listed) > NUM_NAMED else "")
