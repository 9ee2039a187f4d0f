"""Packing is refused for a model whose examples see one another; the check disturbs nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging import version
from tiny_models import seeded, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2
from torch import nn
from train_fixtures import build, byte_tokenizer, parse, quiet, write_model, write_sums
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from gradselect import UsageError
from gradselect.app.train import train
from gradselect.app.train.packing_check import check_packing, measure

# peft and trl ask transformers for names that were changed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONVOLUTION = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}

APART: dict[str, dict[str, Any]] = {
    "Qwen3Config": {**DECODER, "head_dim": 4},
    "Gemma2Config": {**DECODER, "head_dim": 4, "sliding_window": 5},
    "Gemma3TextConfig": {**DECODER, "head_dim": 4, "sliding_window": 5},
    "MistralConfig": {**DECODER, "sliding_window": 5},
    "GPTNeoXConfig": {**SIZES, "intermediate_size": 32},
    "PhiConfig": DECODER,
    "StableLmConfig": DECODER,
    "Starcoder2Config": DECODER,
}
TOGETHER: dict[str, dict[str, Any]] = {
    "BloomConfig": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "MptConfig": {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "MambaConfig": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "RwkvConfig": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 64},
    "BioGptConfig": {**SIZES, "intermediate_size": 32, "max_position_embeddings": 64},
    "OpenAIGPTConfig": {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "GptOssConfig": {**DECODER, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}
HAS_POSITIONS = version.parse(transformers.__version__) >= version.parse("5.24")
"""Whether transformers makes Falcon's mask from the positions."""
(APART if HAS_POSITIONS else TOGETHER)["FalconConfig"] = SIZES
UNREADABLE: dict[str, dict[str, Any]] = {
    "Mamba2Config": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "Lfm2Config": {**DECODER, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "GraniteMoeHybridConfig": {
        **DECODER,
        **CONVOLUTION,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
}


def of(name: str, settings: dict[str, Any]) -> nn.Module:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, name)(**settings, **ids)
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config))


def packing_trainer(model: nn.Module) -> Any:
    """The three parts of TRL's trainer that the check uses."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # pyright: ignore[reportArgumentType]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return SimpleNamespace(model=model, data_collator=collator, _prepare_inputs=lambda batch: batch)


def check(model: nn.Module) -> None:
    check_packing(packing_trainer(model), [list(range(3, 40))], max_length=64)


@pytest.mark.parametrize("name", APART)
def test_architectures_that_keep_examples_apart_pass(name: str) -> None:
    check(of(name, APART[name]))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_leak(make: Any, dtype: torch.dtype) -> None:
    check(make().to(dtype))


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_whose_examples_see_one_another_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"^data\.packing=true: .* lets packed .*; write data\.packing=false"):
        check(of(name, TOGETHER[name]).to(dtype))


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="it reads packed rows")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_model_that_cannot_read_packed_rows_is_refused_with_its_own_reason(name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read packed rows \(ValueError: .*; write data\.packing=false"):
        check(of(name, UNREADABLE[name]))


def test_positions_that_do_not_start_again_are_refused() -> None:
    model: Any = tiny_gpt2()
    positions = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: positions(torch.arange(ids.shape[-1])[None].expand_as(ids))
    with pytest.raises(UsageError, match="does not start positions again"):
        check_packing(packing_trainer(model), [list(range(3, 40))], max_length=24)


def test_a_model_without_context_is_not_called_checked(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    check(model)
    assert "could not check that packed examples do not see one another" in caplog.text


def test_an_adapter_is_seen_through() -> None:
    trainer = packing_trainer(tiny_opt())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer.model = seeded(lambda: peft.get_peft_model(trainer.model, config))
    with pytest.raises(UsageError, match="OPTForCausalLM lets packed examples see one another"):
        check_packing(trainer, [list(range(3, 40))], max_length=64)


def test_the_check_leaves_everything_as_it_was() -> None:
    trainer = packing_trainer(tiny_llama())
    model = trainer.model
    model.model.layers[1].eval()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    marks = [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    check_packing(trainer, [list(range(3, 40))], max_length=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == marks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))


def test_dropout_is_off() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=4)  # dropout is 0.1
    check(seeded(lambda: transformers.GPT2LMHeadModel(config)).train())


def test_a_refused_run_harms_nothing_on_disk(tmp_path: Path) -> None:
    model: Any = of("OPTConfig", {**SIZES, "vocab_size": 258, "ffn_dim": 32, "word_embed_proj_dim": 16})
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    with pytest.raises(UsageError, match="OPTForCausalLM lets packed examples see one another"):
        train(parse(tmp_path, data={"packing": True, "max_length": 64}), console=quiet())
    assert not list((tmp_path / "out").glob("*"))
    train(parse(tmp_path, data={"max_length": 64}, run={"steps": 1}), console=quiet())


@pytest.mark.parametrize("method", [{"name": "uniform", "count": 1}, {"name": "lora"}])
def test_the_check_runs_in_a_real_trainer(tmp_path: Path, method: dict[str, Any]) -> None:
    write_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    options = {"attention": "eager", "gradient_checkpointing": True}
    trainer: Any
    trainer, _ = build(tmp_path, tmp_path / "out", data={"packing": True}, method=method, model=options)
    one, other, *others = torch.randint(3, 200, (4, 12))
    influence = measure(trainer, one, other, others)
    assert influence.within > 1e-4
    assert influence.across == influence.rounding == 0.0
