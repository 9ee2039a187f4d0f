"""Make what the suite `lab` needs: a base model pretrained from nothing, and word problems that are hard for it.

    python benchmarks/lab_base.py --preset cpu --out runs/lab/cpu
    python benchmarks/lab_base.py --preset gpu --out runs/lab/gpu --text books.txt.xz --known other_book.txt

The base reads generated text, and as much of the given files: arithmetic facts, short stories of the quickstart, and
single events of the problems with their outcome. It reads no question and no worked answer. The command writes

    base/                                the model, a plain Hugging Face folder, when pretraining has ended
    train.jsonl valid.jsonl test.jsonl   the problems; no two of these files share one
    known.jsonl                          held-out text like the base's own: forgetting is measured on it
    tokens.pt run.pt                     for resuming: a stopped command continues when it is called again

Same preset, text and seed: same files, and on a CPU the same weights.

    preset   parameters   pretraining                 cost (an estimate; the card in base/ has the measured one)
    cpu      4.9 M        5,000 steps of 16 x 128     about 2 hours of one core
    gpu      33.5 M       3,000 steps of 64 x 512     about 6 minutes of an H200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lab_problems  # puts quickstart/ on the path
import pretrain
import torch
from lab_presets import PRESETS, Preset, changed
from lab_text import load_text, write_known
from pretraining import Training
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gradselect.files import writing_aside

CARD = """# The base model of the suite `lab`, preset {preset}

A Llama of {num_parameters:,} parameters, pretrained from nothing by `python benchmarks/lab_base.py` on generated
stories and arithmetic{files}. {steps:,} steps, {num_tokens:,} tokens, {seconds:,.0f} seconds of training on {device};
loss of the last 100 steps {loss:.3f} nats per token. It has read no question and no worked answer.

```json
{recipe}
```
"""


def batch_of(tokens: Tensor, recipe: pretrain.Recipe, step: int) -> Tensor:
    """Return windows from random places, a pure function of seed and step. int64 (batch_size, window)."""
    generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
    starts = torch.randint(0, tokens.numel() - recipe.window, (recipe.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(recipe.window)].long()


@dataclass
class Run:
    """The pretraining of the base.

    Args:
        losses: losses of the last steps.
    """

    recipe: pretrain.Recipe
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.model = pretrain.build_model(self.recipe, self.tokenizer).to(self.device)
        self.training = Training(self.model, pretrain.make_optimizers(self.recipe, self.model))

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.training.step

    def update(self, tokens: Tensor) -> None:
        """Take a step. On a GPU the forward pass computes in bfloat16; the weights stay float32."""
        started = time.perf_counter()
        batch = batch_of(tokens, self.recipe, self.step).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            loss = self.model(input_ids=batch, labels=batch).loss
        self.training.update(loss, share=pretrain.learning_rate(self.recipe, self.step), clip=self.recipe.clip)
        self.losses.append(loss.item())
        self.training.seconds += time.perf_counter() - started

    def save(self, file: Path) -> None:
        self.training.save(file, losses=list(self.losses))

    def load(self, file: Path) -> None:
        self.losses.extend(self.training.load(file, device=self.device)["losses"])


def train(run: Run, tokens: Tensor, file: Path) -> None:
    """Train to the last step, saving on the way."""
    while run.step < run.recipe.steps:
        run.update(tokens)
        if run.step % 100 == 0:
            mean = statistics.fmean(run.losses)
            print(f"step {run.step}/{run.recipe.steps}  loss {mean:.4f}  {run.training.seconds:.0f} s", flush=True)
        if run.step % run.recipe.save_steps == 0:
            run.save(file)


# files ------------------------------------------------------------------------------------------------------


def write_task(preset: Preset, out: Path) -> None:
    """Write the problems of all splits."""
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


def write_base(run: Run, name: str, preset: Preset, files: Sequence[Path], out: Path) -> None:
    """Write the model's folder, whole or not at all."""
    recipe = run.recipe
    card = CARD.format(
        preset=name,
        num_parameters=run.model.num_parameters(),
        files=f", and on {', '.join(path.name for path in files)}" if files else "",
        steps=recipe.steps,
        num_tokens=recipe.steps * recipe.batch_size * recipe.window,
        seconds=run.training.seconds,
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else "one CPU core",
        loss=statistics.fmean(run.losses),
        recipe=json.dumps(dataclasses.asdict(preset), indent=2),
    )
    with writing_aside(out / "base") as aside:
        pretrain.save(run.model.cpu(), run.tokenizer, aside)
        (aside / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Files:
    """Text files of the user: those that the base reads, and those that are held out."""

    text: Sequence[Path] = ()
    known: Sequence[Path] = ()

    def names(self) -> dict[str, list[str]]:
        return {"text": [path.name for path in self.text], "known": [path.name for path in self.known]}


def make(name: str, preset: Preset, *, files: Files, out: Path, device: torch.device, workers: int) -> None:
    """Make all that the suite needs in `out`, and keep what is there already."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what the suite needs."""
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
