"""A LoRA in the form that llama.cpp's engine computes: it scales B A by alpha / rank, with one alpha for all layers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradselect.usage import UsageError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
B_ENDS = (".lora_B.weight", ".lora_embedding_B")
# The engine leaves out vectors of norms without a word, and the converter leaves out copies of the base's weights.
KNOWN_ENDS = (*B_ENDS, ".lora_A.weight", ".lora_embedding_A", ".base_layer.weight")
KEEPS_BASE = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that leave the weights of the base as they are. PiSSA and others change them."""


@contextmanager
def plain_lora(folder: Path, *, scratch: Path, instead: str) -> Iterator[Path]:
    """Give a folder with a LoRA that is as strong in the engine as in PEFT.

    rsLoRA divides by the root of the rank, and `alpha_pattern` gives layers an alpha of their own. The converter copies
    `lora_alpha` only. So their scale moves into B, and alpha becomes 1.

    Args:
        folder: folder of the adapter. It is given itself where nothing has to change.
        scratch: folder to write a changed copy to, for the time of the block.
        instead: what a user can do with an adapter that is refused.

    Raises:
        UsageError: the adapter is no LoRA or does more than LoRA does, or was trained on changed weights of the base.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / CONFIG).read_text("utf-8"))
    if (kind := config["peft_type"]) != "LORA":
        raise UsageError(f"{folder} holds an adapter of the kind {kind}, and GGUF has adapters of LoRA only; {instead}")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in KEEPS_BASE:
        raise UsageError(
            f"{folder} holds an adapter with init_lora_weights={init!r}, which changed the weights of the base, so it "
            f"does not fit the GGUF file of the base; {instead}"
        )
    tensors = load_file(folder / WEIGHTS)
    if others := [name for name in tensors if not name.endswith(KNOWN_ENDS)]:
        raise UsageError(
            f"{folder} holds {len(others)} tensors beside those of LoRA, such as {others[0]}, and adapters of GGUF "
            f"have no place for them; {instead}"
        )
    ranks = {name: tensor.shape[1] for name, tensor in tensors.items() if name.endswith(B_ENDS)}
    strengths = {
        name: _alpha(config, name) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
        for name, rank in ranks.items()
    }
    if all(strength == config["lora_alpha"] for strength in strengths.values()):
        yield folder
        return
    with TemporaryDirectory(dir=scratch) as aside:
        copy = Path(aside) / folder.name  # the converter writes the folder's name into the file
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(WEIGHTS))
        plain = config | {"lora_alpha": 1, "alpha_pattern": {}, "use_rslora": False}
        (copy / CONFIG).write_text(json.dumps(plain, indent=2), "utf-8")
        save_file({name: tensor * strengths.get(name, 1) for name, tensor in tensors.items()}, copy / WEIGHTS)
        yield copy


def _alpha(config: dict[str, Any], name: str) -> float:
    """Return alpha of the layer of a tensor, by PEFT's own rule for patterns."""
    from peft.utils.other import get_pattern_key

    layer = name.removeprefix("base_model.model.")
    for end in B_ENDS:
        layer = layer.removesuffix(end)
    patterns = config.get("alpha_pattern") or {}
    return patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"])
