"""Pack the results of comparisons into benchmarks/results, to be committed and shown.

    python benchmarks/pack_results.py runs/compare/smollm2 runs/compare/smollm2-half runs/compare/e2e

Each folder becomes benchmarks/results/<its name>: results, calibration and sampled answers, each as `.json.gz`; of
`gradselect compare --calibrate-only` the calibration alone. What was computed with uncommitted changes is left out, as
the tables leave it out. Damaged files are refused. So is more than `--limit` in all, and a file that stands in
benchmarks/results but not in the folder: `--replace` removes it. Packing again changes only what is new. Then
`python benchmarks/readme.py` fills the tables.
"""

from __future__ import annotations

import argparse
import gzip
import re
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, ROOT, megabytes

from gradselect.app.results import CALIBRATION, SAMPLES, read_calibration, read_result, read_sample_file, result_paths
from gradselect.files import json_files, plain_or_packed, read_json_text, write_atomically
from gradselect.usage import UsageError, read_size

LIMIT = "3MB"
LEVEL = 9


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A folder of results as it is to be committed.

    Args:
        target: folder in benchmarks/results.
        files: packed contents, by their place in the target.
        dirty: names of the files of a tree with uncommitted changes, which are left out.
    """

    target: Path
    files: dict[str, bytes]
    dirty: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.files.values()))

    @property
    def others(self) -> list[Path]:
        """JSON files in the target that are not among the packed ones."""
        found = [*json_files(self.target), *json_files(self.target / SAMPLES)]
        return [path for path in found if path.relative_to(self.target).as_posix() not in self.files]


def pack(folder: Path, target: Path) -> Packed:
    """Read everything that `gradselect compare` keeps in a folder, check it, and pack it.

    Raises:
        UsageError: the folder holds no results, one is damaged, or one names a folder of this machine.
    """
    paths = result_paths(folder) if folder.is_dir() else []
    has_calibration = folder.is_dir() and plain_or_packed(folder / CALIBRATION) is not None
    if not paths and not has_calibration:
        raise UsageError(f"{folder} holds no results; give a folder such as runs/compare/smollm2")
    dirty = tuple(path.name for path in paths if read_result(path).record.dirty)
    kept = [path for path in paths if path.name not in dirty]
    if paths and not kept:
        raise UsageError(f"{folder}: all results are of a tree with uncommitted changes; commit, and run them again")
    records = [read_result(path).record for path in kept]
    scored = {(record.method, record.lr, record.seed) for record in records if record.role == "score"}
    files = {_packed_name(path, folder): _packed(path) for path in [*kept, *_beside(folder, scored)]}
    return Packed(target=target, files=files, dirty=dirty)


def write(packed: Packed, *, replace: bool) -> int:
    """Write the files that are new or differ, and return their number.

    Raises:
        UsageError: the target holds other files too, and `replace` is false.
    """
    others = packed.others
    if others and not replace:
        names = ", ".join(path.name for path in others[:3]) + (" ..." if len(others) > 3 else "")
        raise UsageError(
            f"{packed.target} holds {len(others)} files that are not to be packed: {names}; pack them from a folder "
            "that has them too, or remove them with --replace"
        )
    for path in others:
        path.unlink()
    changed = {name: data for name, data in packed.files.items() if not _is_there(packed.target / name, data)}
    for name, data in changed.items():
        (packed.target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(packed.target / name, data)
    return len(changed)


def _beside(folder: Path, scored: Set[tuple[str, float, int]]) -> Iterator[Path]:
    """Yield the calibration and the sampled answers of the base and of these runs, checked."""
    if read_calibration(folder) is not None and (path := plain_or_packed(folder / CALIBRATION)) is not None:
        yield path
    for path in json_files(folder / SAMPLES):
        answers = read_sample_file(path)
        if answers.method is None or (answers.method, answers.lr, answers.seed) in scored:
            yield path


def _packed_name(path: Path, folder: Path) -> str:
    return f"{path.relative_to(folder).as_posix().removesuffix('.gz')}.gz"


def _packed(path: Path) -> bytes:
    """Return the file packed, without time and name, so that the same text gives the same bytes."""
    text = read_json_text(path)
    places = {path.resolve().parent, Path.cwd(), ROOT, Path(sys.prefix).resolve(), Path.home()} - {Path("/")}
    found = (place for place in places if re.search(rf"(?<!\w){re.escape(str(place))}(?![\w.-])", text))
    if named := next(found, None):
        raise UsageError(f"{path} names {named}, a folder of this machine; mend what wrote it, or move the file away")
    return gzip.compress(text.encode(), LEVEL, mtime=0)


def _is_there(path: Path, data: bytes) -> bool:
    return path.exists() and gzip.decompress(path.read_bytes()) == gzip.decompress(data)


def _check_limit(all_packed: Sequence[Packed], limit: str) -> None:
    total = sum(packed.num_bytes for packed in all_packed)
    if total > read_size(limit):
        each = ", ".join(f"{packed.target.name} {megabytes(packed.num_bytes, digits=2)}" for packed in all_packed)
        raise UsageError(
            f"{megabytes(total, digits=2)} MB in all ({each}), more than --limit {limit}; pack fewer methods or seeds, "
            "or raise the limit"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="results, e.g. runs/compare/smollm2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all committed results")
    parser.add_argument("--limit", default=LIMIT, help=f"most bytes of all folders together, by default {LIMIT}")
    parser.add_argument("--replace", action="store_true", help="remove files that a folder does not hold any more")
    arguments = parser.parse_args()
    try:
        all_packed = [pack(folder, arguments.out / folder.resolve().name) for folder in arguments.folders]
        _check_limit(all_packed, arguments.limit)
        for packed in all_packed:
            changed = write(packed, replace=arguments.replace)
            left_out = f"; {len(packed.dirty)} left out: uncommitted changes" if packed.dirty else ""
            print(
                f"{packed.target}: {len(packed.files)} files, {megabytes(packed.num_bytes, digits=2)} MB, "
                f"{changed} of them new or changed{left_out}"
            )
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
