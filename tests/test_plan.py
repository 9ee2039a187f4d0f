"""`gs.plan`: bytes of activations against those that autograd keeps, of the rest against optimizers that were run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import (
    HIDDEN,
    VOCABULARY,
    causal,
    decoder,
    tiny_batch,
    tiny_bert_classifier,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_phi3,
    tiny_plain,
    tiny_qwen2,
    tiny_sequential,
)
from torch import nn

import gradselect as gs
from gradselect.blocks.flops import step_time
from gradselect.planning import Plan
from gradselect.planning.forward_pass import ForwardPass, peak_logits, saved_logits
from gradselect.planning.meta_forward import count_saved, on_meta
from gradselect.planning.policy_survey import ask, mean_depth, mean_elements
from gradselect.planning.tape import Rows

BATCH, LENGTH = 3, 16


def measured(model: nn.Module, *, padded: bool = False, cache: bool = False) -> int:
    """Bytes that autograd keeps of a forward pass and its loss on the CPU, each piece of memory once, no weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = tiny_batch(model, seed=0, batch=BATCH, length=LENGTH)
    if padded:
        batch["attention_mask"][0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=cache)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def planned(model: Any, trained: Collection[str], *, padded: bool = False, cache: bool = False) -> int:
    """The same as the model of activations has it."""
    rows = Rows(batch=BATCH, length=LENGTH, itemsize=next(model.parameters()).element_size(), masked=padded)
    forward = ForwardPass(on_meta(model), rows, loss="whole", checkpointing=False, keeps_cache=cache)
    assert not forward.notes
    return forward.kept(trained).activations + saved_logits(
        rows, vocabulary=model.config.get_text_config().vocab_size, loss="whole"
    )


def train_only(model: nn.Module, mark: str) -> list[str]:
    """Freeze all parameters but those whose name holds `mark`; the names of these."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mark in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def tiny_qwen3() -> nn.Module:
    return causal(transformers.Qwen3Config(**decoder(layers=2, tied=True), head_dim=4))


# Activations --------------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "llama in bfloat16": lambda: tiny_llama(dtype=torch.bfloat16),
    "llama, tied": lambda: tiny_llama(tied=True),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "phi3": tiny_phi3,
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("mark", ["", ".1.", "attn", "norm", "embed"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_that_autograd_keeps(name: str, mark: str) -> None:
    """To 10 %: indices, rotations and, on the CPU, a copy of the output of attention are left out."""
    model = MODELS[name]()
    trained = train_only(model, mark)
    if trained:
        for padded in (False, True):
            assert planned(model, trained, padded=padded) == pytest.approx(measured(model, padded=padded), rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_keys_and_values_is_counted(name: str) -> None:
    model = MODELS[name]()
    trained = train_only(model, "")
    assert planned(model, trained, cache=True) == pytest.approx(measured(model, cache=True), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_lora_are_those_that_autograd_keeps(dtype: torch.dtype) -> None:
    """Its float32 matrices make a float32 copy of each input in half precision."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model: Any = peft.get_peft_model(tiny_llama(dtype=dtype), config)  # type: ignore[arg-type]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert planned(model, trained) == pytest.approx(measured(model), rel=0.05)


def test_eager_attention_keeps_probabilities() -> None:
    model: Any = tiny_llama()
    model.set_attn_implementation("eager")
    trained = train_only(model, "")
    rows = Rows(batch=BATCH, length=LENGTH, itemsize=4, attention="eager")
    forward = ForwardPass(on_meta(model), rows, loss="whole", checkpointing=False, keeps_cache=False)
    logits = saved_logits(rows, vocabulary=VOCABULARY, loss="whole")
    assert forward.kept(trained).activations + logits == pytest.approx(measured(model), rel=0.1)


def test_below_the_lowest_trained_layer_nothing_is_kept() -> None:
    deep, shallow = (planned(tiny_llama(layers=layers), ["model.norm.weight"]) for layers in (8, 2))
    assert deep == shallow
    model = tiny_llama(layers=4)
    top = planned(model, train_only(model, "layers.3."))
    assert top < planned(model, train_only(model, "layers.0.")) / 2


def test_with_checkpointing_a_layer_keeps_its_input_alone() -> None:
    model = tiny_llama(layers=6)
    rows = Rows(batch=BATCH, length=LENGTH, itemsize=4)
    trained = train_only(model, "")
    without, with_it = (
        ForwardPass(on_meta(model), rows, loss="whole", checkpointing=choice, keeps_cache=False).kept(trained)
        for choice in (False, True)
    )
    one_input = rows.tokens * HIDDEN * 4
    per_layer = (without.activations - with_it.activations) / 6
    assert with_it.recomputed == pytest.approx(per_layer + one_input)
    assert with_it.recomputed < without.activations / 5


@pytest.mark.parametrize("name", MODELS)
def test_counting_on_the_meta_device_agrees_with_the_model_of_activations(name: str) -> None:
    model: Any = MODELS[name]()
    model.config.use_cache = False
    trained = train_only(model, "")
    rows = Rows(batch=BATCH, length=LENGTH, itemsize=next(model.parameters()).element_size())
    assert count_saved(on_meta(model), trained, rows) == pytest.approx(planned(model, trained), rel=0.1)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_gemma2, tiny_opt, tiny_plain, tiny_sequential])
def test_an_unknown_architecture_is_counted_and_that_is_said(
    build: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    found = gs.plan(build(), gs.Cyclic(every=1), batch_size=2, sequence_length=8)
    assert "counted by a forward pass on the meta device" in found.notes[0]
    assert found.notes[0] in caplog.text
    assert found.bytes.activations > 0


def test_counting_leaves_the_model_as_it_was() -> None:
    model = tiny_opt()
    trained = train_only(model, "layers.1.")
    before = copy.deepcopy(model.state_dict())
    gs.plan(model, gs.All(), batch_size=2, sequence_length=8)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_counted_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.layers[int(tokens.sum())](tokens.float())

    with pytest.raises(gs.UsageError, match="cannot be counted"):
        gs.plan(Odd(), gs.All(), batch_size=2, sequence_length=2)


# Weights, gradients, masters, state ---------------------------------------------------------------------------------

NUM_STEPS = 10


def run_blocks(model: nn.Module, policy: gs.AbstractPolicy, **options: Any) -> list[dict[str, int]]:
    """`memory()` before each update, as a trainer's meter reads it."""
    optimizer = gs.BlockOptimizer(model, policy, **options)
    seen = []
    for step in range(NUM_STEPS):
        model(**tiny_batch(model, seed=step)).loss.backward()
        seen.append(dict(optimizer.memory()))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def of(found: Plan, name: str) -> int:
    """What a meter would read: at the moment of the update."""
    return max(getattr(step.moments["update"], name) for step in found.steps)


RESIDENCIES = {"keep": gs.Keep(), "offload": gs.Offload(), "drop": gs.Drop()}
POLICIES = {
    "all": gs.All(),
    "fixed": gs.Fixed(("layer.1", "layer.2")),
    "adagradselect": gs.AdaGradSelect(count=2, explore_steps=4, among=("layer.*",)),
    "gradient norm": gs.GradNormTopK(count=2, among=("layer.*",)),
    "uniform": gs.Uniform(count=2, among=("layer.*",)),
    "lisa": gs.Uniform(count=2, every=2, among=("layer.*",)),
    "cyclic": gs.Cyclic(every=2, among=("layer.*",)),
}


@pytest.mark.parametrize(
    ("residency", "dtype"), [("keep", torch.float32), ("offload", torch.bfloat16), ("drop", torch.float32)]
)
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_of_equal_blocks_are_exact(name: str, residency: str, dtype: torch.dtype) -> None:
    """All but those of the host, where the plan is the limit, are met within a few steps."""
    always = ("embedding", "norm") if name == "lisa" else ()
    options: dict[str, Any] = {"always": always, "residency": RESIDENCIES[residency]}
    found = gs.plan(tiny_llama(dtype=dtype, tied=True), POLICIES[name], batch_size=2, sequence_length=8, **options)
    seen = run_blocks(tiny_llama(dtype=dtype, tied=True), POLICIES[name], **options)
    for category in ("weights", "gradients"):
        assert max(each[category] for each in seen) == of(found, category)
    state = ("masters", "state_on_device")
    comes_everywhere = name not in ("adagradselect", "gradient norm")
    if (residency == "keep" and comes_everywhere) or name in ("all", "fixed"):
        assert all(max(each[category] for each in seen) == of(found, category) for category in state)
    assert all(each[category] <= of(found, category) for each in seen for category in state)
    assert max(each["state_on_host"] for each in seen) <= of(found, "state_on_host")


def test_state_on_the_host_is_met_by_one_block_after_the_other() -> None:
    policy, residency = gs.Cyclic(every=1, order="descending"), gs.Offload()
    found = gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8, residency=residency)
    seen = run_blocks(tiny_llama(), policy, residency=residency)
    assert max(each["state_on_host"] for each in seen) == of(found, "state_on_host")


@pytest.mark.parametrize("policy", [gs.AdaGradSelect(fraction=0.5, explore_steps=4), gs.Uniform(count=3), gs.MISA()])
def test_no_run_exceeds_the_plan(policy: gs.AbstractPolicy) -> None:
    """Of unequal blocks the largest ones count."""
    model = tiny_llama()
    found = gs.plan(model, policy, batch_size=2, sequence_length=8, residency=gs.Offload())
    for seen in run_blocks(model, policy, residency=gs.Offload()):
        assert all(count <= of(found, category) for category, count in seen.items())


def test_in_explore_steps_one_block_more_than_are_kept_has_gradients() -> None:
    policy = gs.GradNormTopK(count=2, among=("layer.*",))
    step = gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8).step("explore")
    assert step.moments["backward"].gradients * 2 == step.moments["update"].gradients * 3


def test_with_accumulation_all_gradients_of_an_explore_step_add_up() -> None:
    policy, sizes = gs.AdaGradSelect(count=1), {"batch_size": 2, "sequence_length": 8}
    found = gs.plan(tiny_llama(), policy, accumulation_steps=2, **sizes)
    assert found.step("explore").moments["loss"].gradients == found.bytes.weights
    assert gs.plan(tiny_llama(), policy, **sizes).step("explore").moments["loss"].gradients == 0


MASKS = {
    "id3": gs.ID3(budget=500, steps=4),
    "static": gs.StaticMask(density=0.05),
    "static by tensor": gs.StaticMask(salience=gs.salience.magnitude, budget=333, scope="tensor"),
    "static, refreshed": gs.StaticMask(salience=gs.salience.random, density=0.05, refresh_every=5),
    "lift": gs.LIFT(density=0.05, refresh_every=9),
    "bitfit": gs.BitFit(among=("*norm*",)),
    "top gradient": gs.TopGradient(density=0.05),
    "gmt": gs.GMT(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_bytes_of_masks_are_exact(name: str, dtype: torch.dtype) -> None:
    """But for the bits that say when entries joined: those are at most as many as are planned for a long run."""
    always = ("model.norm.weight",) if name != "bitfit" else ()
    found = gs.plan(tiny_llama(dtype=dtype), MASKS[name], batch_size=2, sequence_length=8, always=always)
    model = tiny_llama(dtype=dtype)
    optimizer = gs.SparseOptimizer(model, MASKS[name], always=always)
    seen = []
    for step in range(NUM_STEPS):
        model(**tiny_batch(model, seed=step)).loss.backward()
        seen.append(dict(optimizer.memory()))
        optimizer.step()
        optimizer.zero_grad()
    for category in ("weights", "gradients", "masters"):
        assert max(each[category] for each in seen) == of(found, category)
    bits = of(found, "state_on_device") - max(each["state_on_device"] for each in seen)
    assert 0 <= bits <= 125 * len(list(model.parameters()))


def test_plain_adamw_is_exact() -> None:
    model = tiny_llama()
    found = gs.plan(model, None, batch_size=2, sequence_length=8)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert (found.bytes.weights, found.bytes.gradients, found.bytes.state_on_device) == (
        4 * number,
        4 * number,
        8 * number,
    )


# Time, logits -------------------------------------------------------------------------------------------------------


def test_everything_takes_the_time_of_full_fine_tuning() -> None:
    for choice in (None, gs.All(), gs.GMT()):
        found = gs.plan(tiny_llama(), choice, batch_size=2, sequence_length=8)
        assert found.relative_time == pytest.approx(1)
        assert found.backward_skipped == pytest.approx(0)


def test_the_top_layer_alone_is_as_quick_as_the_operations_say() -> None:
    model = tiny_llama(layers=4)
    found = gs.plan(model, gs.Fixed(("layer.3",)), batch_size=2, sequence_length=8)
    share = gs.partition(model)[4].num_elements / sum(parameter.numel() for parameter in model.parameters())
    assert found.relative_time == pytest.approx(step_time(depth=1 / 4, frozen=1 - share) / 6)
    again = gs.plan(model, gs.Fixed(("layer.3",)), batch_size=2, sequence_length=8, gradient_checkpointing=True)
    assert again.relative_time - found.relative_time == pytest.approx(2 * (1 / 4) / 6)


def test_mean_depth_and_size_are_those_of_many_draws() -> None:
    """2,000 draws: means to 3 %."""
    blocks = gs.partition(tiny_llama(layers=8))
    policy = gs.Uniform(count=3, among=("layer.*",)).bind(blocks)
    names = list(policy.names)
    visited = {name: (len(names) - place) / len(names) for place, name in enumerate(names)}
    sizes = {name: 1 + place for place, name in enumerate(names)}
    choices = ask(gs.Uniform(count=3, among=("layer.*",)).bind(blocks))
    draws = [policy.propose(step) for step in range(2000)]
    depths = [max(visited[name] for name in draw) for draw in draws]
    elements = [sum(sizes[name] for name in draw) for draw in draws]
    assert mean_depth(choices, visited) == pytest.approx(sum(depths) / len(depths), rel=0.03)
    assert mean_elements(choices, sizes) == pytest.approx(sum(elements) / len(elements), rel=0.03)


@pytest.mark.parametrize("policy", [gs.Uniform(count=2, every=500), gs.Cyclic(every=700)])
def test_a_policy_that_seldom_changes_is_not_taken_for_a_fixed_one(policy: gs.AbstractPolicy) -> None:
    choices = ask(policy.bind(gs.partition(tiny_llama())))
    assert not choices.is_fixed
    assert set(choices.reached) == {block.name for block in gs.partition(tiny_llama())}


def test_chunks_of_logits_are_less_than_the_whole() -> None:
    rows = Rows(batch=8, length=512, itemsize=2)
    sizes = {"vocabulary": 151_936, "hidden": 896, "head_trains": True}
    whole, chunked, none = (peak_logits(rows, loss=loss, **sizes) for loss in ("whole", "chunked", "none"))
    assert whole == 12 * 4096 * 151_936
    assert none == 0 < chunked < whole / 5


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"sequence_length": -1}, "sequence_length"),
        ({"choice": "adagradselect"}, "neither a policy nor a mask"),
        ({"choice": gs.All(), "always": "nothing"}, "nothing"),
    ],
)
def test_mistakes_are_said(options: dict[str, Any], words: str) -> None:
    given = {"choice": gs.All(), "batch_size": 2, "sequence_length": 8, **options}
    with pytest.raises(gs.UsageError, match=words):
        gs.plan(tiny_llama(), **given)
