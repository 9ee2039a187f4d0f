"""Methods that train a PEFT adapter."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from gradselect.usage import UsageError

from .base import AbstractMethod

if TYPE_CHECKING:
    from peft import PeftConfig


Rank = Annotated[int, Field(ge=1, le=2**16)]
"""Rank of an adapter's matrices. The bound stops a typing error before it allocates all memory."""

Alpha = Annotated[int, Field(ge=1, le=10**9)]
"""Numerator of the scale of an adapter."""


class AbstractAdapterMethod(AbstractMethod):
    """Trains a PEFT adapter in fp32 and merges it into the model's weights at the end."""

    @abstractmethod
    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        """Return the configuration that PEFT builds the adapter from.

        Args:
            embedding: name of the token embedding.
            head: names of the modules of a classification head, which train whole beside the adapter. Empty for a
                language model.
        """


class LoraMethod(AbstractAdapterMethod):
    """Low-rank adapters on every linear layer (Hu et al., "LoRA", arXiv 2106.09685).

    rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732). DoRA trains magnitude and direction
    separately (Liu et al., arXiv 2402.09353).

    Attributes:
        rank: rank of the update of each matrix.
        alpha: the update is scaled by alpha / rank. Default: twice the rank.
        dropout: dropout on the adapter's input.
        targets: "all-linear", or names of the layers to adapt.
        train_embedding: train the whole token embedding too. A tied head follows it.
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
            task_type=task_type(head),
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
    """Low-rank adapters that lose the least important ranks (Zhang et al., "AdaLoRA", arXiv 2303.10512).

    Singular triplets are scored by smoothed |weight x gradient|. Between `start` and `end` the mean rank of a matrix
    falls along a cubic from `initial_rank` to `rank`. A penalty with the weight `orthogonality` keeps the singular
    vectors near orthogonal; the training loss in logs includes it. The defaults of `start`, `end` and `every` are our
    choice, that of `orthogonality` is PEFT's; the examples of the authors have 0.1.

    Attributes:
        rank: mean rank of a matrix at the end.
        initial_rank: rank of every matrix at the start. Default: 1.5 times `rank`, the ratio of PEFT's defaults.
        alpha: the update is scaled by alpha / `initial_rank`, as PEFT has it. Default: twice `rank`.
        dropout: dropout on the adapter's input.
        targets: "all-linear", or names of the layers to adapt.
        start: share of the run after which ranks begin to fall.
        end: share of the run after which ranks stay.
        every: steps between two allocations of ranks.
        orthogonality: weight of the penalty.
    """

    can_resume: ClassVar[bool] = False  # the scores are in no checkpoint

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
        """Rank of every matrix at the start."""
        return math.ceil(1.5 * self.rank) if self.initial_rank is None else self.initial_rank

    @model_validator(mode="after")
    def check_schedule(self) -> Self:
        if self.first_rank <= self.rank:
            raise ValueError(f"initial_rank={self.initial_rank} must be above rank={self.rank}; write {2 * self.rank}")
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be below end={self.end}; write e.g. start=0.1 end=0.7")
        return self

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type=task_type(head),
            init_r=self.first_rank,
            target_r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            deltaT=self.every,
            orth_reg_weight=self.orthogonality,
            modules_to_save=list(head) or None,
            total_step=1,  # `write_schedule` sets it once the number of steps is known
        )

    def write_schedule(self, config: Any, num_steps: int) -> None:
        """Write the schedule of the ranks over a run of `num_steps` into PEFT's configuration.

        Raises:
            UsageError: the run is too short for the schedule.
        """
        config.total_step = num_steps
        config.tinit = round(self.start * num_steps)
        config.tfinal = num_steps - min(round(self.end * num_steps), num_steps - 1)
        if config.tinit >= config.total_step - config.tfinal:
            raise UsageError(
                f"method.start={self.start} and method.end={self.end} of {num_steps} steps leave no step for ranks to "
                "fall; train more steps, e.g. run.steps=100"
            )


INITS_FROM_DATA = ("eva", "lora_ga")
"""Values of `init_lora_weights` with which PEFT trains a plain LoRA if nothing has looked at data. PEFT refuses CorDA
and LoftQ, which need more than their name too."""


class OtherAdapterMethod(AbstractAdapterMethod):
    """Any other adapter of PEFT, by PEFT's own names.

    Attributes:
        type: name of the adapter in PEFT, e.g. "IA3", "SHIRA", "HRA".
        options: arguments of its PEFT configuration class.
    """

    name: Literal["peft"]
    type: str
    options: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def check_type(self) -> Self:
        if self.type.upper() == "ADALORA":
            raise ValueError(
                f"type={self.type!r} would be a plain LoRA here: ranks fall only with name=adalora; write "
                "method={name: adalora, rank: 8, initial_rank: 12}"
            )
        init = self.options.get("init_lora_weights")
        if init in INITS_FROM_DATA:
            raise ValueError(
                f"init_lora_weights={init!r} starts from gradients or activations of data, which nothing computes "
                'here, and PEFT would train a plain LoRA without them; write "pissa" or "olora", or leave it out'
            )
        return self

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        from peft import get_peft_config

        import gradselect.adapters  # noqa: F401  # so that PEFT knows ours too

        whole = {"modules_to_save": list(head)} if head else {}
        return get_peft_config({"peft_type": self.type.upper(), "task_type": task_type(head), **whole, **self.options})


def task_type(head: Sequence[str]) -> str:
    """Return PEFT's name of the task: classification with a head, otherwise language modelling."""
    return "SEQ_CLS" if head else "CAUSAL_LM"
