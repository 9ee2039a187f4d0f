"""Selective training in torchtitan: `selective` changes a configuration of its registry.

from torchtitan.models.llama3.config_registry import llama3_8b
from gradselect.integrations.torchtitan import selective

def llama3_8b_selective():
    return selective(llama3_8b(), {"name": "adagradselect", "fraction": 0.3, "explore_steps": 100})

torchrun ... -m torchtitan.train --module my_configs --config llama3_8b_selective
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.checkpointer.utils import canonical_fqn  # pyright: ignore[reportMissingImports]
from torchtitan.components.optimizer import OptimizersContainer  # pyright: ignore[reportMissingImports]
from torchtitan.components.optimizer.utils import init_optim_state  # pyright: ignore[reportMissingImports]
from torchtitan.trainer import Trainer  # pyright: ignore[reportMissingImports]

from gradselect import BlockOptimizer, JsonlWriter, SparseOptimizer, UsageError
from gradselect.integrations.callers import caller_of
from gradselect.integrations.reporting import say_explore_steps, say_what_trains
from gradselect.methods import parse_selection

_Config = TypeVar("_Config")

ADAMW = ("lr", "betas", "eps", "weight_decay")
"""Settings that are taken over from the configuration."""

ENTRIES = "entries"
"""Key of the state of a masked tensor: bytes, because files are read into tensors of the same size only."""

PLAIN = "selective.plain"
"""Key of everything in a state_dict that is no tensor."""


def selective(config: _Config, method: Mapping[str, Any] | str, *, jsonl: str | None = None) -> _Config:
    """Return the configuration of a `torchtitan.trainer.Trainer`, changed so that it trains selectively.

    Rate, betas, eps and weight decay stay those of its AdamW, `max_norm` stays the limit of clipping. CUDA graphs are
    switched off: they would go on with the first selection.

    Args:
        config: of a registry; it must have one AdamW for all parameters.
        method: plain data, as for `gradselect.method`. torchtitan has no epochs, so `explore_steps` that
            are left open are a quarter of the run.
        jsonl: file for the records of rank 0, one a line; its folder must exist.

    Raises:
        UsageError: a wrong key or value of the method, or other optimizers in the configuration.

    Example:
        >>> from torchtitan.models.llama3.config_registry import llama3_debugmodel
        >>> config = selective(llama3_debugmodel(), {"name": "uniform", "count": 2})
        >>> config.optimizer.lr
        0.0008
    """
    changed: Any = config
    groups = changed.optimizer.param_groups
    if len(groups) != 1 or groups[0].optimizer_name not in ("Adam", "AdamW") or groups[0].pattern != ".*":
        found = ", ".join(f"{group.optimizer_name} for {group.pattern!r}" for group in groups) or "none"
        raise UsageError(
            f"selective() takes rate and decay from one AdamW for all parameters, but the configuration has {found}; "
            "write config.optimizer = default_adamw(lr=...) first, of torchtitan.components.optimizer"
        )
    parse_selection(method)
    values = {"name": method} if isinstance(method, str) else dict(method)
    adamw = {key: value for key, value in groups[0].optimizer_kwargs.items() if key in ADAMW}
    changed.optimizer = SelectiveOptimizers.Config(method=values, jsonl=jsonl, **adamw)
    changed.training.disable_cuda_graphs = True
    return config


class SelectiveOptimizers(OptimizersContainer):
    """Container of torchtitan with one `BlockOptimizer` or `SparseOptimizer`.

    It learns from the Trainer that builds it how many micro-batches and steps there are and how to clip. With a mask
    gradients are freed before torchtitan could clip them: the optimizer clips, and torchtitan logs a norm of 0.

    Args:
        config: see `selective`.
        model_parts: the model; pipelines are refused.

    Raises:
        UsageError: a pipeline or CUDA graphs; a policy whose `explore_steps` only an epoch could give; or a mask that
            selects by weights, which torchtitan loads later.

    Example:
        >>> SelectiveOptimizers.Config(method={"name": "uniform", "count": 2}, lr=1e-5).lr
        1e-05
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Plain data; `lr` and the rest as those of AdamW, steps and micro-batches as those of the Trainer."""

        method: dict[str, Any] = field(default_factory=dict)
        jsonl: str | None = None
        lr: float = 1e-5
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8
        weight_decay: float = 0.1
        accumulation_steps: int | None = None
        num_steps: int | None = None
        max_norm: float | None = None
        seed: int | None = None

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        trainer: Any = caller_of(Trainer)
        _check_trainer(trainer, model_parts)
        facts = _facts_of(trainer, config)
        self.model_parts = model_parts
        self._selective = _build(config, model_parts[0], facts)
        self.optimizers: list[Any] = [self._selective]
        if isinstance(self._selective, SparseOptimizer) and trainer is not None:
            trainer.config.training.max_norm = math.inf  # the optimizer clips
        self._window = _Window(model_parts[0], facts["accumulation_steps"])
        self._selective.count_passes_if(self._window.is_last)
        if config.jsonl is not None and dist.get_rank() == 0:
            self._selective.add_record_hook(JsonlWriter(config.jsonl))
        self._post_init([parameter for group in self._selective.param_groups for parameter in group["params"]])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._window.restart()
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return a flat state_dict, keyed by the names that weights have in checkpoints."""
        if not self._selective.num_steps:
            init_optim_state(self._selective)  # shows the tensors to load
        names = self._names()
        saved = self._selective.state_dict()
        saved["param_groups"][0].pop("selection", None)
        flat: dict[str, Any] = {}
        for number, state in saved.pop("state").items():
            key = f"state.{names[number][1]}."
            flat |= (
                {key + ENTRIES: _packed(state)} if "indices" in state else {key + kind: state[kind] for kind in state}
            )
        return {**flat, PLAIN: _renamed(json.dumps(saved), names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if PLAIN not in state_dict:
            raise UsageError(
                "the checkpoint has no state of a selective optimizer: another optimizer wrote it; load only its "
                "weights, with --checkpoint.initial_load_path and --checkpoint.initial_load_model_only"
            )
        names = self._names()
        state: dict[int, dict[str, Any]] = {}
        for number, (_, name) in enumerate(names):
            key = f"state.{name}."
            found = {kind.removeprefix(key): value for kind, value in state_dict.items() if kind.startswith(key)}
            if found:
                state[number] = _unpacked(found[ENTRIES]) if ENTRIES in found else found
        plain = json.loads(_renamed(state_dict[PLAIN], [(name, live) for live, name in names]))
        self._selective.load_state_dict({**plain, "state": state})

    def _names(self) -> list[tuple[str, str]]:
        """Names of the parameters in the model as it is wrapped, and in checkpoints."""
        live = [name for group in self._selective.param_groups for name in group["param_names"]]
        return [(name, canonical_fqn(name)) for name in live]


class _Window:
    """Tells which backward pass is the last of a step: the one that begins at the output of the last micro-batch.

    A chunked loss runs a pass of the head for each chunk before it. Such a pass begins at the output of the model even
    if nothing below the head trains.
    """

    def __init__(self, model: nn.Module, num_forwards: int) -> None:
        self._num_forwards = num_forwards
        self.restart()
        model.register_forward_hook(self._after_forward)

    def restart(self) -> None:
        self._num_seen = 0
        self._is_last = False

    def is_last(self) -> bool:
        return self._is_last

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and isinstance(output, Tensor):
            self._num_seen += 1
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        self._is_last = self._num_seen >= self._num_forwards


def _check_trainer(trainer: Any, model_parts: list[nn.Module]) -> None:
    if len(model_parts) != 1 or (trainer is not None and trainer.parallel_dims.pp_enabled):
        raise UsageError(
            "a pipeline divides the blocks among ranks, and each would select among its own; write "
            "--parallelism.pipeline_parallel_degree 1"
        )
    if trainer is not None and not trainer.config.training.disable_cuda_graphs:
        raise UsageError(
            "CUDA graphs replay the backward pass of the first selection; write --training.disable_cuda_graphs"
        )


def _facts_of(trainer: Any, config: Any) -> dict[str, Any]:
    """Return what the configuration gives, else the Trainer that is being built."""
    facts = {key: getattr(config, key) for key in ("accumulation_steps", "num_steps", "max_norm", "seed")}
    if trainer is not None:
        training = trainer.config.training
        known = {
            "accumulation_steps": trainer.gradient_accumulation_steps,
            "num_steps": training.steps,
            "max_norm": training.max_norm,
            "seed": trainer.config.debug.seed,
        }
        facts = {key: known[key] if value is None else value for key, value in facts.items()}
    return {**facts, "accumulation_steps": facts["accumulation_steps"] or 1, "seed": facts["seed"] or 0}


def _build(config: Any, model: nn.Module, facts: Mapping[str, Any]) -> BlockOptimizer | SparseOptimizer:
    method = parse_selection(config.method)
    is_sparse = method.optimizer_class is SparseOptimizer
    clipping = {"max_grad_norm": facts["max_norm"]} if is_sparse else {}
    optimizer = method.make_optimizer(
        model,
        seed=facts["seed"],
        num_steps=facts["num_steps"],
        # Its backward passes are counted by the window, several of a micro-batch as one.
        accumulation_steps=1,
        **{key: getattr(config, key) for key in ADAMW},
        **clipping,
    )
    if isinstance(optimizer, SparseOptimizer):
        if optimizer.entries:
            raise UsageError(
                f"method.name={method.name!r} has selected entries already, and torchtitan loads weights after it has "
                "built the optimizer; write method.name='id3', which selects by gradients"
            )
    else:
        say_what_trains(optimizer)
        try:
            say_explore_steps(optimizer, num_steps=facts["num_steps"] or 1)
        except UsageError:
            raise UsageError(
                f"method.name={method.name!r} without explore_steps, and torchtitan has no epochs; write e.g. "
                f"explore_steps={max(1, (facts['num_steps'] or 1000) // 4)}"
            ) from None
    return optimizer


def _renamed(text: str, names: list[tuple[str, str]]) -> str:
    """Replace each first name by its second where it stands as a JSON string."""
    for old, new in names:
        if old != new:
            text = text.replace(json.dumps(old), json.dumps(new))
    return text


def _packed(state: Mapping[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def _unpacked(packed: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(packed), weights_only=True)
