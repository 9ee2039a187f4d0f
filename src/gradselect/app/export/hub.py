"""Upload to the Hugging Face hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradselect.app.runtime import hub_fault
from gradselect.usage import UsageError, first_line

from .exported import ExportedModel

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Content of a repository on the hub.

    Args:
        name: id of the repository: "you/model".
        files: files to upload, by their name there.
        card: text of its README.md.
        num_bytes: of all files without the card.
    """

    name: str
    files: Mapping[str, Path]
    card: str
    num_bytes: int


def plan_upload(model: ExportedModel, *, name: str, card: str) -> Upload:
    """Return what an upload would write.

    Raises:
        UsageError: the name is no id of a repository.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--hub {name!r} is no id on the hub ({first_line(error)}); write e.g. you/model") from None
    # The base's own card, if it was copied, is not that of this model.
    files = {file: path for file, path in model.files.items() if file != CARD}
    return Upload(name=name, files=files, card=card, num_bytes=model.num_bytes)


def export_hub(upload: Upload, *, private: bool = False) -> str:
    """Upload everything in one commit and return its address. Files of the same name there are replaced.

    Raises:
        UsageError: the hub cannot be reached, or refuses; nothing has changed there then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if (fault := hub_fault()) is not None:
        raise UsageError(f"{upload.name} cannot be uploaded: {fault}. See what would be uploaded with: --dry-run")
    added = [CommitOperationAdd(name, path) for name, path in upload.files.items()]
    added.append(CommitOperationAdd(CARD, upload.card.encode()))
    api = HfApi()
    try:
        repository = api.create_repo(upload.name, private=private or None, exist_ok=True)
        commit = api.create_commit(repository.repo_id, added, commit_message="Model trained with gradselect")
    # Of the network, of the server, of the token: the library has many kinds.
    except Exception as error:
        raise UsageError(
            f"the hub did not take {upload.name}: {first_line(error)}. A token with the right to write is needed: hf "
            "auth login"
        ) from error
    return str(commit.commit_url)
