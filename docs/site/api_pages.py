"""Pages of the API reference: every public name of the library, found in the source without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOMS = {
    "blocks": "blocks",
    "slices": "blocks",
    "entries": "masks",
    "masks": "masks",
    "policies": "policies",
    "plain_data": "methods",
    "planning": "methods",
    "usage": "methods",
}
"""Page of the names that `public_names.py` takes from a folder; core's are told apart by name."""

CORE = {
    "Block": "blocks",
    "Keep": "residency",
    "Offload": "residency",
    "Drop": "residency",
    "AbstractResidency": "residency",
    "MaskRecord": "records",
    "StepRecord": "records",
    "JsonlWriter": "records",
    "Patch": "records",
}
OTHERS = {
    "AbstractPolicy": "policies",
    "BlockOptimizer": "optimizers",
    "Borders": "optimizers",
    "SparseOptimizer": "optimizers",
}

TITLES = {
    "optimizers": (
        "Optimizers",
        "Both are `torch.optim.Optimizer`s; see [Training loops](../training-loops.md).",
    ),
    "blocks": (
        "Blocks and slices",
        "A block trains or is frozen as a whole. [Slices](../slices.md) are blocks too.",
    ),
    "policies": ("Policies", "A policy selects the blocks of each step. [Write your own](../write-a-policy.md)."),
    "masks": (
        "Masks",
        "A [mask](../masks.md) selects the entries that train. [Write your own](../write-a-mask.md).",
    ),
    "salience": ("Saliences", "Scores of entries for `gs.StaticMask(salience=...)`."),
    "rules": ("Rules", "A rule is the formula that moves a weight. [Write your own](../write-a-rule.md)."),
    "residency": ("Residency", "Where the state of blocks lives that are not selected. [Memory](../memory.md)."),
    "records": ("Records", "What a step did, and the weights that it moved."),
    "methods": (
        "Methods, plans, errors",
        "Methods as plain data; bytes and time of a training; the error of this library.",
    ),
    "delta": ("Delta files", "`gradselect.delta`: the change of a training as one file. [Delta files](../delta.md)."),
    "sparsegrad": (
        "SparseGrad",
        "`gradselect.sparsegrad`: MLPs in another basis. [SparseGrad](../sparsegrad.md).",
    ),
    "adapters": (
        "Adapters",
        "`gradselect.adapters`: methods for PEFT, which importing it registers. [Adapters](../adapters.md).",
    ),
    "integrations": ("Integrations", "`gradselect.integrations`, one module for each framework."),
}

INTEGRATIONS = (
    "transformers.SelectiveTraining",
    "transformers.SelectionCallback",
    "transformers.SelectiveOptimizerFactory",
    "transformers.checkpoint_selected",
    "compile.compile_blocks",
    "distributed.save",
    "distributed.load",
    "lightning.SelectionCallback",
    "torchtitan.selective",
    "axolotl.SelectivePlugin",
)
FOR_MASKS = ("MaskTensor", "TopOfGradient", "FromWeights")


def write_api_pages(source: Path, folder: Path) -> None:
    """Write one page for each group of names, and an overview."""
    entries = {page: [] for page in TITLES}
    for name, module in public_names(source):
        if name != "salience":
            entries[page_of(name, module)].append((f"gs.{name}", f"{module}.{name}"))
    entries["masks"] += [(f"gradselect.entries.{name}", f"gradselect.entries.{name}") for name in FOR_MASKS]
    for name, kind in saliences(source):
        entries["salience"].append((f"gs.salience.{name}", f"gradselect.masks.salience.{kind}"))
    for module in ("delta", "sparsegrad"):
        for name in names_of_all(source / module / "__init__.py"):
            entries[module].append((f"gs.{module}.{name}", f"gradselect.{module}.{name}"))
    for name in names_of_all(source / "adapters" / "__init__.py"):
        entries["adapters"].append((f"gradselect.adapters.{name}", f"gradselect.adapters.{name}"))
    for name in INTEGRATIONS:
        entries["integrations"].append((f"gradselect.integrations.{name}", f"gradselect.integrations.{name}"))
    for page in set(TITLES) - {"salience", "integrations"}:
        entries[page].sort(key=in_order)
    folder.mkdir(parents=True)
    for page, found in entries.items():
        (folder / f"{page}.md").write_text(page_text(page, found), encoding="utf-8")
    (folder / "index.md").write_text(overview(entries), encoding="utf-8")


def in_order(entry: tuple[str, str]) -> tuple[bool, bool, str]:
    """Return what puts names in order: public ones first, contracts before what keeps to them, then by alphabet."""
    module, _, name = entry[0].rpartition(".")
    return module == "gradselect.entries", not name.startswith("Abstract"), name.lower()


def public_names(source: Path) -> list[tuple[str, str]]:
    """Return each public name and the module that `public_names.py` takes it from."""
    tree = ast.parse((source / "public_names.py").read_text(encoding="utf-8"))
    listed = set(names_of_all(source / "public_names.py"))
    found = [
        (alias.name, str(node.module))
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in listed
    ]
    if missing := listed - {name for name, _ in found}:
        raise SystemExit(f"public names without an import in public_names.py: {sorted(missing)}")
    return found


def names_of_all(path: Path) -> list[str]:
    """Return `__all__` of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise SystemExit(f"{path} has no __all__")


def saliences(source: Path) -> list[tuple[str, str]]:
    """Return each salience and its class, after the abstract classes."""
    body = ast.parse((source / "masks" / "salience.py").read_text(encoding="utf-8")).body
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    made = {
        node.value.func.id: node.targets[0].id
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
    }
    return [(made.get(name, name), name) for name in classes]


def page_of(name: str, module: str) -> str:
    """Return the page that a public name stands on."""
    if name in OTHERS:
        return OTHERS[name]
    room = module.removeprefix("gradselect.").partition(".")[0]
    if room != "core":
        return ROOMS[room]
    return "rules" if name.endswith("Rule") else CORE[name]


def page_text(page: str, names: list[tuple[str, str]]) -> str:
    """Return a page of directives that mkdocstrings fills in."""
    title, about = TITLES[page]
    parts = [f"# {title}\n\n{about}\n"]
    for heading, path in names:
        parts.append(
            f'::: {path}\n    options:\n      heading: "{heading}"\n      toc_label: "{heading.rpartition(".")[2]}"\n'
        )
    return "\n".join(parts)


def overview(entries: dict[str, list[tuple[str, str]]]) -> str:
    """Return the page that lists every name."""
    lines = ["# API", "", "`import gradselect as gs`. Every example on these pages is run by the tests.", ""]
    for page, found in entries.items():
        lines += [f"## [{TITLES[page][0]}]({page}.md)", ""]
        lines += [" · ".join(f"[`{heading}`]({page}.md#{path})" for heading, path in found), ""]
    return "\n".join(lines)
