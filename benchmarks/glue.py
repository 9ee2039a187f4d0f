"""CoLA, RTE, MRPC and STS-B with a small encoder: methods that train few weights, beside full fine-tuning.

    python benchmarks/glue.py --encoder ENCODER --data DATA     # DATA/glue_cola/train.tsv, ...
    python benchmarks/glue.py --table                           # from benchmarks/results/glue.jsonl

The encoder is what benchmarks/pretrain_encoder.py made, or any BERT with its tokenizer. Budget: as many entries as LoRA
of rank 2 on every linear of the encoder has. ID3 and PaFI train so many in all, SparseGrad and MeProp so many at each
step (in the MLP linears, where they are defined); BitFit has what one-dimensional tensors hold, and GMT moves a fifth
of all at each step. The pooler and the new classifier train whole in every method and are not counted.

The rate of each method is the best of three on STS-B with the first seed, by 500 training pairs that were held out; it
is then the same for all tasks and seeds, whose scores are of the dev files. A row that stands in the result file is not
made again, so the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft
import scipy.stats
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import gradselect as gs

RESULTS = Path(__file__).parent / "results" / "glue.jsonl"
HEAD = ("bert.pooler.*", "classifier.*")
MLP = ("bert.encoder.layer.?.intermediate.dense.weight", "bert.encoder.layer.?.output.dense.weight")
LORA_RANK = 2
NUM_HELD_OUT = 500


# The tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One or two texts, and a class or a score in [-1, 1]."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Task:
    """Where a task's columns are and how it is scored.

    Attributes:
        texts: the columns of the texts.
        label: the column of the label.
        num_labels: number of classes; 1: a score.
        has_header: whether the first line names the columns.
        metrics: names of the scores; the first one ranks.
    """

    folder: str
    texts: tuple[int, ...]
    label: int
    num_labels: int
    has_header: bool
    metrics: tuple[str, ...]

    def read(self, file: Path) -> list[Example]:
        """Every line of a TSV file; quotes mean nothing."""
        lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        return [self.example(line.split("\t")) for line in lines[self.has_header :]]

    def example(self, columns: Sequence[str]) -> Example:
        return Example(tuple(columns[place] for place in self.texts), self.value(columns[self.label]))

    def value(self, label: str) -> float:
        """A class number, or a score of 0 to 5 as one of -1 to 1."""
        if self.num_labels == 1:
            return float(label) / 2.5 - 1
        return {"0": 0.0, "1": 1.0, "entailment": 0.0, "not_entailment": 1.0}[label]


TASKS = {
    "CoLA": Task("glue_cola", texts=(3,), label=1, num_labels=2, has_header=False, metrics=("matthews",)),
    "RTE": Task("glue_rte", texts=(1, 2), label=3, num_labels=2, has_header=True, metrics=("accuracy",)),
    "MRPC": Task("glue_mrpc", texts=(3, 4), label=0, num_labels=2, has_header=True, metrics=("f1", "accuracy")),
    "STS-B": Task("glue_stsb", texts=(7, 8), label=9, num_labels=1, has_header=False, metrics=("spearman",)),
}
RATE_TASK = "STS-B"


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def confusion(predicted: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    """True positives, false positives, false negatives, true negatives."""
    said, true = predicted.bool(), labels.bool()
    parts = (said & true, said & ~true, ~said & true, ~said & ~true)
    return tuple(float(part.sum()) for part in parts)  # pyright: ignore[reportReturnType]


def f1(predicted: Tensor, labels: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of class 1."""
    tp, fp, fn, _ = confusion(predicted, labels)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of two binary variables; 0 where one of them is constant."""
    tp, fp, fn, tn = confusion(predicted, labels)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / square**0.5 if square else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    if len(predicted.unique()) == 1:
        return 0.0
    return float(scipy.stats.spearmanr(predicted.numpy(), labels.numpy()).statistic)


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "spearman": spearman,
}


def scores(task: Task, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    return {name: METRICS[name](predicted, labels) for name in task.metrics}


def constant(task: Task, labels: Tensor) -> dict[str, float]:
    """The scores of always answering the most frequent class."""
    answer = labels.mode().values if task.num_labels > 1 else torch.zeros(())
    return scores(task, answer.expand_as(labels), labels)


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Examples as token ids.

    Attributes:
        inputs: input_ids, token_type_ids and attention_mask, each int64 (n, 64).
        labels: float32 (n,).
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """These examples, without the columns where all are padded."""
        longest = int(self.inputs["attention_mask"][rows].sum(1).max())
        return {key: value[rows, :longest] for key, value in self.inputs.items()}, self.labels[rows]

    def some(self, rows: slice) -> Part:
        return Part({key: value[rows] for key, value in self.inputs.items()}, self.labels[rows])


def tokenised(examples: Sequence[Example], tokenizer: Any, length: int) -> Part:
    columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
    shape = {"padding": "max_length", "truncation": True, "max_length": length}
    inputs = tokenizer(*columns, **shape, return_tensors="pt", return_token_type_ids=True)
    return Part(dict(inputs), torch.tensor([example.label for example in examples]))


def load(task: Task, arguments: argparse.Namespace) -> tuple[Part, Part]:
    """The training and the dev file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.encoder)
    folder = arguments.data / task.folder
    train, dev = (
        tokenised(task.read(folder / f"{name}.tsv"), tokenizer, arguments.length) for name in ("train", "dev")
    )
    return train, dev


def held_out(train: Part) -> tuple[Part, Part]:
    """The training file without its last examples in a fixed random order, and those."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    mixed = Part({key: value[order] for key, value in train.inputs.items()}, train.labels[order])
    return mixed.some(slice(None, -NUM_HELD_OUT)), mixed.some(slice(-NUM_HELD_OUT, None))


def batches(part: Part, *, size: int, steps: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """`steps` batches, every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(part.labels), generator=generator)])
        yield part.take(order[:size])
        order = order[size:]


# The methods: each makes an optimizer from a classifier, and may change the classifier ------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method may know: the budget in entries, the number of steps, some batches, the learning rate."""

    budget: int
    steps: int
    batches: Sequence[tuple[dict[str, Tensor], Tensor]]
    lr: float


class AllEntries:
    """AdamW over everything that requires a gradient, clipped as the others are."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.torch = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.torch.step()
        self.torch.zero_grad()


class SomeEntries:
    """`gs.SparseOptimizer`; the head trains whole."""

    def __init__(self, model: nn.Module, mask: gs.AbstractMask, lr: float) -> None:
        self.torch = gs.SparseOptimizer(model, mask, always=HEAD, lr=lr, weight_decay=0.0, max_grad_norm=1.0)

    def step(self) -> None:
        self.torch.step()
        self.torch.zero_grad()


def full(model: nn.Module, plan: Plan) -> AllEntries:
    return AllEntries(model, plan.lr)


def lora(model: nn.Module, plan: Plan) -> AllEntries:
    """On every linear of the encoder; what PEFT freezes in the head trains again."""
    settings = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=r".*encoder\.layer\..*\.(query|key|value|dense)"
    )
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or is_head(name))
    return AllEntries(model, plan.lr)


def bitfit(model: nn.Module, plan: Plan) -> SomeEntries:
    return SomeEntries(model, gs.BitFit(), plan.lr)


def pafi(model: nn.Module, plan: Plan) -> SomeEntries:
    return SomeEntries(model, gs.StaticMask(salience=gs.salience.smallest_magnitude, budget=plan.budget), plan.lr)


def id3(model: nn.Module, plan: Plan) -> SomeEntries:
    return SomeEntries(model, gs.ID3(budget=plan.budget, steps=plan.steps), plan.lr)


def sparsegrad(model: nn.Module, plan: Plan) -> SomeEntries:
    layers = [pattern.removesuffix(".weight") for pattern in MLP]
    mask = gs.sparsegrad.convert(model, plan.batches, mlp_density(model, plan), layers=layers, loss=loss_of_batch)
    return SomeEntries(model, mask, plan.lr)


def meprop(model: nn.Module, plan: Plan) -> SomeEntries:
    return SomeEntries(model, gs.TopGradient(density=mlp_density(model, plan), among=MLP), plan.lr)


def gmt(model: nn.Module, plan: Plan) -> SomeEntries:
    return SomeEntries(model, gs.GMT(fraction=0.2), plan.lr)


def mlp_density(model: nn.Module, plan: Plan) -> float:
    """The share of the MLPs' weights that is as many entries as the budget."""
    weights = [p for name, p in model.named_parameters() if any(fnmatchcase(name, pattern) for pattern in MLP)]
    return plan.budget / sum(weight.numel() for weight in weights)


def is_head(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in HEAD)


METHODS: dict[str, Callable[[nn.Module, Plan], AllEntries | SomeEntries]] = {
    "full": full,
    "LoRA": lora,
    "BitFit": bitfit,
    "PaFI": pafi,
    "ID3": id3,
    "SparseGrad": sparsegrad,
    "MeProp": meprop,
    "GMT": gmt,
}
RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 3e-4, 1e-3),
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
    "BitFit": (3e-3, 1e-2, 3e-2),
    "PaFI": (1e-3, 3e-3, 1e-2, 3e-2),
    "ID3": (1e-3, 3e-3, 1e-2),
    "SparseGrad": (1e-3, 3e-3, 1e-2),
    "MeProp": (1e-3, 3e-3, 1e-2),
    "GMT": (1e-4, 3e-4, 1e-3),
}


# One run -------------------------------------------------------------------------------------------------------------


def run(
    task: Task, method: str, train: Part, test: Part, arguments: argparse.Namespace, *, lr: float, seed: int
) -> dict[str, Any]:
    """Train with one method and score."""
    started = time.perf_counter()
    model = classifier(task, arguments.encoder, seed=seed)
    some = list(batches(train, size=arguments.batch, steps=8, seed=seed))
    plan = Plan(budget=lora_entries(model), steps=arguments.steps, batches=some, lr=lr)
    optimizer = METHODS[method](model, plan)
    schedule = LambdaLR(optimizer.torch, lambda step: rate_share(step, arguments.steps))
    losses = []
    for batch in batches(train, size=arguments.batch, steps=arguments.steps, seed=seed):
        loss = loss_of_batch(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    predicted = predict(task, model, test)
    return {
        "scores": scores(task, predicted, test.labels),
        "num_entries": num_entries(model, optimizer),
        "last_loss": statistics.mean(losses[-20:]),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "length": arguments.length,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def classifier(task: Task, encoder: Path, *, seed: int) -> nn.Module:
    """The pretrained encoder with a classifier at random."""
    torch.manual_seed(seed)
    with quiet():
        return transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=task.num_labels)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, and without the report that the classifier is new: it is meant to be."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def loss_of_batch(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Cross-entropy; squared error where there is one score."""
    inputs, labels = batch
    logits = model(**inputs).logits
    if logits.shape[1] == 1:
        return functional.mse_loss(logits[:, 0], labels)
    return functional.cross_entropy(logits, labels.long())


@torch.no_grad()
def predict(task: Task, model: nn.Module, part: Part) -> Tensor:
    """Class or score of every example, float32 (n,); those of like length go together."""
    model.eval()
    order = part.inputs["attention_mask"].sum(1).argsort()
    logits = torch.cat([model(**part.take(rows)[0]).logits for rows in order.split(64)])
    answers = logits[:, 0] if task.num_labels == 1 else logits.argmax(1).float()
    return torch.empty_like(answers).index_copy_(0, order, answers)


def rate_share(step: int, steps: int, *, warmup: float = 0.06) -> float:
    """A linear rise, then a linear fall to zero."""
    return min((step + 1) / (warmup * steps), (steps - step) / ((1 - warmup) * steps), 1.0)


def lora_entries(model: nn.Module) -> int:
    """Entries of LoRA on every linear of the encoder's layers."""
    linears = [m for name, m in model.named_modules() if ".layer." in name and isinstance(m, nn.Linear)]
    return sum(LORA_RANK * (linear.in_features + linear.out_features) for linear in linears)


def num_entries(model: nn.Module, optimizer: AllEntries | SomeEntries) -> int:
    """Entries outside the head that train: in all, or at a step where the choice is made at every step."""
    if isinstance(optimizer, SomeEntries):
        assert optimizer.torch.last_record is not None
        return sum(optimizer.torch.last_record.num_entries.values())
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


# All runs ------------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        parts = {name: load(TASKS[name], arguments) for name in dict.fromkeys([RATE_TASK, *arguments.tasks])}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for method in arguments.only or METHODS:
            choose_rate(method, parts[RATE_TASK][0], arguments)
        for seed in range(arguments.seeds):
            for task in arguments.tasks:
                train, dev = parts[task]
                note_constant(task, dev)
                for method in arguments.only or METHODS:
                    once(task, method, train, dev, arguments, part="dev", lr=best_rate(method), seed=seed)
    print(table(read()))


def choose_rate(method: str, train: Part, arguments: argparse.Namespace) -> None:
    """Runs at each rate, scored by training examples that they have not seen."""
    rest, unseen = held_out(train)
    for lr in RATES[method]:
        once(RATE_TASK, method, rest, unseen, arguments, part="held-out", lr=lr, seed=0)


def best_rate(method: str) -> float:
    """The rate of the best score on the held-out examples."""
    rows = [row for row in read() if row["method"] == method and row["part"] == "held-out"]
    return max((main_score(row), row["lr"]) for row in rows)[1]


def main_score(row: Mapping[str, Any]) -> float:
    return row["scores"][TASKS[row["task"]].metrics[0]]


def once(
    task: str, method: str, train: Part, test: Part, arguments: argparse.Namespace, *, part: str, lr: float, seed: int
) -> None:
    """Make a row unless it is there."""
    key = {"task": task, "part": part, "method": method, "lr": lr, "seed": seed}
    if not any(key.items() <= row.items() for row in read()):
        write(key | run(TASKS[task], method, train, test, arguments, lr=lr, seed=seed))


def note_constant(task: str, dev: Part) -> None:
    """The row of the most frequent class."""
    key = {"task": task, "part": "dev", "method": "constant", "lr": 0.0, "seed": 0}
    if not any(key.items() <= row.items() for row in read()):
        write(key | {"scores": constant(TASKS[task], dev.labels), "num_entries": 0})


def write(row: Mapping[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Per method: its rate, its entries, and for each task the mean over seeds with each seed's score, times 100."""
    dev = [row for row in rows if row["part"] == "dev"]
    tasks = list(dict.fromkeys(row["task"] for row in dev))
    heads = [f"{task}, {' / '.join(TASKS[task].metrics)}" for task in tasks]
    lines = [
        f"| {' | '.join(['method', 'rate', 'entries', *heads, 'mean'])} |",
        "|" + "---|" * (len(tasks) + 4),
    ]
    for method in dict.fromkeys(row["method"] for row in dev):
        own = [row for row in dev if row["method"] == method]
        cells = [cell([row for row in own if row["task"] == task], TASKS[task].metrics) for task in tasks]
        present = {row["task"] for row in own}
        means = [statistics.mean(main_score(row) for row in own if row["task"] == task) for task in present]
        mean = f"{100 * statistics.mean(means):.1f}" if present == set(tasks) else ""
        lines.append(f"| {method} | {own[0]['lr']:g} | {own[0]['num_entries']:,} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def cell(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Means over seeds, each seed's first score behind them."""
    if not rows:
        return ""
    means = " / ".join(f"{100 * statistics.mean(row['scores'][metric] for row in rows):.1f}" for metric in metrics)
    each = ", ".join(f"{100 * main_score(row):.1f}" for row in rows)
    return f"{means} ({each})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="folder of a BERT with its tokenizer")
    parser.add_argument("--data", type=Path, help="folder with glue_cola, glue_rte, glue_mrpc, glue_stsb")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods, e.g. to run two halves side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table and None in (arguments.encoder, arguments.data):
        parser.error("give --encoder and --data, or --table")
    return arguments


if __name__ == "__main__":
    main()
