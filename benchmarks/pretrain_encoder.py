"""Pretrain a small BERT by masked-language modelling: the encoder of suites/glue, where no hub can be reached.

    python benchmarks/pretrain_encoder.py --out encoder --minutes 25 --text books.txt.xz stories.txt --valid other.txt

4 layers of width 128, a lowercase WordPiece vocabulary of 4096 learned from the text. One row is `[CLS] A [SEP] B
[SEP]`, 63 tokens, with 15 % of its words masked (80 % as [MASK], 10 % as another word, 10 % unchanged; Devlin et al.,
BERT, arXiv 1810.04805, 3.1). B continues A, but in two rows of five B is A again with other words masked, so that
attention learns to look across the pair. In the last third of the time these B keep only a random share of A's words,
from places that have moved, and the pooler predicts the share: BERT's next-sentence head with a soft label, in place
of its next-sentence task.

A few minutes of one core are too short for some things, which are set at the start: word vectors from counted
neighbours (PMI and its singular vectors; Levy, Goldberg, "Neural Word Embedding as Implicit Matrix Factorization",
NeurIPS 2014), log frequencies as the head's bias, sinusoids as positions. Muon trains the matrices of the layers, AdamW
the rest, as in quickstart/pretrain.py; the rate follows a cosine over the given CPU minutes. A stopped command resumes
from its last save when it is called again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from pathlib import Path

import torch
from common import write_result
from encoder_text import PAD, Batch, Recipe, load_streams, make_batch
from pretraining import Training
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from transformers import BertConfig, BertForPreTraining


def build_model(recipe: Recipe) -> BertForPreTraining:
    """Build the encoder: random weights, tied head, no dropout."""
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
    """Set word vectors, the head's bias and positions in place; vectors get the scale of random ones."""
    words, embeddings = stream.long(), model.bert.embeddings
    frequencies = torch.bincount(words, minlength=recipe.vocab_size) + 1.0
    model.cls.predictions.bias.copy_((frequencies / frequencies.sum()).log())
    for parameter, vectors in (
        (embeddings.word_embeddings.weight, word_vectors(words, recipe)),
        (embeddings.position_embeddings.weight, sinusoids(recipe)),
    ):
        parameter.copy_(vectors * (recipe.initializer_range / vectors.std()))


def word_vectors(words: Tensor, recipe: Recipe) -> Tensor:
    r"""Return U sqrt(S) of the positive pointwise mutual information of words and neighbours. Shape (4096, 128).

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
    """Return sines and cosines of wavelengths from 2 pi to about 6000 tokens. Shape (128, 128)."""
    rates = torch.exp(-math.log(1000) * torch.arange(0, recipe.hidden_size, 2) / recipe.hidden_size)
    angles = torch.arange(recipe.max_length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def predictions(model: BertForPreTraining, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits of the masked places only, (288, 4096), and of B not being and being A, (32, 2).

    On all places the head would be a third of the work.
    """
    encoded = model.bert(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids)
    masked_places = encoded.last_hidden_state.flatten(0, 1)[batch.positions]
    return model.cls(masked_places, encoded.pooler_output)


def loss_of(model: BertForPreTraining, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the loss of masked words, and of pairs if the batch has them."""
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
    """Return the share of the full rate at `progress` in [0, 1]: a linear rise, then a cosine to zero."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Run:
    """The pretraining of the encoder."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.file = recipe, out / "run.pt"
        self.model = build_model(recipe).train()
        self.training = Training(self.model, make_optimizers(recipe, self.model))
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        if self.file.exists():
            self.generator.set_state(self.training.load(self.file)["generator"])

    def update(self, stream: Tensor, *, progress: float) -> float:
        """Take one step. Returns its loss of masked words."""
        started = time.process_time()
        recipe = self.recipe
        with_pairs = progress >= recipe.pairs_from
        batch = make_batch(stream, recipe, self.generator, repeat_share=recipe.repeat_share, with_pairs=with_pairs)
        masked_loss, pair_loss = loss_of(self.model, batch)
        loss = masked_loss if pair_loss is None else masked_loss + pair_loss
        self.training.update(loss, share=rate_share(progress, recipe.warmup), clip=recipe.clip)
        self.training.seconds += time.process_time() - started
        return masked_loss.item()

    def save(self) -> None:
        self.training.save(self.file, generator=self.generator.get_state())

    def finish(self, out: Path, after: dict[str, float], before: dict[str, float]) -> None:
        """Write a plain Hugging Face folder, and its figures as pretrain.json."""
        steps = self.training.step
        figures = {
            "steps": steps,
            "num_tokens": steps * self.recipe.batch_size * self.recipe.window,
            "cpu_seconds": self.training.seconds,
            "held_out": after,
            "held_out_random_init": before,
        }
        write_result(out / "pretrain.json", figures)
        self.model.save_pretrained(out)
        print(json.dumps(figures), flush=True)


@torch.no_grad()
def evaluate(model: BertForPreTraining, stream: Tensor, recipe: Recipe, *, batches: int = 40) -> dict[str, float]:
    """Return loss and accuracy at masked places where B continues A, and the correlation of the share of A in B with
    the pooler's answer. Uses the same rows each time."""
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


def main() -> None:
    arguments, recipe = parse(), Recipe()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, valid = load_streams(arguments, recipe)
    run = Run(recipe, arguments.out)
    training = run.training
    if training.step == 0:
        warm_start(run.model, train, recipe)
    before = evaluate(build_model(recipe), valid, recipe)
    print(f"{train.numel():,} tokens, {run.model.num_parameters():,} parameters, at random {before}", flush=True)
    budget, losses = 60 * arguments.minutes, deque[float](maxlen=100)
    while training.seconds < budget:
        losses.append(run.update(train, progress=training.seconds / budget))
        if training.step % 100 == 0:
            mean = sum(losses) / len(losses)
            print(f"step {training.step}  loss {mean:.4f}  {training.seconds:.0f} s of one core", flush=True)
        if training.step % 500 == 0:
            run.save()
    run.save()
    run.finish(arguments.out, evaluate(run.model, valid, recipe), before)


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
