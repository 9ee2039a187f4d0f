"""Who may import whom, and that the public list is right."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradselect

PACKAGE = Path(gradselect.__file__).parent
LEAVES = {"_errors", "_checks"}
GROUND = LEAVES | {"_freeze", "_blocks", "_rules", "_records", "_checkpoint", "_distributed"}
CONTRACTS = GROUND | {"_policy", "_transfer", "_residency", "_observe", "_groups", "_state"}

ALLOWED = {
    "_errors": set(),
    "_checks": {"_errors"},
    "_sealed": LEAVES,
    "_freeze": set(),
    "_structure": LEAVES,
    "_blocks": LEAVES | {"_structure", "_freeze"},
    "_rules": LEAVES,
    "_low_bit": LEAVES | {"_rules"},
    "_records": LEAVES,
    "_checkpoint": LEAVES,
    "_policy": LEAVES | {"_blocks"},
    "_transfer": LEAVES | {"_rules"},
    "_residency": LEAVES | {"_rules", "_transfer"},
    "_distributed": LEAVES,
    "_observe": LEAVES | {"_blocks", "_distributed"},
    "_groups": LEAVES | {"_blocks"},
    "_state": LEAVES | {"_residency", "_rules", "_groups", "_observe", "_distributed"},
    "_base": LEAVES | {"_groups"},
    "_in_backward": LEAVES | {"_distributed", "_groups", "_observe", "_state"},
    "_reach": LEAVES | {"_distributed"},
    "_optimizer": CONTRACTS | {"_base", "_in_backward", "_reach"},
    "_reader": LEAVES | {"_observe", "_distributed"},
    "reference": GROUND | {"_policy"},
    "policies": LEAVES | {"_policy"},
    "_top": set(),
    "_mask": LEAVES | {"_blocks"},
    "_shards": {"_top", "_distributed"},
    "_contest": {"_top", "_shards"},
    "masks": LEAVES | {"_mask", "_top", "_contest", "_shards", "_distributed", "_structure"},
    "_entries": {"_distributed"},
    "_masked_update": LEAVES | {"_groups", "_state", "_distributed"},
    "_chooser": {"_mask", "_contest", "_shards", "_entries", "_distributed"},
    "_sparse": CONTRACTS | {"_base", "_mask", "_chooser", "_entries", "_reader", "_masked_update", "_shards"},
    "sparsegrad": LEAVES | {"_mask", "_blocks", "masks", "_structure"},
    "report": LEAVES | {"_sealed", "compare"},
    "_delta_checkpoint": LEAVES,
    "_delta_write": LEAVES | {"_delta_checkpoint"},
    "_delta_file": LEAVES | {"_delta_checkpoint"},
    "_delta_diff": LEAVES | {"_delta_checkpoint", "_delta_write", "_delta_file"},
    "_delta_merge": LEAVES | {"_delta_checkpoint", "_delta_file"},
    "delta": LEAVES | {"_delta_checkpoint", "_delta_write", "_delta_file", "_delta_diff", "_delta_merge"},
}
HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "pydantic", "typer", "numpy.testing", "matplotlib")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts, ast.parse(path.read_text(encoding="utf-8"))


def imported(parts, tree):
    """First module below the package of every import from the package itself; "" is the public list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            target = (node.module or "").split(".") if node.module else []
            if node.level:
                base = parts[: len(parts) - node.level] if parts[-1] != "__init__" else parts[: -node.level]
                target = [*base, *target]
            elif target[:1] == ["gradselect"]:
                target = target[1:]
            else:
                continue
            yield from [target[0]] if target else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (
                a.name.partition(".")[2].split(".")[0] for a in node.names if a.name.split(".")[0] == "gradselect"
            )


@pytest.mark.parametrize(
    ("parts", "tree"), list(modules()), ids=lambda value: "/".join(value) if type(value) is tuple else ""
)
def test_lower_never_imports_higher(parts, tree):
    layer = parts[0]
    if layer not in ALLOWED:
        return
    assert set(imported(parts, tree)) <= ALLOWED[layer] | {layer}


def test_nobody_imports_the_application():
    application = {
        "train",
        "evaluate",
        "compare",
        "report",
        "tune",
        "cli",
        "_delta_commands",
        "_compare_command",
        "_report_command",
        "_tune_command",
        "planning",
        "_plan_command",
    }
    for parts, tree in modules():
        if parts[0] not in application:
            assert not set(imported(parts, tree)) & application, parts


def test_integrations_use_the_public_names():
    for parts, tree in modules():
        if parts[0] == "integrations":
            private = {name for name in imported(parts, tree) if name.startswith("_")}
            assert not private, parts


def test_public_list_is_what_the_module_offers():
    helpers = {"TYPE_CHECKING", "Any"}
    public = {name for name in vars(gradselect) if not name.startswith("_")} - helpers | {"plan"}
    submodules = {parts[0] for parts, _ in modules()}
    assert len(set(gradselect.__all__)) == len(gradselect.__all__)
    assert public - submodules == set(gradselect.__all__)


def test_import_loads_torch_and_nothing_heavier():
    code = f"import gradselect, sys; sys.exit(' '.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
