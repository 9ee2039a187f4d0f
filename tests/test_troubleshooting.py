"""The table of troubles names tests that exist, so that no row outlives what it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    return [[cell.strip() for cell in row] for row in cells if row[0].strip() != "what you see"]


def test_each_row_names_a_test_that_exists() -> None:
    tests: dict[str, set[str]] = {}
    assert len(rows()) > 20
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        match = re.fullmatch(r"`(tests/test_\w+\.py)::(test_\w+)`", row[3])
        assert match is not None, row
        file, name = match.groups()
        if file not in tests:
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            tests[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in tests[file], row[3]
