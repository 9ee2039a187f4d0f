"""Newest checkpoint of a transformers Trainer: its log, and how its optimizer selects."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


@dataclass(frozen=True, kw_only=True)
class TrainerCheckpoint:
    """State of a Trainer, and the selection in the state of its optimizer.

    Args:
        num_steps: steps taken.
        planned_steps: steps asked for.
        history: what the Trainer logged, in order.
        blocks: names of the blocks, in model order; empty if the optimizer selects none.
        method: name and settings of policy or mask; empty if they are unknown.
    """

    num_steps: int
    planned_steps: int | None
    history: Sequence[Mapping[str, Any]]
    blocks: Sequence[str]
    method: Mapping[str, Any]


def find_checkpoint(folder: Path) -> TrainerCheckpoint | None:
    """Return the newest state in a folder of a Trainer or in its checkpoints; None if there is none.

    Raises:
        UsageError: the file is damaged.
    """
    files = [*folder.glob(STATE), *folder.glob(f"checkpoint-*/{STATE}"), *folder.glob(f"checkpoints/step-*/{STATE}")]
    states = [(_read_state(file), file.parent) for file in sorted(files)]
    if not states:
        return None
    # A state without optimizer beside it, in the folder itself, is that of the end.
    state, _ = max(states, key=lambda each: each[0].get("global_step", 0))
    with_optimizer = [each for each in states if (each[1] / OPTIMIZER).is_file()]
    newest = max(with_optimizer, key=lambda each: each[0].get("global_step", 0), default=None)
    selection = {} if newest is None else _selection_in(newest[1] / OPTIMIZER)
    return TrainerCheckpoint(
        num_steps=int(state.get("global_step", 0)),
        planned_steps=state.get("max_steps") or None,
        history=[entry for entry in state.get("log_history", ()) if isinstance(entry, dict)],
        blocks=list(selection.get("blocks", ())),
        method=_method_in(selection),
    )


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read ({error}); remove it, and the newest checkpoint before it counts"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"{file} holds no state of a Trainer; remove it, and the newest checkpoint before it counts")
    return state


def _selection_in(file: Path) -> Mapping[str, Any]:
    import torch

    try:
        # Mapped: moments of gigabytes are not read.
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError):
        return {}  # another optimizer's: the report does without
    selection = saved.get("selection") if isinstance(saved, dict) else None
    return selection if isinstance(selection, dict) else {}


def _method_in(selection: Mapping[str, Any]) -> Mapping[str, Any]:
    for kind in ("policy", "mask"):
        if kind in selection:
            always = {"always": selection["always"]} if selection.get("always") else {}
            rule = {"rule": selection["rule"]} if "rule" in selection else {}
            return {"name": selection[kind], **selection.get(f"{kind}_settings", {}), **always, **rule}
    return {}
