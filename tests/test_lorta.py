"""LoRTA: heads of the projections, the places of layers in the tensor, and what it refuses."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapter_support import disturbed, layers_of, needs_add_adapter, wrapped
from packaging import version
from test_adapters import logits, trains
from tiny_models import tiny_bart, tiny_gpt2, tiny_llama, tiny_roberta, tiny_t5
from torch import nn
from torch.nn import functional
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

import gradselect as gs
from gradselect.adapters import LortaConfig
from gradselect.adapters.lorta import FACTORS

pytestmark = [
    # PEFT asks transformers 5 for a property that was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
HEAD = 4
"""Numbers of a head of the tiny models, which have 4 heads."""


def updates(model):
    """Return the dense update of each adapted layer, by path."""
    return {
        layer.path: (layer.transformed("default", torch.zeros(layer.out_features, layer.in_features), None)[0]).detach()
        for layer in layers_of(model)
    }


def test_a_head_is_a_slice_of_outputs_or_of_the_inputs_of_an_output_projection():
    """Only head 2 of the tensor is not zero. Heads 2 and 3 share the second head of keys and values."""
    model = disturbed(wrapped(tiny_llama(layers=2), LortaConfig(rank=3)), 0.3)
    with torch.no_grad():
        heads = model.base_model.lorta_C_h["default"]
        heads[[0, 1, 3]] = 0
    found = {path.rpartition(".")[2]: each for path, each in updates(model).items()}
    own = slice(2 * HEAD, 3 * HEAD)
    shared = slice(HEAD, 2 * HEAD)
    for name, part in (("q_proj", (own,)), ("k_proj", (shared,)), ("v_proj", (shared,)), ("o_proj", (..., own))):
        assert found[name][part].abs().min() > 0
        found[name][part] = 0
        assert not found[name].any()


def test_a_shared_head_of_keys_is_the_mean_over_the_heads_that_share_it():
    model = disturbed(wrapped(tiny_llama(layers=1), LortaConfig(rank=3)), 0.3)
    width, head, layers, heads, matrices = (getattr(model.base_model, name)["default"].detach() for name in FACTORS)
    for shared in (0, 1):
        mean = (heads[2 * shared] + heads[2 * shared + 1]) / 2
        expected = (8 / 3 * (width * mean * matrices[1] * layers[0]) @ head).T
        found = updates(model)["model.layers.0.self_attn.k_proj"][shared * HEAD : (shared + 1) * HEAD]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("build", "num_layers", "num_matrices"),
    [
        (lambda: tiny_roberta(layers=2), 2, 4),
        # Encoder and decoder, whose layers attend to the encoder too.
        (lambda: tiny_bart(layers=2), 2 + 2, 4 + 4),
        (lambda: tiny_t5(layers=2), 2 + 2 * 2, 4 + 4),
    ],
    ids=["roberta", "bart", "t5"],
)
def test_every_attention_of_a_model_has_a_place(build, num_layers, num_matrices):
    model = wrapped(build(), LortaConfig(rank=2))
    tuner = model.base_model
    assert len(tuner.lorta_C_l["default"]) == num_layers
    assert len(tuner.lorta_C_m["default"]) == num_matrices
    places = [(place.layer, place.matrix) for place in tuner.shared.places["default"].values()]
    assert len(set(places)) == len(places) == len(layers_of(model))


def test_the_number_of_parameters_of_roberta_base():
    with torch.device("meta"):
        base = RobertaModel(RobertaConfig())
    model = wrapped(base, LortaConfig(rank=4))
    assert model.get_nb_trainable_parameters()[0] == 4 * (768 + 64 + 12 + 12 + 4) == 3440


def test_layers_of_one_adapter_share_their_factors_and_copies_do_not():
    model = disturbed(wrapped(tiny_llama(layers=2), LortaConfig(rank=3)), 0.3)
    assert sorted(trains(model)) == [f"base_model.lorta_{name}.default" for name in ("A", "B", "C_h", "C_l", "C_m")]
    assert not any("lorta" in name for name in model.base_model.model.state_dict())
    before, other = logits(model), copy.deepcopy(model)
    disturbed(other, 0.5, seed=3)
    assert torch.equal(logits(model), before)
    assert all(layer.lorta_A is other.base_model.lorta_A for layer in layers_of(other))


def test_factors_follow_a_model_that_was_taken_out_of_peft():
    """`gradselect evaluate` loads it so, and then moves it to its device."""
    model = disturbed(wrapped(tiny_llama(layers=2), LortaConfig(rank=3)), 0.3)
    before = logits(model)
    base = model.get_base_model()
    factors = layers_of(base)[0].shared.factors
    del model
    base.to(torch.float64)
    assert {factors[name]["default"].dtype for name in FACTORS} == {torch.float64}
    torch.testing.assert_close(logits(base), before.double(), rtol=0, atol=1e-5)
    base.to("meta")
    assert all(factors[name]["default"].is_meta and factors[name]["default"].requires_grad for name in FACTORS)


def test_two_adapters_with_other_layers_and_ranks_add_up():
    model = disturbed(wrapped(tiny_llama(layers=2), LortaConfig(rank=3, target_modules=["q_proj", "v_proj"])), 0.3)
    one = logits(model)
    model.add_adapter("wide", LortaConfig(rank=5, layers_to_transform=[1]))
    assert torch.equal(logits(model), one)
    model.set_adapter("wide")
    disturbed(model, 0.3, seed=2)
    assert len(model.base_model.lorta_C_l["wide"]) == 1
    model.base_model.set_adapter(["default", "wide"])
    assert len(trains(model)) == 10
    both = logits(model)
    assert not torch.equal(both, one)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("wide")
    assert torch.equal(logits(model), one)
    assert len(trains(model)) == 5


def test_dropout_hides_inputs_in_training_only():
    model = disturbed(wrapped(tiny_llama(layers=1), LortaConfig(rank=3, dropout=0.5)), 0.3)
    first = logits(model.eval())
    assert torch.equal(logits(model), first)
    assert not torch.equal(logits(model.train()), first)


def test_without_casting_factors_have_the_type_of_the_model():
    base = tiny_llama(layers=1, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, LortaConfig(rank=3), autocast_adapter_dtype=False)
    assert {each.dtype for each in trains(model).values()} == {torch.bfloat16}


class Packed(nn.Linear):
    """A quantised layer, with two entries in one number, as bitsandbytes has them."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.dense = [layer.weight.detach()]
        self.weight = nn.Parameter(torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.dense[0])


def test_quantised_layers_are_adapted_and_not_merged():
    model, plain = tiny_llama(layers=1), tiny_llama(layers=1)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, Packed(getattr(attention, name)))
    model, plain = (disturbed(wrapped(each, LortaConfig(rank=3)), 0.3) for each in (model, plain))
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(gs.UsageError, match=r"q_proj' has quantised weights, which cannot take an adapter"):
        model.merge_and_unload()


class Bare(nn.Module):
    """Projections without a configuration of a model."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(width, 16)}) for width in widths)


BAD = {
    "rank 0": (lambda: tiny_llama(layers=1), {"rank": 0}, r"rank=0 is not a whole number from 1 on; write"),
    "rank above width": (
        lambda: tiny_llama(layers=1),
        {"rank": 17},
        r"rank=17 is above the width of the projections, 16.*write e\.g\. rank=8",
    ),
    "dropout": (lambda: tiny_llama(layers=1), {"dropout": 1.0}, r"dropout=1\.0 is outside \[0, 1\)"),
    "all-linear": (
        lambda: tiny_llama(layers=1),
        {"target_modules": "all-linear"},
        r"attention projections only; leave target_modules out",
    ),
    "no projection": (
        lambda: tiny_llama(layers=1),
        {"target_modules": ["q_proj", "up_proj"]},
        r"'model\.layers\.0\.mlp\.up_proj' has the name of none.*heads_on_outputs=\['up_proj'\]",
    ),
    "an MLP called one": (
        lambda: tiny_llama(layers=1),
        {"target_modules": ["q_proj", "up_proj"], "heads_on_outputs": ["q_proj", "up_proj"]},
        r"up_proj' has 32 numbers on the side of the heads, which are not 1 to 4 heads of 4 numbers",
    ),
    "one layer for all": (
        lambda: tiny_gpt2(layers=1),
        {"target_modules": ["c_attn"], "heads_on_outputs": ["c_attn"]},
        r"'transformer\.h\.0\.attn\.c_attn' has 48 numbers.*take a LoRA there",
    ),
    "nothing found": (
        lambda: tiny_llama(layers=1),
        {"target_modules": ["q_porj"]},
        r"target_modules=\['q_porj'\] matches no layer.*'q_proj'.*Leave target_modules out",
    ),
    "no attention": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {},
        r"finds no attention projection by name in Sequential, which has '0'",
    ),
    "one layer for all, by default": (
        lambda: tiny_gpt2(layers=1),
        {},
        r"which has 'c_attn', 'c_fc', 'c_proj', 'lm_head'\. .*one layer holds query, key and value.*train a LoRA",
    ),
    "no configuration": (
        lambda: Bare(16),
        {},
        r"Bare does not say how many attention heads.*num_heads=12, head_dim=64",
    ),
    "two widths": (
        lambda: Bare(16, 8),
        {"num_heads": 4, "head_dim": 4},
        r"must have one width, but that of 'layers\.0\.q_proj' is 16 and that of 'layers\.1\.q_proj' is 8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(name):
    build, settings, words = BAD[name]
    model = build()
    before = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(gs.UsageError, match=words):
        wrapped(model, LortaConfig(**settings))
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_a_second_adapter_that_does_not_fit_leaves_the_first():
    model = disturbed(wrapped(tiny_llama(layers=2), LortaConfig(rank=3)), 0.3)
    before, names = logits(model), set(model.state_dict())
    with pytest.raises(gs.UsageError, match="rank=99"):
        model.add_adapter("second", LortaConfig(rank=99))
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names
    model.add_adapter("second", LortaConfig(rank=2))


@needs_add_adapter
@pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.21"), reason="PEFT 0.20 does not refuse it")
def test_transformers_add_adapter_is_refused_by_peft():
    """The factors belong to PEFT's model, which add_adapter throws away."""
    with pytest.raises(ValueError, match="shared state"):
        tiny_llama(layers=1).add_adapter(LortaConfig(rank=2))


def test_the_head_of_a_roberta_classifier_is_no_output_projection() -> None:
    config = RobertaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = peft.get_peft_model(RobertaForSequenceClassification(config), LortaConfig(rank=2))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lorta_settings")]
    assert len(adapted) == 8
    assert not any("classifier" in name for name in adapted)
