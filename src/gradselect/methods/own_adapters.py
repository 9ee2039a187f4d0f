"""Methods that train an adapter which PEFT does not have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .adapters import AbstractAdapterMethod, task_type

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
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
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
