"""Files of a model's folder beside its weights: which belong to the model, and which hold weights of their own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gradselect.usage import matches_any

from .manifest import MANIFEST_NAME

BELONGING = (
    *("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.codes", "*.dict"),
    *("tokenizer*", "vocab*", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*"),
)
"""Configurations, processors, tokenizers, templates, code, and licences, which ask to be passed on with every copy."""
NOT_BELONGING = (
    # Describe the weights as they lie in the files of one folder, or weights in another format.
    *("*.index.json", "adapter_*", "params.json", "quantize_config.json", "quant_strategy.json"),
    # Of a training, by us and by others.
    *(MANIFEST_NAME, "run.json", "trainer_state.json", "*_results.json", "training_args.*", "log_window_*.json"),
    "requirements*.txt",
)
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data*", "*.h5"),
    *("*.msgpack", "*.tflite", "*.ot", "*.npz", "*.pkl", "*.mlmodel", "*.llamafile", "*.pte"),
)
STATES = ("training_args.bin", "optimizer*", "scheduler*", "scaler.pt", "rng_state*")
"""States of a training, which look like weights by their names."""
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
FOLDERS = ("additional_chat_templates", "custom_generate")
"""Folders that transformers reads."""
MODULES = "modules.json"
"""List of the modules of a sentence-transformers model. Each but the first has a folder."""


@dataclass(frozen=True, kw_only=True)
class BesideWeights:
    """Files of a model's folder beside its weights, by their names relative to it.

    Args:
        folder: the folder.
        belonging: files that belong to the model.
        other_weights: files, and folders ("onnx/"), with the model's weights in other formats. Training does not change
            them.
        others: everything else at the top, such as README.md.
    """

    folder: Path
    belonging: tuple[str, ...]
    other_weights: tuple[str, ...]
    others: tuple[str, ...]

    def copy_to(self, target: Path, *, leave: Collection[str] = ()) -> list[str]:
        """Copy the files that belong to the model and are not in `target` yet. Return the names of those copied."""
        copied = []
        for name in self.belonging:
            source, place = self.folder / name, target / name
            if name not in leave and not place.exists() and source.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)
                copied.append(name)
        return copied


def beside_weights(folder: Path) -> BesideWeights:
    """Return the files beside the weights of the model in `folder`."""
    top = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    kept = [*FOLDERS, *module_folders(folder)]
    belonging = [entry.name for entry in top if entry.is_file() and belongs(entry.name)]
    belonging += [name for part in kept for name in _files_below(folder, part)]
    belonging = [name for name in belonging if is_safe(name)]
    weights = [_slashed(entry) for entry in top if entry.name not in kept and _holds_other_weights(entry)]
    shown = [entry for entry in top if entry.name not in kept]
    rest = [entry for entry in shown if matches_any(entry.name, STATES) or not matches_any(entry.name, WEIGHTS)]
    return BesideWeights(
        folder=folder,
        belonging=tuple(belonging),
        other_weights=tuple(weights),
        others=tuple(name for entry in rest if (name := _slashed(entry)) not in (*belonging, *weights)),
    )


def belongs(name: str) -> bool:
    """Return True if a file of this name at the top of a folder belongs to the model."""
    return matches_any(name, BELONGING) and not matches_any(name, (*NOT_BELONGING, *WEIGHTS))


def is_safe(name: str) -> bool:
    """Return True for a relative path of plain names: none leads upwards, is hidden or holds a control character."""
    return all(re.fullmatch(r"\w[\w .,+()@=-]*", part) for part in name.split("/"))


def module_folders(folder: Path) -> list[str]:
    """Return the folders of the modules of a sentence-transformers model, such as "1_Pooling"."""
    try:
        names = [str(module["path"]) for module in json.loads((folder / MODULES).read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    # A name from a file must not lead outside.
    return [name for name in names if is_safe(name) and "/" not in name and (folder / name).is_dir()]


def _files_below(folder: Path, name: str) -> Iterator[str]:
    for path in sorted((folder / name).rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _holds_other_weights(entry: Path) -> bool:
    if entry.is_dir():
        # The folder of a run keeps its own models below it.
        return any(path.is_file() and matches_any(path.name, WEIGHTS) for path in entry.iterdir())
    # A torch pickle may be all that there is. Beside safetensors it is another copy.
    own = (*OWN_WEIGHTS, *STATES, *(() if any(entry.parent.glob("*.safetensors")) else ("pytorch_model*.bin",)))
    return matches_any(entry.name, WEIGHTS) and not matches_any(entry.name, own)


def _slashed(entry: Path) -> str:
    return f"{entry.name}/" if entry.is_dir() else entry.name
