"""The shapes of a decoder, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["split", "fused", "gpt2"]

KINDS: dict[str, Kind] = {
    "llama": "split",
    "mistral": "split",
    "qwen2": "split",
    "qwen3": "split",
    "phi3": "fused",
    "gpt2": "gpt2",
}
"""By `model_type`: how a layer is made. "split" has matrices of their own for q, k, v, gate and up; "fused" has one for
q, k, v and one for gate and up; "gpt2" has LayerNorm and an MLP of two matrices."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder as the activation model sees it.

    Args:
        kind: how a layer is made.
        layers: path of the list of layers.
        norm: path of the norm above them.
        embedding: names of the parameters that make the input of the first layer.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        heads: attention heads.
        key_heads: heads of keys and values.
        head_size: width of one head.
        vocabulary: rows of the head.
        num_layers: how many layers there are.
        activation: of the MLP, as transformers names it.
        dropout: of embedding, residual branches and attention.
        norms_heads: whether q and k have norms of their own.
        window: tokens that attention looks back; None: all.
    """

    kind: Kind
    layers: str
    norm: str
    embedding: tuple[str, ...]
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    num_layers: int
    activation: str
    dropout: tuple[float, float, float] = (0.0, 0.0, 0.0)
    norms_heads: bool = False
    window: int | None = None


def read_architecture(config: Any) -> Architecture | None:
    """The shapes in a configuration of transformers; None for an architecture that the activation model lacks."""
    kind = KINDS.get(getattr(config, "model_type", ""))
    if kind is None:
        return None
    return _gpt2(config) if kind == "gpt2" else _llama(config, kind)


def _llama(config: Any, kind: Kind) -> Architecture:
    heads = config.num_attention_heads
    # Qwen2 has a window in its configuration that it does not use by default.
    windows = getattr(config, "use_sliding_window", True)
    return Architecture(
        kind=kind,
        layers="model.layers",
        norm="model.norm",
        embedding=("model.embed_tokens.weight",),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        key_heads=config.num_key_value_heads or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        num_layers=config.num_hidden_layers,
        activation=config.hidden_act,
        dropout=(0.0, getattr(config, "resid_pdrop", 0.0), getattr(config, "attention_dropout", 0.0)),
        norms_heads=config.model_type == "qwen3",
        window=getattr(config, "sliding_window", None) if windows else None,
    )


def _gpt2(config: Any) -> Architecture:
    return Architecture(
        kind="gpt2",
        layers="transformer.h",
        norm="transformer.ln_f",
        embedding=("transformer.wte.weight", "transformer.wpe.weight"),
        hidden=config.n_embd,
        intermediate=config.n_inner or 4 * config.n_embd,
        heads=config.n_head,
        key_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        vocabulary=config.vocab_size,
        num_layers=config.n_layer,
        activation=config.activation_function,
        dropout=(config.embd_pdrop, config.resid_pdrop, config.attn_pdrop),
    )
