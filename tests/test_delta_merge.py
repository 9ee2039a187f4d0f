"""Merging deltas: entries of one are taken, entries of several go by the rule."""

from __future__ import annotations

import pytest
import torch
from delta_support import noise, read_model, same_bits, same_model, small_files, with_changes, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gradselect import UsageError, delta
from gradselect.delta.checkpoint import as_bits
from gradselect.delta.merging import combined_bits


def deltas_of(folder, base, *models, files=()):
    """The base, and the delta of each model against it."""
    base_dir = write_model(folder / "base", base)
    paths = []
    for n, model in enumerate(models):
        tuned = write_model(folder / f"tuned{n}", model, files=files[n] if files else None)
        delta.diff(base_dir, tuned, folder / f"{n}.safetensors")
        paths.append(folder / f"{n}.safetensors")
    return base_dir, paths


def merged(folder, base_dir, paths, **rules):
    """The model that the merged delta makes of the base; the delta must lead back, too."""
    delta.merge(base_dir, paths, folder / "m", **rules)
    delta.apply(base_dir, folder / "m", folder / "out")
    delta.revert(folder / "out", folder / "m", folder / "back")
    assert same_model(folder / "back", base_dir)
    return read_model(folder / "out")


def test_changes_that_do_not_overlap_are_all_taken(tmp_path):
    base = {"a": noise(40), "b": noise(40, seed=1), "c": noise(4)}
    one = base | {"a": with_changes(base["a"], [1, 2])}
    two = base | {"a": with_changes(base["a"], [3]), "b": with_changes(base["b"], range(40))}
    result = merged(tmp_path, *deltas_of(tmp_path, base, one, two))
    assert same_bits(result["a"], with_changes(base["a"], [1, 2, 3]))
    assert same_bits(result["b"], two["b"])
    assert same_bits(result["c"], base["c"])


def test_an_overlap_is_an_error_that_counts_it(tmp_path):
    base = {"a": noise(40), "b": noise(40, seed=1)}
    one = {"a": with_changes(base["a"], [1, 2, 3]), "b": with_changes(base["b"], [0])}
    two = {"a": with_changes(base["a"], [2, 3, 4]), "b": with_changes(base["b"], [1])}
    base_dir, paths = deltas_of(tmp_path, base, one, two)
    with pytest.raises(UsageError, match=r'2 entries are changed by more than one delta: 2 of a; .*overlap="last"'):
        delta.merge(base_dir, paths, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_last_wins_where_that_is_the_rule(tmp_path):
    base = {"a": noise(40)}
    models = [{"a": with_changes(base["a"], [1, 2], 1.0)}, {"a": with_changes(base["a"], [2, 3], 2.0)}]
    base_dir, paths = deltas_of(tmp_path, base, *models)
    forward = merged(tmp_path, base_dir, paths, overlap="last")["a"]
    assert same_bits(forward, with_changes(with_changes(base["a"], [1], 1.0), [2, 3], 2.0))
    (tmp_path / "other").mkdir()
    backward = merged(tmp_path / "other", base_dir, paths[::-1], overlap="last")["a"]
    assert same_bits(backward, with_changes(with_changes(base["a"], [1, 2], 1.0), [3], 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("overlap", ["sum", "mean"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), num_models=st.integers(1, 4), share=st.sampled_from((0.2, 0.7, 1.0)))
def test_sum_and_mean_are_the_formula_rounded_once(dtype, overlap, seed, num_models, share):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(30, generator=generator).to(dtype)
    models = []
    for _ in range(num_models):
        other = torch.randn(30, generator=generator).to(dtype)
        models.append(torch.where(torch.rand(30, generator=generator) < share, other, base))
    result = combined_bits(base, [as_bits(model) for model in models], overlap=overlap).view(dtype)

    wide = torch.promote_types(torch.float32, dtype) if dtype.itemsize > 1 else torch.float32
    for entry in range(30):
        changed = [model[entry] for model in models if model[entry].to(wide) != base[entry].to(wide)]
        expected = changed[0] if changed else base[entry]
        if len(changed) > 1:
            total = torch.zeros((), dtype=wide)
            for value in changed:
                total = total + (value.to(wide) - base[entry].to(wide))
            total = total / len(changed) if overlap == "mean" else total
            expected = (base[entry].to(wide) + total).to(dtype)
        assert same_bits(result[entry], expected)


def test_a_sum_of_two_trainings_ends_between_them(tmp_path):
    base = {"a": torch.zeros(8)}
    base_dir, paths = deltas_of(tmp_path, base, {"a": torch.full((8,), 1.0)}, {"a": torch.full((8,), 3.0)})
    assert merged(tmp_path, base_dir, paths, overlap="sum")["a"].tolist() == [4.0] * 8
    (tmp_path / "mean").mkdir()
    assert merged(tmp_path / "mean", base_dir, paths, overlap="mean")["a"].tolist() == [2.0] * 8


def test_an_entry_of_one_delta_stays_exact_beside_a_sum(tmp_path):
    """1e8 + (1 - 1e8) in fp32 is 0: an entry that need not be computed must not be."""
    base = {"a": torch.tensor([1e8, 1.0, 1.0])}
    one, two = {"a": torch.tensor([1.0, 2.0, 1.0])}, {"a": torch.tensor([1e8, 3.0, 1.0])}
    result = merged(tmp_path, *deltas_of(tmp_path, base, one, two), overlap="sum")
    assert result["a"].tolist() == [1.0, 4.0, 1.0]


def test_whole_numbers_have_no_sum(tmp_path):
    base = {"a": torch.zeros(8, dtype=torch.int8), "w": torch.zeros(8)}
    models = [{"a": torch.full((8,), n, dtype=torch.int8), "w": torch.full((8,), float(n))} for n in (1, 2)]
    base_dir, paths = deltas_of(tmp_path, base, *models)
    with pytest.raises(UsageError, match=r"8 of a; their dtype has no sum; whole=\"last\""):
        delta.merge(base_dir, paths, tmp_path / "m", overlap="sum")
    result = merged(tmp_path, base_dir, paths, overlap="sum", whole="last")
    assert (result["a"].tolist(), result["w"].tolist()) == ([2] * 8, [3.0] * 8)


def test_what_can_only_be_taken_whole_is_taken_of_one_or_goes_by_its_rule(tmp_path):
    base = {"a": noise(4), "head": noise(4)}
    one = {"a": with_changes(base["a"], [0]), "classifier": noise(2)}
    two = {"a": base["a"], "head": base["head"], "extra": noise(3)}
    three = {"a": base["a"], "head": base["head"], "classifier": noise(2, seed=1)}
    base_dir, paths = deltas_of(tmp_path, base, one, two, three)
    result = merged(tmp_path, base_dir, paths[:2])
    assert result.keys() == {"a", "classifier", "extra"}
    assert same_bits(result["a"], one["a"])
    with pytest.raises(UsageError, match=r"2 of the deltas change tensor classifier, each to something else"):
        delta.merge(base_dir, paths, tmp_path / "n")
    (tmp_path / "last").mkdir()
    assert same_bits(merged(tmp_path / "last", base_dir, paths, whole="last")["classifier"], three["classifier"])


def test_small_files_go_by_the_rule_for_what_is_taken_whole(tmp_path):
    base = {"a": noise(4)}
    files = [{"config.json": "1", "vocab.txt": "v"}, {"config.json": "2"}, {"config.json": "1"}]
    base_dir, paths = deltas_of(tmp_path, base, base, base, base, files=files)
    merged(tmp_path, base_dir, [paths[0], paths[2]])
    assert small_files(tmp_path / "out") == {"config.json": b"1", "vocab.txt": b"v"}
    with pytest.raises(UsageError, match=r"change config\.json, each to something else"):
        delta.merge(base_dir, paths[:2], tmp_path / "n", overlap="mean")
    (tmp_path / "last").mkdir()
    merged(tmp_path / "last", base_dir, paths[:2], overlap="mean", whole="last")
    assert small_files(tmp_path / "last" / "out") == {"config.json": b"2", "vocab.txt": b"v"}


def test_a_merged_model_is_sharded_as_the_base_is(tmp_path):
    base = {name: noise(20, seed=n) for n, name in enumerate("abc")}
    base_dir = write_model(tmp_path / "base", base, shards=[["a"], ["b", "c"]])
    paths = []
    for n, change in enumerate(({"a": with_changes(base["a"], [1])}, {"d": noise(3)})):
        delta.diff(base_dir, write_model(tmp_path / f"t{n}", base | change), tmp_path / f"{n}")
        paths.append(tmp_path / f"{n}")
    result = merged(tmp_path, base_dir, paths)
    assert result.keys() == set("abcd")
    assert same_bits(result["a"], with_changes(base["a"], [1]))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2


def test_a_merged_delta_can_be_merged_again(tmp_path):
    base = {"a": noise(40)}
    models = [{"a": with_changes(base["a"], [n])} for n in range(3)]
    base_dir, paths = deltas_of(tmp_path, base, *models)
    delta.merge(base_dir, paths[:2], tmp_path / "two")
    result = merged(tmp_path, base_dir, [tmp_path / "two", paths[2]])
    assert same_bits(result["a"], with_changes(base["a"], range(3)))


def test_the_merge_of_one_is_that_one(tmp_path):
    base = {"a": noise(40)}
    base_dir, paths = deltas_of(tmp_path, base, {"a": with_changes(base["a"], [3])})
    delta.merge(base_dir, paths, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == paths[0].read_bytes()


def test_a_delta_of_another_base_is_refused(tmp_path):
    base = {"a": noise(40)}
    base_dir, _ = deltas_of(tmp_path, base, base)
    _, others = deltas_of(tmp_path / "other", {"a": with_changes(base["a"], [1])}, {"a": with_changes(base["a"], [2])})
    with pytest.raises(UsageError, match=r"another base model than .*: tensor a has other values"):
        delta.merge(base_dir, others, tmp_path / "m")


@pytest.mark.parametrize(
    ("paths", "rules", "message"),
    [
        ([], {}, r"paths=\[\] names no delta"),
        (["d"], {"overlap": "first"}, "overlap='first' is unknown"),
        (["d"], {"whole": "sum"}, "whole='sum' is unknown"),
        (["d"], {}, "there is no delta d"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, paths, rules, message):
    base_dir = write_model(tmp_path / "base", {"a": noise(4)})
    with pytest.raises(UsageError, match=message):
        delta.merge(base_dir, paths, tmp_path / "m", **rules)
