"""Offline, one thread: what a test computes must not depend on the machine."""

import functools
import gc
import importlib.metadata
import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
# No test loses power; a run would wait for the disk fifteen times.
os.fsync = os.fstat  # it refuses what is no open file too
# accelerate reads the metadata of PEFT ten times in a run.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


NEW_MODULES = 50
num_frozen = 0


def freeze() -> None:
    """Keep collections of garbage short: all objects of now stay, most of them made by imports.

    Each `train()` collects garbage, half a second with the objects of transformers.
    """
    global num_frozen
    gc.collect()
    gc.freeze()
    num_frozen = len(sys.modules)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, but from `make gpu`: what a test of the CPU counts and computes must not depend on the machine."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    freeze()


def pytest_runtest_logfinish() -> None:
    """Freeze what the test imported: many packages are loaded only when something needs them."""
    if len(sys.modules) > num_frozen + NEW_MODULES:
        freeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model and data; no test changes it."""
    from train_fixtures import write_model, write_sums

    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder
