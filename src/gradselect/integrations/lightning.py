"""Selective training in Lightning's `Trainer`. Packages `lightning` and `pytorch_lightning` are both served.

    class Module(lightning.LightningModule):
        def configure_optimizers(self):
            return gs.BlockOptimizer(self.net, policy=gs.AdaGradSelect(fraction=0.2), lr=1e-5)

    trainer = lightning.Trainer(callbacks=[SelectionCallback(jsonl="selection.jsonl")])

The module builds the optimizer. The callback passes it what only the Trainer knows, and logs what it did. Fabric needs
no part of this module: its loops are loops of your own.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from gradselect import All, BlockOptimizer, JsonlWriter, SparseOptimizer, UsageError
from gradselect.integrations.reporting import say_explore_steps, say_what_never_trained, say_what_trains, summarise
from gradselect.usage import check_file_name

try:
    from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback  # pyright: ignore[reportMissingImports]

SelectiveOptimizer = BlockOptimizer | SparseOptimizer


class SelectionCallback(Callback):
    """Connects Lightning's Trainer with the `BlockOptimizer` or `SparseOptimizer` of its module.

    **To the optimizer**, when training begins: which micro-batch is the last of a step, the gradient scaler of
    `precision="16-mixed"` and, for a policy that left it open (`AdaGradSelect(explore_steps=None)`), the number of
    steps in which it explores: the first epoch, at most a quarter of the run. With manual optimization only your loop
    knows these: give `accumulation_steps` and `explore_steps` yourself.

    **The model** is given back when `fit()` ends in any way: what you had left trainable is trainable again, and hooks
    are gone.

    **Logs.** Whenever Lightning logs a step, means over the last `log_every_n_steps` steps: `selection/blocks`,
    `selection/explored`, `selection/entropy`, `selection/state_bytes` and `selection/moved_bytes`, or with a mask
    `selection/entries`, `selection/new`, `selection/overlap`, `selection/state_bytes` and `grad_norm`. At the end
    `selection/updates/<block>`, the number of updates of each block.

    **Clipping.** With a mask Lightning cannot clip, because gradients are freed before it reads them. The optimizer
    clips instead, to its own `max_grad_norm` or, if it has none, to `gradient_clip_val`, which is None during training.

    Args:
        jsonl: file for the records, one a line; its folder must exist when training begins.

    Raises:
        UsageError: when `fit()` begins: the module has no optimizer of ours, or several; the strategy is FSDP of
            version 1, DeepSpeed, or DDP without unused parameters; or clipping would find no gradients.

    Example:
        >>> callback = SelectionCallback(jsonl="selection.jsonl")  # for Trainer(callbacks=[callback])
    """

    def __init__(self, *, jsonl: str | Path | None = None) -> None:
        if jsonl is not None:
            check_file_name("jsonl", jsonl, example="selection.jsonl")
        self._jsonl = jsonl
        self._recent: deque[Any] = deque(maxlen=1)
        self._hooks: list[Any] = []
        self._clipping: float | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            _check_strategy(trainer.strategy)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = _optimizer_of(trainer)
        _check_ddp(trainer.strategy.model, optimizer)
        self._settle_clipping(trainer, pl_module, optimizer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = _optimizer_of(trainer)
        optimizer.reopen()
        optimizer.check_model()
        if pl_module.automatic_optimization:
            # Lightning steps after the last batch of an epoch too, however many came before.
            optimizer.accumulation_steps = 1
            optimizer.count_passes_if(lambda: not trainer.fit_loop._should_accumulate())
            _fill_explore_steps(trainer, optimizer)
        _settle_scaler(trainer, optimizer)
        optimizer.zero_grad()  # a fit() that was interrupted leaves its window of micro-batches open
        self._recent = deque(maxlen=max(1, trainer.log_every_n_steps))
        self._hooks.append(optimizer.add_record_hook(self._recent.append))
        if self._jsonl is not None and trainer.is_global_zero:
            self._hooks.append(optimizer.add_record_hook(JsonlWriter(self._jsonl)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._recent and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(summarise([*self._recent]), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        optimizer = _optimizer_of(trainer)
        if isinstance(optimizer, BlockOptimizer):
            counts = {f"selection/updates/{name}": float(count) for name, count in optimizer.update_counts.items()}
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=trainer.global_step)
            say_what_never_trained(optimizer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._give_back(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._give_back(trainer)

    def _settle_clipping(self, trainer: Any, pl_module: Any, optimizer: SelectiveOptimizer) -> None:
        """Refuse clipping that would find no gradients; with a mask let the optimizer clip."""
        limit = trainer.gradient_clip_val
        if isinstance(optimizer, BlockOptimizer):
            if limit and optimizer.update_in_backward:
                raise UsageError(
                    f"update_in_backward=True with Trainer(gradient_clip_val={limit}): when Lightning clips, the "
                    "gradients have been used and freed; leave one of the two out"
                )
            return
        if not type(pl_module).configure_gradient_clipping.__qualname__.startswith("LightningModule."):
            raise UsageError(
                f"{type(pl_module).__name__}.configure_gradient_clipping would find no gradients: with a mask they are "
                "freed in the backward pass; leave the method out and write SparseOptimizer(..., max_grad_norm=1.0)"
            )
        if limit and str(trainer.gradient_clip_algorithm or "norm") != "norm":
            raise UsageError(
                f"gradient_clip_algorithm={str(trainer.gradient_clip_algorithm)!r} with a mask, whose gradients are "
                "freed in the backward pass: the optimizer clips them itself, and only by their norm; write "
                'gradient_clip_algorithm="norm"'
            )
        if limit:
            if optimizer.max_grad_norm is None:
                optimizer.max_grad_norm = float(limit)
            self._clipping, trainer.gradient_clip_val = limit, None

    def _give_back(self, trainer: Any) -> None:
        """Leave model and Trainer as the user had them, until the next `fit()`."""
        while self._hooks:
            self._hooks.pop().remove()
        for optimizer in _selective_optimizers(trainer):
            optimizer.count_passes_if(None)
            optimizer.close()
        if self._clipping is not None:
            trainer.gradient_clip_val, self._clipping = self._clipping, None


def _selective_optimizers(trainer: Any) -> list[SelectiveOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SelectiveOptimizer)]


def _optimizer_of(trainer: Any) -> SelectiveOptimizer:
    found = _selective_optimizers(trainer)
    if len(found) != 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
        raise UsageError(
            f"SelectionCallback needs one BlockOptimizer or SparseOptimizer, but configure_optimizers gave {names}; "
            "return gs.BlockOptimizer(self.net, policy=gs.AdaGradSelect(fraction=0.2), lr=1e-5) there, or leave out "
            "the callback"
        )
    return found[0]


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies that hide gradients, before `configure_optimizers` runs into them."""
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    for name, why in {
        "FSDPStrategy": "it flattens parameters across blocks",
        "DeepSpeedStrategy": "it steps an optimizer of its own and hides gradients from others",
    }.items():
        if name in kinds:
            raise UsageError(
                f"strategy={type(strategy).__name__}: {why}; write "
                'Trainer(strategy="ddp_find_unused_parameters_true"), or '
                "strategy=ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1) with "
                "torch.distributed.fsdp.fully_shard of each layer in the module's configure_model()"
            )


def _check_ddp(model: Any, optimizer: SelectiveOptimizer) -> None:
    trains_all = isinstance(optimizer, BlockOptimizer) and isinstance(optimizer.policy, All)
    if not isinstance(model, DistributedDataParallel) or trains_all:
        return
    if not model.find_unused_parameters or model.static_graph:
        raise UsageError(
            f"strategy DDP with find_unused_parameters={model.find_unused_parameters}, "
            f"static_graph={model.static_graph} does not average the gradients of blocks that change; write "
            'Trainer(strategy="ddp_find_unused_parameters_true"), or DDPStrategy(find_unused_parameters=True)'
        )


def _settle_scaler(trainer: Any, optimizer: SelectiveOptimizer) -> None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if isinstance(optimizer, BlockOptimizer):
        optimizer.grad_scaler = scaler
    elif scaler is not None:
        raise UsageError(
            f"Trainer(precision={trainer.precision!r}) with a mask: gradients are freed in the backward pass, before "
            'the gradient scaler could unscale them; write precision="bf16-mixed", which needs no scaler'
        )


def _fill_explore_steps(trainer: Any, optimizer: SelectiveOptimizer) -> None:
    """Tell the policy the steps of the first epoch and of the run, which streams may not have, and say what follows."""
    in_epoch = _ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    limits = [each for each in (trainer.max_steps, in_epoch * _or_endless(trainer.max_epochs)) if each >= 0]
    in_run = min(limits, default=math.inf)
    known = min(in_epoch, in_run)
    if not isinstance(optimizer, BlockOptimizer):
        return
    say_what_trains(optimizer)
    if not math.isfinite(known):
        return
    run_steps = int(in_run) if math.isfinite(in_run) else None
    optimizer.policy.fill_explore_steps(max(1, int(known)), run_steps=run_steps)
    if run_steps is not None:
        say_explore_steps(optimizer, num_steps=run_steps)


def _or_endless(max_epochs: int | None) -> float:
    return math.inf if max_epochs is None or max_epochs < 0 else max_epochs


def _ceil(number: float) -> float:
    return math.ceil(number) if math.isfinite(number) else number
