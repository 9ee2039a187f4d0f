"""Recipe, tokenizer and batches of benchmarks/pretrain_encoder.py."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pretraining import open_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gradselect.files import writing_aside

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that decide the weights, besides text and time."""

    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 2
    max_length: int = 128
    batch_size: int = 32
    window: int = 63
    mask_share: float = 0.15
    repeat_share: float = 0.4
    initializer_range: float = 0.08
    neighbours: int = 4
    pairs_from: float = 0.66
    max_move: int = 4
    muon_lr: float = 3e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    clip: float = 1.0


def read_text(path: Path, megabytes: float) -> str:
    """Read the first `megabytes` of a text file, plain or packed by xz."""
    with open_text(path) as file:
        return file.read(int(megabytes * 1e6)).decode("utf-8", errors="ignore")


def build_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a lowercase WordPiece tokenizer with BERT's template of pairs."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=recipe.vocab_size, special_tokens=SPECIAL, limit_alphabet=200, show_progress=False
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(paragraphs, texts)), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=recipe.max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def paragraphs(text: str) -> Iterator[str]:
    """Yield the lines that are not blank."""
    return (line for line in text.splitlines() if line.strip())


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the whole text as one row of ids; int16 holds a vocabulary of 4096."""
    lines, parts = list(paragraphs(text)), list[Tensor]()
    for start in range(0, len(lines), 4096):
        rows = tokenizer(lines[start : start + 4096], add_special_tokens=False)["input_ids"]
        parts.append(torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int16))
    return torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """Rows of `[CLS] A [SEP] B [SEP]`.

    Attributes:
        input_ids: with words masked, int64 (32, 63).
        token_type_ids: 0 in A, 1 in B; the same shape.
        positions: places of masked words in the flattened rows, int64 (288,).
        targets: the masked words, int64 (288,).
        kept: the share of A's words in B, float32 (32,); None in the first part of the time.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    positions: Tensor
    targets: Tensor
    kept: Tensor | None


def make_batch(
    stream: Tensor, recipe: Recipe, generator: torch.Generator, *, repeat_share: float, with_pairs: bool = False
) -> Batch:
    """Make a batch from random places of `stream`."""
    half = (recipe.window - 3) // 2
    rows = recipe.batch_size
    starts = torch.randint(0, stream.numel() - 2 * half, (rows,), generator=generator)
    words = stream[starts[:, None] + torch.arange(2 * half)].long()
    repeats = torch.rand(rows, generator=generator) < repeat_share
    kept = None
    if with_pairs:
        kept = torch.rand(rows, generator=generator) * repeats
        words[:, half:] = mixed(words[:, :half], words[:, half:], kept, recipe, generator)
    else:
        words[repeats, half:] = words[repeats, :half]
    hidden, chosen = masked(words, recipe, generator)

    def frame(halves: Tensor, *, first: int, last: int) -> Tensor:
        sides = (halves[:, :half], halves[:, half:])
        ends = halves.new_full((rows, 1), last)
        return torch.cat([halves.new_full((rows, 1), first), sides[0], ends, sides[1], ends], dim=1)

    input_ids = frame(hidden, first=CLS, last=SEP)
    positions = frame(chosen.long(), first=0, last=0).flatten().nonzero().flatten()
    token_type_ids = torch.zeros_like(input_ids)
    token_type_ids[:, half + 2 :] = 1
    return Batch(input_ids, token_type_ids, positions, frame(words, first=0, last=0).flatten()[positions], kept)


def mixed(first: Tensor, second: Tensor, kept: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Replace a share `kept` of the words of `second` by words of `first`, moved by the same few places in a row."""
    rows, half = first.shape
    moves = torch.randint(-recipe.max_move, recipe.max_move + 1, (rows, 1), generator=generator)
    moved = first.gather(1, (torch.arange(half) + moves) % half)
    return torch.where(torch.rand(first.shape, generator=generator) < kept[:, None], moved, second)


def masked(words: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide some words, as many in each row: batches cost alike. Returns the words, and a mask of the hidden ones."""
    count = round(recipe.mask_share * words.shape[1])
    chosen = torch.zeros_like(words, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(words.shape, generator=generator).topk(count, dim=1).indices, True)
    fate = torch.rand(words.shape, generator=generator)
    others = torch.randint(len(SPECIAL), recipe.vocab_size, words.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), torch.full_like(words, MASK), words)
    return torch.where(chosen & (fate >= 0.9), others, hidden), chosen


def load_streams(arguments: argparse.Namespace, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the ids of training and held-out text. Makes them and the tokenizer once, in the output folder."""
    file = arguments.out / "streams.pt"
    # a whole text is longer than a row, on purpose
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    if not file.exists():
        texts = [read_text(path, arguments.megabytes) for path in arguments.text]
        tokenizer = build_tokenizer(texts, recipe)
        tokenizer.save_pretrained(arguments.out)
        held_out = "\n".join(read_text(path, 1) for path in arguments.valid)
        streams = [torch.cat([tokens_of(text, tokenizer) for text in texts]), tokens_of(held_out, tokenizer)]
        with writing_aside(file) as aside:
            torch.save(streams, aside)
    train, valid = torch.load(file, weights_only=True)
    return train, valid
