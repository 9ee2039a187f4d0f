"""Files that a path names: one file, the shards in a folder, or the files that match a pattern."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gradselect.files import sha256
from gradselect.usage import UsageError, printable

from .endings import ending_of, whole_ending_of

MOST_FILES = 10_000
"""Files in a folder of data. A larger folder was hardly meant."""

MOST_LEVELS = 2
"""Levels of folders below the one that is named: `data/train/part-0.parquet` has two."""

OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the datasets library writes beside the data."""

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that name a split."""

MOST_LISTED = 8
"""Groups and files that a message lists."""

Groups = Mapping[str, Sequence[Path]]
"""Files by the name that those of one split share."""

VALIDATION_SPLITS = ("validation", "test", "train")
"""Splits of a folder that is named as validation data, the best first."""

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})$")


def is_local(path: str | Path) -> bool:
    """True if a path names a file, a folder or a pattern, and no data set on the hub."""
    return ending_of(path) is not None or is_pattern(path) or Path(path).exists()


def names_split(name: str, *, of: str, rows_key: str | None) -> bool:
    """True if the name of validation data is a split of the training data's source, and no place of its own.

    A bare word is a split even if a folder here has that name, which would be written as ./word.

    Args:
        name: name of the validation data.
        of: path of the training data.
        rows_key: key of the training rows in a JSON file of several lists, whose other keys are its splits.
    """
    has_splits = not is_local(of) or Path(of).is_dir() or rows_key is not None
    is_word = ending_of(name) is None and not is_pattern(name) and name == Path(name).name
    return (has_splits and is_word) or not is_local(name)


def check_local(path: str | Path, *, subset: str | None, split: str, default: str) -> None:
    """Check that nothing is asked of a local file or folder that only a data set on the hub has.

    Args:
        path: a file, a folder or a pattern.
        subset: configuration of a data set on the hub.
        split: split to read.
        default: split that is read if the user names none.

    Raises:
        UsageError: a subset, or a split of what is no folder.
    """
    if subset is not None:
        raise UsageError(f"subset={subset!r} is for data sets on the hub; {path} is none: leave it out")
    if split != default and not Path(path).is_dir():
        raise UsageError(
            f"split={split!r} is for data sets on the hub and for folders; {path} is neither: leave it out, and name "
            "the file that is meant"
        )


def files_of(path: str | Path, splits: Sequence[str] = ("train",), *, needs_split: bool = False) -> list[Path]:
    """Return the files that a path names, in order: part-2 before part-10.

    Args:
        path: a file; a folder, whose data files have one ending, also one or two levels below; or a pattern with `*`.
        splits: for a folder with the files of several splits: the first of these that it has is read.
        needs_split: a folder whose files are of no split is refused.

    Raises:
        UsageError: nothing is there, or it is not clear which files are meant; names them.
    """
    path = Path(path)
    if path.is_dir():
        return _files_of_folder(path, splits, needs_split=needs_split)
    if not is_pattern(path):
        return [path]
    files = sorted((Path(name) for name in glob.glob(str(path)) if Path(name).is_file()), key=_natural)
    if not files:
        raise UsageError(f"{path}: no file matches; paths are relative to the folder the command runs in")
    _check_one_kind(files, folder=path.parent)
    return files


def describe_files(path: str | Path, files: Sequence[Path]) -> str:
    """Return which files of a folder or pattern are read, and which data files of the folder are not."""
    some = files[0].name if len(files) == 1 else f"{len(files):,} files, {files[0].name} to {files[-1].name}"
    unread = sorted(set(_data_files(Path(path))).difference(files), key=_natural) if Path(path).is_dir() else []
    more = f" and {len(unread) - MOST_LISTED:,} more" if len(unread) > MOST_LISTED else ""
    names = ", ".join(file.name for file in unread[:MOST_LISTED]) + more
    return printable(some + (f"; not read, of other splits: {names}" if unread else ""))


def data_fingerprint(path: str | Path, splits: Sequence[str] = ("train",), *, needs_split: bool = False) -> str:
    """Return the SHA-256 of a data file, or of names and contents of the files in a folder. Arguments: `files_of`."""
    files = files_of(path, splits, needs_split=needs_split)
    if files == [Path(path)]:
        return sha256(path)
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def is_pattern(path: str | Path) -> bool:
    """True if a path has a `*` or `?` and is no file of that very name."""
    return any(sign in str(path) for sign in "*?") and not Path(path).exists()


def _files_of_folder(folder: Path, splits: Sequence[str], *, needs_split: bool) -> list[Path]:
    files = sorted(_data_files(folder), key=_natural)
    if not files:
        there = printable(", ".join(sorted(entry.name for entry in folder.iterdir())[:10])) or "nothing"
        raise UsageError(f"{folder}: a folder without data files; it holds: {there}")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_group_of(file.relative_to(folder)), []).append(file)
    name = _choose(groups, splits, needs_split=needs_split, folder=folder)
    _check_one_kind(groups[name], folder=folder)
    _check_complete(groups[name], folder=folder)
    return groups[name]


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the data files in a folder and below. Names that begin with a dot or an underscore are no data."""
    num_files = 0
    for root, folders, names in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = [name for name in folders if name[0] not in "._" and depth < MOST_LEVELS]
        num_files += len(names)
        if num_files > MOST_FILES:
            raise UsageError(f"{folder}: more than {MOST_FILES:,} files; name a folder that holds nothing but the data")
        for name in names:
            if name[0] not in "._" and name not in OF_DATASETS and ending_of(name) is not None:
                yield Path(root, name)


# Splits --------------------------------------------------------------------------------------------------------------


def _group_of(relative: Path) -> str:
    """Return the name that a file shares with those of its split: "train", "train_sft", "en/train", or ""."""
    stem = relative.name[: -len(whole_ending_of(relative))]
    shard = _SHARD.match(stem)
    above = [part for part in relative.parent.parts if part != "data"]
    if shard is None:
        word = next((word for part in (*above, stem) if (word := split_of(part))), None)
        own = word if word and not any(split_of(part) for part in above) else ""
    else:
        own = shard["name"]
    return "/".join([*above, *([own] if own else [])])


def split_of(name: str) -> str | None:
    """Return the split that a name holds as a word.

    Example:
        >>> split_of("gsm8k-train_v2"), split_of("dev"), split_of("attest")
        ('train', 'validation', None)
    """
    for word in re.findall("[a-z]+", name.lower()):
        for split, words in SPLIT_WORDS.items():
            if word in words:
                return split
    return None


def _choose(groups: Groups, splits: Sequence[str], *, needs_split: bool, folder: Path) -> str:
    """Return the group of the first split that is there, or the only group if it is of no split."""
    of_no_split = [name for name in groups if split_of(name) is None]
    if len(groups) == len(of_no_split) == 1 and not needs_split and set(splits) <= SPLIT_WORDS.keys():
        return of_no_split[0]
    for split in splits:
        matching = _matching(groups, split)
        if len(matching) > 1:
            found = f"several splits fit {split!r}: {_listed(groups, matching)}"
            raise UsageError(f"{folder}: {found}; {_advice(groups, matching)}")
        if matching and split_of(matching[0]) is not None and of_no_split:
            raise UsageError(
                f"{folder}: files of the split {split!r} and files of no split: {_listed(groups, of_no_split)}; move "
                f"these away, or name the files that are meant: data.path='{_pattern(groups[matching[0]])}'"
            )
        if matching:
            return matching[0]
    found = f"no file of the split {' or '.join(map(repr, splits))}; there is: {_listed(groups, groups)}"
    raise UsageError(f"{folder}: {found}; {_advice(groups, groups)}")


def _matching(groups: Groups, split: str) -> list[str]:
    exact = [name for name in groups if name == split] or [name for name in groups if name.endswith(f"/{split}")]
    return exact or [name for name in groups if split_of(name) == split]


def _listed(groups: Groups, names: Iterable[str]) -> str:
    """Return groups with their files: "train (3 files, train-0.csv to train-2.csv)"."""
    listed = []
    for name in list(names)[:MOST_LISTED]:
        files = [file.name for file in groups[name]]
        files = files[0] if len(files) == 1 else f"{len(files):,} files, {files[0]} to {files[-1]}"
        listed.append(f"{name} ({files})" if name else files)
    return printable(", ".join(listed))


def _advice(groups: Groups, names: Iterable[str]) -> str:
    name = next((name for name in names if name), "train")
    pattern = _pattern(groups.get(name) or next(iter(groups.values())))
    return f"write data.split={name} (gradselect evaluate: --split {name}), or name the files: data.path='{pattern}'"


def _pattern(files: Sequence[Path]) -> str:
    """Return a pattern that matches these files of one folder and no others: by the ending, or by what names share."""
    folder, ending = files[0].parent, whole_ending_of(files[0])
    if {*folder.glob(f"*{ending}")} == {*files}:
        return f"{folder}/*{ending}"
    if len(files) == 1:
        return str(files[0])
    # Of numbered shards the names have "train-0000" in common: the digits would leave the tenth out.
    common = next(n for n in range(len(files[0].name), -1, -1) if all(f.name[:n] == files[0].name[:n] for f in files))
    return f"{folder}/{files[0].name[:common].rstrip('0123456789')}*{ending}"


# Checks --------------------------------------------------------------------------------------------------------------


def _check_one_kind(files: Sequence[Path], *, folder: Path) -> None:
    first_of = {whole_ending_of(file).lower(): file.name for file in reversed(files)}
    if len(first_of) > 1:
        shown = printable(", ".join(sorted(first_of.values())[:MOST_LISTED]))
        ending = next(iter(sorted(first_of)))
        meant = [file for file in files if whole_ending_of(file).lower() == ending]
        raise UsageError(
            f"{folder}: files of {len(first_of)} kinds: {shown}; name the ones that are meant, e.g. "
            f"data.path='{_pattern(meant)}'"
        )


def _check_complete(files: Sequence[Path], *, folder: Path) -> None:
    """Check that no shard is missing from a download: train-00001-of-00004 says that there are four."""
    shards = [shard for file in files if (shard := _SHARD.match(file.name[: -len(whole_ending_of(file))]))]
    for total in {int(shard["total"]) for shard in shards}:
        there = {int(shard["number"]) for shard in shards if int(shard["total"]) == total}
        missing = sorted(set(range(total)) - there) if total <= MOST_FILES else []
        if missing:
            raise UsageError(
                f"{folder}: {len(missing)} of {total} shards are missing, the first is number {missing[0]:05d}; "
                f"complete the copy, or name the files: data.path='{_pattern(files)}'"
            )


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a key that sorts numbers in names as numbers."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]
