"""Delta files: apply gives the tuned model to the bit, revert the base, and the file holds no more than it must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from delta_support import (
    everything,
    noise,
    read_model,
    same_bits,
    same_model,
    small_files,
    with_changes,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_llama, tiny_lora

import gradselect as gs
from gradselect import delta
from gradselect.delta.file import index_dtype

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
)
SHAPES = ((), (0,), (3, 0), (1,), (7,), (3, 5), (2, 3, 4))
SHARED = Path(os.environ.get("GRADSELECT_SHARED", Path(__file__).parents[2] / "shared"))


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def round_trip(folder: Path, base: Path, tuned: Path) -> delta.DeltaSummary:
    """Both ways through a delta; each end must be what it was."""
    summary = delta.diff(base, tuned, folder / "d.safetensors")
    delta.apply(base, folder / "d.safetensors", folder / "applied")
    delta.revert(tuned, folder / "d.safetensors", folder / "reverted")
    assert same_model(folder / "applied", tuned)
    assert same_model(folder / "reverted", base)
    return summary


@st.composite
def pairs_of_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of random bits, NaN of every kind among them, and one with the bits of some entries changed."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = torch.Size(shape).numel() * dtype.itemsize
    largest = 2 if dtype == torch.bool else 256
    base = torch.randint(largest, (size,), generator=generator, dtype=torch.uint8)
    changed = torch.rand(size, generator=generator) < draw(st.sampled_from((0.0, 0.02, 0.3, 1.0)))
    tuned = torch.where(changed, torch.randint(largest, (size,), generator=generator, dtype=torch.uint8), base)
    return base.view(dtype).view(shape), tuned.view(dtype).view(shape)


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs_of_tensors(), min_size=1, max_size=4))
def test_apply_and_revert_are_exact_for_every_dtype_and_bit_pattern(pairs):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_model(folder / "base", {f"t{n}": before for n, (before, _) in enumerate(pairs)})
        tuned = write_model(folder / "tuned", {f"t{n}": after for n, (_, after) in enumerate(pairs)})
        summary = round_trip(folder, base, tuned)
        assert summary.num_dense + summary.num_sparse == sum(not same_bits(*pair) for pair in pairs)


def test_only_what_changed_is_stored_and_in_the_smaller_form(tmp_path):
    before = {name: noise(100, seed=n) for n, name in enumerate(("same", "few", "half", "most"))}
    after = {
        "same": before["same"].clone(),
        "few": with_changes(before["few"], [3, 99]),
        # fp32: index and value are 8 bytes an entry, dense ones 4; 50 of 100 is the first that is not smaller
        "half": with_changes(before["half"], range(50)),
        "most": with_changes(before["most"], range(49)),
    }
    delta.diff(write_model(tmp_path / "a", before), write_model(tmp_path / "b", after), tmp_path / "d")
    tensors = stored(tmp_path / "d")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "index:few": (2,),
        "xor:few": (2,),
        "xor:half": (100,),
        "index:most": (49,),
        "xor:most": (49,),
    }
    assert tensors["index:few"].dtype == torch.int32
    assert tensors["index:few"].tolist() == [3, 99]


def test_minus_zero_and_another_nan_are_changes(tmp_path):
    bits = torch.tensor([0, 0x7FC00000, 0x7FC00000] + [0] * 20, dtype=torch.int32)
    others = bits.clone()
    others[0], others[1] = -(2**31), 0x7FC00001
    base = write_model(tmp_path / "base", {"w": bits.view(torch.float32)})
    tuned = write_model(tmp_path / "tuned", {"w": others.view(torch.float32)})
    assert round_trip(tmp_path, base, tuned).num_changed_entries == 2


def test_indices_are_int64_only_where_int32_ends():
    assert index_dtype(2**31) == torch.int32  # the last index is 2³¹ - 1
    assert index_dtype(2**31 + 1) == torch.int64


def test_int64_indices_apply_and_revert(tmp_path, monkeypatch):
    """What a tensor of more than 2³¹ entries does, with the limit at none."""
    for module in ("file", "difference"):
        monkeypatch.setattr(f"gradselect.delta.{module}.index_dtype", lambda num_entries: torch.int64)
    weight = noise(50)
    base = write_model(tmp_path / "base", {"w": weight})
    round_trip(tmp_path, base, write_model(tmp_path / "tuned", {"w": with_changes(weight, [49])}))
    assert stored(tmp_path / "d.safetensors")["index:w"].dtype == torch.int64


def test_new_gone_reshaped_and_recast_tensors_come_and_go(tmp_path):
    same = noise(4, 4)
    base = write_model(
        tmp_path / "base", {"same": same, "lm_head": noise(8, 4), "tokens": noise(8, 4), "norm": noise(4)}
    )
    tuned = write_model(
        tmp_path / "tuned",
        {"same": same, "classifier": noise(2, 4), "tokens": noise(9, 4), "norm": noise(4, dtype=torch.bfloat16)},
    )
    summary = round_trip(tmp_path, base, tuned)
    assert (summary.num_whole, summary.num_dense, summary.num_sparse) == (4, 0, 0)
    assert summary.num_changed_entries == 2 * 4 + 9 * 4 + 4


def test_small_files_come_and_go_and_files_of_a_run_stay_out(tmp_path):
    weights = {"w": noise(4)}
    base = write_model(
        tmp_path / "base", weights, files={"tokenizer.json": "{}", "merges.txt": "a b", "generation_config.json": "{}"}
    )
    tuned = write_model(
        tmp_path / "tuned",
        weights,
        files={
            "config.json": '{"tuned": true}',
            "tokenizer.json": "{}",
            "chat_template.jinja": "",
            "added_tokens.json": "1",
        },
    )
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    delta.diff(base, tuned, tmp_path / "d")
    delta.apply(base, tmp_path / "d", tmp_path / "applied")
    delta.revert(tuned, tmp_path / "d", tmp_path / "reverted")
    assert everything(tmp_path / "applied") == everything(tuned)
    assert everything(tmp_path / "reverted") == everything(base)

    (tuned / "run.json").write_text("{}")
    (tuned / "training_args.bin").write_bytes(b"1")
    delta.diff(base, tuned, tmp_path / "d2")
    delta.apply(base, tmp_path / "d2", tmp_path / "applied2")
    assert everything(tmp_path / "applied2") == everything(tmp_path / "applied")


@pytest.mark.parametrize(
    ("base_shards", "tuned_shards"),
    [([["a"], ["b", "c"]], []), ([], [["c", "a"], ["b"]]), ([["a", "b", "c"]], [["a"], ["b"], ["c"]])],
)
def test_base_and_tuned_may_be_sharded_differently(tmp_path, base_shards, tuned_shards):
    before = {name: noise(20, seed=n) for n, name in enumerate("abc")}
    after = before | {"b": with_changes(before["b"], [5])}
    base = write_model(tmp_path / "base", before, shards=base_shards)
    tuned = write_model(tmp_path / "tuned", after, shards=tuned_shards)
    assert round_trip(tmp_path, base, tuned).num_changed_entries == 1


def test_the_fingerprint_is_of_the_contents_alone(tmp_path):
    tensors = {name: noise(6, seed=n) for n, name in enumerate("abc")}
    one = delta.fingerprint(write_model(tmp_path / "one", tensors))
    assert delta.fingerprint(write_model(tmp_path / "many", tensors, shards=[["c"], ["b", "a"]])) == one
    others = [
        {"a": tensors["b"], "b": tensors["a"], "c": tensors["c"]},
        tensors | {"a": tensors["a"].view(2, 3)},
        tensors | {"a": tensors["a"].view(torch.int32)},
        tensors | {"a": with_changes(tensors["a"], [0])},
        {"a": tensors["a"], "b": tensors["b"]},
    ]
    prints = {delta.fingerprint(write_model(tmp_path / str(n), other)) for n, other in enumerate(others)}
    assert len(prints | {one}) == 6


def test_a_delta_is_the_same_file_each_time(tmp_path):
    before = {name: noise(20, seed=n) for n, name in enumerate("abc")}
    base = write_model(tmp_path / "base", before)
    tuned = write_model(tmp_path / "tuned", before | {"a": with_changes(before["a"], [1])}, files={"vocab.txt": "a"})
    delta.diff(base, tuned, tmp_path / "1")
    delta.diff(base, tuned, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_equal_models_make_a_delta_of_nothing(tmp_path):
    tensors = {"w": noise(4)}
    summary = round_trip(tmp_path, write_model(tmp_path / "base", tensors), write_model(tmp_path / "tuned", tensors))
    assert (summary.num_changed_entries, summary.num_changed_files) == (0, 0)
    assert not stored(tmp_path / "d.safetensors")


def test_neither_model_is_written_to(tmp_path):
    weight = noise(20)
    base = write_model(tmp_path / "base", {"w": weight})
    tuned = write_model(tmp_path / "tuned", {"w": with_changes(weight, [1])})
    before = everything(base), everything(tuned)
    round_trip(tmp_path, base, tuned)
    assert (everything(base), everything(tuned)) == before


# With transformers ------------------------------------------------------------------------------------------------


def trained_in_blocks(model: torch.nn.Module, *, steps: int) -> list[str]:
    """Train a few whole blocks; their parameters' names."""
    optimizer = gs.BlockOptimizer(model, policy=gs.Uniform(fraction=0.2, seed=0), lr=1e-2)
    selected = set()
    for step in range(steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        selected |= set(optimizer.last_record.selected)
        optimizer.zero_grad()
    optimizer.close()
    ids = {id(p) for block in gs.partition(model) if block.name in selected for p in block.parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) in ids]


@pytest.mark.parametrize("tied", [False, True])
def test_training_whole_blocks_leaves_dense_tensors_of_these_alone(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tied=tied)
    model.save_pretrained(tmp_path / "base")
    names = trained_in_blocks(model, steps=2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    summary = round_trip(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert set(stored(tmp_path / "d.safetensors")) == {f"xor:{name}" for name in names}
    assert 0 < summary.num_dense < summary.num_tensors

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "applied")
    batch = tiny_batch(model, seed=9)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_classifier_made_of_a_language_model_loads_like_the_tuned_one(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tiny_llama().save_pretrained(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    tuned = AutoModelForSequenceClassification.from_config(config)
    tuned.save_pretrained(tmp_path / "tuned")
    round_trip(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "applied")) is type(tuned)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "reverted").lm_head.weight.shape == (64, 16)


def test_a_merged_adapter_changes_the_matrices_it_was_on(tmp_path):
    model = tiny_lora()
    model.unload().save_pretrained(tmp_path / "base")
    model = tiny_lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    round_trip(tmp_path, tmp_path / "base", tmp_path / "tuned")
    changed = {name.split(":")[1] for name in stored(tmp_path / "d.safetensors")}
    assert changed == {f"model.layers.{n}.self_attn.{w}_proj.weight" for n in range(4) for w in "qv"}


def test_one_percent_of_a_trained_model_is_a_small_file(tmp_path):
    base = SHARED / "models" / "llama-3.5M-tinystories"
    if not base.is_dir():
        pytest.skip(f"no {base}; GRADSELECT_SHARED names the folder it is in")
    tensors, generator = read_model(base), torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor[torch.rand(tensor.shape, generator=generator) < 0.01] += 0.01
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned, copy_function=shutil.copyfile)
    tuned.chmod(0o755)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    summary = delta.diff(base, tuned, tmp_path / "d")
    # 4 bytes of index and 2 of value for each entry of 2 bytes, and a manifest of about 450 bytes a tensor
    assert summary.delta_bytes < 0.01 * 3.1 * summary.tuned_bytes + 600 * summary.num_tensors
    delta.apply(base, tmp_path / "d", tmp_path / "applied")
    delta.revert(tuned, tmp_path / "d", tmp_path / "reverted")
    assert everything(tmp_path / "applied")["model.safetensors"] == everything(tuned)["model.safetensors"]
    assert all(
        same_bits(a, b)
        for a, b in zip(read_model(base).values(), read_model(tmp_path / "reverted").values(), strict=True)
    )
    assert small_files(tmp_path / "applied").keys() == {p.name for p in base.iterdir()} - {
        "README.md",
        "model.safetensors",
    }


MEASURE = """
import sys, threading
from pathlib import Path
from gradselect import delta

def anonymous():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    global most
    while not done.wait(0.0005):
        most = max(most, anonymous())

folder, done = Path(sys.argv[1]), threading.Event()
most = start = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
delta.diff(folder / "base", folder / "tuned", folder / "d")
delta.apply(folder / "base", folder / "d", folder / "applied")
delta.merge(folder / "base", [folder / "d", folder / "d"], folder / "m", overlap="mean")
done.set()
watcher.join()
print(most - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process from /proc")
def test_memory_is_a_few_tensors_whatever_the_model(tmp_path):
    """Two models of 24 MiB in tensors of 1 MiB; pages of the mapped files are the system's cache and do not count.

    malloc would keep freed memory of this size; the threshold makes it give it back at once.
    """
    weight = noise(2**18)
    names = [f"layer.{n}" for n in range(24)]
    for folder, tensor in (("base", weight), ("tuned", with_changes(weight, range(0, 2**18, 3)))):
        write_model(tmp_path / folder, {name: tensor.clone() for name in names})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10 * weight.nbytes


def test_the_file_is_readable_without_this_library(tmp_path):
    weight = noise(20)
    base = write_model(tmp_path / "base", {"w": weight})
    delta.diff(base, write_model(tmp_path / "tuned", {"w": with_changes(weight, [7])}), tmp_path / "d")
    with safe_open(tmp_path / "d", framework="pt") as file:
        assert file.metadata()["format"] == "gradselect.delta"
        index, xor = file.get_tensor("index:w"), file.get_tensor("xor:w")
    bits = weight.view(torch.int32).clone()
    bits[index.long()] ^= xor
    assert torch.equal(bits.view(torch.float32), with_changes(weight, [7]))
