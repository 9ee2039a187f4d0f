"""Levers on memory and time, each alone and all together, in the form of torchtune's table.

    python benchmarks/levers.py                              # CPU: writes benchmarks/results/levers.json
    python benchmarks/levers.py --preset gpu-qwen2.5-0.5b --out benchmarks/results/gpu/qwen2.5-0.5b.json
    python benchmarks/levers.py --table                      # prints the table of the result file

Models have random weights; every setting trains its own copy of the same one on the same tokens. Bytes are peaks over
whole steps: `weights`, `gradients` (that exist at once), `masters` and `moments` at the update, `host` the offloaded
state. `peak` is the most that the device holds in a step that trains a known selection, activations and logits
included; `explore` is the same of the first step, which looks at all gradients and has no state yet.

On a CPU the settings take turns, one step each a round, and `speed` is the median over rounds of full fine-tuning's
time by the setting's own (with one thread: the processor's time). `peak` counts tensors, without those that an
accelerator would have offloaded; it does not see what an operation allocates inside its kernel.

On a GPU the settings come one after the other, each alone on the device, whose allocator counts `peak`. Steps are
queued as in training, without waiting for the device, and timed by its own clock. `speed` is the ratio of medians; the
times of single steps stand beside it, for they depend on the blocks that a step trains, and on the machine's other
work. With `Offload()` the copies are part of them. `planned` is the peak of a long run by `gradselect.plan`, which
needs no GPU and does not know the chunked loss:

    python benchmarks/levers.py --preset gpu-qwen2.5-0.5b --plan --out benchmarks/results/gpu/qwen2.5-0.5b.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice, pairwise
from typing import Any

import common
import torch
import transformers
from torch import nn

import gradselect as gs

RESULT = common.RESULTS / "levers.json"
LR = 1e-5
FULL = "full AdamW"


TILES = {"cpu": 1024, "cuda": 32_768}
"""Words of the vocabulary in one tile of the chunked loss, by device; TRL has 32,768."""

SMALL = common.decoder_shape(
    "llama",
    layers=12,
    width=384,
    mlp_width=1024,
    heads=6,
    vocabulary=8192,
    length=128,
    tie_word_embeddings=False,
    use_cache=False,
)
PRESETS = {
    "cpu": common.Workload(config=SMALL, batch=8, length=128, dtype=torch.float32, device="cpu"),
    **{f"gpu-{name}": workload for name, workload in common.GPU_WORKLOADS.items()},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The levers that are on.

    Args:
        policy: "all"; "adagradselect": `fraction` of the blocks; "truncated": as many of the upper half of the layers.
        rank: rank of LoRA on all linear layers, in place of the model's own weights; 0: none.
    """

    policy: str = "adagradselect"
    fraction: float = 0.2
    chunked: bool = False
    checkpointing: bool = False
    in_backward: bool = False
    offload: bool = False
    low_bit: bool = False
    rank: int = 0


ALL_LEVERS = {"chunked": True, "checkpointing": True, "in_backward": True, "offload": True, "low_bit": True}
SETTINGS = {
    FULL: Setting(policy="all"),
    "full, chunked loss": Setting(policy="all", chunked=True),
    "full, checkpointing": Setting(policy="all", checkpointing=True),
    "full, update in backward": Setting(policy="all", in_backward=True),
    "full, 8-bit moments": Setting(policy="all", low_bit=True),
    "AdaGradSelect 20 %": Setting(),
    "+ truncated": Setting(policy="truncated"),
    "+ chunked loss": Setting(policy="truncated", chunked=True),
    "+ checkpointing": Setting(policy="truncated", chunked=True, checkpointing=True),
    "+ update in backward": Setting(policy="truncated", chunked=True, checkpointing=True, in_backward=True),
    "+ offload": Setting(policy="truncated", chunked=True, checkpointing=True, in_backward=True, offload=True),
    "+ 8-bit moments": Setting(policy="truncated", **ALL_LEVERS),
    "not truncated, all other levers": Setting(**ALL_LEVERS),
    "LoRA r=32": Setting(policy="all", rank=32),
    "LoRA r=32, chunked loss, checkpointing": Setting(policy="all", rank=32, chunked=True, checkpointing=True),
}
ON_GPU = SETTINGS | {
    "AdaGradSelect 20 %, offload": Setting(offload=True),
    "AdaGradSelect 10 %, offload": Setting(fraction=0.1, offload=True),
    "AdaGradSelect 20 %, offload, chunked loss, checkpointing": Setting(offload=True, chunked=True, checkpointing=True),
    "full, chunked loss, checkpointing": Setting(policy="all", chunked=True, checkpointing=True),
    "LoRA r=256": Setting(policy="all", rank=256),
}
"""With what an accelerator has by default, `Offload()`."""


# One setting ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A setting at work.

    Args:
        live: counts tensors; None on a GPU, whose allocator counts.
        most: the peak of each kind of bytes.
    """

    setting: Setting
    model: nn.Module
    optimizer: gs.BlockOptimizer
    gradients: common.GradientPeak
    live: common.LiveBytes | None
    most: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def observed_step(self, batch: common.Batch) -> None:
        """Train a step and note its bytes."""
        before = self.optimizer.memory()
        self._reset_peak()
        self.gradients.bytes, self.gradients.is_on = 0, True
        with self.live or nullcontext(), self.optimizer.phases(self._note_state):
            self._step(batch)
        self.gradients.is_on = False
        peak, after, record = self._peak(), self.optimizer.memory(), self.optimizer.last_record
        assert record is not None
        # State that stayed on the host is not on the device. What moved in this step may have been there, and counts.
        on_host = max(0, min(before["state_on_host"], after["state_on_host"]) - record.moved_bytes)
        found = {
            "explore" if record.explored else "peak": peak - (on_host if self.live else 0),
            "weights": after["weights"],
            "gradients": self.gradients.bytes if not record.explored else 0,
            "host": after["state_on_host"],
        }
        self._keep_most(found)

    def timed_steps(self, batches: Iterable[common.Batch]) -> None:
        """Train steps and note the time of each."""
        if self.live is None:
            self._timed_by_device(batches)
            return
        # The time of a single-threaded process does not change with what others compute beside it.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        for batch in batches:
            start = clock()
            self._step(batch)
            self.seconds.append(clock() - start)

    def _timed_by_device(self, batches: Iterable[common.Batch]) -> None:
        marks = [_mark()]
        for batch in batches:
            self._step(batch)
            marks.append(_mark())
        torch.cuda.synchronize()
        self.seconds += [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]

    def row(self, name: str) -> dict[str, Any]:
        return {"name": name, "levers": asdict(self.setting), "bytes": self.most, "seconds": self.seconds}

    def _step(self, batch: common.Batch) -> None:
        fused = {"fused_lm_head": True} if self.setting.chunked else {}
        self.model(**batch, **fused).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _note_state(self, phase: str) -> AbstractContextManager[None]:
        """Note the state on the device as a phase begins: one begins right after the update, before anything moves."""
        held = self.optimizer.memory()
        self._keep_most({"masters": held["masters"], "moments": held["state_on_device"]})
        return nullcontext()

    def _keep_most(self, found: dict[str, int]) -> None:
        self.most |= {name: max(self.most.get(name, 0), num_bytes) for name, num_bytes in found.items()}

    def _reset_peak(self) -> None:
        if self.live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.reset_peak()

    def _peak(self) -> int:
        if self.live is None:
            return torch.cuda.max_memory_allocated()
        return self.live.peak + sum(p.nbytes for p in self.model.parameters())


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def start(preset: common.Workload, setting: Setting) -> Run:
    """Set up a fresh model as the setting says."""
    model = preset.model()
    if setting.chunked:
        chunk_loss(model, tile=TILES[preset.device])
    if setting.checkpointing:
        from gradselect.integrations.transformers import checkpoint_selected

        checkpoint_selected(model)
    if setting.rank:
        model = common.with_lora(model, rank=setting.rank)
    gradients = common.GradientPeak(model)
    optimizer = gs.BlockOptimizer(
        model,
        policy_of(setting, preset),
        lr=LR,
        rule=rule_of(setting),
        residency=residency_of(setting),
        update_in_backward=setting.in_backward,
    )
    return Run(setting, model, optimizer, gradients, common.LiveBytes() if preset.device == "cpu" else None)


def planned_bytes(preset: common.Workload, setting: Setting) -> int | None:
    """Return the peak that `gradselect.plan` predicts for a long run; None where the loss is chunked."""
    if setting.chunked:
        return None
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(preset.config, dtype=preset.dtype).train()
    plan = gs.plan(
        common.with_lora(model, rank=setting.rank) if setting.rank else model,
        policy_of(setting, preset),
        batch_size=preset.batch,
        sequence_length=preset.length,
        gradient_checkpointing=setting.checkpointing,
        update_in_backward=setting.in_backward,
        rule=rule_of(setting),
        residency=residency_of(setting),
    )
    return plan.peak_bytes


def with_plans(result: dict[str, Any], preset: common.Workload) -> dict[str, Any]:
    """Add to each row of a result of a GPU what is planned for it."""
    for row in result["rows"]:
        row["planned"] = planned_bytes(preset, Setting(**row["levers"]))
    result["rows"] = with_speeds(result["rows"], in_turns=False)
    return result


def rule_of(setting: Setting) -> gs.AbstractRule:
    return gs.AdamW8bitRule(fused=True) if setting.low_bit else gs.AdamWRule(fused=True)


def residency_of(setting: Setting) -> gs.AbstractResidency:
    return gs.Offload() if setting.offload else gs.Keep()


def policy_of(setting: Setting, preset: common.Workload) -> gs.AbstractPolicy:
    """Return the policy; it looks at all gradients in its first step alone."""
    if setting.policy == "all":
        return gs.All()
    layers = preset.config.num_hidden_layers
    if setting.policy == "adagradselect":
        return gs.AdaGradSelect(fraction=setting.fraction, explore_steps=1)
    upper = tuple(f"layer.{number}" for number in range(layers // 2, layers))
    return gs.AdaGradSelect(count=round(setting.fraction * (layers + 2)), among=upper, explore_steps=1)


def chunk_loss(model: nn.Module, *, tile: int) -> None:
    """Put TRL's chunked loss on the model, with `tile` words a tile."""
    import trl.trainer.utils

    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
    trl.trainer.utils.add_fused_lm_head(model)


# All settings --------------------------------------------------------------------------------------------------------


def measure_in_turns(
    preset: common.Workload, names: Sequence[str], *, rounds: int, observed: int
) -> list[dict[str, Any]]:
    """Train all settings, one step of each a round. Returns a row a setting."""
    runs = {name: start(preset, ON_GPU[name]) for name in names}
    for number, batch in enumerate(islice(preset.batches(), observed + rounds)):
        for run in runs.values():
            if number < observed:
                run.observed_step(batch)
            else:
                run.timed_steps([batch])
    return [run.row(name) for name, run in runs.items()]


def measure_alone(preset: common.Workload, names: Sequence[str], *, rounds: int, observed: int) -> list[dict[str, Any]]:
    """Train each setting alone on the GPU. Returns a row a setting; one that does not fit has its error."""
    rows = []
    for name in names:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            rows.append(_row_alone(preset, name, rounds=rounds, observed=observed))
        except torch.OutOfMemoryError as error:
            rows.append({"name": name, "levers": asdict(ON_GPU[name]), "error": str(error).splitlines()[0]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row_alone(preset: common.Workload, name: str, *, rounds: int, observed: int) -> dict[str, Any]:
    left = torch.cuda.memory_allocated()
    run = start(preset, ON_GPU[name])
    batches = list(islice(preset.batches(), observed + rounds))
    for batch in batches[:observed]:
        run.observed_step(batch)
    run.timed_steps(batches[observed:])
    run.optimizer.close()
    run.gradients.close()
    return {**run.row(name), "left_before": left}


def with_speeds(rows: list[dict[str, Any]], *, in_turns: bool) -> list[dict[str, Any]]:
    """Add the speed against full fine-tuning, which comes first."""
    full = rows[0]["seconds"]
    for row in rows:
        if own := row.get("seconds"):
            alone = statistics.median(full) / statistics.median(own)
            row["speed"] = common.ratio_columns("speed", full, own)["speed"] if in_turns else alone
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the table; MB are 10^6 bytes."""
    kinds = ("weights", "gradients", "masters", "moments", "host", "peak", "explore")
    headings = [f"{kind} MB" for kind in kinds[:4]]
    is_planned = any("planned" in row for row in result["rows"])
    return common.markdown_table(
        ["setting", *headings, "on host MB", "peak MB", "explore step MB", *GPU_COLUMNS * is_planned, "speed"],
        [
            [
                row["name"],
                *(common.megabytes(row["bytes"][kind]) if kind in row["bytes"] else "" for kind in kinds),
                *(_columns_of_gpu(row) if is_planned else ()),
                f"{row['speed']:.2f}",
            ]
            for row in result["rows"]
            if "error" not in row
        ],
    )


GPU_COLUMNS = ["planned MB", "step ms", "fastest to slowest"]


def _columns_of_gpu(row: dict[str, Any]) -> list[str]:
    middle, least, most = (1000 * of(row["seconds"]) for of in (statistics.median, min, max))
    planned = common.megabytes(row["planned"]) if row["planned"] else ""
    return [planned, f"{middle:.0f}", f"{least:.0f}-{most:.0f}"]


def measure(arguments: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    preset = PRESETS[arguments.preset]
    names = [FULL, *(name for name in arguments.settings if name != FULL)]
    is_cpu = preset.device == "cpu"
    rows = (measure_in_turns if is_cpu else measure_alone)(preset, names, **sizes)
    result = {
        "settings": {**sizes, "preset": arguments.preset, "batch": preset.batch, "length": preset.length},
        "model": {
            "type": preset.config.model_type,
            "layers": preset.config.num_hidden_layers,
            "hidden": preset.config.hidden_size,
            "vocabulary": preset.config.vocab_size,
            "dtype": str(preset.dtype).removeprefix("torch."),
            "tile": TILES[preset.device],
        },
        "machine": {**common.machine(preset.device), "trl": version("trl")},
        "rows": with_speeds(rows, in_turns=is_cpu),
    }
    return result if is_cpu else with_plans(result, preset)


def main() -> None:
    parser = common.make_parser(__doc__, out=RESULT, rounds=5, observed=3, threads=1)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--settings", nargs="+", choices=ON_GPU, help="default: those that fit the device")
    parser.add_argument("--plan", action="store_true", help="measure nothing, add plans to the rows of the result file")
    arguments = common.parse(parser)
    if arguments.plan:
        common.write_result(arguments.out, with_plans(common.read_result(arguments.out), PRESETS[arguments.preset]))
    elif not arguments.table:
        is_gpu = PRESETS[arguments.preset].device == "cuda"
        if is_gpu and not torch.cuda.is_available():
            sys.exit(f"--preset {arguments.preset} needs a GPU, and there is none; write --preset cpu")
        torch.set_num_threads(arguments.threads)
        arguments.settings = arguments.settings or list(ON_GPU if is_gpu else SETTINGS)
        sizes = {"rounds": arguments.rounds, "observed": arguments.observed}
        common.write_result(arguments.out, measure(arguments, sizes))
    print(markdown(common.read_result(arguments.out)))


if __name__ == "__main__":
    gc.disable()
    main()
