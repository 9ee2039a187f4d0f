"""Names that the architectures of transformers give to the projections of attention."""

from __future__ import annotations

QUERIES_KEYS_VALUES = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "q", "k", "v"),
)
"""Ends of the names of query, key and value projections."""

ATTENTION_VALUES = tuple(name for name in QUERIES_KEYS_VALUES if name.startswith("v"))
"""Ends of the names of value projections."""

ATTENTION_OUTPUTS = (
    *("o_proj", "out_lin", "attention.output.dense", "o"),
    # Not "out_proj" alone, which a classification head may have.
    *("attn.out_proj", "self_attn.out_proj", "encoder_attn.out_proj", "attention.out_proj"),
    "crossattention.output.dense",
)
"""Ends of the names of output projections, in architectures whose query, key and value are layers of their own."""
