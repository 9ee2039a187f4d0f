"""Tiny random models from configs alone: no file, no network, a fixed seed, the global random state untouched.

They are in training mode and have no dropout, so two forward passes agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from torch.nn import functional

VOCABULARY = 64
HIDDEN = 16
EXPERTS = 2

Model = TypeVar("Model", bound=nn.Module)


@dataclass(kw_only=True)
class Output:
    """What a `PlainModel` returns, read like an output of transformers."""

    logits: torch.Tensor  # (2, 8, 64)
    loss: torch.Tensor | None


class PlainModel(nn.Module):
    """A language model of torch modules only: token embedding, `layers` blocks, a norm, a head."""

    def __init__(self, *, layers: int, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(PlainLayer() for _ in range(layers))
        self.final_norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,  # (2, 8)
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,  # (2, 8)
    ) -> Output:
        hidden = self.tokens(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.out(self.final_norm(hidden))
        if labels is None:
            return Output(logits=logits, loss=None)
        return Output(
            logits=logits, loss=functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )


class PlainLayer(nn.Module):
    """A residual MLP with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


def tiny_plain(*, layers: int = 4, tied: bool = False) -> PlainModel:
    """A model that has none of transformers' methods."""
    return seeded(lambda: PlainModel(layers=layers, tied=tied))


def tiny_sequential(*, layers: int = 4) -> nn.Sequential:
    """Embedding, equal layers, norm, head as the numbered children of one `nn.Sequential`."""
    return seeded(
        lambda: nn.Sequential(
            nn.Embedding(VOCABULARY, HIDDEN),
            *(PlainLayer() for _ in range(layers)),
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, VOCABULARY),
        )
    )


def tiny_llama(*, layers: int = 4, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model most tests use."""
    return causal(transformers.LlamaConfig(**decoder(layers=layers, tied=tied)), dtype=dtype)


def tiny_qwen2(*, layers: int = 4, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Biases on q, k, v; tied as the small Qwen2.5 models are."""
    return causal(transformers.Qwen2Config(**decoder(layers=layers, tied=tied)), dtype=dtype)


def tiny_phi3(*, layers: int = 4) -> nn.Module:
    """Fused qkv and gate-up projections; the architecture of Phi-3 and of Phi-4-mini."""
    return causal(
        transformers.Phi3Config(**decoder(layers=layers, tied=True), pad_token_id=0, bos_token_id=0, eos_token_id=0)
    )


def tiny_gemma(*, layers: int = 4) -> nn.Module:
    return causal(transformers.GemmaConfig(**decoder(layers=layers, tied=True), head_dim=4))


def tiny_gemma2(*, layers: int = 4) -> nn.Module:
    """Four norms in each layer."""
    return causal(transformers.Gemma2Config(**decoder(layers=layers, tied=True), head_dim=4))


def tiny_gpt2(*, layers: int = 4) -> nn.Module:
    """Learned positions, tied head."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return causal(config)


def tiny_opt(*, layers: int = 4) -> nn.Module:
    """Learned positions, tied head, projections into and out of a narrower embedding."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN // 2,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        dropout=0.0,
    )
    return causal(config)


def tiny_bert(*, layers: int = 4) -> nn.Module:
    """Encoder with a masked-language head, tied."""
    return seeded(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**encoder(layers=layers))))


def tiny_bert_classifier(*, layers: int = 4) -> nn.Module:
    """Encoder with a pooler and a classifier, no head of its own."""
    config = transformers.BertConfig(**encoder(layers=layers))
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def tiny_roberta(*, layers: int = 4) -> nn.Module:
    return seeded(lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**encoder(layers=layers))))


def tiny_t5(*, layers: int = 3) -> nn.Module:
    """Encoder-decoder; the embedding is shared by both sides and the head."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=4,
        d_ff=2 * HIDDEN,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def tiny_bart(*, layers: int = 3) -> nn.Module:
    """Encoder-decoder with learned positions and embedding norms on both sides."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        dropout=0.0,
        max_position_embeddings=32,
    )
    return seeded(lambda: transformers.BartForConditionalGeneration(config))


def tiny_mixtral(*, layers: int = 3) -> nn.Module:
    """Experts of a layer in one stacked tensor."""
    config = transformers.MixtralConfig(**decoder(layers=layers, tied=False), num_local_experts=EXPERTS)
    return causal(config)


def tiny_qwen2_moe(*, layers: int = 3) -> nn.Module:
    """Routed experts beside a shared one."""
    config = transformers.Qwen2MoeConfig(
        **decoder(layers=layers, tied=False),
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
    )
    return causal(config)


def tiny_gemma3_vision(*, layers: int = 3) -> nn.Module:
    """A vision tower, a projector and a language model, tied."""
    config = transformers.Gemma3Config(
        text_config={**decoder(layers=layers, tied=True), "head_dim": 4},
        vision_config={**vision(), "num_hidden_layers": 2},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return seeded(lambda: transformers.Gemma3ForConditionalGeneration(config))


def tiny_qwen2_vl(*, layers: int = 3) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    config = transformers.Qwen2VLConfig(
        text_config={**decoder(layers=layers, tied=False), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config))


def tiny_smolvlm(*, layers: int = 3) -> nn.Module:
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **decoder(layers=layers, tied=False), "pad_token_id": 0},
        vision_config={**vision(), "num_hidden_layers": 2},
        image_token_id=60,
        scale_factor=2,
    )
    return seeded(lambda: transformers.SmolVLMForConditionalGeneration(config))


def tiny_lora(*, layers: int = 4, modules_to_save: tuple[str, ...] = ()) -> nn.Module:
    """A tiny Llama in PEFT: only the adapters train, and whole copies of `modules_to_save`."""
    import peft  # here: slow to import, and most tests do not need it

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=list(modules_to_save) or None, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks transformers 5 for a property that was renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return seeded(lambda: peft.get_peft_model(tiny_llama(layers=layers), config))  # type: ignore[arg-type]


def tiny_batch(model: nn.Module, *, seed: int, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """Random tokens for `model(**batch)`: input_ids, attention_mask and labels, each (2, 8), on the model's device."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def decoder(*, layers: int, tied: bool) -> dict[str, Any]:
    """The fields that every Llama-like config shares."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
    }


def vision() -> dict[str, Any]:
    """The fields of a small vision tower of SigLIP's kind."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }


def encoder(*, layers: int) -> dict[str, Any]:
    """The fields of a BERT-like config."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def causal(config: transformers.PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model of this config."""
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))


def seeded(build: Callable[[], Model], *, seed: int = 0) -> Model:
    """What `build` makes when random numbers start at `seed`; the caller's random state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
