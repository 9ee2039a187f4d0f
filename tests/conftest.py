"""Offline, one thread: what a test computes must not depend on the machine."""

import gc
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What the imports made stays: the Trainer collects garbage after each run, and need not look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model and data; no test changes it."""
    from train_fixtures import write_model, write_sums

    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """Keep collections short: each `train()` collects garbage, half a second with the objects of transformers."""
    gc.freeze()
    yield
    gc.unfreeze()
