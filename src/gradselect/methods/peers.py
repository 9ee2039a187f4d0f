"""Peers: methods run through their authors' packages, for comparison (extra `peers`)."""

from __future__ import annotations

import importlib
import sys
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from gradselect.blocks import partition
from gradselect.core import num_bytes
from gradselect.usage import UsageError

from .base import AbstractMethod


class AbstractPeerMethod(AbstractMethod):
    """Trains with the optimizer of another package. It cannot resume, and has masters only if the package has."""

    can_resume: ClassVar[bool] = False

    @abstractmethod
    def make_optimizer(
        self, model: nn.Module, *, head: Collection[str], adamw: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Build the package's optimizer.

        Args:
            model: model to train.
            head: names of parameters that train at every step.
            adamw: `lr`, `weight_decay`, `betas` and `eps`.

        Raises:
            UsageError: the package is not installed.
        """


class BAdamPackageMethod(AbstractPeerMethod):
    """BAdam through its authors' package `badam` (Luo, Yu, Li, arXiv 2404.02827).

    Attributes:
        every: steps that a block trains for.
        order: order in which blocks train.
        embedding: make the embedding a block too.
        norm_and_head: make the rest, neither layer nor embedding, a block too.
    """

    name: Literal["badam-package"]
    every: PositiveInt = 50
    order: Literal["random", "ascending", "descending"] = "random"
    embedding: bool = False
    norm_and_head: bool = False

    def make_optimizer(
        self, model: nn.Module, *, head: Collection[str], adamw: dict[str, Any]
    ) -> torch.optim.Optimizer:
        badam = _import("badam", requirement="badam")
        return badam.BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), **adamw),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=self.every,
            switch_mode=self.order,
            active_modules=list(head),
            include_embedding=self.embedding,
            include_lm_head=self.norm_and_head,
            verbose=0,
        )


class GaLoreMethod(AbstractPeerMethod):
    """GaLore through its authors' package `galore-torch` (Zhao et al., arXiv 2403.03507).

    Gradients of matrices in layers are projected. Everything else trains with the package's plain AdamW.

    Attributes:
        rank: rank of the projections.
        refresh: steps after which a projection is computed anew.
        scale: factor on projected updates.
    """

    name: Literal["galore"]
    rank: PositiveInt = 128
    refresh: PositiveInt = 200
    scale: PositiveFloat = 0.25

    def make_optimizer(
        self, model: nn.Module, *, head: Collection[str], adamw: dict[str, Any]
    ) -> torch.optim.Optimizer:
        galore = _import("galore_torch", requirement="galore-torch")
        projected = [
            parameter
            for block in partition(model)
            if block.name.rpartition("layer.")[2].isdecimal()
            for parameter in block.parameters
            if parameter.ndim == 2
        ]
        identities = {id(parameter) for parameter in projected}
        plain = [parameter for parameter in model.parameters() if id(parameter) not in identities]
        options = {"rank": self.rank, "update_proj_gap": self.refresh, "scale": self.scale, "proj_type": "std"}
        groups = [{"params": plain}, {"params": projected, **options}]
        return galore.GaLoreAdamW(groups, **adamw, no_deprecation_warning=True)


@final
class PeerFactory:
    """Build the optimizer of a peer when the trainer asks for it."""

    def __call__(self, model: nn.Module, *, method: AbstractPeerMethod, **options: Any) -> torch.optim.Optimizer:
        return method.make_optimizer(model, **options)


def peer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Return the bytes of masters, of their gradients and of other state of a peer's optimizer."""
    masters: list[Tensor] = []
    inner: Any = optimizer
    badam: Any = sys.modules.get("badam")
    if badam is not None and isinstance(inner, badam.BlockOptimizer):
        masters, inner = list(inner.param_idx2hp.values()), inner.base_optimizer
    gradients = [master.grad for master in masters if master.grad is not None]
    return _total(masters), _total(gradients), _total(_tensors_of(inner))


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the large tensors of the state. Step counters are not counted, as in `BlockOptimizer.memory`."""
    for entries in optimizer.state.values():
        for name, value in entries.items():
            # GaLore keeps an object under this name, which holds one matrix.
            tensor = value.ortho_matrix if name == "projector" else value
            if torch.is_tensor(tensor) and tensor.ndim > 0:
                yield tensor


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(map(num_bytes, tensors))


def _import(module: str, *, requirement: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"method: the package {requirement} cannot be used ({error}); run: pip install 'gradselect[peers]'"
        ) from error
