"""HiWi: which layers it adapts, that every unit can learn, and that only biases remain of it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from adapter_support import disturbed, layers_of, with_biases, wrapped
from classification_fixtures import classify, write_place
from test_adapters import logits
from tiny_models import seeded, tiny_bart, tiny_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_roberta
from torch import nn
from train_fixtures import byte_tokenizer, parse, quiet, weights, write_sums

import gradselect as gs
from gradselect.adapters import HiwiConfig
from gradselect.app.compare.measure import count_weights, measure_shipment, weight_bytes
from gradselect.app.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # PEFT asks transformers 5 for a property that was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
MODELS = {"bert": tiny_bert, "roberta": tiny_roberta, "opt": tiny_opt, "gpt2": tiny_gpt2, "bart": tiny_bart}


def adapted(build=tiny_bert, **settings):
    return wrapped(with_biases(build(layers=2)), HiwiConfig(**{"rank": 4, **settings}))


@pytest.mark.parametrize("kind", MODELS)
def test_by_default_the_two_layers_of_each_mlp_are_adapted(kind):
    model = adapted(MODELS[kind])
    num_layers = 2 * (2 if kind == "bart" else 1)
    sizes = [(layer.in_features, layer.out_features) for layer in layers_of(model)]
    assert len(sizes) == 2 * num_layers
    assert all(inputs == reverse for (inputs, _), (_, reverse) in zip(sizes[::2], sizes[1::2], strict=True))
    assert all(inputs != outputs for inputs, outputs in sizes)


def test_every_unit_begins_above_the_bend_of_relu():
    """A unit below it would never get a gradient, because the bias that it reads never changes."""
    model = adapted(rank=16)
    model(**tiny_batch(model, seed=0)).loss.backward()
    for layer in layers_of(model):
        units = layer.plain_bias @ layer.hiwi_down["default"]
        assert len(units) == 16
        assert (units > 0).all()
        assert (layer.hiwi_up["default"].grad.abs().sum(1) > 0).all()


def test_only_biases_are_left_of_it():
    model = disturbed(adapted(), 0.3)
    before = {name: each.clone() for name, each in model.base_model.model.state_dict().items()}
    adapted_names = {f"{layer.path}.bias" for layer in layers_of(model)}
    after = model.merge_and_unload().state_dict()
    changed = {name for name in after if not torch.equal(after[name], before.get(name, before.get(_below(name))))}
    assert changed == adapted_names


def _below(name):
    path, _, last = name.rpartition(".")
    return f"{path}.base_layer.{last}"


def test_each_of_two_merged_adapters_reads_the_bias_of_the_base():
    model = disturbed(adapted(), 0.3)
    model.add_adapter("second", HiwiConfig(rank=2))
    model.set_adapter("second")
    disturbed(model, 0.3, seed=2)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)


def test_a_recipe_trains_the_biases_of_a_classifier(tmp_path):
    place = write_place(tmp_path)
    base = with_biases(transformers.AutoModel.from_pretrained(place / "bert"))
    base.save_pretrained(place / "bert")
    recipe = classify(place, tmp_path / "out", method={"name": "hiwi", "rank": 4}, run={"steps": 3})
    train(recipe, console=quiet())
    ours, before = weights(tmp_path / "out"), base.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], before.get(name.removeprefix("bert."), ours[name]))}
    assert len(changed) == 2 * 2
    assert all(re.fullmatch(r"bert\.encoder\.layer\.\d\.(intermediate|output)\.dense\.bias", name) for name in changed)


def test_to_ship_a_classifier_of_a_base_without_a_head_what_has_changed_is_enough(tmp_path):
    """Such a base is saved without the "bert." that stands before its names in the classifier."""
    place = write_place(tmp_path)
    method = {"name": "bitfit", "always": []}
    recipe = classify(place, tmp_path / "out", method=method, run={"steps": 2})
    train(recipe, console=quiet())
    job: Any = SimpleNamespace(training=tmp_path / "out", recipe=recipe, share=1)
    shipment = measure_shipment(job, job)
    ours, before = weights(tmp_path / "out"), weights(place / "bert")
    changed = [
        n for n in ours if not torch.equal(ours[n], before.get(n.removeprefix("bert."), torch.zeros_like(ours[n])))
    ]
    assert shipment.num_trained == sum(ours[name].numel() for name in changed) < count_weights(place / "bert") / 10
    assert shipment.num_bytes < weight_bytes(tmp_path / "out")


def test_to_ship_it_the_biases_are_enough(tmp_path):
    config = transformers.GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    with_biases(seeded(lambda: transformers.GPT2LMHeadModel(config))).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    recipe = parse(tmp_path, method={"name": "hiwi", "rank": 16}, run={"output": str(tmp_path / "out"), "steps": 2})
    train(recipe, console=quiet())
    job: Any = SimpleNamespace(training=tmp_path / "out", recipe=recipe, share=1)
    shipment = measure_shipment(job, job)
    num_biases = 2 * (64 + 16)
    assert shipment.num_bytes < weight_bytes(tmp_path / "out" / "adapter")
    assert shipment.num_trained == count_weights(tmp_path / "out" / "adapter") == 2 * 16 * num_biases


def without_biases():
    return tiny_llama(layers=1)


def zero_biases():
    return tiny_bert(layers=1)


BAD = {
    "no bias": (
        without_biases,
        {"target_modules": ["up_proj"]},
        r"'model\.layers\.0\.mlp\.up_proj' has no bias.*Name layers in target_modules.*name: lora",
    ),
    "zero bias": (zero_biases, {}, r"intermediate\.dense' has a bias of zeros: its adapter would never get a gradient"),
    "unknown model": (without_biases, {}, r"type 'llama' are not known to HiWi; name layers with a bias"),
    "rank 0": (zero_biases, {"rank": 0}, r"rank=0 is not a whole number from 1 on"),
    "rank too high": (
        lambda: with_biases(tiny_bert(layers=1)),
        {"rank": 17},
        r"rank=17 is above the size of the bias of .*output\.dense', 16; write e\.g\. rank=8",
    ),
    "nothing found": (zero_biases, {"target_modules": ["fc1"]}, r"target_modules=\['fc1'\] matches no layer"),
    "no linear layer": (
        lambda: with_biases(tiny_bert(layers=1)),
        {"target_modules": ["LayerNorm"]},
        r"hiwi cannot change .*LayerNorm.*of the class LayerNorm",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(name):
    build, settings, words = BAD[name]
    model: nn.Module = build()
    before = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(gs.UsageError, match=words):
        wrapped(model, HiwiConfig(**settings))
    assert [(path, type(module)) for path, module in model.named_modules()] == before
