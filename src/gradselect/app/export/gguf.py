"""GGUF file of a model, written by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gradselect.app.models import merge_command
from gradselect.files import writing_aside
from gradselect.usage import UsageError

from .exported import ExportedModel
from .plain_lora import plain_lora

CONVERTER, ADAPTER_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
VARIABLE = "LLAMA_CPP"
TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")


def export_gguf(model: ExportedModel, *, output: Path | None = None, kind: str = "auto") -> Path:
    """Convert the model and return the new file.

    Args:
        model: to convert. An adapter becomes a GGUF adapter for the GGUF file of its base, as strong as in PEFT.
        output: the new file. Default: the run's name with `.gguf`, beside the folder of the run.
        kind: type of the weights: auto (as they are), f32, f16, bf16, q8_0, ...

    Raises:
        UsageError: the converter is not installed or fails, the file exists, or GGUF has no such adapters.
    """
    if kind not in TYPES:
        raise UsageError(f"--type {kind!r} is not one of {', '.join(TYPES)}")
    run = model.run.resolve()
    target = run.with_name(f"{run.name}{'-adapter' if model.is_adapter else ''}.gguf") if output is None else output
    if target.exists():
        raise UsageError(f"{target} exists already; name another file, or remove it first")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.resolve().parent}; make it first")
    if model.is_adapter:
        kind = "f32" if kind == "auto" else kind
    with _source(model, scratch=target.resolve().parent) as source, writing_aside(target) as aside:
        script = find_converter(ADAPTER_CONVERTER if model.is_adapter else CONVERTER)
        command = [sys.executable, str(script), str(source), "--outfile", str(aside), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not aside.is_file():
            raise UsageError(_failure(script, done))
    return target


def find_converter(name: str) -> Path:
    """Return llama.cpp's script of this name, from the folder in LLAMA_CPP or on the PATH.

    Raises:
        UsageError: it is nowhere; says what to install.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        script = Path(folder) / name
        if script.is_file():
            return script
        raise UsageError(f"{VARIABLE}={folder}: there is no {name} in this folder; give a checkout of llama.cpp")
    # Not executable scripts count too: Python runs them.
    places = [Path(place) / name for place in os.get_exec_path()]
    found = shutil.which(name) or next((str(place) for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"GGUF files are written by {name} of llama.cpp, which is neither on the PATH nor in the folder that "
            f"{VARIABLE} names; run: git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf && "
            f"export {VARIABLE}=llama.cpp"
        )
    return Path(found)


def _source(model: ExportedModel, *, scratch: Path) -> AbstractContextManager[Path]:
    """Give the folder that the converter reads."""
    folder = model.folder.resolve()
    return plain_lora(folder, scratch=scratch, instead=_instead(model)) if model.is_adapter else nullcontext(folder)


def _instead(model: ExportedModel) -> str:
    """Say how to get a GGUF file of a model whose adapter cannot be converted."""
    if model.folder != model.run:
        return "leave --adapter off, for the merged model"
    return f"merge it first, and convert that: {merge_command(model.folder, base='UNQUANTISED_BASE')}"


def _failure(script: Path, done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    missing = "; run: pip install gguf" if "No module named 'gguf'" in last else ""
    return f"{script.name} has failed with exit code {done.returncode}: {last}{missing}"
