"""Pretrain the base model of the quickstart from nothing, on the text of `stories`.

    python quickstart/pretrain.py --out quickstart/base

Writes a plain Hugging Face folder: config, weights, tokenizer, generation config, and a README with the recipe and the
final loss. One core; about half an hour. The folder is rewritten every `save_steps` steps, so it is usable early.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import problems
from stories import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    max_length: int = 256
    steps: int = 2200
    batch_size: int = 32
    window: int = 128
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    save_steps: int = 500


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every digit its own token.

    It is trained on stories and on problems, so that both are short; the model sees the stories only.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems(count=8000, seed=0, split="train")]
    texts += itertools.islice(documents(seed=recipe.seed), 8000)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=recipe.max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights and a tied head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Windows of the endless stream of documents, int64 of (batch_size, window): (32, 128)."""
    texts, stream = documents(seed=recipe.seed + 1), list[int]()
    size = recipe.batch_size * recipe.window
    while True:
        while len(stream) < size:
            rows = tokenizer([text + END for text in itertools.islice(texts, 512)])["input_ids"]
            stream.extend(itertools.chain.from_iterable(rows))
        yield torch.tensor(stream[:size]).view(recipe.batch_size, recipe.window)
        del stream[:size]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(recipe: Recipe, model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; the norms' scales do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights in bfloat16 for their size; the config says float32, so that they load as what they are trained in."""
    halved = copy.deepcopy(model).to(torch.bfloat16)
    halved.config.dtype = torch.float32
    halved.save_pretrained(out)
    tokenizer.save_pretrained(out)


def pretrain(recipe: Recipe, out: Path) -> float:
    """Train, save, and return the mean loss of the last 100 steps in nats per token."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    optimizer = make_optimizer(recipe, model)
    losses, start = list[float](), time.perf_counter()
    for step, tokens in enumerate(itertools.islice(batches(recipe, tokenizer), recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}  loss {sum(losses[-50:]) / 50:.4f}  {seconds:.0f} s", flush=True)
        if (step + 1) % recipe.save_steps == 0 or step + 1 == recipe.steps:
            save(model, tokenizer, out)
    return sum(losses[-100:]) / len(losses[-100:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain with the recipe above, or with some of its values changed."""
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's base model.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--set", default="{}", help="changes to the recipe, as JSON: '{\"steps\": 100}'")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = dataclasses.replace(Recipe(), **json.loads(options.set))
    print(f"final loss {pretrain(recipe, options.out):.4f}")


if __name__ == "__main__":
    main()
