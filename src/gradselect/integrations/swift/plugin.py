"""The file for `--external_plugins` of ms-swift, which registers the callback `gradselect`.

It lies in a folder of its own, because ms-swift makes that folder the first place of imports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from swift.callbacks import callbacks_map  # pyright: ignore[reportMissingImports]
from swift.optimizers import optimizers_map  # pyright: ignore[reportMissingImports]

from gradselect.integrations.section import parse_section
from gradselect.integrations.transformers import SelectiveTraining
from gradselect.integrations.words import read_words
from gradselect.usage import UsageError

NAME = "gradselect"
SOURCE = "--optim_args"


def make_callback(args: Any, trainer: Any) -> SelectiveTraining:
    """Build the callback of a trainer of ms-swift. A wrong method ends the command."""
    return _or_exit(lambda: _make_callback(args))


def _make_callback(args: Any) -> SelectiveTraining:
    others = [name for name in args.callbacks if name == "lisa"]
    if args.optimizer not in (None, "default"):
        others.append(f"--optimizer {args.optimizer}")
    if others:
        raise UsageError(f"{others[0]} and gradselect both choose what is trained; leave one of them out")
    _shorten_backward(args)
    method, jsonl = parse_section(read_words(args.optim_args or "", source=SOURCE), key=SOURCE)
    return SelectiveTraining(jsonl=jsonl, method=method)


def _shorten_backward(args: Any) -> None:
    """Let the backward pass end at the lowest selected block: ms-swift's checkpoints are reentrant by default."""
    settings = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and settings.get("use_reentrant") is None:
        args.gradient_checkpointing_kwargs = {**settings, "use_reentrant": False}


def _or_exit(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


class _CheckedDefault(optimizers_map["default"]):
    """ms-swift's optimizer, where this plug-in is loaded: says so if nothing uses the plug-in."""

    def __init__(self, args: Any, trainer: Any) -> None:
        _or_exit(lambda: _check_is_used(args))
        super().__init__(args, trainer)


def _check_is_used(args: Any) -> None:
    if NAME not in args.callbacks:
        raise UsageError(
            f"the plug-in of gradselect is loaded, and nothing uses it; add --callbacks {NAME}, or leave out "
            "--external_plugins"
        )


callbacks_map[NAME] = make_callback
optimizers_map["default"] = _CheckedDefault
