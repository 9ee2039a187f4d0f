"""Models of transformers with parts that the loss does not reach: text alone, unused poolers, heads and decoders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
import transformers
from policy_support import through_torch
from torch import nn

import gradselect as gs

Loss = Callable[[nn.Module, int], torch.Tensor]


def own_loss(model: nn.Module, seed: int) -> torch.Tensor:
    return model(**tiny_models.tiny_batch(model, seed=seed)).loss


def text_loss(model: nn.Module, seed: int) -> torch.Tensor:
    """Gemma 3 asks for the types of tokens while it trains."""
    batch = tiny_models.tiny_batch(model, seed=seed)
    return model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).loss


def sentence_loss(model: nn.Module, seed: int) -> torch.Tensor:
    """Mean of the last layer, as in a model of sentences."""
    tokens = tiny_models.tiny_batch(model, seed=seed)["input_ids"]
    return model(input_ids=tokens).last_hidden_state.mean(1).square().sum()


def encoder_loss(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = tiny_models.tiny_batch(model, seed=seed)["input_ids"]
    return model.get_encoder()(input_ids=tokens).last_hidden_state.square().mean()


def tiny_bert_encoder() -> nn.Module:
    return tiny_models.seeded(lambda: transformers.BertModel(transformers.BertConfig(**tiny_models.encoder(layers=3))))


class WithValue(nn.Module):
    """A language model with a value head that this loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_models.tiny_gpt2(layers=2)
        self.value = nn.Linear(tiny_models.HIDDEN, 1)

    def forward(self, **batch: torch.Tensor) -> object:
        output = self.model(**batch, output_hidden_states=True)
        self.value(output.hidden_states[-1])
        return output


class Routed(nn.Module):
    """Layers of three experts each, of which a batch reaches one: modules of their own, as in older mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tiny_models.VOCABULARY, 8)
        layers = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))}) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, tiny_models.VOCABULARY)

    def forward(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer["experts"][expert](hidden)
        return self.head(hidden).square().mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], Loss, str]] = {
    "gemma3": (tiny_models.tiny_gemma3_vision, text_loss, "vision_tower multi_modal_projector"),
    "qwen2_vl": (tiny_models.tiny_qwen2_vl, own_loss, "visual"),
    "smolvlm": (tiny_models.tiny_smolvlm, own_loss, "vision_model connector"),
    "bert": (tiny_bert_encoder, sentence_loss, "head"),
    "t5 encoder": (tiny_models.tiny_t5, encoder_loss, "decoder"),
    "value head": (lambda: tiny_models.seeded(WithValue), own_loss, "head"),
}
POLICIES = {
    "one at random": gs.Uniform(count=1, seed=1),
    "adagradselect": gs.AdaGradSelect(fraction=0.3, explore_steps=4, among=None),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("build", "loss", "dead"), MODELS.values(), ids=MODELS)
def test_only_what_the_loss_reaches_is_selected(build, loss, dead, policy):
    model = build()
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-3)
    is_dead = {name: name.startswith(tuple(dead.split())) for name in optimizer.blocks}
    for seed in range(8):
        loss(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.unreached == tuple(name for name, flag in is_dead.items() if flag)
    assert optimizer.num_steps >= 7
    counts = optimizer.update_counts
    assert not any(counts[name] for name, flag in is_dead.items() if flag)
    assert sum(counts.values()) >= optimizer.num_steps


@pytest.mark.parametrize(
    "policy", [gs.MISA(share=0.2, every=1, eta=0.01), gs.Uniform(count=2), gs.GradNormTopK(count=2)]
)
def test_experts_without_tokens_drop_out_and_come_back(policy):
    """By matrix, every expert is a block."""
    model = tiny_models.seeded(Routed)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-3, blocks=gs.partition(model, by="matrix"))
    tokens = torch.arange(8).view(2, 4)
    for _ in range(4):
        model(tokens, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    lost = {f"layer.{layer}.experts.{expert}" for layer in (0, 1) for expert in (1, 2)}
    assert set(optimizer.unreached) == lost
    for number in range(40):
        model(tokens, 1 + number % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not lost.intersection(optimizer.unreached)
    assert any(optimizer.update_counts[name] for name in lost)


def test_a_tower_that_sees_its_first_picture_late_trains_from_then_on():
    model = tiny_models.tiny_smolvlm()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=3), lr=1e-3)
    for seed in range(3):
        own_loss(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = tiny_models.tiny_batch(model, seed=9)
    batch["input_ids"].clamp_(max=50)[:, 0] = 60  # one token of a picture of 28 x 28, after the connector
    pixels = torch.ones(2, 1, 3, 28, 28)
    for _ in range(12):
        model(**batch, pixel_values=pixels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(name.startswith("vision_model.layer") for name in optimizer.unreached)
    assert any(count for name, count in optimizer.update_counts.items() if name.startswith("vision_model"))


def test_a_trainer_on_text_stops_and_resumes_alike():
    def run(steps: range, saved: dict | None = None) -> tuple[nn.Module, gs.BlockOptimizer]:
        model = tiny_models.tiny_qwen2_vl()
        optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(count=2, explore_steps=3), lr=1e-3)
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for seed in steps:
            own_loss(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = run(range(6))
    model, optimizer = run(range(2))
    saved = through_torch({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, _ = run(range(2, 6), saved)
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in whole.state_dict().items())


@pytest.mark.parametrize("build", [tiny_models.tiny_t5, tiny_models.tiny_mixtral, tiny_models.tiny_gpt2])
@pytest.mark.parametrize("by", ["layer", "matrix"])
def test_where_everything_is_reached_no_bit_changes(build, by):
    """T5 adds an embedding of positions to scores of attention: torch's kernel depends on whether it has a gradient."""
    found = []
    for is_known in (False, True):
        model = build()
        optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1), lr=1e-3, blocks=gs.partition(model, by=by))
        if is_known:
            optimizer._pass_hooks.reach.begin({**optimizer._pass_hooks.reach.state(), "unknown": ()})
        for seed in range(4):
            own_loss(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.unreached == ()
        found.append(model.state_dict())
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
