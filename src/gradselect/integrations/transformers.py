"""Selective training in an unmodified `transformers.Trainer`, and in trainers built on it, as TRL's and axolotl's.

    trainer = Trainer(
        model=model,
        args=args,
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"args": args, "policy": AdaGradSelect(fraction=0.2)}),
        callbacks=[SelectionCallback(jsonl="selection.jsonl")],
    )

With `"mask": ID3(budget=320_000, steps=1000)` in place of `"policy"` single weights are selected instead of blocks.
The factory builds the optimizer; the callback tells it what only the Trainer knows, and the Trainer's logs what it did.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from gradselect import BlockOptimizer, JsonlWriter, MaskRecord, SparseOptimizer, StepRecord, UsageError

logger = logging.getLogger(__name__)


@final
class SelectiveOptimizerFactory:
    """Builds a `BlockOptimizer` or a `SparseOptimizer` where a trainer asks for an optimizer.

    Trainer calls `SelectiveOptimizerFactory()(model, **kwargs)` with the kwargs that it was given, axolotl
    `SelectiveOptimizerFactory()(model, args, **kwargs)`.

    Example:
        >>> import gradselect as gs
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = SelectiveOptimizerFactory()(model, policy=gs.Cyclic(every=50), lr=1e-5)
        >>> optimizer.defaults["lr"]
        1e-05
    """

    def __call__(
        self, model: nn.Module, args: TrainingArguments | None = None, **options: Any
    ) -> BlockOptimizer | SparseOptimizer:
        """The optimizer of `model`.

        Args:
            model: as the trainer holds it; it may be wrapped for data parallelism.
            args: gives `lr`, `weight_decay`, `betas`, `eps`, `accumulation_steps` and, with a mask, `max_grad_norm`
                where `options` do not. The Trainer does not pass its own: name them among the kwargs, or else `lr`.
            options: keyword arguments of `BlockOptimizer` with a `policy`, or of `SparseOptimizer` with a `mask`.

        Raises:
            UsageError: an unknown option, no policy and no mask or both, no learning rate, a mask on several processes,
                or what the optimizer refuses.
        """
        kind = SparseOptimizer if "mask" in options else BlockOptimizer
        settings = options if args is None else {**_from_arguments(args, kind), **options}
        _check_settings(settings, kind)
        if settings.get("update_in_backward") and args is not None:
            _check_clipping(args)
        return kind(model, **settings)


class SelectionCallback(TrainerCallback):
    """Connects the `BlockOptimizer` or `SparseOptimizer` of a Trainer with it.

    When training begins, the optimizer learns the number of micro-batches per step, the gradient scaler and, for a
    policy that left it open (`AdaGradSelect(explore_steps=None)`), the number of optimizer steps of the first epoch.
    With activation checkpointing transformers makes the output of the embedding require a gradient, so the backward
    pass would visit every layer: that is undone where checkpoints are not reentrant.

    Each log of the training loss gets, over the steps since the last one,

        selection/blocks         mean number of blocks updated in a step
        selection/explored       share of steps that looked at all gradients
        selection/entropy        evenness of all updates so far, 1.0: every block equally often
        selection/state_bytes    most bytes of optimizer state and masters on the device
        selection/moved_bytes    mean bytes moved between device and host in a step

    and the last log `selection/updates/<block>`, the number of updates of each block. With a mask it gets

        selection/entries        mean number of entries updated in a step
        selection/new            mean number of them that the step before did not update
        selection/overlap        least share of a step's set that was in the next one
        selection/state_bytes    most bytes of indices, moments and masters on the device
        grad_norm                of the last step, before clipping, of the gradients that were applied

    They reach `log_history` and whatever `report_to` names: for that the callback moves before the Trainer's own
    reporters.

    **Clipping.** With a mask the Trainer cannot clip: gradients are freed before it looks. So while it trains,
    `args.max_grad_norm` is 0, and the optimizer clips instead: to its own `max_grad_norm`, or, if it was built without
    one, to that of the arguments.

    Args:
        jsonl: a file that gets every record as a line; its folder must exist when training begins.

    Raises:
        UsageError: when training begins, if the optimizer is none of ours, or if training resumes from a checkpoint
            without optimizer state.

    Example:
        >>> callback = SelectionCallback(jsonl="selection.jsonl")  # for Trainer(..., callbacks=[callback])
    """

    def __init__(self, *, jsonl: str | Path | None = None) -> None:
        self._jsonl = jsonl
        self._connected: BlockOptimizer | SparseOptimizer | None = None
        self._since_log: list[Any] = []
        self._max_grad_norm: float | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        # TRL makes the embedding's output require a gradient here and the Trainer again in train(), which can undo
        # its own doing only.
        _keep_backward_short(parts["model"], args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        optimizer = _unwrap_optimizer(parts["optimizer"])
        _check_resumed(optimizer, state)
        _warn(args, optimizer)
        if isinstance(optimizer, BlockOptimizer):
            if optimizer.update_in_backward:
                _check_clipping(args)
            optimizer.grad_scaler = parts["optimizer"].scaler
            optimizer.policy.fill_explore_steps(_num_steps_of_epoch(args, state, parts["train_dataloader"]))
        else:
            self._take_over_clipping(args, optimizer)
        # A train() that was interrupted within a window of micro-batches leaves it open.
        optimizer.zero_grad()
        _keep_backward_short(parts["model"], args)
        self._connect(optimizer, writes=state.is_world_process_zero)
        self._report_before_others()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        # Accelerate reduces the gradients of shards in the last of the micro-batches only, and hooks see no other.
        is_sharded = isinstance(parts["model"], FSDPModule)
        num_passes = 1 if is_sharded else _num_micro_batches(args, state, parts["train_dataloader"])
        _unwrap_optimizer(parts["optimizer"]).accumulation_steps = num_passes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        # The Trainer clears gradients through the model, so the optimizer does not see that a window ended unused.
        if parts["optimizer"].step_was_skipped:
            _unwrap_optimizer(parts["optimizer"]).zero_grad()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **parts: Any,
    ) -> None:
        assert logs is not None
        values: dict[str, float] = {}
        if "loss" in logs and self._since_log:
            values = summarise(self._since_log)
            self._since_log.clear()
        elif "train_runtime" in logs and isinstance(self._connected, BlockOptimizer):
            values = {f"selection/updates/{name}": count for name, count in self._connected.update_counts.items()}
        logs.update(values)
        # The Trainer has copied the logs there before it calls anyone.
        state.log_history[-1].update(values)

    def _take_over_clipping(self, args: TrainingArguments, optimizer: SparseOptimizer) -> None:
        # A train() that was interrupted has not given it back.
        asked = args.max_grad_norm if self._max_grad_norm is None else self._max_grad_norm
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = asked or None
        self._max_grad_norm, args.max_grad_norm = asked, 0.0

    def _connect(self, optimizer: BlockOptimizer | SparseOptimizer, *, writes: bool) -> None:
        """Receive the records of `optimizer`; a second `train()` of one Trainer goes on with the same."""
        self._since_log.clear()
        if self._connected is optimizer:
            return
        self._connected = optimizer
        optimizer.add_record_hook(self._since_log.append)
        if self._jsonl is not None and writes:
            optimizer.add_record_hook(JsonlWriter(self._jsonl))

    def _report_before_others(self) -> None:
        handler = _calling_handler()
        if handler is not None and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)


def checkpoint_selected(model: PreTrainedModel) -> None:
    """Activation checkpointing of the layers that the backward pass visits: those above the lowest selected block.

    In place of `model.activation_checkpointing_enable()` (once `gradient_checkpointing_enable`), which also makes the
    output of the embedding require a gradient, so that every layer keeps its input and runs a second time, frozen ones
    too. Checkpoints that are not reentrant, as these, do not need that. In a Trainer `SelectionCallback` sees to it.

    Args:
        model: of transformers; in training mode it checkpoints from now on.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16))
        >>> checkpoint_selected(model)
        >>> [layer.gradient_checkpointing for layer in model.encoder.layer]
        [True, True]
    """
    # transformers before 5.20 or so knows the old name only, and newer ones warn of it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _leave_inputs_alone(model)


def summarise(records: Sequence[StepRecord] | Sequence[MaskRecord]) -> dict[str, float]:
    """Summarise one or more steps as the numbers that `SelectionCallback` logs.

    Example:
        >>> record = MaskRecord(step=0, num_entries={"w": 4}, num_new=4, overlap=1.0, grad_norm=2.0, state_bytes=64)
        >>> summarise([record])["selection/entries"]
        4.0
    """
    of_blocks = [record for record in records if isinstance(record, StepRecord)]
    of_masks = [record for record in records if isinstance(record, MaskRecord)]
    return _summarise_masks(of_masks) if of_masks else _summarise_blocks(of_blocks)


def _summarise_blocks(records: Sequence[StepRecord]) -> dict[str, float]:
    return {
        "selection/blocks": fmean(len(record.selected) for record in records),
        "selection/explored": fmean(record.explored for record in records),
        "selection/entropy": records[-1].selection_entropy,
        "selection/state_bytes": max(record.state_bytes for record in records),
        "selection/moved_bytes": fmean(record.moved_bytes for record in records),
    }


def _summarise_masks(records: Sequence[MaskRecord]) -> dict[str, float]:
    return {
        "selection/entries": fmean(sum(record.num_entries.values()) for record in records),
        "selection/new": fmean(record.num_new for record in records),
        "selection/overlap": min(record.overlap for record in records),
        "selection/state_bytes": max(record.state_bytes for record in records),
        "grad_norm": records[-1].grad_norm,
    }


def _hyper_parameters(args: TrainingArguments | type[TrainingArguments]) -> dict[str, Any]:
    """AdamW's settings of TrainingArguments; of the class, their defaults."""
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def _from_arguments(args: TrainingArguments, kind: type) -> dict[str, Any]:
    clipping = {"max_grad_norm": args.max_grad_norm or None} if kind is SparseOptimizer else {}
    return {**_hyper_parameters(args), "accumulation_steps": args.gradient_accumulation_steps, **clipping}


def _check_settings(settings: Mapping[str, Any], kind: type) -> None:
    known = list(inspect.signature(kind).parameters)[1:]
    for name in settings.keys() - {*known, "policy"}:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"write {close[0]!r}" if close else f"known are {', '.join(known)}"
        raise UsageError(f"{name!r} among the kwargs of SelectiveOptimizerFactory is no option; {advice}")
    if ("policy" in settings) == ("mask" in settings):
        raise UsageError(
            "the kwargs of SelectiveOptimizerFactory need a 'policy', which chooses blocks, or a 'mask', which chooses "
            f"single weights, and have {'both' if 'mask' in settings else 'neither'}; write e.g. "
            '{"policy": AdaGradSelect(fraction=0.2), "args": args}'
        )
    if "lr" not in settings:
        raise UsageError(
            "the kwargs of SelectiveOptimizerFactory have no 'lr', and the Trainer does not pass on its learning_rate; "
            'add "args": args with the TrainingArguments, or "lr": 2e-5'
        )


def _check_clipping(args: TrainingArguments) -> None:
    if args.max_grad_norm:
        raise UsageError(
            f"update_in_backward=True with max_grad_norm={args.max_grad_norm}: when the Trainer clips, the gradients "
            "have been used and freed; write TrainingArguments(max_grad_norm=0.0), or leave update_in_backward out"
        )


def _check_resumed(optimizer: BlockOptimizer | SparseOptimizer, state: TrainerState) -> None:
    if state.global_step > 0 and optimizer.num_steps == 0:
        raise UsageError(
            f"training resumes after step {state.global_step}, but the checkpoint holds no optimizer state; save with "
            "save_only_model=False, or load the checkpoint with from_pretrained and call train() without "
            "resume_from_checkpoint"
        )


def _warn(args: TrainingArguments, optimizer: BlockOptimizer | SparseOptimizer) -> None:
    defaults = _hyper_parameters(type(args))
    if _is_reentrant(args):
        logger.warning(
            "with reentrant checkpoints the backward pass visits every layer, frozen ones too; "
            'drop "use_reentrant": True to skip those below the lowest selected block'
        )
    if args.torch_compile:
        logger.warning(
            "torch_compile=True compiles the whole model once more for each new selection; leave it out, and write "
            "gradselect.integrations.compile.compile_blocks(model) before the Trainer is built"
        )
    for name, value in _hyper_parameters(args).items():
        ours = optimizer.defaults[name]
        if value not in (ours, defaults[name]):
            logger.warning(
                "TrainingArguments say %s=%s, but the optimizer was built with %s=%s, which counts; "
                'add "args": args to the kwargs of SelectiveOptimizerFactory',
                *(name, value, name, ours),
            )


def _unwrap_optimizer(optimizer: torch.optim.Optimizer) -> BlockOptimizer | SparseOptimizer:
    if isinstance(optimizer, AcceleratedOptimizer):
        return _unwrap_optimizer(optimizer.optimizer)
    if not isinstance(optimizer, BlockOptimizer | SparseOptimizer):
        raise UsageError(
            "SelectionCallback needs a BlockOptimizer or a SparseOptimizer, the Trainer has "
            f"{type(optimizer).__name__}; write "
            'optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"policy": ..., "args": args}), or leave out the '
            "callback"
        )
    return optimizer


def _num_steps_of_epoch(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Optimizer steps of an epoch, the last of which may be on fewer micro-batches; as the Trainer counts them."""
    if not has_length(loader):
        return state.max_steps
    return max(1, -(-len(loader) // args.gradient_accumulation_steps))


def _num_micro_batches(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Backward passes of the step that begins; the last of an epoch gets what is left."""
    window = args.gradient_accumulation_steps
    if not has_length(loader):
        return window
    num_steps = _num_steps_of_epoch(args, state, loader)
    is_last = state.global_step % num_steps == num_steps - 1
    return len(loader) % window or window if is_last else window


def _keep_backward_short(model: nn.Module, args: TrainingArguments) -> None:
    """Let the backward pass end at the lowest selected block, with activation checkpointing too."""
    if _is_reentrant(args):
        return
    _leave_inputs_alone(model)


def _leave_inputs_alone(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()


def _is_reentrant(args: TrainingArguments) -> bool:
    """Return True if activation checkpoints are reentrant: their input must require a gradient."""
    settings = args.gradient_checkpointing_kwargs
    return bool(args.gradient_checkpointing) and isinstance(settings, dict) and bool(settings.get("use_reentrant"))


def _calling_handler() -> CallbackHandler | None:
    """The handler of the Trainer that this call comes from: it passes nothing by which a callback could reach it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
