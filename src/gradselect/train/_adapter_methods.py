"""Methods that train an adapter of PEFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from ._settings import Settings

if TYPE_CHECKING:
    from peft import PeftConfig


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
    rank: PositiveInt = 16
    alpha: PositiveInt | None = None
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
