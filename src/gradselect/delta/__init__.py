"""Delta files: the difference between a tuned checkpoint and its base, as one safetensors file.

    gs.delta.diff(base, tuned, "d.safetensors")      # per tensor: nothing, all of it, or single entries
    gs.delta.apply(base, "d.safetensors", "out")     # bitwise the tuned model
    gs.delta.revert(tuned, "d.safetensors", "out")   # bitwise the base
    gs.delta.merge(base, ["a.safetensors", "b.safetensors"], "ab.safetensors")

A change is the XOR of the bit patterns of base and tuned model, stored where it is not zero. XOR undoes itself, so that
applying and reverting are one operation, exact for every dtype, NaN payloads and -0.0 included. The file names the base
it belongs to by the SHA-256 of each tensor. `docs/delta.md` describes the format.

A patch is what the steps of a run have moved since the last one, for a copy that follows the training:

    gs.delta.apply_patch(copy, optimizer.changed_entries())
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, get_args

from gradselect.files import writing_aside
from gradselect.usage import UsageError, check_one_of

from .checkpoint import CheckpointFolder
from .difference import write_delta
from .file import DeltaFile, OtherSide, Side
from .merging import MergedCheckpoint, Overlap, Whole
from .patches import apply_patch, read_patch, write_patch
from .related import check_related
from .renaming import Renamed, names_in_tuned
from .write import free_file, free_folder, write_checkpoint

__all__ = [
    "DeltaSummary",
    "apply",
    "apply_patch",
    "diff",
    "fingerprint",
    "merge",
    "read_patch",
    "revert",
    "summary",
    "write_patch",
]

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class DeltaSummary:
    """Counts and sizes of a delta.

    num_tensors, num_entries: of the tuned model.
    num_dense, num_sparse: tensors of which most entries, or some, changed.
    num_whole: tensors that are new, gone, or of another shape or dtype.
    num_new, num_new_entries: tensors that the base lacks, such as a head, and their entries.
    num_renamed: tensors that the base has under another name.
    num_changed_entries: entries that differ; all entries of new tensors and those of another shape or dtype.
    num_changed_files: small files, such as config.json, that are new, gone or different.
    delta_bytes, tuned_bytes: size of the file, and of the tuned model's tensors.
    fingerprints: of the base and of the tuned model.

    Example:
        >>> found = diff("base", "tuned", "printed.safetensors")
        >>> found.num_tensors, found.num_changed_entries
        (1, 1)
    """

    num_tensors: int
    num_entries: int
    num_dense: int
    num_sparse: int
    num_whole: int
    num_new: int
    num_new_entries: int
    num_renamed: int
    num_changed_entries: int
    num_changed_files: int
    delta_bytes: int
    tuned_bytes: int
    fingerprints: dict[Side, str]

    def __str__(self) -> str:
        changed = self.num_dense + self.num_sparse + self.num_whole
        lines = [
            f"{changed:,} of {self.num_tensors:,} tensors changed "
            f"({self.num_dense:,} dense, {self.num_sparse:,} by index and value, {self.num_whole:,} whole), "
            f"{self.num_changed_files:,} small files",
            f"{self.num_changed_entries:,} of {self.num_entries:,} entries changed "
            f"({_percent(self.num_changed_entries, self.num_entries)})",
            f"{self.delta_bytes:,} bytes, {_percent(self.delta_bytes, self.tuned_bytes)} "
            f"of the tuned checkpoint's {self.tuned_bytes:,}",
        ]
        if self.num_renamed:
            lines.append(f"{self.num_renamed:,} tensors have another name in the base, as in a model without a head")
        if self.num_new:
            lines.append(f"{self.num_new:,} tensors of {self.num_new_entries:,} entries are new, and in the file whole")
        if self.num_whole > self.num_new:
            lines.append(
                f"{self.num_whole:,} tensors are new, gone, or of another shape or dtype: both models' are in the file"
            )
        return "\n".join(lines)


def diff(base_dir: PathLike, tuned_dir: PathLike, path: PathLike, *, unrelated: bool = False) -> DeltaSummary:
    """Write the changes from `base_dir` to `tuned_dir` into the file `path`.

    Args:
        base_dir: a Hugging Face checkpoint folder, one file or sharded, in safetensors.
        tuned_dir: another; it may be sharded differently, and have other tensors and small files. The base may lack
            its head, and have other names for its tensors: "encoder.layer.0..." for "bert.encoder.layer.0...".
        path: the delta; a new file.
        unrelated: also write a delta between two models of which one was not trained from the other. It holds both.

    Raises:
        UsageError: a folder holds no such weights, the tensors of `tuned_dir` are not those of `base_dir`, `path` is
            taken, or the disk is full.

    Example:
        >>> diff("base", "tuned", "d.safetensors").num_changed_entries
        1
    """
    target = free_file(Path(path))
    base, tuned = CheckpointFolder(Path(base_dir)), CheckpointFolder(Path(tuned_dir))
    renamed = names_in_tuned(base.contents.tensors.keys(), tuned.contents.tensors.keys())
    if not unrelated:
        check_related(Renamed(base, renamed), tuned)
    with writing_aside(target) as aside:
        write_delta(aside, base, tuned, renamed=renamed)
    return summary(target)


def apply(base_dir: PathLike, path: PathLike, out_dir: PathLike) -> DeltaSummary:
    """Write the tuned model, exact to the bit, into the new folder `out_dir`, from base and delta.

    Raises:
        UsageError: the delta was made with another base (the message names the first tensor that differs) or is
            damaged, `out_dir` is taken, or the disk is full.

    Example:
        >>> _ = diff("base", "tuned", "forth.safetensors")
        >>> _ = apply("base", "forth.safetensors", "tuned-again")
        >>> fingerprint("tuned-again") == fingerprint("tuned")
        True
    """
    return _cross(base_dir, path, out_dir, source="base", target="tuned")


def revert(tuned_dir: PathLike, path: PathLike, out_dir: PathLike) -> DeltaSummary:
    """Write the base, exact to the bit, into the new folder `out_dir`: `apply` backwards.

    Raises:
        UsageError: as `apply` does.

    Example:
        >>> _ = diff("base", "tuned", "back.safetensors")
        >>> _ = revert("tuned", "back.safetensors", "base-again")
        >>> fingerprint("base-again") == fingerprint("base")
        True
    """
    return _cross(tuned_dir, path, out_dir, source="tuned", target="base")


def merge(
    base_dir: PathLike,
    paths: Sequence[PathLike],
    path: PathLike,
    *,
    overlap: Overlap = "error",
    whole: Whole = "error",
) -> DeltaSummary:
    """Write one delta with the changes of several deltas of the same base.

    An entry that one delta changes gets the value of that delta, to the bit. For an entry that several change,
    with the base's w and the values w_i of those deltas: "error" refuses, "last" takes the w_i of the last in `paths`,
    "sum" is w + Σ(w_i − w) and "mean" w + mean(w_i − w), in fp32 and rounded once.

    Args:
        base_dir: the base of all of them; its values are needed to add changes, and to fingerprint the result.
        paths: the deltas, in order.
        path: the merged delta; a new file that `apply` and `revert` take.
        overlap: rule for entries that several deltas change: "error", "last", "sum" or "mean".
        whole: "error" or "last", the rule where several deltas differ and entries cannot be combined: small files,
            tensors new, gone or of another shape or dtype, integers under "sum" and "mean". overlap="last" implies it.

    Raises:
        UsageError: a delta is of another base or damaged, changes overlap where the rule is "error", `path` is taken.

    Example:
        >>> deltas = ["a.safetensors", "b.safetensors"]
        >>> for path in deltas:
        ...     _ = diff("base", "tuned", path)
        >>> merge("base", deltas, "ab.safetensors", overlap="mean").num_changed_entries
        1
    """
    check_one_of("overlap", overlap, get_args(Overlap))
    check_one_of("whole", whole, get_args(Whole))
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise UsageError('paths=[] names no delta to merge; write e.g. paths=["a.safetensors", "b.safetensors"]')
    target = free_file(Path(path))
    base = CheckpointFolder(Path(base_dir))
    tuned = [_other_side(base, delta, source="base", target="tuned") for delta in paths]
    renamed = _common_names(tuned)
    merged = MergedCheckpoint(Renamed(base, renamed), tuned, overlap=overlap, whole=whole)
    with writing_aside(target) as aside:
        write_delta(aside, base, merged, renamed=renamed)
    return summary(target)


def summary(path: PathLike) -> DeltaSummary:
    """Return counts and sizes of the delta at `path`.

    Raises:
        UsageError: it is missing, damaged or no delta.

    Example:
        >>> _ = diff("base", "tuned", "counted.safetensors")
        >>> summary("counted.safetensors").num_tensors
        1
    """
    delta = DeltaFile(Path(path))
    stored = [change.stored for change in delta.changes.values()]
    tensors = delta.contents["tuned"].tensors.values()
    new = [spec for name, spec in delta.contents["tuned"].tensors.items() if name not in delta.contents["base"].tensors]
    base_files, tuned_files = delta.file_digests["base"], delta.file_digests["tuned"]
    return DeltaSummary(
        num_tensors=len(tensors),
        num_entries=sum(spec.num_entries for spec in tensors),
        num_dense=stored.count("dense"),
        num_sparse=stored.count("sparse"),
        num_whole=stored.count("whole"),
        num_new=len(new),
        num_new_entries=sum(spec.num_entries for spec in new),
        num_renamed=len(delta.renamed),
        num_changed_entries=sum(change.num_entries for change in delta.changes.values()),
        num_changed_files=len({name for name, _ in base_files.items() ^ tuned_files.items()}),
        delta_bytes=delta.path.stat().st_size,
        tuned_bytes=sum(spec.num_bytes for spec in tensors),
        fingerprints=dict(delta.fingerprints),
    )


def fingerprint(folder: PathLike) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors; sharding and order do not matter.

    Raises:
        UsageError: the folder holds no weights in safetensors.

    Example:
        >>> fingerprint("base") == fingerprint("tuned")
        False
    """
    return CheckpointFolder(Path(folder)).fingerprint()


def _cross(source_dir: PathLike, path: PathLike, out_dir: PathLike, *, source: Side, target: Side) -> DeltaSummary:
    """Write the other side of a delta."""
    folder = free_folder(Path(out_dir))
    other = _other_side(CheckpointFolder(Path(source_dir)), path, source=source, target=target)
    own = {tuned: name for name, tuned in other.delta.renamed.items()} if target == "base" else {}
    with writing_aside(folder) as aside:
        write_checkpoint(aside, Renamed(other, own))
        free_folder(folder)  # minutes have passed, and the rename deletes what is there
    return summary(path)


def _other_side(folder: CheckpointFolder, path: PathLike, *, source: Side, target: Side) -> OtherSide:
    delta = DeltaFile(Path(path))
    checkpoint = Renamed(folder, delta.renamed if source == "base" else {})
    delta.check_is(checkpoint, side=source, where=folder.folder)
    return OtherSide(checkpoint, delta, side=target)


def _common_names(tuned: Sequence[OtherSide]) -> dict[str, str]:
    """Return the names of the base's tensors in models that share them.

    Raises:
        UsageError: they do not.
    """
    first = tuned[0].delta
    for other in tuned[1:]:
        if other.delta.renamed != first.renamed:
            raise UsageError(
                f"the models of {first.path} and {other.delta.path} have other names for the same tensors, as a "
                "classifier has beside a model without a head; merge deltas of models of one kind"
            )
    return first.renamed


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "none"
