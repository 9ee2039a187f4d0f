"""Activations that `gs.plan` counts on the meta device, against those that autograd saves on the CPU."""

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
import trl.trainer.utils
from packaging import version
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
from gradselect.integrations.transformers import checkpoint_selected
from gradselect.planning.activations import ActivationCounter, Activations
from gradselect.planning.forward_pass import ForwardPass, peak_logits, saved_logits
from gradselect.planning.meta_forward import Rows, meta_copy

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
    assert output  # alive until here, and its graph with it
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


OF_T5 = 0.12 if version.parse(transformers.__version__) >= version.parse("5.23") else 0.14


@pytest.mark.parametrize(("build", "rel"), [(tiny_phi3, 0.08), (tiny_t5, OF_T5), (tiny_bart, 0.04)])
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


@pytest.mark.parametrize("name", ["llama", "llama in bfloat16", "qwen2", "gpt2"])
@pytest.mark.parametrize("mark", ["", ".1.", "embed"])
def test_a_chunked_loss_saves_two_numbers_a_token_and_the_input_of_the_head(name: str, mark: str) -> None:
    """To 0.5 %: TRL's loss also saves a few scalars, and one byte a row."""
    model = without_cache(MODELS[name])
    if trained := train_only(model, mark):
        rows = Rows(batch=BATCH, length=LENGTH)
        forward = ForwardPass(ActivationCounter(meta_copy(model)), rows, loss="chunked", checkpointing=False)
        logits = saved_logits(BATCH * LENGTH, vocabulary=VOCABULARY, loss="chunked")
        trl.trainer.utils.add_fused_lm_head(model)  # pyright: ignore
        real = saved_by(model, labels=inputs_for(model)["input_ids"], fused_lm_head=True)
        assert forward.kept(trained).activations + logits == pytest.approx(real, rel=0.005)


def test_a_chunked_loss_holds_less_than_all_logits() -> None:
    sizes = {"vocabulary": 151_936, "hidden": 896, "itemsize": 2, "head_trains": True}
    whole, chunked, none = (peak_logits(8 * 512, loss=loss, **sizes) for loss in ("whole", "chunked", "none"))
    assert whole == 12 * 4096 * 151_936
    assert none == 0 < chunked < whole / 5
