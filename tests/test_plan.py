"""`gs.plan`: bytes of activations against those that autograd keeps, of the rest against optimizers that were run."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
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
    tiny_bart,
    tiny_batch,
    tiny_bert,
    tiny_bert_classifier,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_phi3,
    tiny_plain,
    tiny_qwen2,
    tiny_sequential,
    tiny_t5,
)
from torch import nn

import gradselect as gs
from gradselect.blocks.flops import step_time
from gradselect.integrations.transformers import checkpoint_selected
from gradselect.planning import Plan
from gradselect.planning.activations import ActivationCounter, Activations
from gradselect.planning.forward_pass import peak_logits
from gradselect.planning.meta_forward import Rows, meta_copy
from gradselect.planning.policy_survey import mean_depth, mean_entries, survey

BATCH, LENGTH = 3, 16


class Saved:
    """A tensor that autograd saves. It dies with the part of the graph that saved it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_by(model: nn.Module, **options: Any) -> int:
    """Bytes that wait for the backward pass on the CPU, each storage once, without weights and buffers."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        output = model(**{**inputs_for(model), **options})
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    assert output.logits is not None  # alive until here, and its graph with it
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def inputs_for(model: Any, *, padded: bool = False) -> dict[str, Any]:
    batch = tiny_batch(model, seed=0, batch=BATCH, length=LENGTH)
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if padded:
        inputs["attention_mask"] = batch["attention_mask"]
        inputs["attention_mask"][0, :3] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    return inputs


def counted(model: nn.Module, *, padded: bool = False, **options: Any) -> Activations:
    """The same on the meta device, for the parameters that require a gradient."""
    rows = Rows(batch=BATCH, length=LENGTH, masked=padded)
    return ActivationCounter(meta_copy(model, **options)).count(train_only(model, ""), rows)


def train_only(model: nn.Module, mark: str) -> list[str]:
    """Freeze all parameters whose names lack `mark`. Returns the names of those that train now."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and mark in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def without_cache(build: Callable[[], nn.Module]) -> Any:
    model: Any = build().train()
    model.config.use_cache = False
    return model


def tiny_qwen3() -> nn.Module:
    return causal(transformers.Qwen3Config(**decoder(layers=2, tied=True), head_dim=4))


def tiny_mistral() -> nn.Module:
    return causal(transformers.MistralConfig(**decoder(layers=2, tied=False), sliding_window=4))


def with_dropout() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=HIDDEN, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return causal(config)


# Activations --------------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "llama in bfloat16": lambda: tiny_llama(dtype=torch.bfloat16),
    "llama, tied": lambda: tiny_llama(tied=True),
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "bert": tiny_bert,
    "mixtral in bfloat16": lambda: tiny_mixtral().to(torch.bfloat16),
}


@pytest.mark.parametrize("mark", ["", ".1.", "attn", "norm", "embed"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_exactly_those_that_autograd_saves(name: str, mark: str) -> None:
    model = without_cache(MODELS[name])
    train_only(model, mark)
    for padded in (False, True):
        assert counted(model, padded=padded).whole == saved_by(model, **inputs_for(model, padded=padded))


@pytest.mark.parametrize(("build", "rel"), [(tiny_phi3, 0.08), (tiny_t5, 0.12), (tiny_bart, 0.04)])
@pytest.mark.parametrize("mark", ["", "norm"])
def test_where_the_cpu_lacks_a_fused_kernel_activations_are_close(
    build: Callable[[], nn.Module], rel: float, mark: str
) -> None:
    """The CPU copies the output of Phi-3's attention, and saves all probabilities where a position bias trains (T5)."""
    model = without_cache(build)
    train_only(model, mark)
    for padded in (False, True):
        found = counted(model, padded=padded).whole
        assert found == pytest.approx(saved_by(model, **inputs_for(model, padded=padded)), rel=rel)


HELD_BY_KEYWORD = {"llama": 640, "llama in bfloat16": 384, "qwen3": 640, "gemma2": 6784, "gpt2": 128, "opt": 384}
"""Bytes of positions, rotations and masks. Checkpoints hold them for the second pass, but not through autograd."""


@pytest.mark.parametrize("mark", ["", ".1.", "embed", "wte"])
@pytest.mark.parametrize("name", HELD_BY_KEYWORD)
def test_checkpointed_activations_are_those_that_are_held(name: str, mark: str) -> None:
    model: Any = MODELS[name]().train()
    if train_only(model, mark):
        found = counted(model, checkpointing=True)
        checkpoint_selected(model)
        assert 0 <= found.checkpointed - saved_by(model) <= HELD_BY_KEYWORD[name]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_keys_and_values_is_counted(name: str) -> None:
    model: Any = MODELS[name]().train()
    assert counted(model).whole == saved_by(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_lora_are_exactly_those_that_autograd_saves(dtype: torch.dtype) -> None:
    """Its float32 matrices make a float32 copy of each input in half precision."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model: Any = peft.get_peft_model(without_cache(lambda: tiny_llama(dtype=dtype)), config)
    assert counted(model).whole == saved_by(model)


def test_eager_attention_keeps_probabilities() -> None:
    model = without_cache(tiny_llama)
    fused = counted(model).whole
    model.set_attn_implementation("eager")
    assert counted(model).whole == saved_by(model) > fused


def test_flex_attention_counts_as_fused() -> None:
    model = without_cache(tiny_llama)
    fused = counted(model).whole
    model.set_attn_implementation("flex_attention")
    assert counted(model).whole == fused
    assert model.config._attn_implementation == "flex_attention"


def test_a_dropout_keeps_one_byte_an_entry() -> None:
    """As on accelerators; the CPU keeps its mask as float32, the meta device too if it is left alone."""
    model = without_cache(with_dropout)
    plain = counted(without_cache(lambda: tiny_gpt2(layers=2))).whole
    # After the embedding, and after attention and MLP of two layers.
    assert counted(model).whole - plain == 5 * BATCH * LENGTH * HIDDEN


def test_a_model_in_evaluation_mode_is_planned_as_it_will_train() -> None:
    model = without_cache(with_dropout)
    assert counted(model.eval()) == counted(model.train())


def test_below_the_lowest_trained_layer_nothing_is_kept() -> None:
    deep, shallow = (without_cache(lambda: tiny_llama(layers=layers)) for layers in (8, 2))  # noqa: B023
    for model in (deep, shallow):
        train_only(model, "model.norm")
    assert counted(deep).whole == counted(shallow).whole
    low, high = tiny_llama(layers=4), tiny_llama(layers=4)
    train_only(low, "layers.0.")
    train_only(high, "layers.3.")
    assert counted(high).whole < counted(low).whole / 2


def test_with_checkpointing_one_layer_is_kept_beside_the_inputs() -> None:
    found = counted(without_cache(lambda: tiny_llama(layers=6)))
    assert found.recomputed * 6 == pytest.approx(found.whole - found.checkpointed, rel=0.01)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_plain, tiny_sequential])
def test_any_model_that_returns_logits_is_counted(build: Callable[[], nn.Module]) -> None:
    found = gs.plan(build(), gs.Cyclic(every=1), batch_size=2, sequence_length=8)
    assert found.notes == ()
    assert found.bytes.activations > 0


def test_counting_leaves_the_model_as_it_was() -> None:
    model = tiny_opt().eval()
    train_only(model, "layers.1.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = copy.deepcopy(model.state_dict())
    gs.plan(model, gs.All(), batch_size=2, sequence_length=8, gradient_checkpointing=True)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert not model.training
    assert model.config.use_cache  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers[int(tokens.sum())](tokens.float())


@pytest.mark.parametrize(
    ("build", "words"),
    [(Odd, "does not run on the meta device"), (lambda: tiny_llama().base_model, "without logits")],
)
def test_a_model_that_cannot_be_counted_is_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(gs.UsageError, match=f"cannot be counted: it.* {words}"):
        gs.plan(build(), gs.All(), batch_size=2, sequence_length=2)


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
    found = survey(gs.Uniform(count=3, among=("layer.*",)).bind(blocks))
    draws = [policy.propose(step) for step in range(2000)]
    depths = [max(visited[name] for name in draw) for draw in draws]
    elements = [sum(sizes[name] for name in draw) for draw in draws]
    assert mean_depth(found, visited) == pytest.approx(sum(depths) / len(depths), rel=0.03)
    assert mean_entries(found, sizes) == pytest.approx(sum(elements) / len(elements), rel=0.03)


@pytest.mark.parametrize("policy", [gs.Uniform(count=2, every=500), gs.Cyclic(every=700)])
def test_a_policy_that_seldom_changes_is_not_taken_for_a_fixed_one(policy: gs.AbstractPolicy) -> None:
    found = survey(policy.bind(gs.partition(tiny_llama())))
    assert not found.is_fixed
    assert set(found.reached) == {block.name for block in gs.partition(tiny_llama())}


def test_chunks_of_logits_are_less_than_the_whole() -> None:
    sizes = {"vocabulary": 151_936, "hidden": 896, "itemsize": 2, "head_trains": True}
    whole, chunked, none = (peak_logits(8 * 512, loss=loss, **sizes) for loss in ("whole", "chunked", "none"))
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
