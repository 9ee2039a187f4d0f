"""Picture of which blocks trained when, from the records of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is drawn; no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

SHADES = " ░▒▓█"


@dataclass(frozen=True, kw_only=True)
class Selections:
    """Selections of a run: `trained[b, t]` is true if block b trained at step t, `explored[t]` if step t explored."""

    blocks: tuple[str, ...]
    trained: np.ndarray  # (8, 300) bool
    explored: np.ndarray  # (300,) bool

    @classmethod
    def read(cls, path: Path, *, blocks: Sequence[str]) -> Selections:
        """Read the JSONL file of a run on a model with these blocks."""
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        trained = np.array([[block in record["selected"] for record in records] for block in blocks])
        return cls(blocks=tuple(blocks), trained=trained, explored=np.array([record["explored"] for record in records]))


def draw(selections: Selections, path: Path) -> None:
    """Draw block by step: explore steps darker and marked above, update counts at the right."""
    cells = selections.trained.astype(int) * np.where(selections.explored, 2, 1)
    figure, (axes, bars) = plt.subplots(
        1, 2, figsize=(10, 0.35 * len(selections.blocks) + 1.6), width_ratios=(5, 1), sharey=True, layout="constrained"
    )
    colours = ListedColormap(["#ffffff", "#9ecae1", "#08306b"])
    axes.imshow(cells, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=2)
    explored = np.flatnonzero(selections.explored)
    axes.plot(explored, np.full(explored.shape, -0.75), "|", color="#08306b", clip_on=False, markersize=5)
    axes.set_yticks(range(len(selections.blocks)), selections.blocks)
    axes.set_xlabel("step (dark, and marked above: decided from gradient norms; light: drawn)")
    counts = selections.trained.sum(axis=1)
    bars.barh(range(len(counts)), counts, color="#6baed6", edgecolor="#08306b")
    bars.bar_label(bars.containers[0], padding=2)
    bars.margins(x=0.25)
    bars.set_xlabel("updates")
    figure.suptitle("Which blocks trained when")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def as_text(selections: Selections, *, width: int = 60) -> str:
    """Return the picture as text: each character is the share of updates in a stretch of steps."""
    edges = np.linspace(0, selections.trained.shape[1], min(width, selections.trained.shape[1]) + 1).astype(int)
    lines = []
    for block, row in zip(selections.blocks, selections.trained, strict=True):
        shares = [row[first:last].mean() for first, last in pairwise(edges)]
        cells = "".join(SHADES[int(np.ceil(share * (len(SHADES) - 1)))] for share in shares)
        lines.append(f"{block:>12} |{cells}| {row.sum():4d}")
    return "\n".join(lines)
