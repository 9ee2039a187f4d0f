"""A resumed run has every weight of its checkpoint, whatever names transformers saved them under."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from train_fixtures import (
    ADAGRADSELECT,
    assert_same_weights,
    byte_tokenizer,
    parse,
    quiet,
    write_sums,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from gradselect import UsageError, sparsegrad
from gradselect.app.recipe import load_recipe
from gradselect.app.train import train
from gradselect.app.train.restoring import check_adapter, restore_weights
from gradselect.files.checked_json import sealed

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SIZES: dict[str, int] = {
    name: size
    for size, names in {
        1: "num_key_value_heads num_experts_per_tok n_shared_experts first_k_dense_replace n_group topk_group n_groups "
        "linear_num_key_heads linear_num_value_heads mm_tokens_per_image",
        2: "num_hidden_layers num_attention_heads num_experts num_local_experts n_routed_experts mamba_num_heads "
        "n_layer num_layers num_decoder_layers num_heads n_head",
        4: "qk_rope_head_dim qk_nope_head_dim",
        8: "head_dim moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank v_head_dim d_kv "
        "linear_key_head_dim linear_value_head_dim mamba_head_dim",
        14: "patch_size",
        16: "hidden_size d_model d_ff n_embd",
        24: "intermediate_size",
        28: "image_size",
        64: "max_position_embeddings n_positions",
        256: "bos_token_id eos_token_id",
        257: "pad_token_id",
        258: "vocab_size",
    }.items()
    for name in names.split()
}
"""Sizes of a tiny model, for configurations of any family; each takes those that it has."""

CONVERTED = (
    *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma3"),
    *("glm4_moe", "gpt_neox", "gpt_oss", "granitemoe", "granitemoeshared", "jetmoe", "longcat_flash", "mimo_v2_flash"),
    *("minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe"),
    *("qwen3_next", "solar_open", "gpt2", "bert"),
)
"""Families of language models that transformers saves under other names, and two that it does not."""
CLASSIFIERS = ("deepseek_v3", "gemma3", "gte", "mixtral", "nomic_bert", "qwen3_moe", "t5gemma2")


def tiny(kind: str, auto: Any = AutoModelForCausalLM) -> Any:
    """Return a random model of a family, whose tensors all have other values."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto.from_config(_shrunk(AutoConfig.for_model(kind)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
    return model


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    for name, size in SIZES.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if kinds:
            setattr(config, name, [*dict.fromkeys(kinds), *kinds][:2])
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _shrunk(part)
    return config


def perturbed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Overwrite every float tensor of the model. Return what it had."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(1)
    return before


def assert_is(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert [name for name in now if not torch.equal(now[name], before[name])] == []


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        *((AutoModelForCausalLM, kind) for kind in CONVERTED),
        *((AutoModelForSequenceClassification, k) for k in CLASSIFIERS),
    ],
)
def test_every_family_returns_bitwise_in_place(auto: Any, kind: str, tmp_path: Path) -> None:
    model = tiny(kind, auto)
    model.save_pretrained(tmp_path)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = perturbed(model)
    restore_weights(model, tmp_path)
    assert_is(model, before)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_a_model_read_from_the_hub_format_returns_in_bfloat16_and_shards(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved/model.safetensors.index.json").is_file()
    before = perturbed(model)
    restore_weights(model, tmp_path / "saved")
    assert_is(model, before)


def test_rotated_layers_of_a_converted_family_return(tmp_path: Path) -> None:
    model = tiny("gemma3")
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with torch.random.fork_rng():
        sparsegrad.convert(model, [batch], layers="model.language_model.layers.*.mlp.*_proj")
    model.save_pretrained(tmp_path)
    before = perturbed(model)
    restore_weights(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def edited(folder: Path, *, gone: str = "", new: str = "", other_shape: str = "", value: str = "") -> None:
    """Change tensors of a weight file whose names contain a text."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if gone and gone in name:
            del tensors[name]
        elif other_shape and other_shape in name:
            tensors[name] = tensors[name][:-1].clone()
    if new:
        tensors[new] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_checkpoint_that_lacks_tensors_or_has_others_is_refused(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    edited(tmp_path, gone="layers.1.self_attn.q_proj", new="model.stray", other_shape="layers.0.self_attn.k_proj")
    with pytest.raises(UsageError) as refusal:
        restore_weights(model, tmp_path)
    said = str(refusal.value)
    assert "1 are missing (model.layers.1.self_attn.q_proj.weight)" in said
    assert "1 have no place in the model (model.stray)" in said
    assert "1 have another shape (model.layers.0.self_attn.k_proj.weight)" in said
    assert "Nothing has been trained" in said


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    """Without it the others would be stacked to a smaller tensor."""
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    edited(tmp_path, gone="experts.1.gate_proj")
    with pytest.raises(UsageError, match="experts"):
        restore_weights(model, tmp_path)


def test_the_version_that_wrote_a_refused_checkpoint_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    edited(tmp_path, gone="embed_tokens")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    with pytest.raises(UsageError, match=r"pip install transformers==5\.0\.0"):
        restore_weights(model, tmp_path)


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen3_moe", "gemma3", "llama"])
def test_an_adapter_on_a_converted_family_returns(kind: str, tmp_path: Path) -> None:
    options = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"] if kind == "llama" else None)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny(kind), options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        model.save_pretrained(str(tmp_path))
        before = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1)
        check_adapter(model, tmp_path)
    now = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert [name for name in now if not torch.equal(now[name], before[name])] == []


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1" in name)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UsageError, match=f"1 are missing \\({name}\\)"):
        check_adapter(model, tmp_path)


def stop_after(run: Path, *, step: int) -> None:
    """Make a finished run one that was killed after its checkpoint of `step`."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (run / "model.safetensors").unlink()
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(sealed({**description, "status": "started"})))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_neox", "gemma3"])
def test_a_run_of_a_converted_family_resumes_bitwise(kind: str, tmp_path: Path) -> None:
    """Tensors of other names kept the values that the model was built with, in silence."""
    tiny(kind).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl")
    method = {**ADAGRADSELECT, "fraction": 0.6}
    recipe = parse(
        tmp_path, method=method, run={"save_every": 2, "keep_checkpoints": 9, "output": str(tmp_path / "out")}
    )
    whole = train(recipe, console=quiet())
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    stop_after(stopped, step=2)
    train(load_recipe(whole / "recipe.yaml", [f"run.output={stopped}"]), resume=True, console=quiet())
    assert_same_weights(whole, stopped)
