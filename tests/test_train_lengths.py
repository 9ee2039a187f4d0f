"""Batches of rows of about the same length."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from train_fixtures import assert_same_weights, build, parse, quiet, train_until, write_sums

from gradselect import UsageError
from gradselect.app.inputs import LengthSampler, padding_share
from gradselect.app.inputs.length_sampler import POOL
from gradselect.app.recipe import dump_recipe
from gradselect.app.train import train

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
SIZE = 4
PREFERENCE = {"format": "preference", "path": "x", "prompt": "{a}", "chosen": "{b}", "rejected": "{c}"}


def order_of(lengths: list[int], *, epoch: int = 0, seed: int = 0) -> list[int]:
    sampler = LengthSampler(lengths, batch_size=SIZE, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, SIZE * POOL, SIZE * POOL + 1, 3 * SIZE * POOL - 1])
def test_every_row_comes_once_in_each_epoch_and_the_longest_first(count: int) -> None:
    lengths = [7 + 13 * row % 101 for row in range(count)]
    for epoch in range(20):
        order = order_of(lengths, epoch=epoch)
        assert sorted(order) == list(range(count))
        assert max(lengths[row] for row in order[:SIZE]) == max(lengths)
    if count > 2 * SIZE:
        assert len({tuple(order_of(lengths, epoch=epoch)) for epoch in range(3)}) > 1
        assert order_of(lengths, seed=1) != order_of(lengths)
    assert order_of(lengths, epoch=2) == order_of(lengths, epoch=2)


def test_rows_of_a_batch_have_about_the_same_length_and_batches_have_no_order() -> None:
    lengths = [1 + row * 37 % 1000 for row in range(1000)]
    order = order_of(lengths)
    assert padding_share([lengths[row] for row in order], batch_size=SIZE) < 0.02
    assert padding_share(random.Random(0).sample(lengths, 1000), batch_size=SIZE) > 0.3
    batches = [[lengths[row] for row in order[start : start + SIZE]] for start in range(0, len(order), SIZE)]
    rises = sum(max(one) < max(two) for one, two in pairwise(batches))
    assert 0.4 < rises / len(batches) < 0.6


def test_a_run_pads_less_and_a_stopped_one_goes_on_as_if_it_had_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch, whose order differs from that of the first."""
    run = {"epochs": 2, "steps": None, "batch_size": SIZE, "save_every": 2, "group_by_length": True}
    whole, stopped = (parse(place, run={"output": str(tmp_path / name), **run}) for name in ("whole", "stopped"))
    train(whole, console=quiet())
    train_until(stopped, step=8, monkeypatch=monkeypatch)
    train(stopped, console=quiet(), resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_rows_are_dealt_out_by_their_number_of_tokens(place: Path, tmp_path: Path) -> None:
    write_sums(tmp_path / "many.jsonl", rows=300)
    padding = {}
    for grouped in (False, True):
        run = {"batch_size": SIZE, "group_by_length": grouped}
        trainer, _ = build(place, tmp_path / str(grouped), run=run, data={"path": str(tmp_path / "many.jsonl")})
        drawn = list(trainer.get_train_dataloader())
        batches = [batch["attention_mask"] for batch in drawn]
        assert sum(len(batch) for batch in batches) == 300
        padding[grouped] = sum(int((batch == 0).sum()) for batch in batches)
        if grouped:
            loader: Any = trainer.get_train_dataloader()
            loader.set_epoch(1)
            assert [batch["input_ids"].tolist() for batch in loader] != [batch["input_ids"].tolist() for batch in drawn]
    assert 0 < padding[True] < padding[False] / 4


@pytest.mark.parametrize(
    ("sections", "cause"),
    [
        ({"data": {"packing": True}}, r"no effect with data\.packing=true"),
        ({"trainer": {"name": "dpo"}, "data": PREFERENCE}, r"does not go with trainer\.name=dpo"),
    ],
)
def test_it_is_refused_where_rows_have_one_length_or_another_order(
    place: Path, sections: dict[str, dict[str, object]], cause: str
) -> None:
    with pytest.raises(UsageError, match=cause):
        parse(place, run={"group_by_length": True}, **sections)


def test_a_recipe_names_it_only_where_it_is_on(place: Path) -> None:
    assert "group_by_length" not in dump_recipe(parse(place))
    assert "group_by_length: true" in dump_recipe(parse(place, run={"group_by_length": True}))
