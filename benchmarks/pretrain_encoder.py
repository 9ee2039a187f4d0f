"""Pretrain a small BERT by masked-language modelling: the encoder of benchmarks/glue.py, where no hub can be reached.

    python benchmarks/pretrain_encoder.py --out encoder --minutes 25 --text books.txt.xz stories.txt --valid other.txt

4 layers of width 128, a lowercase WordPiece vocabulary of 4096 learned from the text. One row is `[CLS] A [SEP] B
[SEP]`, 63 tokens, 15 % of its words masked (80 % as [MASK], 10 % as another word, 10 % as they are; Devlin et al.,
BERT, arXiv 1810.04805, 3.1). B continues A, but in two rows of five B is A again with words masked of its own, so that
attention learns to look across the pair. In the last third of the time these B keep only a random share of A's words,
from places that have moved, and the pooler has to say which share: BERT's next-sentence head with a soft label, in
place of its next-sentence task.

What a few minutes of one core cannot learn is put in at the start: word vectors from counted neighbours (PMI and its
singular vectors; Levy, Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", NeurIPS 2014), log
frequencies as the head's bias, sinusoids as positions. Muon for the layers' matrices, AdamW for the rest, as in
quickstart/pretrain.py; cosine over the CPU minutes given. A run that was stopped continues where it was saved last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import lzma
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from transformers import BertConfig, BertForPreTraining, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything beside the text and the time that decides the weights."""

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
    """The first so many megabytes of a text file, of one packed by xz too."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        return file.read(int(megabytes * 1e6)).decode("utf-8", errors="ignore")


def build_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Lowercase WordPiece with BERT's template of pairs."""
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
    """Lines that hold something."""
    return (line for line in text.splitlines() if line.strip())


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The whole text as one row of ids; int16 holds a vocabulary of 4096."""
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
        positions: where words are to be predicted, in the flattened rows, int64 (288,).
        targets: the words there, int64 (288,).
        kept: which share of A's words B has, float32 (32,); None in the first part of the time.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    positions: Tensor
    targets: Tensor
    kept: Tensor | None


def make_batch(
    stream: Tensor, recipe: Recipe, generator: torch.Generator, *, repeat_share: float, with_pairs: bool = False
) -> Batch:
    """Rows from random places of `stream`."""
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
    """`second` with a share `kept` of the words of `first`, which are moved by the same few places in a row."""
    rows, half = first.shape
    moves = torch.randint(-recipe.max_move, recipe.max_move + 1, (rows, 1), generator=generator)
    moved = first.gather(1, (torch.arange(half) + moves) % half)
    return torch.where(torch.rand(first.shape, generator=generator) < kept[:, None], moved, second)


def masked(words: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The words with some hidden, and which ones: the same number in each row, so that batches cost alike."""
    count = round(recipe.mask_share * words.shape[1])
    chosen = torch.zeros_like(words, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(words.shape, generator=generator).topk(count, dim=1).indices, True)
    fate = torch.rand(words.shape, generator=generator)
    others = torch.randint(len(SPECIAL), recipe.vocab_size, words.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), torch.full_like(words, MASK), words)
    return torch.where(chosen & (fate >= 0.9), others, hidden), chosen


def build_model(recipe: Recipe) -> BertForPreTraining:
    """Random weights, tied head, no dropout."""
    config = BertConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        max_position_embeddings=recipe.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=recipe.initializer_range,
        pad_token_id=PAD,
    )
    return BertForPreTraining(config)


@torch.no_grad()
def warm_start(model: BertForPreTraining, stream: Tensor, recipe: Recipe) -> None:
    """Word vectors, the head's bias and positions, in place; every vector as large as a random one."""
    words, embeddings = stream.long(), model.bert.embeddings
    frequencies = torch.bincount(words, minlength=recipe.vocab_size) + 1.0
    model.cls.predictions.bias.copy_((frequencies / frequencies.sum()).log())
    for parameter, vectors in (
        (embeddings.word_embeddings.weight, word_vectors(words, recipe)),
        (embeddings.position_embeddings.weight, sinusoids(recipe)),
    ):
        parameter.copy_(vectors * (recipe.initializer_range / vectors.std()))


def word_vectors(words: Tensor, recipe: Recipe) -> Tensor:
    r"""U sqrt(S) of the positive pointwise mutual information of words and their neighbours. Shape (4096, 128).

    A neighbour at distance d counts 1 / d; contexts' frequencies are raised to 0.75.
    """
    size = recipe.vocab_size
    pairs = torch.zeros(size * size)
    for distance in range(1, recipe.neighbours + 1):
        pairs += torch.bincount(words[:-distance] * size + words[distance:], minlength=size * size) / distance
    pairs = pairs.view(size, size) + pairs.view(size, size).T
    totals = pairs.sum(1)
    contexts = totals**0.75 / (totals**0.75).sum()
    information = (pairs / (totals[:, None] * contexts).clamp_min(1e-12)).clamp_min(1.0).log()
    left, values, _ = torch.svd_lowrank(information, q=recipe.hidden_size)
    return left * values.sqrt()


def sinusoids(recipe: Recipe) -> Tensor:
    """Sines and cosines of wavelengths from 2 pi to about 6000 tokens. Shape (128, 128)."""
    rates = torch.exp(-math.log(1000) * torch.arange(0, recipe.hidden_size, 2) / recipe.hidden_size)
    angles = torch.arange(recipe.max_length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def predictions(model: BertForPreTraining, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of the words at the masked places only, (288, 4096), since the head is a third of the work otherwise; and
    of B not being and being A, (32, 2)."""
    encoded = model.bert(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids)
    masked_places = encoded.last_hidden_state.flatten(0, 1)[batch.positions]
    return model.cls(masked_places, encoded.pooler_output)


def loss_of(model: BertForPreTraining, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Of the masked words, and of the pairs if they are asked about."""
    words, pairs = predictions(model, batch)
    masked_loss = functional.cross_entropy(words, batch.targets)
    if batch.kept is None:
        return masked_loss, None
    return masked_loss, functional.cross_entropy(pairs, torch.stack([1 - batch.kept, batch.kept], dim=1))


def make_optimizers(recipe: Recipe, model: BertForPreTraining) -> tuple[Optimizer, Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "encoder.layer" in name]
    others = [p for name, p in named.items() if p.ndim == 1 or "encoder.layer" not in name]
    # match_rms_adamw: updates as large as AdamW's, so that both rates are of one kind
    muon = Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def rate_share(progress: float, warmup: float) -> float:
    """The share of the full rate at `progress` in [0, 1]: a linear rise, then a cosine to zero."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Run:
    """Everything that must be saved to continue: weights, optimizers, step, CPU seconds, the generator of batches."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.file = recipe, out / "run.pt"
        self.model = build_model(recipe).train()
        self.optimizers = make_optimizers(recipe, self.model)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            self.load()

    def update(self, stream: Tensor, *, progress: float) -> float:
        """One step; its loss of masked words."""
        started = time.process_time()
        share = rate_share(progress, self.recipe.warmup)
        with_pairs = progress >= self.recipe.pairs_from
        batch = make_batch(
            stream, self.recipe, self.generator, repeat_share=self.recipe.repeat_share, with_pairs=with_pairs
        )
        masked_loss, pair_loss = loss_of(self.model, batch)
        (masked_loss if pair_loss is None else masked_loss + pair_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        self.seconds += time.process_time() - started
        return masked_loss.item()

    def save(self) -> None:
        """Written aside, then renamed."""
        aside = self.file.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, aside)
        os.replace(aside, self.file)

    def load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]


@torch.no_grad()
def evaluate(model: BertForPreTraining, stream: Tensor, recipe: Recipe, *, batches: int = 40) -> dict[str, float]:
    """Mean loss and accuracy at masked places of `stream`, B always the continuation of A; and the correlation of the
    share of A in B with what the pooler says of it. The same rows each time."""
    model.eval()
    generator = torch.Generator().manual_seed(12345)
    loss, right, count = 0.0, 0, 0
    shares = list[Tensor]()
    for _ in range(batches):
        batch = make_batch(stream, recipe, generator, repeat_share=0.0)
        logits, _ = predictions(model, batch)
        loss += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        right += int((logits.argmax(-1) == batch.targets).sum())
        count += batch.targets.numel()
        pairs = make_batch(stream, recipe, generator, repeat_share=1.0, with_pairs=True)
        _, said = predictions(model, pairs)
        assert pairs.kept is not None
        shares.append(torch.stack([pairs.kept, said.softmax(1)[:, 1]]))
    model.train()
    correlation = torch.corrcoef(torch.cat(shares, dim=1))[0, 1].item()
    return {"masked_loss": loss / count, "masked_accuracy": right / count, "pair_correlation": correlation}


def load_streams(arguments: argparse.Namespace, recipe: Recipe) -> tuple[PreTrainedTokenizerFast, Tensor, Tensor]:
    """The tokenizer and the ids of the training and held-out text, made once and kept in the output folder."""
    file = arguments.out / "streams.pt"
    # a whole text is longer than a row, on purpose
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    if not file.exists():
        texts = [read_text(path, arguments.megabytes) for path in arguments.text]
        tokenizer = build_tokenizer(texts, recipe)
        tokenizer.save_pretrained(arguments.out)
        held_out = "\n".join(read_text(path, 1) for path in arguments.valid)
        streams = [torch.cat([tokens_of(text, tokenizer) for text in texts]), tokens_of(held_out, tokenizer)]
        torch.save(streams, file)
    train, valid = torch.load(file, weights_only=True)
    return PreTrainedTokenizerFast.from_pretrained(arguments.out), train, valid


def main() -> None:
    arguments, recipe = parse(), Recipe()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    _, train, valid = load_streams(arguments, recipe)
    run = Run(recipe, arguments.out)
    if run.step == 0:
        warm_start(run.model, train, recipe)
    before = evaluate(build_model(recipe), valid, recipe)
    print(f"{train.numel():,} tokens, {run.model.num_parameters():,} parameters, at random {before}", flush=True)
    budget, losses = 60 * arguments.minutes, list[float]()
    while run.seconds < budget:
        losses.append(run.update(train, progress=run.seconds / budget))
        if run.step % 100 == 0:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {run.step}  loss {mean:.4f}  {run.seconds:.0f} s of one core", flush=True)
        if run.step % 500 == 0:
            run.save()
            finish(run, arguments.out, evaluate(run.model, valid, recipe), before)
    run.save()
    finish(run, arguments.out, evaluate(run.model, valid, recipe), before)


def finish(run: Run, out: Path, after: dict[str, float], before: dict[str, float]) -> None:
    """A plain Hugging Face folder, and what it is in pretrain.json."""
    run.model.save_pretrained(out)
    num_tokens = run.step * run.recipe.batch_size * run.recipe.window
    result: dict[str, Any] = {"steps": run.step, "num_tokens": num_tokens, "cpu_seconds": run.seconds}
    result |= {"held_out": after, "held_out_random_init": before}
    (out / "pretrain.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files to learn from, .xz too")
    parser.add_argument("--valid", type=Path, nargs="+", required=True, help="text to measure on; 1 MB of each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=25, help="of each file at most")
    parser.add_argument("--minutes", type=float, default=25, help="of CPU time in training steps")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
