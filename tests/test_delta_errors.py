"""What is wrong with a delta or a checkpoint is said, and nothing on the disk is harmed."""

from __future__ import annotations

import hashlib
import json
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from delta_support import everything, noise, same_model, with_changes, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradselect import UsageError, delta


@pytest.fixture
def models(tmp_path):
    """Folders of a base and a tuned model, and a delta with a tensor of each kind."""
    before = {"dense": noise(8), "sparse": noise(40), "same": noise(4), "whole": noise(3)}
    after = {
        **before,
        "dense": before["dense"] + 1,
        "sparse": with_changes(before["sparse"], [5, 30]),
        "whole": noise(4),
    }
    base = write_model(tmp_path / "base", before, files={"vocab.txt": "a"})
    tuned = write_model(tmp_path / "tuned", after, files={"config.json": "{}", "vocab.txt": "a"})
    delta.diff(base, tuned, tmp_path / "d")
    return base, tuned, tmp_path / "d"


def rewritten(path: Path, *, tensors=None, drop=(), manifest=None, **metadata):
    """The delta with some of it replaced."""
    with safe_open(path, framework="pt") as file:
        old = dict(file.metadata())
    if manifest is not None:
        content = json.loads(old["manifest"])
        manifest(content)
        old["manifest"] = json.dumps(content)
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    old["sha256"] = hashlib.sha256(old["manifest"].encode()).hexdigest()
    other = path.with_name("rewritten")
    save_file({**kept, **(tensors or {})}, other, metadata={**old, **metadata})
    return other


def refused(message: str, base: Path, path: Path) -> None:
    """apply says so, and leaves nothing behind."""
    out = base.parent / "out"
    before = everything(base.parent)
    with pytest.raises(UsageError, match=message):
        delta.apply(base, path, out)
    assert everything(base.parent) == before
    assert not out.exists()


def test_another_base_is_refused_with_the_first_tensor_that_differs(tmp_path, models):
    base, _, path = models
    tensors = load_file(base / "model.safetensors")
    other = write_model(tmp_path / "other", {**tensors, "same": tensors["same"] + 1, "sparse": tensors["sparse"] + 1})
    refused("was made with another base model than .*other: tensor same has other values", other, path)
    other = write_model(tmp_path / "less", {"dense": tensors["dense"]})
    refused("tensor same is in the delta only", other, path)
    other = write_model(tmp_path / "more", {**tensors, "more": noise(1)})
    refused("tensor more is in the model only", other, path)
    other = write_model(tmp_path / "cast", {**tensors, "same": tensors["same"].half()})
    refused(r"tensor same is F32 \[4\] there, F16 \[4\] here", other, path)


def test_base_and_tuned_taken_for_each_other_is_pointed_out(tmp_path, models):
    base, tuned, path = models
    refused("tensor dense is the tuned model's here; apply takes the base, revert the tuned model", tuned, path)
    with pytest.raises(UsageError, match=r"another tuned model .* tensor dense is the base model's here"):
        delta.revert(base, path, tmp_path / "out")


def test_a_small_file_that_is_taken_over_must_be_the_same(models):
    base, tuned, path = models
    (base / "config.json").write_text("changed: the delta brings the tuned model's, so it does not matter")
    delta.apply(base, path, base.parent / "applied")
    assert same_model(base.parent / "applied", tuned)
    (base / "vocab.txt").write_text("b")
    refused(r"vocab\.txt of .*base is another one", base, path)
    (base / "vocab.txt").unlink()
    refused(r"vocab\.txt of .*base is missing", base, path)


def test_a_delta_that_is_none_is_refused(tmp_path, models):
    base, _, path = models
    refused("there is no delta .*nothing; make one with: gradselect delta diff", base, tmp_path / "nothing")
    refused("there is no delta", base, tmp_path)
    refused("is a safetensors file but no delta: its format is 'pt'", base, base / "model.safetensors")
    refused("is no whole safetensors file", base, base / "config.json")
    refused("has version '4' of the format, this gradselect reads '1', '2' and '3'", base, rewritten(path, version="4"))
    refused("manifest cannot be read", base, rewritten(path, manifest=lambda m: m.pop("changes")))
    refused("manifest cannot be read", base, rewritten(path, manifest=lambda m: m.update(base=3)))


def test_a_delta_cut_off_anywhere_is_refused(tmp_path, models):
    base, _, path = models
    content = path.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        refused("is no whole safetensors file", base, tmp_path / "cut")


@pytest.mark.parametrize(
    "indices", [[5, 40], [-1, 30], [30, 5], [5, 5], [5, 2**31 - 1]], ids=["past", "negative", "order", "twice", "far"]
)
def test_an_index_out_of_its_tensor_is_refused(models, indices):
    base, _, path = models
    bad = rewritten(path, tensors={"index:sparse": torch.tensor(indices, dtype=torch.int32)})
    refused("indices of sparse are not ascending within its 40 entries", base, bad)


def test_stored_tensors_that_do_not_fit_are_refused(models):
    base, _, path = models
    refused("index:sparse is missing", base, rewritten(path, drop=["index:sparse"]))
    refused("has no tensor tuned:whole", base, rewritten(path, drop=["tuned:whole"]))
    refused(r"xor:dense is torch.int32 \[7\]", base, rewritten(path, tensors={"xor:dense": torch.zeros(7).int()}))
    refused(r"xor:dense is torch.float32", base, rewritten(path, tensors={"xor:dense": torch.zeros(8)}))
    refused(
        "dense does not become the tuned model's", base, rewritten(path, tensors={"xor:dense": torch.zeros(8).int()})
    )
    refused("whole has another shape", base, rewritten(path, tensors={"tuned:whole": noise(5)}))
    refused("its copy of config.json", base, rewritten(path, tensors={"tuned_file:config.json": torch.zeros(2).byte()}))


@pytest.mark.parametrize(
    "name", ["../config.json", "/tmp/config.json", "a/../../config.json", "..", "evil.sh", "a\\b.py"]
)
def test_a_delta_cannot_write_outside_its_folder(models, name):
    def escape(manifest):
        manifest["tuned"]["files"][name] = manifest["tuned"]["files"].pop("config.json")

    base, _, path = models
    refused("manifest cannot be read", base, rewritten(path, manifest=escape))


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", ".safetensors", "a/b.safetensors"])
def test_a_delta_cannot_put_weights_outside_its_folder(models, name):
    def escape(manifest):
        manifest["tuned"]["shards"] = {name: {}}
        for entry in manifest["tuned"]["tensors"].values():
            entry["shard"] = name

    base, _, path = models
    refused("manifest cannot be read", base, rewritten(path, manifest=escape))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_flipped_bit_makes_another_model(data):
    """A delta with one bit of it wrong is refused, or what it says is right all the same (a space in its header)."""
    with tempfile.TemporaryDirectory() as folder:
        weight = noise(40)
        base = write_model(Path(folder, "base"), {"w": weight, "v": noise(3)})
        tuned = write_model(Path(folder, "tuned"), {"w": with_changes(weight, [3, 9]), "v": noise(3, seed=1)})
        path = Path(folder, "d")
        delta.diff(base, tuned, path)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            delta.apply(base, path, Path(folder, "out"))
        except UsageError:
            assert not Path(folder, "out").exists()
        else:
            assert {"w", "v"} == load_file(Path(folder, "out", "model.safetensors")).keys()
            assert delta.fingerprint(Path(folder, "out")) == delta.fingerprint(tuned)


def test_folders_without_safetensors_are_refused_with_what_to_do(tmp_path, models):
    _, tuned, _ = models

    def refused_base(message: str, folder: Path) -> None:
        with pytest.raises(UsageError, match=message):
            delta.diff(folder, tuned, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    refused_base("nowhere is no folder", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused_base("empty holds no weights: neither model.safetensors nor", empty)
    (empty / "adapter_model.safetensors").touch()
    refused_base("holds an adapter, no model; merge it first", empty)
    (empty / "pytorch_model.bin").touch()
    refused_base(r"as a torch pickle; convert it first: .*save_pretrained\(new_folder\)", empty)
    (empty / "model.safetensors").write_bytes(b"no")
    refused_base("is no whole safetensors file", empty)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of shards"),
        ("{}", "is no index of shards"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names '../model.safetensors', which is no safetensors file"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "model-1.safetensors is no whole safetensors file"),
        ('{"weight_map": {"a": "model-2.safetensors"}}', "it has no tensor a"),
        ('{"weight_map": {}}', "have no tensor"),
    ],
)
def test_a_wrong_index_of_shards_is_refused(tmp_path, models, index, message):
    _, tuned, _ = models
    base = tmp_path / "sharded"
    base.mkdir()
    save_file({"b": noise(1)}, base / "model-2.safetensors")
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UsageError, match=message):
        delta.diff(base, tuned, tmp_path / "new")


def test_what_is_there_is_not_written_over(tmp_path, models):
    base, tuned, path = models
    before = everything(tmp_path)
    for attempt in (
        lambda: delta.diff(base, tuned, path),
        lambda: delta.merge(base, [path], path),
        lambda: delta.apply(base, path, tuned),
        lambda: delta.revert(tuned, path, base),
        lambda: delta.apply(base, path, path),
    ):
        with pytest.raises(UsageError, match="exists already and is not empty"):
            attempt()
    with pytest.raises(UsageError, match="base is a folder; name a file"):
        delta.diff(base, tuned, base)
    assert everything(tmp_path) == before


def test_an_empty_folder_and_a_new_path_are_fine(tmp_path, models):
    base, tuned, path = models
    (tmp_path / "empty").mkdir()
    delta.apply(base, path, tmp_path / "empty")
    delta.apply(base, path, tmp_path / "some" / "new" / "folder")
    assert same_model(tmp_path / "empty", tuned)
    assert same_model(tmp_path / "some" / "new" / "folder", tuned)


@contextmanager
def no_file_above(size: int):
    """What a full disk does: a write fails midway."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, models):
    base, tuned, path = models
    (tmp_path / "empty").mkdir()
    before = everything(tmp_path)
    for attempt in (
        lambda: delta.diff(base, tuned, tmp_path / "new"),
        lambda: delta.merge(base, [path], tmp_path / "new"),
        lambda: delta.apply(base, path, tmp_path / "new"),
        lambda: delta.revert(tuned, path, tmp_path / "empty"),
    ):
        with no_file_above(100), pytest.raises(UsageError, match=r"could not write .* MiB free on the disk"):
            attempt()
    assert everything(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d", "empty", "tuned"]


def test_a_place_that_cannot_be_written_to_is_said(tmp_path, models):
    base, tuned, path = models
    with pytest.raises(UsageError, match="could not write"):
        delta.diff(base, tuned, path / "below" / "a_file")
    with pytest.raises(UsageError, match="could not write"):
        delta.apply(base, path, path / "out")


def test_a_base_of_other_shapes_is_refused_and_nothing_is_written(tmp_path):
    """It made a file of both models, and said that all of it had changed."""
    base = write_model(tmp_path / "base", {f"layer.{n}": noise(8, 8) for n in range(4)})
    tuned = write_model(tmp_path / "tuned", {f"layer.{n}": noise(8, 9) for n in range(4)})
    with pytest.raises(UsageError, match=r"4 have another shape .*\(layer\.0: \[8, 8\] and \[8, 9\]\)"):
        delta.diff(base, tuned, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert delta.diff(base, tuned, tmp_path / "d", unrelated=True).num_whole == 4


def test_a_base_of_other_names_or_depth_is_refused(tmp_path):
    tuned = write_model(tmp_path / "tuned", {f"layer.{n}": noise(8, 8) for n in range(12)})
    for name, tensors in {
        "other names": {f"block.{n}": noise(8, 8) for n in range(12)},
        "shallow": {f"layer.{n}": noise(8, 8) for n in range(3)},
    }.items():
        base = write_model(tmp_path / name, tensors)
        with pytest.raises(UsageError, match=r"in the second \("):
            delta.diff(base, tuned, tmp_path / "d")


def test_a_base_of_another_vocabulary_is_refused_and_added_tokens_are_not(tmp_path):
    """Rows of a resized embedding that came from the base are near what they were, or the layers are."""
    rows, layers = noise(20, 8, seed=1), {f"layer.{n}": noise(8, 8, seed=n) for n in range(3)}
    base = write_model(tmp_path / "base", {"embed": rows, **layers})
    added = {"embed": torch.cat([rows + 0.01, noise(2, 8, seed=7)]), **layers}
    assert delta.diff(base, write_model(tmp_path / "added", added), tmp_path / "a").num_whole == 1
    other = {"embed": noise(30, 8, seed=9), **{name: noise(8, 8, seed=50) for name in layers}}
    with pytest.raises(UsageError, match=r"other rows \(embed: \[20, 8\] and \[30, 8\]\)"):
        delta.diff(base, write_model(tmp_path / "other", other), tmp_path / "o")
