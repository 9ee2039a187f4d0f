"""Train a model that FSDP2 shards over two processes: python sharded.py FOLDER. Weights go to FOLDER/weights.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from test_lightning import Module, loader, trainer_for
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Sharded(Module):
    """Each rank trains on half of a batch."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        assert isinstance(self.net.head.weight, DTensor)
        return super().training_step(batch[self.global_rank :: 2], batch_idx)

    def on_train_batch_start(self, *_):
        pass  # weights are compared at the end

    on_train_batch_end = on_train_batch_start

    def on_train_end(self):
        whole = {name: value.full_tensor() for name, value in self.net.state_dict().items()}
        if self.global_rank == 0:
            torch.save(whole, f"{self.trainer.default_root_dir}/weights.pt")


if __name__ == "__main__":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    settings = {"use_distributed_sampler": False, "max_epochs": 2, "devices": 2}
    trainer_for(Path(sys.argv[1]), strategy=strategy, **settings).fit(Sharded(), loader())
