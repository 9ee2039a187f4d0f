"""Files of rows for tests of readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gradselect.app.data import read_rows

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three\u2028still three"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Write text, bytes or Parquet rows under their names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(path: Path | str, **options: Any) -> list[str]:
    return [row["text"] for row in read_rows(path, **options)]
