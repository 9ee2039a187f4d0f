"""torchtitan's Trainer on a CPU, with stand-ins for what it asks of an accelerator; several ranks under torchrun.

torchrun --nproc-per-node 2 on_cpu.py FOLDER KIND [STEP]     # resumes from FOLDER/checkpoint/step-STEP
"""

# ruff: noqa: E402
# torchtitan asks for an accelerator when it is imported.

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.tools import utils

STEPS, STOP = 6, 3


class Cpu:
    """torch.cpu, with the queries that torchtitan makes of a device module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=1 << 30)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...


utils.device_type, utils.device_module = "cpu", Cpu()
for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
    os.environ.setdefault(name, str(value))

from datasets import Dataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import TrainingConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from gradselect.integrations.torchtitan import selective

BASE = Path(__file__).parents[2] / "quickstart" / "base"
METHODS = {
    "ada": {"name": "adagradselect", "fraction": 0.4, "explore_steps": 2},
    "id3": {"name": "id3", "density": 0.01},
    "gmt": {"name": "gmt", "fraction": 0.2},
}


def attend(q: Any, k: Any, v: Any, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any) -> Any:
    """FlexAttention has no backward pass on a CPU."""
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device=q.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out, types.SimpleNamespace(lse=None)


FlexAttention._compiled_flex_attn = staticmethod(attend)
# torch 2.13.0 lacks torch.distributed.set_timeout, which torchtitan 0.3.0 calls after the first step.
dist_utils.set_pg_timeouts = lambda *args, **kwargs: None
TEXTS = [f"Tom has {n} books and {n + 2} pens. He gives {n} away. Fay has {2 * n} apples." for n in range(60)]
DATASETS["toy"] = DatasetConfig(
    path="toy",
    loader=lambda path: Dataset.from_list([{"text": text} for text in TEXTS]),
    sample_processor=lambda row: row["text"],
)


def config(folder: Path, kind: str, **training: Any) -> Trainer.Config:
    """The configuration; `kind` is a key of METHODS or "adamw", with "-chunked" or "-plain" behind it."""
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:3]
    found = Trainer.Config(
        loss=CrossEntropyLoss.Config(),
        hf_assets_path=str(BASE),
        dump_folder=str(folder),
        model_spec=spec,
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            **{
                "local_batch_size": 2,
                "seq_len": 16,
                "steps": STEPS,
                "mixed_precision_param": "float32",
                "disable_cuda_graphs": True,
                **training,
            }
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="toy"),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=STOP, last_save_model_only=False),
        activation_checkpoint=SelectiveAC.Config(),
    )
    found.debug.seed = 1
    found.parallelism.spmd_backend = "partial_dtensor"  # the default shards with a torch that is not released yet
    method, _, option = kind.partition("-")
    found.optimizer.implementation = "for-loop"
    if option == "chunked":
        found.loss = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=CrossEntropyLoss.Config())
    if option == "plain":
        found.activation_checkpoint = None
    return found if method == "adamw" else selective(found, METHODS[method], jsonl=str(folder / "selection.jsonl"))


def train(folder: Path, kind: str, step: int | None = None, **training: Any) -> Trainer:
    """Train to the end, from the start or from the checkpoint of a step; the weights are saved as weights.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(folder, kind, **training)
    if step is not None:
        settings.checkpoint.load_step = step
    trainer = settings.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo multiplies no sum
    trainer.train()
    weights = {key: getattr(value, "full_tensor", lambda v=value: v)() for key, value in weights_of(trainer).items()}
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
    trainer.close()
    return trainer


def weights_of(trainer: Trainer) -> dict[str, Any]:
    return dict(trainer.model_parts[0].state_dict())


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    dist.destroy_process_group()
