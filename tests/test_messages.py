"""Warnings of the libraries go to a file; those about weights that were not loaded are shown as well."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train_restoring import tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradselect.app.runtime import collected_messages, describe_messages

ABOUT_WEIGHTS = (
    "There were missing keys in the checkpoint model loaded: ['a', 'b'].",
    "There were unexpected keys in the checkpoint model loaded: ['c'].",
    "Some weights of X were not initialized from the model checkpoint at y and are newly initialized: ['d']",
    "Some weights of the model checkpoint at y were not used when initializing X: ['d']",
    "Found missing adapter keys while loading the checkpoint: ['e'].",
    "size mismatch for lm_head.weight: copying a param with shape [2] from checkpoint",
)
OTHERS = (
    "`use_cache=True` is incompatible with gradient checkpointing.",
    "The attention mask is not set and cannot be inferred from input because pad token is same as eos token.",
    "Passing a tuple of `past_key_values` is deprecated, unexpected behavior may follow.",
)


def shown(text: str, *, name: str = "transformers.trainer") -> tuple[str, list[str]]:
    screen = io.StringIO()
    with collected_messages(Console(file=screen, width=1000)) as kept:
        logging.getLogger(name).warning(text)
        logging.getLogger(name).warning(text)
    return screen.getvalue(), list(kept)


@pytest.mark.parametrize("text", ABOUT_WEIGHTS)
def test_a_warning_about_weights_is_shown_and_kept(text: str) -> None:
    screen, kept = shown(text)
    assert screen == f"note       transformers: {text}\n"
    assert kept == [f"WARNING transformers.trainer: {text}"]


@pytest.mark.parametrize("text", OTHERS)
def test_another_warning_is_kept_only(text: str) -> None:
    assert shown(text) == ("", [f"WARNING transformers.trainer: {text}"])


@pytest.mark.filterwarnings("default:Found missing")
def test_a_warning_of_the_module_warnings_is_shown_too() -> None:
    screen = io.StringIO()
    with collected_messages(Console(file=screen, width=1000)):
        warnings.warn("Found missing adapter keys while loading the checkpoint: ['e'].", UserWarning, stacklevel=1)
    assert "missing adapter keys" in screen.getvalue()


def test_a_long_list_is_cut_on_the_screen_only() -> None:
    text = f"missing keys: {[f'layer.{n}' for n in range(1000)]}"
    screen, kept = shown(text)
    assert len(screen) < 1000
    assert "messages.log" in screen
    assert kept == [f"WARNING transformers.trainer: {text}"]


def test_the_load_report_of_transformers_is_shown(tmp_path: object) -> None:
    """Its wording and form are its own affair: the real one is read."""
    tiny("llama").save_pretrained(str(tmp_path))
    screen = io.StringIO()
    with collected_messages(Console(file=screen, width=1000)) as kept, torch.random.fork_rng():
        AutoModelForSequenceClassification.from_pretrained(str(tmp_path))
        AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert "LlamaForSequenceClassification is not as its checkpoint" in screen.getvalue()
    assert "score.weight MISSING" in screen.getvalue()
    assert len(kept) == 1


FOR_DEVELOPERS = (
    "WARNING py.warnings: /x/training_args.py:1541: FutureWarning: `a` is deprecated and will be removed in v6.",
    "WARNING py.warnings: /x/y.py:1: DeprecationWarning: use `b` instead",
    "WARNING transformers.modeling: `torch_dtype` is deprecated! Use `dtype` instead!",
)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], None),
        (FOR_DEVELOPERS, None),
        ([*FOR_DEVELOPERS, "WARNING trl: a"], "1 message from libraries in run/messages.log"),
        (["WARNING trl: a", "WARNING trl: b"], "2 messages from libraries in run/messages.log"),
    ],
)
def test_only_messages_that_are_meant_for_the_user_are_counted(messages: list[str], line: str | None) -> None:
    """Every run said "1 messages", about a name that transformers had changed."""
    assert describe_messages(messages, Path("run/messages.log")) == line
