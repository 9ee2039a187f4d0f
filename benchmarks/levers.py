"""Levers on memory and time, each alone and all together, in the shape of torchtune's table.

    python benchmarks/levers.py                              # CPU: writes benchmarks/results/levers.json
    python benchmarks/levers.py --preset gpu-llama-3.2-3b    # on a GPU, with random weights; has been run nowhere yet
    python benchmarks/levers.py --table                      # prints the table of the result file

Randomly initialised models; every setting trains its own copy of the same one on the same tokens. Bytes are those of
whole steps: `weights`, `gradients` (the most that exist at once), `masters` and `moments` at the update, `host` what is
offloaded. `peak` is the most that the device holds at one moment of a step that trains what was chosen before,
activations and logits included, and `explore` that of the first step, which looks at all gradients and has no state
yet.

On a CPU the settings take turns, one step each a round, and `speed` is the median over rounds of full fine-tuning's
time by the setting's own in the same round (of one thread the processor's time); `peak` counts tensors (what an
operation allocates for itself inside its kernel is not seen), without those that an accelerator would have offloaded.
On a GPU each setting has a process of its own, `speed` is the ratio of medians and `peak` the allocator's.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from sparse_step import LiveBytes
from torch import Tensor, nn

import gradselect as gs

RESULT = Path(__file__).parent / "results" / "levers.json"
LR = 1e-5
FULL = "full AdamW"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and a batch.

    Args:
        tile: words of the vocabulary in one tile of TRL's chunked loss, which has 32,768.
    """

    config: transformers.PreTrainedConfig
    batch: int
    length: int
    dtype: torch.dtype
    device: str
    tile: int = 32_768


PRESETS = {
    "cpu": Preset(
        config=transformers.LlamaConfig(
            num_hidden_layers=12,
            hidden_size=384,
            intermediate_size=1024,
            num_attention_heads=6,
            vocab_size=8192,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        batch=8,
        length=128,
        dtype=torch.float32,
        device="cpu",
        tile=1024,
    ),
    "gpu-llama-3.2-3b": Preset(
        config=transformers.LlamaConfig(
            num_hidden_layers=28,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        batch=4,
        length=768,
        dtype=torch.bfloat16,
        device="cuda",
    ),
    "gpu-qwen2.5-0.5b": Preset(
        config=transformers.Qwen2Config(
            num_hidden_layers=24,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        batch=8,
        length=512,
        dtype=torch.bfloat16,
        device="cuda",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which levers are pulled.

    Args:
        policy: "all"; "adagradselect": 20 % of the blocks; "truncated": as many among the upper half of the layers.
        rank: of LoRA on all linear layers, in place of the model's own weights; 0: none.
    """

    policy: str = "adagradselect"
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


# One setting ---------------------------------------------------------------------------------------------------------


class Witness(gs.BlockOptimizer):
    """Knows what it held at the last update, when the state of the selection is on the device."""

    at_update: Any = None

    def _commit(self, *arguments: Any) -> Any:
        self.at_update = self.memory()
        return super()._commit(*arguments)


@dataclass
class Run:
    """A setting at work, and the most that was seen of it."""

    preset: Preset
    setting: Setting
    model: nn.Module
    optimizer: Witness
    live: LiveBytes | None
    most: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    gradients: int = 0

    def observed_step(self, tokens: Tensor) -> None:
        """A training step of which the bytes count."""
        before = self.optimizer.memory()
        self._reset_peak()
        self.gradients = 0
        with self.live or nullcontext():
            self._step(tokens)
        peak, after, record = self._peak(), self.optimizer.memory(), self.optimizer.last_record
        assert record is not None
        # What was on the host throughout is no part of the device; what moved in this step may have been, and counts.
        on_host = max(0, min(before["state_on_host"], after["state_on_host"]) - record.moved_bytes)
        at_update = self.optimizer.at_update
        self._note("explore" if record.explored else "peak", peak - (on_host if self.live else 0))
        self._note("weights", at_update["weights"])
        self._note("gradients", self.gradients if not record.explored else 0)
        self._note("masters", at_update["masters"])
        self._note("moments", at_update["state_on_device"])
        self._note("host", after["state_on_host"])

    def timed_step(self, tokens: Tensor) -> None:
        """A training step of which the time counts."""
        # Of one thread the processor's time counts, which others that compute beside it do not change.
        clock = time.process_time if self.live and torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        self._step(tokens)
        if self.live is None:
            torch.cuda.synchronize()
        self.seconds.append(clock() - start)

    def count_gradients(self, _: Tensor) -> None:
        """A hook: a gradient has arrived."""
        existing = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, existing)

    def _step(self, tokens: Tensor) -> None:
        fused = {"fused_lm_head": True} if self.setting.chunked else {}
        self.model(input_ids=tokens, labels=tokens, **fused).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _note(self, name: str, num_bytes: int) -> None:
        self.most[name] = max(self.most.get(name, 0), num_bytes)

    def _reset_peak(self) -> None:
        if self.live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.peak = self.live.now

    def _peak(self) -> int:
        if self.live is None:
            return torch.cuda.max_memory_allocated()
        return self.live.peak + sum(p.nbytes for p in self.model.parameters())


def start(preset: Preset, setting: Setting) -> Run:
    """The setting on a fresh model; gradients are counted from the first step on."""
    torch.manual_seed(0)
    with torch.device(preset.device):
        model = transformers.AutoModelForCausalLM.from_config(preset.config, dtype=preset.dtype).train()
    if setting.chunked:
        chunk_loss(model, tile=preset.tile)
    if setting.checkpointing:
        from gradselect.integrations.transformers import checkpoint_selected

        checkpoint_selected(model)
    if setting.rank:
        model = with_lora(model, rank=setting.rank)
    run = Run(preset, setting, model, None, LiveBytes() if preset.device == "cpu" else None)  # pyright: ignore
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(run.count_gradients)  # before the optimizer's own
    rule = gs.AdamW8bitRule(fused=True) if setting.low_bit else gs.AdamWRule(fused=True)
    run.optimizer = Witness(
        model,
        policy_of(setting, preset),
        lr=LR,
        rule=rule,
        residency=gs.Offload() if setting.offload else gs.Keep(),
        update_in_backward=setting.in_backward,
    )
    return run


def policy_of(setting: Setting, preset: Preset) -> gs.AbstractPolicy:
    """It looks at all gradients in its first step, and in no other."""
    if setting.policy == "all":
        return gs.All()
    layers = preset.config.num_hidden_layers
    if setting.policy == "adagradselect":
        return gs.AdaGradSelect(fraction=0.2, explore_steps=1)
    upper = tuple(f"layer.{number}" for number in range(layers // 2, layers))
    return gs.AdaGradSelect(count=round(0.2 * (layers + 2)), among=upper, explore_steps=1)


def chunk_loss(model: nn.Module, *, tile: int) -> None:
    """TRL's chunked loss, with tiles of so many words."""
    import trl.trainer.utils

    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
    trl.trainer.utils.add_fused_lm_head(model)


def with_lora(model: nn.Module, *, rank: int) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


# All of them ---------------------------------------------------------------------------------------------------------


class Batches:
    """The same tokens for every setting, round after round."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset
        self._generator = torch.Generator().manual_seed(0)

    def next(self) -> Tensor:
        shape = (self._preset.batch, self._preset.length)
        tokens = torch.randint(0, self._preset.config.vocab_size, shape, generator=self._generator)
        return tokens.to(self._preset.device)


def measure_together(preset: Preset, names: list[str], *, rounds: int, observed: int) -> dict[str, Run]:
    """All settings in this process, taking turns."""
    runs, batches = {name: start(preset, SETTINGS[name]) for name in names}, Batches(preset)
    for number in range(observed + rounds):
        tokens = batches.next()
        for run in runs.values():
            if number < observed:
                run.observed_step(tokens)
            else:
                run.timed_step(tokens)
    return runs


def measure_apart(preset: str, names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each setting in a process of its own, one after the other."""
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--preset", preset, "--only", name]
        command += ["--rounds", str(arguments.rounds), "--observed", str(arguments.observed)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    return rows


def row_of(name: str, run: Run) -> dict[str, Any]:
    return {"name": name, "levers": asdict(run.setting), "bytes": run.most, "seconds": run.seconds}


def with_speeds(rows: list[dict[str, Any]], *, in_turns: bool) -> list[dict[str, Any]]:
    """Tokens per second against full fine-tuning, which comes first."""
    full = rows[0]["seconds"]
    for row in rows:
        own = row["seconds"]
        ratios = [theirs / ours for theirs, ours in zip(full, own, strict=True)]
        row["speed"] = statistics.median(ratios) if in_turns else statistics.median(full) / statistics.median(own)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table; MB are 10^6 bytes."""
    columns = ("weights", "gradients", "masters", "moments", "host", "peak", "explore")
    lines = [
        "| setting | weights MB | gradients MB | masters MB | moments MB | on host MB | peak MB | explore step MB "
        "| speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{row['bytes'][name] / 1e6:.1f}" if name in row["bytes"] else "" for name in columns]
        lines.append(f"| {' | '.join([row['name'], *cells, format(row['speed'], '.2f')])} |")
    return "\n".join(lines)


def machine(preset: Preset) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": version("trl"),
        "threads": torch.get_num_threads(),
        "device": platform.machine() if preset.device == "cpu" else torch.cuda.get_device_name(),
    }


def main() -> None:
    arguments = parse()
    preset = PRESETS[arguments.preset]
    if arguments.table:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {arguments.preset} needs a GPU, and there is none; write --preset cpu")
    torch.set_num_threads(arguments.threads)
    names = [FULL, *(name for name in arguments.settings if name != FULL)]
    sizes = {"rounds": arguments.rounds, "observed": arguments.observed}
    if arguments.only:
        runs = measure_together(preset, [arguments.only], **sizes)
        print(json.dumps(row_of(arguments.only, runs[arguments.only])))
        return
    if preset.device == "cpu":
        rows = [row_of(name, run) for name, run in measure_together(preset, names, **sizes).items()]
    else:
        rows = measure_apart(arguments.preset, names, arguments)
    result = {
        "settings": {**sizes, "preset": arguments.preset, "batch": preset.batch, "length": preset.length},
        "model": {
            "type": preset.config.model_type,
            "layers": preset.config.num_hidden_layers,
            "hidden": preset.config.hidden_size,
            "vocabulary": preset.config.vocab_size,
            "dtype": str(preset.dtype).removeprefix("torch."),
            "tile": preset.tile,
        },
        "machine": machine(preset),
        "rows": with_speeds(rows, in_turns=preset.device == "cpu"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    parser.add_argument("--observed", type=int, default=3, help="steps before them, of which the bytes count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS, help="one setting, as JSON")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    gc.disable()
    main()
