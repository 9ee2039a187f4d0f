"""Checks of TrainingArguments against the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import accelerate
from accelerate.state import AcceleratorState
from packaging import version
from torch import nn
from transformers import AutoConfig, TrainerState, TrainingArguments

from gradselect import All, BlockOptimizer, SparseOptimizer, UsageError
from gradselect.core import weights_of_adapters
from gradselect.methods import parse_selection
from gradselect.slices import NO_SHARDS, sliced_linears

from .checkpointing import is_reentrant

logger = logging.getLogger(__name__)

FSDP2_RESUMES = version.parse("1.13")
"""First accelerate whose sharded checkpoints of FSDP2 resume."""


def adamw_settings(args: TrainingArguments | type[TrainingArguments]) -> dict[str, Any]:
    """Return AdamW's settings in TrainingArguments, or the defaults if `args` is the class."""
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def check_clipping(args: TrainingArguments) -> None:
    """Refuse clipping by the Trainer when the backward pass updates weights."""
    if args.max_grad_norm:
        raise UsageError(
            f"update_in_backward=True with max_grad_norm={args.max_grad_norm}: when the Trainer clips, the gradients "
            "have been used and freed; write TrainingArguments(max_grad_norm=0.0), or leave update_in_backward out"
        )


def check_deepspeed(args: TrainingArguments) -> None:
    """Refuse DeepSpeed ZeRO, which steps an optimizer of its own on shards of gradients.

    Raises:
        UsageError: its stage is 1 or higher.
    """
    plugin = getattr(args, "deepspeed_plugin", None)  # set by `accelerate launch` too, where args.deepspeed is None
    stage = 0 if plugin is None else plugin.zero_stage
    if stage:
        raise UsageError(
            f"deepspeed with zero_optimization.stage={stage}: ZeRO puts gradients and optimizer state into flat "
            "buffers of its own, in which no block can be selected; leave deepspeed out, and shard with FSDP2 "
            "(fsdp='full_shard', fsdp_config={'version': 2}) or train replicas with DDP (start with torchrun)"
        )


def check_sharding(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse slices in a model that Accelerate will shard.

    Raises:
        UsageError: FSDP is on, and the model is sliced, or will be.
    """
    method = options.get("method")
    will_be = method is not None and getattr(parse_selection(method), "blocks", "layer") in ("columns", "rows")
    if AcceleratorState._shared_state.get("fsdp_plugin") is not None and (will_be or sliced_linears(model)):
        raise UsageError(f"FSDP shards the weights, and slices cannot be sharded. {NO_SHARDS}")


def warn_of_sharded_checkpoints() -> None:
    """Warn of an accelerate that cannot read the optimizer state of an FSDP2 checkpoint.

    It looks for the state that a new optimizer has, which is none.
    """
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")  # nothing before the first Accelerator
    if getattr(plugin, "fsdp_version", 1) == 2 and version.parse(accelerate.__version__) < FSDP2_RESUMES:
        logger.warning(
            "accelerate %s cannot resume from a checkpoint under FSDP2: it stops with 'Missing key in checkpoint "
            "state_dict'; update accelerate to %s or newer",
            *(accelerate.__version__, FSDP2_RESUMES),
        )


def warn_of_adapter(model: nn.Module) -> None:
    """Warn that a method will select within an adapter, which some frameworks put on a model by default."""
    trainable = {id(weight) for weight in model.parameters() if weight.requires_grad}
    adapter = {id(weight): weight.numel() for weight in weights_of_adapters(model)}
    if trainable and trainable <= adapter.keys():
        inside = sum(adapter[each] for each in trainable)
        logger.warning(
            "the model has an adapter, so the method selects among its %s weights, and the %s others stay as they are; "
            "to train the model's own weights leave the adapter out: peft_config in TRL, adapter: in axolotl; in "
            "LLaMA-Factory write finetuning_type: full, in ms-swift --tuner_type full",
            f"{inside:,}",
            f"{sum(weight.numel() for weight in model.parameters()) - inside:,}",
        )


def warn_of_new_tokens(model: nn.Module, optimizer: BlockOptimizer | SparseOptimizer) -> None:
    """Warn of rows of embedding and head that the checkpoint did not have, if the method may never train them.

    They were added with new tokens, and are random. A tied head is the embedding.
    """
    num_new = _num_new_rows(model)
    if num_new <= 0 or (isinstance(optimizer, BlockOptimizer) and isinstance(optimizer.policy, All)):
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    for part, of in (("embedding", "get_input_embeddings"), ("head", "get_output_embeddings")):
        module = getattr(model, of, lambda: None)()
        weights = [] if module is None else [names[id(each)] for each in module.parameters() if id(each) in names]
        if weights and weights[0] not in (*found, *optimizer.always_trained):
            found[weights[0]] = part
    if found:
        have = "has" if len(found) == 1 else "each have"
        logger.warning(
            "the %s %s %d rows more than the checkpoint (new tokens), which are random, and the selection may rarely "
            "or never train them: add always=%s",
            *(" and the ".join(found.values()), have, num_new),
            tuple(found.values() if isinstance(optimizer, BlockOptimizer) else found),
        )


def _num_new_rows(model: nn.Module) -> int:
    """Number of embedding rows that the model has and its checkpoint on this machine had not; 0 if that is unknown."""
    config = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", "")
    if not origin:
        return 0
    try:
        before = AutoConfig.from_pretrained(origin, local_files_only=True).get_text_config().vocab_size
        return config.get_text_config().vocab_size - before  # pyright: ignore[reportOptionalMemberAccess]
    except Exception:  # a checkpoint that is gone, or of custom code: nothing to compare with
        return 0


def check_resumed(optimizer: BlockOptimizer | SparseOptimizer, state: TrainerState) -> None:
    """Refuse to resume without optimizer state."""
    if state.global_step > 0 and optimizer.num_steps == 0:
        raise UsageError(
            f"training resumes after step {state.global_step}, but the checkpoint holds no optimizer state; save with "
            "save_only_model=False, or load the checkpoint with from_pretrained and call train() without "
            "resume_from_checkpoint"
        )


def warn_of_settings(args: TrainingArguments, optimizer: BlockOptimizer | SparseOptimizer, model: nn.Module) -> None:
    """Warn of settings that cost time, and of those that the optimizer does not use."""
    if is_reentrant(args, model):
        logger.warning(
            "with reentrant checkpoints the backward pass visits every layer, frozen ones too; to skip those below the "
            'lowest selected block write gradient_checkpointing_kwargs={"use_reentrant": False}, in LLaMA-Factory '
            "use_reentrant_gc: false"
        )
    if args.torch_compile:
        logger.warning(
            "torch_compile=True compiles the whole model again for each new selection; leave it out, and write "
            "gradselect.integrations.compile.compile_blocks(model) before building the Trainer"
        )
    defaults = adamw_settings(type(args))
    for name, value in adamw_settings(args).items():
        # A rule may have no betas or eps; other values than the defaults were then refused when it was built.
        ours = optimizer.defaults.get(name, defaults[name])
        if value not in (ours, defaults[name]):
            logger.warning(
                "TrainingArguments have %s=%s, but the optimizer was built with %s=%s and uses that; "
                'add "args": args to the kwargs of SelectiveOptimizerFactory, or build a new Trainer if you changed '
                "the arguments after its first train()",
                *(name, value, name, ours),
            )
