"""Methods that train entries: what they share, and one for each mask with a method name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, create_model, field_validator, model_validator
from torch import nn

from gradselect import masks
from gradselect.entries import AbstractMask, SparseOptimizer
from gradselect.masks import StaticMask, salience
from gradselect.usage import UsageError

from .adapters import LoraMethod
from .base import RunFacts
from .generated_keys import dataclass_keys, describe, named_classes, one_of
from .own_adapters import EtherMethod, HiwiMethod, LortaMethod, PropulsionMethod
from .selection import AbstractSelectionMethod

SALIENCES = {value.name: value for value in vars(salience).values() if isinstance(value, salience.AbstractSalience)}


class MaskAdapter(LoraMethod):
    """The LoRA whose entries a mask selects. Its keys are those of the method `lora`."""

    name: Literal["lora", "rslora", "dora"] = "lora"


AnyAdapter = MaskAdapter | EtherMethod | PropulsionMethod | LortaMethod | HiwiMethod


class AbstractMaskMethod(AbstractSelectionMethod):
    """Trains the entries that a mask selects. Keys not listed here are settings of the mask.

    Attributes:
        always: names or globs of parameters that train whole at every step, e.g. ["*.embed_tokens.weight"]. A
            classification head does so with every method.
        lean_accumulation: reduce the gradient of each forward pass at once instead of adding up whole gradients. See
            `gradselect.SparseOptimizer`.
    """

    optimizer_class = SparseOptimizer

    always: tuple[str, ...] = ()
    lean_accumulation: bool = False

    def optimizer_options(self, model: nn.Module, facts: RunFacts, *, head: Collection[str] = ()) -> dict[str, Any]:
        self.check_batches(facts)
        mask = self.make_mask(model, facts)
        return {
            "mask": mask,
            "always": (*self.trained_beside(model, mask), *head),
            "lean_accumulation": self.lean_accumulation,
        }

    def check_batches(self, facts: RunFacts) -> None:
        """Refuse to go on without the batches that the method looks at.

        Raises:
            UsageError: there are none.
        """
        if self.num_batches and not facts.batches:
            raise UsageError(
                f"method.name={self.name!r} looks at {self.num_batches} batches before the first step and got "
                "none; pass make_optimizer(..., batches=[...]), or train with `gradselect train`"
            )

    @abstractmethod
    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        """Return the mask for this model. `sparsegrad` changes the model's MLPs in place."""

    def trained_beside(self, model: nn.Module, mask: AbstractMask) -> tuple[str, ...]:
        """Return names or globs of the parameters that train whole beside `mask`."""
        return self.always


class AbstractFreeMaskMethod(AbstractMaskMethod):
    """A mask on any weights, or on those of an adapter. Its own keys are the settings of the mask.

    `seed` is the run's seed. `steps` is by default the number of steps of the run.

    Attributes:
        mask_class: class of the mask.
        among: names or globs of the parameters that the mask selects from. None: all that the mask can use.
        adapter: select among the weights of an adapter instead, which is merged at the end: {rank: 8} for a LoRA,
            {name: etherplus} for another.
    """

    mask_class: ClassVar[type[AbstractMask]]

    among: tuple[str, ...] | None = None
    adapter: Annotated[AnyAdapter | None, Field(discriminator="name")] = None

    @field_validator("adapter", mode="before")
    @classmethod
    def name_lora(cls, adapter: Any) -> Any:
        """An adapter without a name is a LoRA."""
        return {"name": "lora", **adapter} if isinstance(adapter, Mapping) else adapter

    def mask_settings(self, facts: RunFacts) -> dict[str, Any]:
        """Return the arguments of the mask."""
        own = self.model_dump(exclude={"name", "adapter", *AbstractMaskMethod.model_fields})
        from_run = {"seed": facts.seed, "steps": facts.num_steps}
        names = {setting.name for setting in fields(self.mask_class)}
        return own | {key: value for key, value in from_run.items() if key in names and own.get(key) is None}

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        """Return the mask, which needs no model yet."""
        return self.mask_class(**self.mask_settings(facts))

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        return self.plain_mask(facts)

    def check_needs_no_application(self) -> None:
        if self.adapter is not None:
            raise UsageError(
                f"method.adapter={self.adapter.model_dump(exclude_defaults=True)}: an adapter changes the model before "
                "there is an optimizer; wrap the model with peft.get_peft_model and leave method.adapter out, or train "
                "with `gradselect train`"
            )

    @model_validator(mode="after")
    def check_mask(self) -> Self:
        """Let the mask check its settings. Its error becomes an error of the recipe."""
        self.plain_mask(RunFacts(seed=0, num_steps=1, batches=[{}] if self.num_batches else []))
        return self


def mask_methods() -> list[type[AbstractFreeMaskMethod]]:
    """Build the method of every mask of `gradselect.masks` that has a method name."""
    return [_method_of(mask, name=name) for name, mask in named_classes(masks, AbstractMask).items()]


def _method_of(mask: type[AbstractMask], *, name: str) -> type[AbstractFreeMaskMethod]:
    keys = dataclass_keys(mask, without=("among", "seed"))
    if "steps" in keys:
        keys["steps"] = (int | None, None)
    method: Any = create_model(
        f"{mask.__name__}Method",
        __base__=AbstractFreeMaskMethod,
        __doc__=describe(mask),
        name=(one_of(name), ...),
        **keys,
    )
    method.mask_class = mask
    return method


_StaticKeys: Any = create_model(
    "_StaticKeys",
    __base__=AbstractFreeMaskMethod,
    name=(Literal["static"], ...),
    salience=(one_of(*SALIENCES), StaticMask.salience.name),
    **dataclass_keys(StaticMask, without=("among", "seed", "salience", "batches", "loss")),
    calibration_batches=(PositiveInt | None, None),
)


class StaticMethod(_StaticKeys):
    """`gradselect.StaticMask`: the entries of largest salience, selected once.

    Attributes:
        salience: name in `gradselect.salience`.
        calibration_batches: batches to estimate the salience from. None: the gradient of the first step.
    """

    mask_class: ClassVar[type[AbstractMask]] = StaticMask

    @property
    def num_batches(self) -> int:
        return self.calibration_batches or 0

    def mask_settings(self, facts: RunFacts) -> dict[str, Any]:
        settings = super().mask_settings(facts)
        del settings["calibration_batches"]
        criterion, batches = SALIENCES[self.salience], facts.batches or None
        return settings | {
            "salience": criterion,
            "batches": batches,
            "loss": facts.loss if batches and criterion.has_loss else None,
        }


class LoraSPMethod(AbstractFreeMaskMethod):
    """LoRA-SP (Wu et al., arXiv 2403.08822): a random half of the entries of a LoRA trains, the others are frozen.

    The paper's abstract does not say if the half is drawn once or at each step. `refresh_every: null` draws once,
    `refresh_every: 1` at each step; an entry that leaves then loses its moments, which is our choice. In each matrix
    of the adapter exactly `density` of the entries is drawn. Entries of A that are frozen keep their random first
    value, those of B stay 0.

    Attributes:
        density: share of the entries of each matrix that train.
        refresh_every: steps between two draws. None: one draw.
        adapter: the LoRA.
    """

    name: Literal["lora-sp"]
    mask_class: ClassVar[type[AbstractMask]] = StaticMask
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    refresh_every: PositiveInt | None = None
    adapter: Annotated[AnyAdapter | None, Field(discriminator="name")] = MaskAdapter()

    def mask_settings(self, facts: RunFacts) -> dict[str, Any]:
        return super().mask_settings(facts) | {"salience": salience.random, "scope": "tensor"}

    def check_needs_no_application(self) -> None:
        raise UsageError(
            "method.name='lora-sp' changes the model before there is an optimizer; wrap the model with "
            'peft.get_peft_model and write method={"name": "static", "salience": "random", "density": '
            f'{self.density}, "scope": "tensor"}}, or train with `gradselect train`'
        )

    @model_validator(mode="after")
    def check_adapter(self) -> Self:
        """Refuse a LoRA-SP without a LoRA."""
        if not isinstance(self.adapter, MaskAdapter):
            name = None if self.adapter is None else self.adapter.name
            raise ValueError(
                f"method.adapter={name} is no LoRA; write e.g. method.adapter={{rank: 8}}, or leave it out"
            )
        return self
