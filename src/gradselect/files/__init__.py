"""Files that are whole or not there: atomic writes, checked JSON, locks, manifests; files of a model."""

from .atomic import aside_of, flush_names, remove, write_atomically, writing_aside
from .checked_json import json_files, plain_or_packed, read_json_text, read_sealed, sealed
from .folder import make_folder
from .git_lfs import check_no_pointer
from .lock import LOCK_NAME, is_owned, locked, owned, taking_turns
from .manifest import MANIFEST_NAME, digests_of_model, newest_whole, sha256, write_manifest
from .model_files import BELONGING, BesideWeights, belongs, beside_weights, is_safe, module_folders
from .model_files import FOLDERS as MODEL_FOLDERS

__all__ = [
    "BELONGING",
    "LOCK_NAME",
    "MANIFEST_NAME",
    "MODEL_FOLDERS",
    "BesideWeights",
    "aside_of",
    "belongs",
    "beside_weights",
    "check_no_pointer",
    "digests_of_model",
    "flush_names",
    "is_owned",
    "is_safe",
    "json_files",
    "locked",
    "make_folder",
    "module_folders",
    "newest_whole",
    "owned",
    "plain_or_packed",
    "read_json_text",
    "read_sealed",
    "remove",
    "sealed",
    "sha256",
    "taking_turns",
    "write_atomically",
    "write_manifest",
    "writing_aside",
]
