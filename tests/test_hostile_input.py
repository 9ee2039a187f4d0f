"""Input from anywhere: nothing in it is run, nothing is believed that cannot be, and what is wrong is said in words."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_fixtures import recipe_values, write_model

from gradselect import UsageError, delta
from gradselect.app.compare.suite import load_suite
from gradselect.app.data import columnar_rows, text_lines
from gradselect.app.data.rows import read_rows
from gradselect.app.evaluate import EvaluationSettings, read_evaluation
from gradselect.app.evaluate.language_model import load
from gradselect.app.inputs.examples import render_examples
from gradselect.app.inputs.model import load_model
from gradselect.app.recipe import ModelSettings, Recipe, TextData, load_recipe
from gradselect.files.checked_json import read_sealed, sealed
from gradselect.files.manifest import MANIFEST_NAME, write_manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load_plainly(folder: Path, **options: Any) -> Any:
    return load_model(ModelSettings(path=str(folder), dtype="float32", **options))


def attempted(read: Callable[[], Any]) -> tuple[Any, str]:
    """What is read, or None and the message for the user."""
    try:
        return read(), ""
    except UsageError as error:
        return None, str(error)


def is_clear(said: str) -> bool:
    """A few lines that a terminal can show."""
    return 0 < len(said) < 25_000 and all(line.isprintable() for line in said.splitlines())


# Models --------------------------------------------------------------------------------------------------------------


def to_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def test_pickled_weights_are_refused_unless_asked_for(model: Path) -> None:
    expected = load_plainly(model).state_dict()
    to_pickle(model)
    with pytest.raises(UsageError, match=r"torch pickle only \(pytorch_model\.bin\).*model\.trust_pickle=true"):
        load_plainly(model)
    with pytest.raises(UsageError, match=r"torch pickle only .*convert it: AutoModelForCausalLM\.from_pretrained"):
        load(EvaluationSettings(model=str(model), task="loss", data="none.txt", device="cpu"))
    found = load_plainly(model, trust_pickle=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_code_of_a_checkpoint_is_not_run_and_nobody_is_asked(model: Path, tmp_path: Path) -> None:
    (model / "code.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\n")
    change_config(model, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with pytest.raises(UsageError, match="trust_remote_code"):
        load_plainly(model)
    with pytest.raises(UsageError, match="trust_remote_code"):
        load(EvaluationSettings(model=str(model), task="loss", data="none.txt", device="cpu"))
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_shards_lie_in_the_folder_of_their_index(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="which is no safetensors file beside it"):
        load_plainly(model)


@pytest.mark.parametrize("random_weights", [True, False], ids=["random", "read"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**12},
        {"hidden_size": 10**400},
    ],
    ids=["width", "layers", "vocabulary", "mlp", "digits"],
)
def test_sizes_that_no_machine_holds_are_refused_before_anything_is_allocated(
    model: Path, sizes: dict[str, int], random_weights: bool
) -> None:
    change_config(model, **sizes)
    with pytest.raises(UsageError, match=rf"cannot be used: .*{next(iter(sizes))}|cannot be used.*integer"):
        load_plainly(model, random_weights=random_weights)


def test_a_header_that_claims_petabytes_is_refused(model: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match="cannot be used"):
        load_plainly(model)
    (model / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match=r"cannot be used: .*damaged or was cut off: copy or download it again"):
        load_plainly(model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(model: Path, name: str) -> None:
    """A clone without git-lfs has such files; "header too large" told nobody what to do."""
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(UsageError, match=rf"{name} is a pointer of Git LFS .*: git lfs pull"):
        load(EvaluationSettings(model=str(model), task="loss", data="none.txt", device="cpu"))


def test_a_trained_model_is_read_as_it_was_written_or_not_at_all(model: Path) -> None:
    """One bit of a weight changes nothing that could be seen otherwise."""
    write_manifest(model, step=3)
    load_plainly(model)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"model\.safetensors is not as it was written.*delete .*{MANIFEST_NAME}"):
        load_plainly(model)
    (model / MANIFEST_NAME).unlink()
    load_plainly(model)


def test_a_manifest_of_another_program_is_none_of_ours(model: Path) -> None:
    (model / "manifest.json").write_text('{"files": ["gone"], "version": 1}')
    load_plainly(model)


def test_a_manifest_that_is_not_as_it_was_written_is_damaged(model: Path) -> None:
    write_manifest(model, step=3)
    text = (model / MANIFEST_NAME).read_text()
    for key in ("files", "sha256", "step"):
        changed = text.replace(f'\n "{key}"', '\n "x"')
        assert changed != text
        (model / MANIFEST_NAME).write_text(changed)
        with pytest.raises(UsageError, match=rf"{MANIFEST_NAME}: damaged"):
            load_plainly(model)
    (model / MANIFEST_NAME).write_text(json.dumps({"version": 1, "step": 1, "files": {"config.json": "0"}}))
    with pytest.raises(UsageError, match=rf"{MANIFEST_NAME}: damaged"):
        load_plainly(model)


def test_a_hub_model_of_pickles_names_the_line_to_type(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says not to set an option that nobody has set."""

    def without_safetensors(*_: Any, **__: Any) -> None:
        raise OSError("owner/name does not appear to have a file. Please do not set `use_safetensors=True`.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", without_safetensors)
    with pytest.raises(UsageError, match=r"model\.trust_pickle=true"):
        load_plainly(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_the_users_error(model: Path, name: str) -> None:
    """tokenizers raises a bare Exception."""
    (model / name).write_text('{"version": "1.0", "model": 7}')
    if name == "tokenizer.json":
        with pytest.raises(UsageError, match="there is no tokenizer"):
            load(EvaluationSettings(model=str(model), task="loss", data="none.txt", device="cpu"))
    write_manifest(model, step=1)
    (model / name).write_text("[]")
    with pytest.raises(UsageError, match=f"{name} is not as it was written"):
        load(EvaluationSettings(model=str(model), task="loss", data="none.txt", device="cpu"))


# Recipes -------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
NO_RECIPES: dict[str, tuple[str, str]] = {
    "billion laughs": (LAUGHS, "more than 20,000 values"),
    "an alias of itself": ("run: &x [*x]", "levels deep, or an alias of itself"),
    "deep": ("[" * 100 + "]" * 100, "levels deep"),
    "very deep": ("[" * 20_000, "levels deep"),
    "object": ("!!python/object/apply:os.system ['exit']", "could not determine a constructor"),
    "date": ("run: 2024-13-45", "month must be in 1..12"),
    "digits": (f"run: {'1' * 5000}", "digits"),
    "bool": ("run: !!bool perhaps", "no valid YAML"),
    "timestamp": ("run: !!timestamp soon", "no valid YAML"),
    "zero byte": ('run: "a\\0b"', "cannot be written"),
    "half a character": ('run: "\\ud800"', "cannot be written"),
    "large": ("# " + "x" * 2**18, "larger than the limit of 262,144 bytes"),
    "many problems": ("\n".join(f"k{n}: 1" for n in range(100)), "and 85 more"),
    "its own base by another name": ("base: ././recipe.yaml", "is its own base"),
    "a base without end": ("base: /dev/zero", "no such recipe"),
    "a base of many letters": (f"base: {'x' * 5000}", "no such recipe"),
    "a key with line ends": ('"a\\nb": 1', r"'a\\nb': unknown key"),
}


@pytest.mark.parametrize(("text", "said"), NO_RECIPES.values(), ids=list(NO_RECIPES))
def test_what_is_no_recipe_is_refused_in_few_words(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError) as raised:
        load_recipe(path)
    assert said.replace("\\\\", "\\") in str(raised.value)
    assert len(str(raised.value)) < 3000


def test_plain_aliases_are_fine() -> None:
    assert load_suite(ROOT / "suites" / "lab.yaml", []).methods


@pytest.mark.parametrize(
    "override",
    ["run.batch_size=1000000000", "run.seed=4294967296", "run.steps=1000000000000", "data.max_length=1000000000000",
     "run.accumulation=10000000000", "model.path=", "run.output=''", f"run.output={'x' * 300}",
     f"data.path={'x/' * 3000}", "method.rank=1000000000", f"method.alpha={10**400}"],
)  # fmt: skip
def test_absurd_values_are_refused_when_the_recipe_is_read(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path, method={"name": "lora"})))
    load_recipe(path)
    with pytest.raises(UsageError, match=rf"{override.partition('=')[0]}.*\b(less than|no path|valid string)\b"):
        load_recipe(path, [override])


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary())
KEYS = st.one_of(
    st.sampled_from(["model", "data", "method", "optimizer", "run", "path", "name", "format", "steps", "lr", "base"]),
    st.text(max_size=4),
    st.integers(),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=60, deadline=None)
@example(section="model", value="\x80", override="")
@given(section=st.sampled_from(["model", "data", "method", "optimizer", "run"]), value=VALUES, override=st.text())
def test_any_values_are_a_recipe_or_a_message(section: str, value: Any, override: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        values = recipe_values(Path(folder))
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
        path.write_text(yaml.dump(values), "utf-8", "surrogatepass")
        for overrides in ([], [f"{section}.x={override}"]):
            recipe, said = attempted(lambda overrides=overrides: load_recipe(path, overrides))
            assert isinstance(recipe, Recipe) or is_clear(said)


# Data ----------------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "zero byte": ("a.csv", b"a,b\n1,2\n3,\0\n", "line 3: a zero byte at column 3"),
    "utf-16 without a mark": ("a.txt", "one\ntwo".encode("utf-16-le"), "line 1: a zero byte at column 2"),
    "deep": ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "line 2: JSON with too many brackets"),
    "digits": ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "line 2: a number with thousands of digits"),
    "half a character": ("a.jsonl", b'{"a": 1}\n{"a": "\\ud800"}', "line 2: half of a character"),
    "half a character in a list": ("a.json", b'[{"a": 1}, {"\\udfff": 1}]', "item 2 of the list: half of a character"),
    "column twice": ("a.csv", b"a,b,a\n1,2,3\n", "line 1: the column 'a' stands twice"),
    "gigantic line": ("a.jsonl", b'{"a": 1}\n{"a": "' + b"x" * 2000 + b'"}', "line 2: longer than 1,000 bytes"),
    "gigantic first line": ("a.csv", b"x" * 5000, "line 1: longer than 1,000 bytes"),
    "control characters": ("a.jsonl", b'["\\ud800"]', "line 1: expected an object"),
}


@pytest.mark.parametrize(("name", "content", "said"), BROKEN.values(), ids=list(BROKEN))
def test_what_no_text_holds_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    if "gigantic" in said or "longer" in said:
        monkeypatch.setattr(text_lines, "LONGEST_LINE", 1000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_rows(tmp_path / name)
    assert said in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_line_is_not_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of zeros as large as the disk would have been read whole before its first byte was looked at."""
    monkeypatch.setattr(text_lines, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="line 1: longer than 1,000 bytes"):
        read_rows(path)


def test_parquet_that_unpacks_to_more_than_the_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 100_000}), path)
    assert len(read_rows(path)) == 100_000
    monkeypatch.setattr(columnar_rows, "machine_bytes", lambda: 2**19)
    with pytest.raises(UsageError, match=r"100,000 rows are .* unpacked, more than this machine holds"):
        read_rows(path)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"]), data=st.data())
def test_any_bytes_are_examples_or_a_message(name: str, data: st.DataObject) -> None:
    text = st.text(max_size=12).map(lambda line: line.encode("utf-8", "replace"))
    rows = st.dictionaries(st.just("text"), st.text(max_size=5)).map(lambda row: json.dumps(row).encode())
    lines = st.lists(st.one_of(st.binary(max_size=12), text, rows), max_size=5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(b"\n".join(data.draw(lines)))
        examples, said = attempted(lambda: render_examples(TextData(format="text", path=str(path)), seed=0))
        assert (str(path) in said and is_clear(said)) if examples is None else len(examples.rows["train"]) > 0


# Results and deltas --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_a_sealed_file_says(place: int, bit: int) -> None:
    values = {"loss": 0.25, "steps": [1, 2, 3], "note": "ü", "recipe": {"lr": 1e-4, "name": None}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.json")
        content = bytearray(json.dumps(sealed(values), ensure_ascii=False).encode())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        found, said = attempted(lambda: read_sealed(path))
        assert "run.json: damaged" in said if found is None else {name: found[name] for name in values} == values


def test_damage_is_said_by_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(sealed({"loss": 1.5, "steps": 3}) | {"loss": 1.0}))
    with pytest.raises(UsageError, match=r"run\.json: damaged: the value of 'loss' is not the one that was written"):
        read_sealed(path)
    path.write_text(json.dumps({"loss": 1.0}))
    assert read_sealed(path) == {"loss": 1.0}  # from before there were seals
    with pytest.raises(UsageError, match="it has no 'steps'"):
        read_sealed(path, needed=["steps"])


def test_items_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"index": 0}\n')
    (tmp_path / "result.json").write_text(json.dumps(sealed({"task": "loss", "num_items": 1, "items_sha256": "0"})))
    with pytest.raises(UsageError, match=r"items\.jsonl: damaged, or not the items of result\.json"):
        read_evaluation(tmp_path)


def test_a_delta_whose_own_numbers_are_damaged_is_refused(tmp_path: Path) -> None:
    """The count of changed entries is in no digest of a tensor: it was told as it stood."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((8,), value)}, tmp_path / name / "model.safetensors")
    path = tmp_path / "d"
    delta.diff(tmp_path / "base", tmp_path / "tuned", path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["manifest"])
    manifest["changes"]["w"]["entries"] = 7
    metadata["manifest"] = json.dumps(manifest)
    tensors = load_file(path)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UsageError, match="its manifest is not the one that was written"):
        delta.summary(path)
    save_file(tensors, path, metadata={**metadata, "version": "1"})
    assert delta.summary(path).num_changed_entries == 7  # version 1 had no digest of the manifest
