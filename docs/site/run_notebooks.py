"""Run the notebooks offline and save their outputs in them: `make notebooks`.

    python docs/site/run_notebooks.py [NAME ...]

They run in a new folder beside a link to the repository's data, so they leave nothing behind.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def main(names: list[str]) -> None:
    os.environ.update(QUIET)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)
            print(f"ran {path.name}")


def run(path: Path) -> None:
    """Execute every cell, in order, from a fresh kernel. An error in any cell ends it with the cell's traceback."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    nbformat.write(as_saved(notebook), path)


def as_saved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what belongs to one machine: times, and standard error, whose warnings name its folders."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
