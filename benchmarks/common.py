"""Parts that the benchmarks share: models, turns, counted bytes, arguments, result files and tables."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

import gradselect as gs
from gradselect.app.compare import source_state
from gradselect.files import read_json_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Batch = dict[str, Tensor]


# Models --------------------------------------------------------------------------------------------------------------


def published_shape(name: str) -> transformers.PreTrainedConfig:
    """Return the config of a published model, e.g. "qwen2.5-0.5b", from suites/shapes."""
    return transformers.AutoConfig.from_pretrained(ROOT / "suites" / "shapes" / name, use_cache=False)


def decoder_shape(
    kind: str, *, layers: int, width: int, mlp_width: int, heads: int, vocabulary: int, length: int, **options: Any
) -> transformers.PreTrainedConfig:
    """Return the config of a decoder of `kind` ("llama", "qwen2"): as many key heads as query heads, tied head."""
    return transformers.AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        **{"tie_word_embeddings": True, **options},
    )


def random_model(
    config: transformers.PreTrainedConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """Build the model with random weights, the same at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def random_batches(vocabulary: int, *, batch: int, length: int, device: str = "cpu") -> Iterator[Batch]:
    """Yield random rows without end, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
        yield {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with random weights, and the shape of its batches."""

    config: transformers.PreTrainedConfig
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def model(self) -> nn.Module:
        return random_model(self.config, dtype=self.dtype, device=self.device)

    def batches(self) -> Iterator[Batch]:
        return random_batches(self.config.vocab_size, batch=self.batch, length=self.length, device=self.device)


GPU_WORKLOADS = {
    "llama-3.2-3b": Workload(config=published_shape("llama-3.2-3b"), batch=4, length=768),
    "llama-3.2-1b": Workload(config=published_shape("llama-3.2-1b"), batch=8, length=512),
    "qwen2.5-0.5b": Workload(config=published_shape("qwen2.5-0.5b"), batch=8, length=512),
}


def with_lora(model: nn.Module, *, rank: int) -> nn.Module:
    """Put PEFT's LoRA on all linear layers."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def fused_adamw(model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """The baseline: torch's fused AdamW without weight decay on everything that trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """A model with its optimizer, and the seconds of its counted steps.

    Args:
        after_backward: called in each step between backward pass and optimizer.
        seconds: of whole steps.
        optimizer_seconds: of `step` and `zero_grad`.
    """

    name: str
    model: nn.Module
    optimizer: Any
    after_backward: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch, *, count: bool) -> None:
        """Train one step."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.after_backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        if count:
            self.seconds.append(end - start)
            self.optimizer_seconds.append(end - middle)


def take_turns(methods: Sequence[Method], batches: Iterable[Batch], *, warmup: int, rounds: int) -> None:
    """Train all methods, one step each a round: a machine that slows down slows all of them."""
    for number, batch in zip(range(-warmup, rounds), batches, strict=False):
        for method in methods:
            method.step(batch, count=number >= 0)


def ratio_columns(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum of the ratios, each taken inside a round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}


# Bytes ---------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: those that exist now, and their peak.

    It does not see what an operation allocates inside its kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        return result

    def reset_peak(self) -> None:
        self.peak = self.now

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class GradientPeak:
    """Counts the most bytes of gradients that exist at once, while `is_on`.

    Build it before the optimizer, whose hooks free gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes, self.is_on = 0, False
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks: list[RemovableHandle] = []
        for parameter in self._parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note))

    def close(self) -> None:
        """Stop counting. A hook keeps the weights that it counts."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, _: Tensor) -> None:
        if self.is_on:
            self.bytes = max(self.bytes, gradient_bytes(self._parameters))


def gradient_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def state_bytes(optimizer: Any) -> dict[str, int]:
    """Return the bytes of moments, indices and masters on the device and on the host, of any optimizer."""
    if isinstance(optimizer, gs.BlockOptimizer | gs.SparseOptimizer):
        memory = optimizer.memory()
        return {"device": memory["masters"] + memory["state_on_device"], "host": memory.get("state_on_host", 0)}
    base = getattr(optimizer, "base_optimizer", optimizer)
    tensors = [t for state in base.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return {"device": sum(tensor.nbytes for tensor in tensors), "host": 0}


# Arguments, results and tables ---------------------------------------------------------------------------------------


def make_parser(doc: str | None, *, out: Path, **counts: int) -> argparse.ArgumentParser:
    """Return a parser of `--out`, `--table`, and an option for each of `counts`, e.g. `rounds=20`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=out, help="the result file")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the result file")
    return parser


def parse(parser: argparse.ArgumentParser, *needed: str) -> argparse.Namespace:
    """Parse the command line; only `--table` can do without the `needed` options."""
    arguments = parser.parse_args()
    if not arguments.table and any(getattr(arguments, name) is None for name in needed):
        parser.error(f"give {', '.join(f'--{name}' for name in needed)}, or --table")
    return arguments


def measure_and_print(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> None:
    """Write what `measure` returns, unless `--table`; then print the table of the result file."""
    if not arguments.table:
        gc.disable()  # no collection inside a timed step
        torch.set_num_threads(arguments.threads)
        write_result(arguments.out, measure(arguments))
    print(markdown(read_result(arguments.out)))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the result: all arguments but the output, files and folders by their names alone."""
    values = {key: value for key, value in vars(arguments).items() if key not in ("out", "table")}
    return {key: value.name if isinstance(value, Path) else value for key, value in values.items()}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return versions, threads, device, and the commit of the library."""
    source = source_state()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "commit": source.commit,
        "dirty": source.dirty,
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result, also one that `gzip` has packed."""
    return json.loads(read_json_text(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the file and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]])


def megabytes(num_bytes: float, *, digits: int = 1) -> str:
    """Format bytes in units of 10^6."""
    return f"{num_bytes / 1e6:.{digits}f}"


def fill_section(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SystemExit: a marker is missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
