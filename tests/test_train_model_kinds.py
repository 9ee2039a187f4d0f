"""Models that `gradselect train` takes: decoders, also beside a vision tower; all others are refused by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from rich.console import Console
from train_fixtures import byte_tokenizer, parse, quiet, write_sums

from gradselect import UsageError
from gradselect.app.evaluate import EvaluationSettings, evaluate
from gradselect.app.models import check_causal
from gradselect.app.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SIZES = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 257}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write(folder: Path, config: Any, kind: Any) -> Path:
    """Write a random model and a tokenizer of bytes to `folder/model`, and data beside it."""
    tiny_models.seeded(lambda: kind.from_config(config)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "sums.jsonl")
    return folder / "model"


def smolvlm() -> Any:
    text = {"model_type": "llama", **SIZES, **HEADS, "bos_token_id": 256, "eos_token_id": 256}
    vision = {**VISION, "image_size": 16, "patch_size": 8}
    return transformers.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=250, scale_factor=2)


def paligemma() -> Any:
    text = {
        "model_type": "gemma",
        **SIZES,
        **HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 8}
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=16, image_token_index=250
    )


def test_a_model_of_pictures_and_text_trains_on_text(tmp_path: Path) -> None:
    write(tmp_path, smolvlm(), transformers.AutoModelForImageTextToText)
    shown = io.StringIO()
    recipe = parse(tmp_path, method={"name": "uniform", "count": 1}, run={"steps": 6, "batch_size": 2})
    out = train(recipe, console=Console(file=shown, width=2000))
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) >= 5
    assert all(name.startswith(("text_model", "head")) for each in records for name in each["selected"])
    assert "the loss reaches no weight of" in shown.getvalue()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["SmolVLMForConditionalGeneration"]
    found = evaluate(EvaluationSettings(model=str(out), task="loss", data=str(tmp_path / "sums.jsonl"), device="cpu"))
    assert found.loss > 0


LOOKING_AHEAD = {
    "an encoder": (lambda: transformers.BertConfig(**SIZES, **HEADS), transformers.AutoModelForCausalLM),
    "a prefix model": (paligemma, transformers.AutoModelForImageTextToText),
}


@pytest.mark.parametrize("name", LOOKING_AHEAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_sees_the_tokens_that_it_predicts_is_refused(name: str, dtype: str, tmp_path: Path) -> None:
    build, kind = LOOKING_AHEAD[name]
    model = write(tmp_path, build(), kind)
    with pytest.raises(UsageError, match=r"model\.path=.* is no causal language model, as loaded"):
        train(parse(tmp_path, model={"dtype": dtype}), console=quiet())
    assert not (tmp_path / "out" / "config.json").exists()
    settings = EvaluationSettings(model=str(model), task="loss", data=str(tmp_path / "sums.jsonl"), device="cpu")
    with pytest.raises(UsageError, match="is no causal language model"):
        evaluate(settings)


def test_an_encoder_that_is_made_a_decoder_trains(tmp_path: Path) -> None:
    write(tmp_path, transformers.BertConfig(**SIZES, **HEADS, is_decoder=True), transformers.AutoModelForCausalLM)
    train(parse(tmp_path, run={"steps": 1}), console=quiet())


def test_an_encoder_decoder_is_refused_by_its_type(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=258, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    write(tmp_path, config, transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(UsageError, match=r"of the type 't5', for which.*give a model with a decoder only"):
        train(parse(tmp_path), console=quiet())


BUILDS = [tiny_models.tiny_llama, tiny_models.tiny_gemma2, tiny_models.tiny_gpt2, tiny_models.tiny_qwen2_vl]


@pytest.mark.parametrize("build", BUILDS)
def test_decoders_are_causal_and_are_left_as_they_were(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, state = build(), torch.get_rng_state()
    check_causal(model, name="model")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "could not check" not in caplog.text
