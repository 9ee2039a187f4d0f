"""Methods that train an adapter which PEFT does not have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from .adapters import AbstractAdapterMethod, Rank, task_type

if TYPE_CHECKING:
    from peft import PeftConfig

MOST = 2**16
"""Largest number of blocks, and largest degree: a typing error ends at once."""


class AbstractOwnAdapterMethod(AbstractAdapterMethod):
    """Trains an adapter of `gradselect.adapters`. Keys not listed here are settings of its configuration class.

    Attributes:
        targets: "all-linear", or names of the layers to adapt.
    """

    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    @property
    @abstractmethod
    def config_class(self) -> Any:
        """Class of the configuration. PEFT is imported here, and not before: it is slow to load."""

    def peft_config(self, *, embedding: str, head: Sequence[str] = ()) -> PeftConfig:
        return self.config_class(
            task_type=task_type(head),
            target_modules=list(self.targets) if isinstance(self.targets, tuple) else self.targets,
            modules_to_save=list(head) or None,
            **self.model_dump(exclude={"name", "targets"}),
        )


class EtherMethod(AbstractOwnAdapterMethod):
    """Reflections of the inputs of each linear layer, or bends of its inputs and outputs (ETHER+).

    Bini, Roth, Akata, Khoreva, "ETHER", arXiv 2405.20271. See `gradselect.adapters.EtherConfig` and `EtherPlusConfig`.

    Attributes:
        num_blocks: diagonal blocks of a reflection; divides the sizes of every layer.
    """

    name: Literal["ether", "etherplus"]
    num_blocks: Annotated[int, Field(ge=1, le=MOST)] = 1

    @property
    def config_class(self) -> Any:
        from gradselect.adapters import EtherConfig, EtherPlusConfig

        return EtherConfig if self.name == "ether" else EtherPlusConfig


class PropulsionMethod(AbstractOwnAdapterMethod):
    """The outputs of each linear layer times a power of one learned number each.

    Kowsher, Prottasha, Bhat, "Propulsion", arXiv 2409.10927. See `gradselect.adapters.PropulsionConfig`.

    Attributes:
        degree: the power.
    """

    name: Literal["propulsion"]
    degree: Annotated[int, Field(ge=1, le=MOST)] = 15

    @property
    def config_class(self) -> Any:
        from gradselect.adapters import PropulsionConfig

        return PropulsionConfig


class LortaMethod(AbstractOwnAdapterMethod):
    """The updates of all attention projections as one tensor of low rank, with a row for each layer, head and matrix.

    Hounie, Kanatsoulis, Tandon, Ribeiro, "LoRTA", arXiv 2410.04060. See `gradselect.adapters.LortaConfig`.

    Attributes:
        targets: names of the attention projections to adapt. None: all of them.
        rank: rank of the tensor.
        alpha: the updates are scaled by alpha / rank.
        dropout: dropout on the adapter's input.
    """

    name: Literal["lorta"]
    targets: Literal["all-linear"] | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    rank: Rank = 8
    alpha: PositiveFloat = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def config_class(self) -> Any:
        from gradselect.adapters import LortaConfig

        return LortaConfig


class HiwiMethod(AbstractOwnAdapterMethod):
    """An adapter of the biases of each MLP, of which only the new biases are left.

    Liao, Meng, Monz, "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv 2305.16742. See
    `gradselect.adapters.HiwiConfig`. Models without biases, such as Llama, are refused.

    Attributes:
        targets: names of layers with a bias. None: the layers of the MLPs.
        rank: width of the adapter of a bias.
    """

    name: Literal["hiwi"]
    targets: Literal["all-linear"] | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    rank: Rank = 8

    @property
    def config_class(self) -> Any:
        from gradselect.adapters import HiwiConfig

        return HiwiConfig
