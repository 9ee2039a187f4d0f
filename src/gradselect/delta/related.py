"""Check that one checkpoint was trained from another: else their delta is both models in one file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradselect.usage import UsageError

from .checkpoint import CheckpointFolder
from .renaming import Renamed

MOST_NEW_OR_GONE = 8
"""Tensors that training may add or drop: a classification head, a tied head, a pooler. A layer has nine or more."""
MOST_RESIZED = 4
"""Embedding and head after tokens were added, and their biases."""
MOST_DISTANCE = 0.5
"""|tuned - base| / |base| of a tensor that has been trained. Two models are 1.4 apart."""
NUM_COMPARED = 8
"""Matrices of unchanged shape that are compared where rows were added."""
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NUM_NAMED = 3


def check_related(base: Renamed, tuned: CheckpointFolder) -> None:
    """Check that the tensors of `tuned` are those of `base`, up to added tokens and a few that are new or gone.

    Args:
        base: under the names that `tuned` has for its tensors.
        tuned: the model trained from it.

    Raises:
        UsageError: they are another model's; counts them and names the first.
    """
    ours, theirs = base.contents.tensors, tuned.contents.tensors
    gone, new = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    common = sorted(ours.keys() & theirs.keys())
    others = [name for name in common if ours[name].shape != theirs[name].shape]
    only_rows = all(_are_rows(ours[name].shape, theirs[name].shape) for name in others)
    if 0 < len(others) <= MOST_RESIZED and only_rows:
        # Not so with another vocabulary: a row is another token's, and the layers are another model's.
        same = [name for name in common if name not in others and len(ours[name].shape) > 1][:NUM_COMPARED]
        if _are_close(base, tuned, others) or _are_close(base, tuned, same):
            others = []
    found = []
    if others:
        shapes = f"{others[0]}: {list(ours[others[0]].shape)} and {list(theirs[others[0]].shape)}"
        found.append(f"{len(others):,} have another shape or other rows ({shapes})")
    if len(gone) + len(new) > MOST_NEW_OR_GONE:
        found.append(f"{len(gone):,} are in the first only{_some(gone)}, {len(new):,} in the second{_some(new)}")
    if found:
        raise UsageError(
            f"{base.source.folder} is not the model that {tuned.folder} was trained from: of {len(ours):,} tensors "
            f"{'; '.join(found)}. The delta would hold both models. Name the base of the training, which run.json has "
            "as recipe.model.path; or write it all the same: unrelated=True (--unrelated)"
        )


def _are_rows(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Return True if the shapes differ in their first axis only."""
    return len(before) == len(after) > 0 and before[1:] == after[1:]


def _are_close(base: Renamed, tuned: CheckpointFolder, names: Sequence[str]) -> bool:
    """Return True if most of the tensors, as far as both have their rows, have been trained from one another."""
    close = [_is_close(base.tensor(name), tuned.tensor(name)) for name in names]
    return 2 * sum(close) > len(close)


def _is_close(before: Tensor, after: Tensor) -> bool:
    if before.dtype not in REAL or after.dtype not in REAL:
        return False
    rows = min(len(before), len(after))
    old, now = before[:rows].to(torch.float32), after[:rows].to(torch.float32)
    return bool((now - old).norm() <= MOST_DISTANCE * old.norm())


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:NUM_NAMED])}{', ...' if len(names) > NUM_NAMED else ''})" if names else ""
