"""Trainers that draw answers while they train: GRPO and RLOO of TRL, as the command line runs them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from gradselect.app.recipe import AbstractSamplingTrainer, GrpoSettings, RlooSettings

from .reference_model import drop_reference_adapter, reference_copy
from .rewards import AbstractReward
from .trainer import MetricsTrainer


class _SamplingTrainer(MetricsTrainer):
    """Common part of GRPO and RLOO.

    Nothing decides the next step but weights, optimizer, place in the data and the random state, all of which a
    checkpoint holds: the answers of a step are drawn and used within it.

    Args:
        model: model to train.
        beta: weight of the divergence from the reference.
        rewards: rewards of the drawn answers.
        token_ids: tokens of each prompt.
        others: arguments of the parent classes.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        beta: float,
        rewards: Sequence[AbstractReward],
        token_ids: dict[str, list[int]],
        **others: Any,
    ) -> None:
        self._token_ids = token_ids
        self._rewards = rewards
        self._config: Any = others["args"]
        reference = reference_copy(model) if beta and not isinstance(model, PeftModel) else None
        # With a beta TRL would load a reference by the name of the model, which may be none.
        super().__init__(model=model, reward_funcs=list(rewards), **others)
        drop_reference_adapter(model)
        self.beta = self._config.beta = beta
        if reference is not None:
            add_fused_lm_head(reference, temperature=self._config.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [self._token_ids[prompt] for prompt in prompts], None, {}

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        config = self._config
        return PromptSampler(
            len(rows),
            group=config.num_generations,
            per_step=config.generation_batch_size // config.num_generations,
            repeats=config.steps_per_generation,
            seed=config.seed,
        )

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate with a random state of its own: neither the next step nor the next evaluation depends on it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*arguments, **options)

    def _count_tokens(self, inputs: dict[str, Any]) -> int:
        return int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())

    def close(self) -> None:
        for reward in self._rewards:
            reward.close()


class GrpoTrainer(_SamplingTrainer, GRPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`RunTrainer` for GRPO."""


class RlooTrainer(_SamplingTrainer, RLOOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`RunTrainer` for RLOO."""


class PromptSampler(Sampler[int]):
    """Prompts in groups, drawn anew in each epoch. The order is a function of the seed and the epoch alone.

    TRL's own sampler goes on with one generator from epoch to epoch, so a resumed run would see other prompts.

    Args:
        num_prompts: number of prompts.
        group: times that a prompt follows itself.
        per_step: different prompts in a step. Those of an epoch that do not fill a step are left out.
        repeats: times that the prompts of a step follow each other, once for each forward pass.
        seed: seed of the order.

    Example:
        >>> sampler = PromptSampler(3, group=2, per_step=1, repeats=1, seed=0)
        >>> sorted(sampler), len(sampler)
        ([0, 0, 1, 1, 2, 2], 6)
    """

    def __init__(self, num_prompts: int, *, group: int, per_step: int, repeats: int, seed: int) -> None:
        self._num_prompts = num_prompts
        self._group = group
        self._per_step = per_step
        self._repeats = repeats
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_prompts // self._per_step * self._per_step * self._group * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._num_prompts))
        random.Random(f"prompts/{self._seed}/{self._epoch}").shuffle(order)
        for start in range(0, self._num_prompts - self._per_step + 1, self._per_step):
            for _ in range(self._repeats):
                for prompt in order[start : start + self._per_step]:
                    yield from [prompt] * self._group


def grpo_options(settings: GrpoSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `GrpoTrainer`."""
    shared = _shared(settings, arguments)
    config = GRPOConfig(**shared, loss_type=settings.loss, scale_rewards=settings.scale_rewards)
    return {"args": config, "beta": settings.beta}


def rloo_options(settings: RlooSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `RlooTrainer`."""
    config = RLOOConfig(**_shared(settings, arguments), normalize_advantages=settings.normalize_advantages)
    return {"args": config, "beta": settings.beta}


def _shared(settings: AbstractSamplingTrainer, arguments: dict[str, Any]) -> dict[str, Any]:
    group, batch = settings.num_generations, arguments["per_device_eval_batch_size"]
    return {
        **arguments,
        # Validation rows are answered `num_generations` times, so its batches hold whole groups.
        "per_device_eval_batch_size": -(-batch // group) * group,
        "num_generations": group,
        "max_completion_length": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "epsilon": settings.epsilon,
        "reward_weights": None if settings.reward_weights is None else list(settings.reward_weights),
        "beta": 0.0,
    }


def prompt_rows(rows: Dataset) -> Dataset:
    """Return prompts in the columns of the sampling trainers."""
    return rows.select_columns(["prompt", "messages", "source", "row"])
