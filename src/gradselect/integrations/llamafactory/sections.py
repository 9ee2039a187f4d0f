"""The YAML file: the section `gradselect`, and the rest for LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf  # pyright: ignore[reportMissingImports]
from omegaconf.errors import OmegaConfBaseException  # pyright: ignore[reportMissingImports]

from gradselect.integrations.section import parse_section
from gradselect.methods import AbstractSelectionMethod
from gradselect.usage import UsageError

SECTION = "gradselect"
EXAMPLE = f"{SECTION}: {{name: adagradselect, fraction: 0.2}}"


@dataclass(frozen=True, kw_only=True)
class Sections:
    """Content of the file.

    Args:
        arguments: for LLaMA-Factory.
        method: for us.
        jsonl: file for the records.
    """

    arguments: dict[str, Any]
    method: AbstractSelectionMethod
    jsonl: str | None


def read_sections(path: Path, words: Sequence[str]) -> Sections:
    """Read a YAML file, as LLaMA-Factory does.

    Args:
        path: the file.
        words: `key=value`, or `gradselect.key=value`, in front of what the file says.

    Raises:
        UsageError: there is no such file; it is no YAML; it has no section `gradselect`, or a wrong one.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(list(words))))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path} with {list(words)} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or SECTION not in values:
        raise UsageError(
            f"{path} has no section '{SECTION}', so nothing says what to select; add {EXAMPLE}, or train all of the "
            "model with llamafactory-cli"
        )
    method, jsonl = parse_section(values.pop(SECTION), key=SECTION)
    if jsonl is not None:
        _make_folder(jsonl)
    return Sections(arguments=values, method=method, jsonl=jsonl)


def _make_folder(jsonl: str) -> None:
    """Make the folder of the records, which may be the output folder that LLaMA-Factory makes later."""
    try:
        Path(jsonl).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{SECTION}.jsonl={jsonl!r} cannot be written: {error.strerror or error}") from None
