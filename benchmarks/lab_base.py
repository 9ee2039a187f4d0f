"""What the suite `lab` needs: a base model, pretrained from nothing, and word problems that are hard for it.

    python benchmarks/lab_base.py --preset cpu --out runs/lab/cpu
    python benchmarks/lab_base.py --preset gpu --out runs/lab/gpu --text books.txt.xz --known other_book.txt

The base reads generated text alone, or as much of the files given: arithmetic facts, short stories of the quickstart,
and single events of the problems with their outcome. It reads no question and no worked answer. Writes

    base/                          the model, a plain Hugging Face folder, once pretraining has ended
    train.jsonl valid.jsonl test.jsonl   the problems; no two of these files share one
    known.jsonl                    held-out text of the kinds that the base has read: forgetting is measured on it
    tokens.pt run.pt               what an interrupted call goes on from: call again

Same preset, text and seed: same files, and on a CPU the same weights.

    preset   parameters   pretraining                 cost (an estimate until the card in base/ says what it took)
    cpu      4.9 M        5,000 steps of 16 x 128     about 2 hours of one core
    gpu      33.5 M       3,000 steps of 64 x 512     about 6 minutes of an H200
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]

import lab_problems  # noqa: E402
import pretrain  # noqa: E402
import stories  # noqa: E402

CARD = """# The base model of the suite `lab`, preset {preset}

A Llama of {num_parameters:,} parameters, pretrained from nothing by `python benchmarks/lab_base.py` on generated
stories and arithmetic{files}. {steps:,} steps, {num_tokens:,} tokens, {seconds:,.0f} seconds of training on {device};
loss of the last 100 steps {loss:.3f} nats per token. It has read no question and no worked answer.

```json
{recipe}
```
"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that decides the files.

    Args:
        base: shape and pretraining of the model.
        num_tokens: of text to make; pretraining goes through them again when they are used up.
        shard_tokens: they are made in pieces of this size, each with a seed of its own.
        largest: the largest number in stories and problems.
        num_steps: how many steps the problems take.
        num_train: training problems; `num_valid` and `num_test` alike.
        num_known: held-out documents.
        tokenizer_texts: problems, and twice as many documents, that the tokenizer is trained on.
    """

    base: pretrain.Recipe
    num_tokens: int
    shard_tokens: int = 250_000
    largest: int = 99
    num_steps: tuple[int, ...] = (2, 3, 4)
    num_train: int = 4000
    num_valid: int = 400
    num_test: int = 400
    num_known: int = 300
    tokenizer_texts: int = 4000


PRESETS = {
    "cpu": Preset(
        base=pretrain.Recipe(
            hidden_size=224,
            intermediate_size=560,
            num_layers=8,
            num_heads=4,
            max_length=320,
            steps=5000,
            cooldown_steps=1700,
            save_steps=250,
        ),
        num_tokens=8_000_000,
    ),
    "gpu": Preset(
        base=pretrain.Recipe(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_layers=18,
            num_heads=6,
            max_length=512,
            steps=3000,
            batch_size=64,
            window=512,
            muon_lr=4e-3,
            adamw_lr=2e-3,
            warmup_steps=100,
            cooldown_steps=1000,
            save_steps=500,
        ),
        num_tokens=60_000_000,
        largest=999,
        num_steps=(2, 3, 4, 5),
        num_train=12_800,
        num_valid=1000,
        num_test=1000,
        num_known=1000,
    ),
}


# text -------------------------------------------------------------------------------------------------------


def documents(*, seed: str, largest: int) -> Iterator[str]:
    """Facts, stories, single events and small talk without end; a pure function of `seed`."""
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
    """The file's text in pieces of whole lines, of about so many characters."""
    piece, size = list[str](), 0
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8")
        for line in file:
            piece.append(line)
            size += len(line)
            if size >= characters:
                yield "".join(piece)
                piece, size = [], 0
    if piece:
        yield "".join(piece)


def build_tokenizer(preset: Preset, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As the quickstart's, of problems, documents and the text of the files."""
    asked = lab_problems.problems(count=4000, seed=0, split="train", num_steps=preset.num_steps, largest=preset.largest)
    written = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in asked]
    made = itertools.islice(documents(seed="tokenizer", largest=preset.largest), 2 * preset.tokenizer_texts)
    return pretrain.tokenizer_of([*written, *made, *texts], preset.base)


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The texts one after the other, each with its end, int16."""
    rows = tokenizer([text + pretrain.END for text in texts], return_attention_mask=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int16)


def make_shard(number: int, preset: Preset, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Shard `number` of the generated text."""
    made, size, parts = documents(seed=f"{preset.base.seed}/{number}", largest=preset.largest), 0, list[Tensor]()
    while size < preset.shard_tokens:
        parts.append(tokens_of(list(itertools.islice(made, 200)), tokenizer))
        size += parts[-1].numel()
    return torch.cat(parts)[: preset.shard_tokens]


def make_shards(count: int, preset: Preset, tokenizer: PreTrainedTokenizerFast, *, workers: int) -> list[Tensor]:
    """The first `count` shards, the same whatever the number of processes."""
    if workers == 1:
        return [make_shard(number, preset, tokenizer) for number in range(count)]
    # A forked process would inherit threads and, on a GPU, a context that it cannot use.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(make_shard, number, preset, tokenizer) for number in range(count)]
        return [future.result() for future in futures]


def make_tokens(preset: Preset, tokenizer: PreTrainedTokenizerFast, files: Sequence[Path], *, workers: int) -> Tensor:
    """All text to read: generated, and, where there are files, as much of them, in turn. Shape (num_tokens,)."""
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


def batch_of(tokens: Tensor, recipe: pretrain.Recipe, step: int) -> Tensor:
    """The windows of a step, from random places, int64 of (batch_size, window): a pure function of seed and step."""
    generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
    starts = torch.randint(0, tokens.numel() - recipe.window, (recipe.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(recipe.window)].long()


# pretraining ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that must be saved to continue.

    Args:
        losses: of the last steps.
    """

    recipe: pretrain.Recipe
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    step: int = 0
    seconds: float = 0.0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.model = pretrain.build_model(self.recipe, self.tokenizer).to(self.device)
        self.optimizers = pretrain.make_optimizers(self.recipe, self.model)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def update(self, tokens: Tensor) -> None:
        """One step. On a GPU the forward pass computes in bfloat16; the weights stay float32."""
        started = time.perf_counter()
        batch = batch_of(tokens, self.recipe, self.step).to(self.device, non_blocking=True)
        with self._half_precision():
            loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        share = pretrain.learning_rate(self.recipe, self.step)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - started

    def _half_precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu")

    def save(self, file: Path) -> None:
        """Written aside, then renamed."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "losses": list(self.losses),
        }
        aside = file.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses.extend(state["losses"])


def train(run: Run, tokens: Tensor, file: Path) -> None:
    """Up to the last step, saved on the way."""
    while run.step < run.recipe.steps:
        run.update(tokens)
        if run.step % 100 == 0:
            mean = statistics.fmean(run.losses)
            print(f"step {run.step}/{run.recipe.steps}  loss {mean:.4f}  {run.seconds:.0f} s", flush=True)
        if run.step % run.recipe.save_steps == 0:
            run.save(file)


# files ------------------------------------------------------------------------------------------------------


def write_task(preset: Preset, out: Path) -> None:
    """The problems of all splits."""
    counts = {"train": preset.num_train, "valid": preset.num_valid, "test": preset.num_test}
    for split, count in counts.items():
        lab_problems.write_problems(
            out / f"{split}.jsonl",
            count=count,
            seed=preset.base.seed,
            split=split,
            num_steps=preset.num_steps,
            largest=preset.largest,
        )


def write_known(preset: Preset, out: Path, files: Sequence[Path]) -> None:
    """Held-out documents, and as many pieces of each of the files, which the base must not read."""
    texts = itertools.islice(documents(seed="held out", largest=preset.largest), preset.num_known)
    pieces = (itertools.islice(read_pieces(path, characters=800), preset.num_known) for path in files)
    with (out / "known.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in itertools.chain(texts, *pieces))


def write_base(run: Run, name: str, preset: Preset, files: Sequence[Path], out: Path) -> None:
    """The model's folder, whole or not at all."""
    aside = out / "base.partial"
    pretrain.save(run.model.cpu(), run.tokenizer, aside)
    recipe = run.recipe
    card = CARD.format(
        preset=name,
        num_parameters=run.model.num_parameters(),
        files=f", and on {', '.join(path.name for path in files)}" if files else "",
        steps=recipe.steps,
        num_tokens=recipe.steps * recipe.batch_size * recipe.window,
        seconds=run.seconds,
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else "one CPU core",
        loss=statistics.fmean(run.losses),
        recipe=json.dumps(dataclasses.asdict(preset), indent=2),
    )
    (aside / "README.md").write_text(card, encoding="utf-8")
    os.replace(aside, out / "base")


def load_text(
    preset: Preset, files: Sequence[Path], out: Path, *, workers: int
) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Tokenizer and tokens, made once and kept in the folder."""
    folder, file = out / "tokenizer", out / "tokens.pt"
    if not file.exists():
        heads = [piece for path in files for piece in itertools.islice(read_pieces(path), 1500)]
        tokenizer = build_tokenizer(preset, heads)
        tokenizer.save_pretrained(folder)
        aside = file.with_suffix(".new")
        torch.save(make_tokens(preset, tokenizer, files, workers=workers), aside)
        os.replace(aside, file)
    return PreTrainedTokenizerFast.from_pretrained(folder), torch.load(file, weights_only=True)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Text of others: what the base reads beside the generated text, and what is held out."""

    text: Sequence[Path] = ()
    known: Sequence[Path] = ()

    def names(self) -> dict[str, list[str]]:
        return {"text": [path.name for path in self.text], "known": [path.name for path in self.known]}


def make(name: str, preset: Preset, *, files: Files, out: Path, device: torch.device, workers: int) -> None:
    """All that the suite needs, in `out`; what is there already is kept."""
    described = json.dumps({"preset": dataclasses.asdict(preset), **files.names()}, indent=1)
    made_by = out / "made_by.json"
    if made_by.exists() and made_by.read_text(encoding="utf-8") != described:
        raise SystemExit(f"{out} was made with other settings, see {made_by}; choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    made_by.write_text(described, encoding="utf-8")
    write_task(preset, out)
    write_known(preset, out, files.known)
    if (out / "base").exists():
        return
    tokenizer, tokens = load_text(preset, files.text, out, workers=workers)
    run = Run(preset.base, tokenizer, device)
    if (out / "run.pt").exists():
        run.load(out / "run.pt")
    print(f"{run.model.num_parameters():,} parameters, {tokens.numel():,} tokens, step {run.step}", flush=True)
    train(run, tokens, out / "run.pt")
    write_base(run, name, preset, files.text, out)
    for spent in (out / "run.pt", out / "tokens.pt"):
        spent.unlink(missing_ok=True)


def changed(preset: Preset, changes: dict[str, Any]) -> Preset:
    """The preset with other values; those of `base` are named as they are there."""
    of_base = {key: value for key, value in changes.items() if key in {f.name for f in dataclasses.fields(preset.base)}}
    own = {key: value for key, value in changes.items() if key not in of_base}
    own |= {"num_steps": tuple(own["num_steps"])} if "num_steps" in own else {}
    return dataclasses.replace(preset, base=dataclasses.replace(preset.base, **of_base), **own)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what the suite needs, by a preset with some of its values changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files to read from, plain or .xz")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="files of that kind to hold out")
    parser.add_argument("--set", default="{}", help="changes to the preset, as JSON: '{\"num_layers\": 24}'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that write text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    make(
        options.preset,
        changed(PRESETS[options.preset], json.loads(options.set)),
        files=Files(text=options.text, known=options.known),
        out=options.out,
        device=torch.device(options.device),
        workers=options.workers,
    )


if __name__ == "__main__":
    main()
