"""Quantised and integer weights: said with numbers, no candidates, and no obstacle to an adapter."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn

import gradselect as gs


class Int8Linear(nn.Module):
    """A linear layer of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.data / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Params4bit(nn.Parameter):
    """Named as in bitsandbytes: two weights in each byte."""


class PackedLinear(Int8Linear):
    """The same values, counted as bitsandbytes packs them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.values = self.weight.data.float()  # a plain attribute, as the real one dequantises
        self.weight = Params4bit(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=linear.weight.shape)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.values * self.scale)


class BufferLinear(nn.Module):
    """A linear layer of GPTQ's kind: eight weights in each int32 of a buffer, and frozen scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bits = 4
        self.values = linear.weight.data
        rows, columns = linear.weight.shape
        self.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
        self.scales = nn.Parameter(torch.ones(1, rows), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.values)


KINDS = {"int8": Int8Linear, "packed": PackedLinear, "buffer": BufferLinear}


def quantised(kind: type[nn.Module] = Int8Linear, *, embeddings: bool = True) -> nn.Module:
    """A tiny Llama whose layers' linears are quantised: 2,048 + ... weights a layer beside two norms of 16."""
    model = tiny_models.tiny_llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        for part in (layer.self_attn, layer.mlp):  # type: ignore[union-attr]
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, kind(child))
    if not embeddings:
        for module in (model.model.embed_tokens, model.model.norm, model.lm_head):  # type: ignore[union-attr]
            module.requires_grad_(False)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(**tiny_models.tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("by", ["layer", "matrix"])
def test_layers_of_quantised_weights_are_no_candidates_and_that_is_said(kind, by, caplog, monkeypatch):
    monkeypatch.setattr("gradselect.blocks.quantised_blocks.LEAST_SHARE", 0.02)  # a tiny layer's norms are 1.4 %
    model = quantised(kind)
    with caplog.at_level(logging.WARNING, logger="gradselect"):
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), blocks=gs.partition(model, by=by))
    assert optimizer.policy.names == ("embedding", "norm", "head")
    (message,) = caplog.messages
    name = "layer.1" if by == "layer" else "layer.1.vectors"
    assert f"{name}: 1.4% of its weights can train" in message
    assert "4 of 7 blocks are no candidates" in message
    assert "lora" in message
    for _ in range(3):
        step(model, optimizer)
    assert all(count == 0 for block, count in optimizer.update_counts.items() if block.startswith("layer"))


def test_a_block_named_in_always_trains_all_the_same(monkeypatch):
    monkeypatch.setattr("gradselect.blocks.quantised_blocks.LEAST_SHARE", 0.02)
    model = quantised()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("head",)), always="layer.2")
    step(model, optimizer)
    assert optimizer.last_record.selected == ("layer.2", "head")


@pytest.mark.parametrize("policy", [gs.Fixed(("layer.*",)), gs.Cyclic(every=1, among=("layer.*",))])
def test_if_no_layer_is_left_the_error_names_lora(policy, monkeypatch):
    monkeypatch.setattr("gradselect.blocks.quantised_blocks.LEAST_SHARE", 0.02)
    with pytest.raises(gs.UsageError, match=r"'layer.\*'.*4 of 7 blocks are no candidates.*lora"):
        gs.BlockOptimizer(quantised(), policy)


@pytest.mark.parametrize("build", [lambda m: gs.partition(m), lambda m: gs.SparseOptimizer(m, gs.GMT())])
def test_if_nothing_can_train_the_error_counts_the_quantised_weights_and_names_lora(build):
    model = quantised()
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(
        gs.UsageError, match=r"no parameter of LlamaForCausalLM can train: 9,216 weights are quanti.*lora"
    ):
        build(model)


def test_an_adapter_on_a_quantised_base_is_silent(caplog):
    class BaseTunerLayer(nn.Module):
        """Named as in PEFT."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.lora_A = nn.Linear(16, 2, bias=False)
            self.lora_B = nn.Linear(2, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

    model = quantised(embeddings=False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = BaseTunerLayer(layer.self_attn.q_proj)
    for make in (lambda: gs.BlockOptimizer(model, gs.Uniform(count=1)), lambda: gs.SparseOptimizer(model, gs.GMT())):
        make().close()
    assert caplog.messages == []


def test_weights_frozen_on_purpose_stay_unsaid(caplog, monkeypatch):
    monkeypatch.setattr("gradselect.blocks.quantised_blocks.LEAST_SHARE", 0.5)
    floating = tiny_models.tiny_llama()
    for layer in floating.model.layers:
        layer.mlp.requires_grad_(False)
    norms_only = quantised()
    for layer in norms_only.model.layers:
        layer.input_layernorm.requires_grad_(False)
    for model in (floating, norms_only):
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1))
        assert len(optimizer.policy.names) == 7
    assert caplog.messages == []


def test_a_mask_on_a_quantised_model_says_how_much_it_selects_from(caplog):
    with caplog.at_level(logging.WARNING, logger="gradselect"):
        gs.SparseOptimizer(quantised(), gs.ID3(density=0.01, steps=4))
    (message,) = caplog.messages
    assert "ID3 selects among 19.2 % of the weights (2,192 of 11,408, in 11 tensors)" in message


def test_a_mask_that_finds_nothing_in_a_quantised_model_names_the_reason():
    with pytest.raises(gs.UsageError, match=r"finds no tensor.*9,216 weights are quantised.*lora"):
        gs.SparseOptimizer(quantised(), gs.LIFT(density=0.01, among=("*layernorm*",)))
