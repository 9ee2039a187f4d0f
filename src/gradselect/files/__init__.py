"""Files that are whole or not there: atomic writes, checked JSON, locks, manifests."""

from .atomic import aside_of, flush_names, remove, write_atomically, writing_aside
from .checked_json import read_sealed, sealed
from .lock import LOCK_NAME, locked
from .manifest import MANIFEST_NAME, digests_of_model, newest_whole, sha256, write_manifest

__all__ = [
    "LOCK_NAME",
    "MANIFEST_NAME",
    "aside_of",
    "digests_of_model",
    "flush_names",
    "locked",
    "newest_whole",
    "read_sealed",
    "remove",
    "sealed",
    "sha256",
    "write_atomically",
    "write_manifest",
    "writing_aside",
]
