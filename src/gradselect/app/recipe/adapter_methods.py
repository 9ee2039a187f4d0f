"""Methods that train an adapter of PEFT."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from gradselect import UsageError

from .settings import Settings

if TYPE_CHECKING:
    from peft import PeftConfig


Rank = Annotated[int, Field(ge=1, le=2**16)]
"""Of an adapter's matrices, which are made before anybody could see that they fit no machine."""

Alpha = Annotated[int, Field(ge=1, le=10**9)]
"""A numerator of the scale of an adapter."""


class AbstractAdapterMethod(Settings, ABC):
    """Trains an adapter of PEFT in float32; at the end it is merged into the model's weights."""

    @abstractmethod
    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        """The configuration that PEFT builds the adapter from.

        Args:
            embedding: name of the token embedding.
            head: names of the modules of a classification head, which train whole beside the adapter; none for a
                language model.
        """


class LoraMethod(AbstractAdapterMethod):
    """Low-rank adapters on every linear layer (Hu et al., "LoRA", arXiv 2106.09685).

    rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732); DoRA trains magnitude and direction apart
    (Liu et al., arXiv 2402.09353).

    Attributes:
        rank: of the update of each matrix.
        alpha: the update is scaled by alpha / rank; by default alpha is twice the rank.
        dropout: on the adapter's input.
        targets: "all-linear", or names of the layers to adapt.
        train_embedding: train the token embedding too, in full; a tied head follows it.
    """

    name: Literal["lora", "rslora", "dora"]
    rank: Rank = 16
    alpha: Alpha | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    train_embedding: bool = False

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        from peft import LoraConfig

        whole = [*head, *([embedding] if self.train_embedding else [])]
        return LoraConfig(
            task_type=_task_type(head),
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            use_rslora=self.name == "rslora",
            use_dora=self.name == "dora",
            modules_to_save=whole or None,
            ensure_weight_tying=self.train_embedding,
        )


class AdaLoraMethod(AbstractAdapterMethod):
    """Low-rank adapters that lose ranks where they matter least (Zhang et al., "AdaLoRA", arXiv 2303.10512).

    Singular triplets are scored by |weight x gradient|, smoothed. From `start` to `end` of the run the total of ranks
    falls along a cubic from `initial_rank` to `rank` a matrix. The loss has the penalty `orthogonality` on how far the
    singular vectors are from orthogonal; it is part of the training loss that is shown. The shares of the run and how
    often ranks are given out are a choice.

    Attributes:
        rank: mean rank of a matrix in the end.
        initial_rank: of every matrix at first; by default 1.5 times `rank`, the ratio of PEFT's defaults.
        alpha: scale of the update; by default twice `rank`.
        dropout: on the adapter's input.
        targets: "all-linear", or names of the layers to adapt.
        start: share of the run after which ranks begin to fall.
        end: share of the run after which they stay.
        every: steps between two allocations.
        orthogonality: weight of the penalty.
    """

    name: Literal["adalora"]
    rank: Rank = 16
    initial_rank: Rank | None = None
    alpha: Alpha | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    end: Annotated[float, Field(gt=0, le=1)] = 0.7
    every: PositiveInt = 10
    orthogonality: NonNegativeFloat = 0.5

    @property
    def first_rank(self) -> int:
        """Rank of every matrix at first."""
        return math.ceil(1.5 * self.rank) if self.initial_rank is None else self.initial_rank

    @model_validator(mode="after")
    def check_schedule(self) -> Self:
        if self.first_rank <= self.rank:
            raise ValueError(f"initial_rank={self.initial_rank} must be above rank={self.rank}; write 2 x rank")
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be below end={self.end}; write e.g. start=0.1 end=0.7")
        return self

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type=_task_type(head),
            init_r=self.first_rank,
            target_r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            deltaT=self.every,
            orth_reg_weight=self.orthogonality,
            modules_to_save=list(head) or None,
            # `schedule` sets it when the number of steps is known.
            total_step=1,
        )

    def schedule(self, config: Any, *, num_steps: int) -> None:
        """Write the course of the ranks over a run of `num_steps` into PEFT's configuration.

        Raises:
            UsageError: the run is too short for one.
        """
        config.total_step = num_steps
        config.tinit = round(self.start * num_steps)
        config.tfinal = num_steps - min(round(self.end * num_steps), num_steps - 1)
        if config.tinit >= config.total_step - config.tfinal:
            raise UsageError(
                f"method.start={self.start} and method.end={self.end} of {num_steps} steps leave no step for ranks to "
                "fall; take more steps, e.g. run.steps=100"
            )


class OtherAdapterMethod(AbstractAdapterMethod):
    """Any other adapter that PEFT ships, by PEFT's own names.

    Attributes:
        type: the adapter's name in PEFT, e.g. "IA3", "SHIRA", "HRA".
        options: arguments of its PEFT configuration class.
    """

    name: Literal["peft"]
    type: str
    options: Mapping[str, Any] = Field(default_factory=dict)

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        from peft import get_peft_config

        whole = {"modules_to_save": list(head)} if head else {}
        return get_peft_config({"peft_type": self.type.upper(), "task_type": _task_type(head), **whole, **self.options})


def _task_type(head: Sequence[str]) -> str:
    return "SEQ_CLS" if head else "CAUSAL_LM"
