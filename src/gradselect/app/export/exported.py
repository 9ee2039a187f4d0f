"""The model in the folder of a finished run: its files and its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradselect.app.results import FinishedRun, read_finished_run, read_run
from gradselect.app.runtime import RunFolder
from gradselect.files import LOCK_NAME, MANIFEST_NAME, digests_of_model
from gradselect.usage import UsageError

OF_THE_RUN = (
    "run.json",
    "recipe.yaml",
    "records.jsonl",
    "answers.jsonl",
    "messages.log",
    MANIFEST_NAME,
    LOCK_NAME,
)
"""Files in the folder that are no part of the model. They name paths of the machine and quote validation rows."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """Files of a trained model, and the record of its run.

    Args:
        run: folder of the run.
        folder: folder of the model: that of the run, or the adapter inside.
        files: files of the model by their name in `folder`.
        record: of the run.
    """

    run: Path
    folder: Path
    files: Mapping[str, Path]
    record: FinishedRun

    @property
    def is_adapter(self) -> bool:
        """True for an adapter, which needs its base."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def read_exported(run: str | Path, *, adapter: bool = False) -> ExportedModel:
    """Return the model of a finished run.

    Args:
        run: its folder.
        adapter: True for the adapter beside the merged model.

    Raises:
        UsageError: it is no folder of a run, the run has not finished, or a file of the model is missing.

    Example:
        >>> read_exported("runs/smol").num_bytes  # doctest: +SKIP
        269060552
    """
    paths = RunFolder(Path(run))
    record = _read_record(paths)
    folder = paths.adapter if adapter else paths.root
    if adapter and not folder.is_dir():
        raise UsageError(f"the run in {run} has no adapter beside its model; leave --adapter off")
    files = _files_of(folder)
    if not {"config.json", "adapter_config.json"}.intersection(files):
        raise UsageError(f"{folder} holds no model: it has no config.json; a run on random tokens keeps none")
    return ExportedModel(run=paths.root, folder=folder, files=files, record=record)


def _read_record(paths: RunFolder) -> FinishedRun:
    if not paths.run_file.is_file():
        raise UsageError(
            f"{paths.root} holds no run: it has no run.json; give the folder that gradselect train wrote. What a "
            "Trainer wrote is a plain checkpoint: hf upload NAME FOLDER, or llama.cpp's convert_hf_to_gguf.py FOLDER"
        )
    if read_run(paths.run_file).status != "finished":
        raise UsageError(f"the run in {paths.root} has not finished; continue it: gradselect train ... --resume")
    return read_finished_run(paths.run_file)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the files that were written as the model; in a folder without manifest all that are not the run's."""
    names = [name for name in digests_of_model(folder) if name != MANIFEST_NAME]
    if not names:
        names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.name not in OF_THE_RUN]
    files = {name: folder / name for name in sorted(names)}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise UsageError(f"{folder} lacks {missing[0]}, which the run wrote as a part of its model; put a copy back")
    return files
