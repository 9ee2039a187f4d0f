"""Folder of a checkpoint on this machine, also of one on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from gradselect.files import BELONGING, MODEL_FOLDERS, BesideWeights, beside_weights, module_folders
from gradselect.usage import first_line

logger = logging.getLogger(__name__)


def files_beside_weights(path: str, *, revision: str | None = None) -> BesideWeights | None:
    """Return the files beside the weights of a folder, or of an id on the hub; None for a mere configuration.

    Of an id on the hub, small files are downloaded. Without a network, those count that are on this machine already.
    """
    if Path(path).exists():
        return beside_weights(Path(path)) if Path(path).is_dir() else None
    snapshot = _snapshot(path, revision=revision)
    return None if snapshot is None else beside_weights(snapshot)


def _snapshot(path: str, *, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = [*BELONGING, *(f"{name}/*" for name in MODEL_FOLDERS)]
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        if modules := module_folders(folder):
            snapshot_download(path, revision=revision, allow_patterns=[f"{name}/*" for name in modules])
    except Exception as error:  # any kind: no network, no permission, a server that fails
        logger.warning(
            "%s: the files beside the weights cannot be read (%s); the trained folder will have the tokenizer and the "
            "configurations only",
            path,
            first_line(error),
        )
        return None
    return folder
