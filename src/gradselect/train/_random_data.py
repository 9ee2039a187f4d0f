"""Random tokens in place of examples, and a tokenizer in place of one that would make them."""

from __future__ import annotations

import hashlib

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import UsageError
from ._data import Examples, Source
from ._recipe import RandomData

_END = "<end>"


def random_examples(settings: RandomData, *, num_embeddings: int, seed: int) -> Examples:
    """Rows of tokens drawn alike for every seed and length, whatever the machine.

    Args:
        settings: how many, how long, of which tokens.
        num_embeddings: tokens that the model has.
        seed: of the draw.

    Raises:
        UsageError: more tokens than the model has.
    """
    vocabulary = num_embeddings if settings.vocabulary is None else settings.vocabulary
    if vocabulary > num_embeddings:
        raise UsageError(
            f"data.vocabulary={vocabulary} is more than the model's {num_embeddings} tokens; write at most that"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (settings.rows, settings.length), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Examples(
        train=Dataset.from_list(rows),
        validation=None,
        sources={"train": Source(path=f"random tokens [{vocabulary}]", fingerprint=fingerprint, rows=rows)},
    )


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """One token, which ends and pads: what trainers ask of a tokenizer that never sees a text."""
    tokenizer = Tokenizer(WordLevel({_END: 0}, unk_token=_END))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
