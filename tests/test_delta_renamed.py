"""Deltas of a base that has other names for its tensors: one without a head, and an old checkpoint of BERT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from classification_fixtures import write_bert
from delta_support import same_model, write_model
from safetensors.torch import load_file
from test_delta import round_trip
from transformers import AutoModelForSequenceClassification

import gradselect as gs
from gradselect import delta
from gradselect.app.cli.delta import diff
from gradselect.delta.renaming import names_in_tuned


def classifier(base: Path, out: Path, *, seed: int = 0) -> Path:
    """A classifier of the base with a new head, of which the biases have moved."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter += torch.randn_like(parameter)
        model.save_pretrained(out)
    return out


def test_a_classifier_of_a_base_without_a_head_goes_both_ways_bit_for_bit(tmp_path, capsys):
    base = write_bert(tmp_path / "base")
    tuned = classifier(base, tmp_path / "tuned")
    summary = round_trip(tmp_path, base, tuned)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert {f"bert.{name}" for name in before} | {"classifier.weight", "classifier.bias"} == after.keys()
    assert (summary.num_renamed, summary.num_new, summary.num_new_entries) == (len(before), 2, 3 * 16 + 3)
    assert summary.num_whole == 2
    assert summary.num_dense == sum(name.endswith(".bias") for name in before)
    assert summary.fingerprints == {"base": delta.fingerprint(base), "tuned": delta.fingerprint(tuned)}
    assert summary.delta_bytes < (base / "model.safetensors").stat().st_size
    diff(str(base), str(tuned), str(tmp_path / "again"))
    shown = capsys.readouterr().out
    assert f"{len(before)} tensors have another name in the base" in shown
    assert "2 tensors of 51 entries are new, and in the file whole" in shown


def test_a_model_whose_head_was_left_out_goes_both_ways(tmp_path):
    base = classifier(write_bert(tmp_path / "bert"), tmp_path / "base")
    bare = {name.removeprefix("bert."): 2 * tensor for name, tensor in load_file(base / "model.safetensors").items()}
    tuned = write_model(tmp_path / "tuned", {k: v for k, v in bare.items() if not k.startswith("classifier")})
    summary = round_trip(tmp_path, base, tuned)
    assert (summary.num_renamed, summary.num_new, summary.num_whole) == (len(bare) - 2, 0, 2)


def test_old_names_of_norms_are_those_of_today(tmp_path):
    tuned = classifier(write_bert(tmp_path / "bert"), tmp_path / "tuned")
    old = {name: torch.ones(16) for name in ("cls.transform.LayerNorm.gamma", "cls.transform.LayerNorm.beta")}
    for name, tensor in load_file(tuned / "model.safetensors").items():
        if not name.startswith("classifier"):
            old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                tensor
            )
    summary = round_trip(tmp_path, write_model(tmp_path / "base", old), tuned)
    assert (summary.num_renamed, summary.num_dense, summary.num_sparse, summary.num_new) == (10, 0, 0, 2)


def test_two_classifiers_of_one_base_merge(tmp_path):
    base = write_bert(tmp_path / "base")
    paths = []
    for seed in (1, 2):
        tuned = classifier(base, tmp_path / f"tuned-{seed}", seed=seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        delta.diff(base, tuned, paths[-1])
    delta.merge(base, paths, tmp_path / "both", overlap="mean", whole="last")
    delta.apply(base, tmp_path / "both", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    one, two = (load_file(tmp_path / f"tuned-{seed}" / "model.safetensors") for seed in (1, 2))
    name = "bert.encoder.layer.0.output.dense.bias"
    assert torch.allclose(found[name], (one[name] + two[name]) / 2)
    assert torch.equal(found["classifier.weight"], two["classifier.weight"])
    delta.revert(tmp_path / "out", tmp_path / "both", tmp_path / "back")
    assert same_model(tmp_path / "back", base)


def test_deltas_of_two_kinds_of_models_do_not_merge(tmp_path):
    base = write_bert(tmp_path / "base")
    delta.diff(base, classifier(base, tmp_path / "one"), tmp_path / "one.safetensors")
    tensors = load_file(base / "model.safetensors")
    other = write_model(tmp_path / "other", {name: 2 * tensor for name, tensor in tensors.items()})
    delta.diff(base, other, tmp_path / "other.safetensors", unrelated=True)
    with pytest.raises(gs.UsageError, match="other names for the same tensors"):
        delta.merge(base, [tmp_path / "one.safetensors", tmp_path / "other.safetensors"], tmp_path / "both")


def test_another_base_without_a_head_is_refused_with_numbers(tmp_path):
    base = write_bert(tmp_path / "base")
    tuned = classifier(base, tmp_path / "tuned")
    wider = {name: torch.cat([tensor, tensor], -1) for name, tensor in load_file(base / "model.safetensors").items()}
    other = write_model(tmp_path / "wider", wider)
    with pytest.raises(gs.UsageError, match=rf"of {len(wider)} tensors {len(wider)} have another shape"):
        delta.diff(other, tuned, tmp_path / "d")
    fewer = write_model(tmp_path / "fewer", {k: v for k, v in wider.items() if ".0." not in k})
    with pytest.raises(gs.UsageError, match="is not the model that"):
        delta.diff(fewer, tuned, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_delta_with_other_names_does_not_fit_another_base(tmp_path):
    base = write_bert(tmp_path / "base")
    delta.diff(base, classifier(base, tmp_path / "tuned"), tmp_path / "d")
    with pytest.raises(gs.UsageError, match="is the tuned model's here"):
        delta.apply(tmp_path / "tuned", tmp_path / "d", tmp_path / "out")


def test_few_tensors_of_the_same_end_are_no_base():
    assert names_in_tuned({"weight", "a", "b"}, {"bert.weight", "bert.c"}) == {}
    assert names_in_tuned({"layer.weight", "lm_head.weight"}, {"layer.weight", "score.weight"}) == {}
    assert names_in_tuned({"a", "b"}, {"m.a", "m.b", "head"}) == {"a": "m.a", "b": "m.b"}


def test_names_in_a_damaged_delta_are_refused(tmp_path, monkeypatch):
    base = write_bert(tmp_path / "base")
    tuned = classifier(base, tmp_path / "tuned")
    dumps = json.dumps

    def with_one_name(value, **options):
        if isinstance(value, dict) and "renamed" in value:
            value = value | {"renamed": dict.fromkeys(value["renamed"], "classifier.bias")}
        return dumps(value, **options)

    monkeypatch.setattr("gradselect.delta.difference.json.dumps", with_one_name)
    with pytest.raises(gs.UsageError, match=r"its manifest cannot be read.*two tensors with one name"):
        delta.diff(base, tuned, tmp_path / "d")
