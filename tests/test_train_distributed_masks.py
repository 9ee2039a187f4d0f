"""`gradselect train` under torchrun with a mask: the run of one process on the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from test_train_distributed import losses, torchrun
from torch.utils.data import BatchSampler, SequentialSampler
from train_fixtures import parse, quiet, weights, write_model, write_recipe, write_sums

from gradselect.app.train import train
from gradselect.app.train.setup import for_every_process

ID3 = {"name": "id3", "density": 0.02, "steps": 3, "always": ["*.norm.weight"]}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    """fp32, equal to rounding: gradients are added in another order."""
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    alone, together = tmp_path / "alone", tmp_path / "together"
    shared = {"accumulation": 2, "steps": 4}
    train(parse(tmp_path, method=ID3, run={**shared, "batch_size": 8, "output": str(alone)}), console=quiet())
    recipe = write_recipe(
        tmp_path, tmp_path / "recipe.yaml", method=ID3, run={**shared, "batch_size": 4, "output": str(together)}
    )
    torchrun(str(recipe))
    ours, theirs = records(together), records(alone)
    assert len(theirs) == 4
    assert [each["num_entries"] for each in ours] == [each["num_entries"] for each in theirs]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    moved = weights(together)
    assert all((moved[name] - value).abs().max() < 1e-3 for name, value in weights(alone).items())


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_estimates_from_all_batches(processes: int) -> None:
    """As Accelerate deals batches out to processes; the remaining rows are not a whole batch."""
    rows = [9, 3, 7, 1, 8, 2, 6]
    dealt = for_every_process(rows, batch_size=2, processes=processes)
    sampler = BatchSampler(SequentialSampler(range(len(dealt))), batch_size=2, drop_last=False)
    for process in range(processes):
        batches = BatchSamplerShard(sampler, num_processes=processes, process_index=process)
        assert [[dealt[index] for index in batch] for batch in batches] == [[9, 3], [7, 1], [8, 2]]
