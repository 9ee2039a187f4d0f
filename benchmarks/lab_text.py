"""The text that the base model of the suite `lab` reads: generated, and from files of the user."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lab_problems  # puts quickstart/ on the path
import pretrain
import stories
import torch
from lab_presets import Preset
from pretraining import open_text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gradselect.files import writing_aside


def documents(*, seed: str, largest: int) -> Iterator[str]:
    """Yield facts, stories, single events and small talk without end; a pure function of `seed`."""
    generator = random.Random(f"lab/{seed}")
    while True:
        kind = generator.choices(("facts", "story", "event", "chat"), weights=(0.35, 0.35, 0.25, 0.05))[0]
        if kind == "facts":
            yield stories.facts(generator, largest=largest)
        elif kind == "story":
            yield stories.story(generator, largest=largest)
        elif kind == "event":
            yield lab_problems.told_event(generator, largest=largest)
        else:
            yield stories.chat(generator)


def read_pieces(path: Path, *, characters: int = 2000) -> Iterator[str]:
    """Yield the file's text in pieces of whole lines, of about `characters` characters."""
    piece, size = list[str](), 0
    with io.TextIOWrapper(open_text(path), encoding="utf-8") as file:
        for line in file:
            piece.append(line)
            size += len(line)
            if size >= characters:
                yield "".join(piece)
                piece, size = [], 0
    if piece:
        yield "".join(piece)


def build_tokenizer(preset: Preset, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the quickstart's kind of tokenizer on problems, documents and the text of the files."""
    asked = lab_problems.problems(count=4000, seed=0, split="train", num_steps=preset.num_steps, largest=preset.largest)
    written = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in asked]
    made = itertools.islice(documents(seed="tokenizer", largest=preset.largest), 2 * preset.tokenizer_texts)
    return pretrain.tokenizer_of([*written, *made, *texts], preset.base)


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the texts one after the other, each with its end token. int16."""
    rows = tokenizer([text + pretrain.END for text in texts], return_attention_mask=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int16)


def make_shard(number: int, preset: Preset, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return shard `number` of the generated text."""
    made, size, parts = documents(seed=f"{preset.base.seed}/{number}", largest=preset.largest), 0, list[Tensor]()
    while size < preset.shard_tokens:
        parts.append(tokens_of(list(itertools.islice(made, 200)), tokenizer))
        size += parts[-1].numel()
    return torch.cat(parts)[: preset.shard_tokens]


def make_shards(count: int, preset: Preset, tokenizer: PreTrainedTokenizerFast, *, workers: int) -> list[Tensor]:
    """Return the first `count` shards; the number of processes does not change them."""
    if workers == 1:
        return [make_shard(number, preset, tokenizer) for number in range(count)]
    # A forked process would inherit threads and, on a GPU, a context that it cannot use.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(make_shard, number, preset, tokenizer) for number in range(count)]
        return [future.result() for future in futures]


def make_tokens(preset: Preset, tokenizer: PreTrainedTokenizerFast, files: Sequence[Path], *, workers: int) -> Tensor:
    """Return the text to read: generated, followed by as much of the files, if there are any. Shape (num_tokens,)."""
    wanted = preset.num_tokens // (2 if files else 1)
    made = torch.cat(make_shards(-(-wanted // preset.shard_tokens), preset, tokenizer, workers=workers))[:wanted]
    if not files:
        return made
    read, size = list[Tensor](), 0
    pieces = itertools.chain.from_iterable(map(read_pieces, files))
    while size < wanted and (batch := list(itertools.islice(pieces, 2000))):
        read.append(tokens_of(batch, tokenizer))
        size += read[-1].numel()
    return torch.cat([made, torch.cat(read)[:wanted]])


def load_text(
    preset: Preset, files: Sequence[Path], out: Path, *, workers: int
) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Return tokenizer and tokens, made once and kept in the folder."""
    folder, file = out / "tokenizer", out / "tokens.pt"
    if not file.exists():
        heads = [piece for path in files for piece in itertools.islice(read_pieces(path), 1500)]
        tokenizer = build_tokenizer(preset, heads)
        tokenizer.save_pretrained(folder)
        tokens = make_tokens(preset, tokenizer, files, workers=workers)
        with writing_aside(file) as aside:
            torch.save(tokens, aside)
    return PreTrainedTokenizerFast.from_pretrained(folder), torch.load(file, weights_only=True)


def write_known(preset: Preset, out: Path, files: Sequence[Path]) -> None:
    """Write held-out documents, and as many pieces of each file, which the base must not read."""
    texts = itertools.islice(documents(seed="held out", largest=preset.largest), preset.num_known)
    pieces = (itertools.islice(read_pieces(path, characters=800), preset.num_known) for path in files)
    with (out / "known.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in itertools.chain(texts, *pieces))
