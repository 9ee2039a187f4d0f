"""Methods that train entries: what they share, and one for each mask with a method name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from pydantic import PositiveInt, create_model, model_validator
from torch import Tensor, nn

from gradselect import AbstractMask, StaticMask, masks, salience

from .adapters import LoraMethod
from .base import AbstractMethod
from .dataclass_keys import dataclass_keys, describe, named_classes, one_of

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to the loss."""

SALIENCES = {value.name: value for value in vars(salience).values() if isinstance(value, salience.AbstractSalience)}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of the run that a mask may need.

    Args:
        seed: seed of the run.
        num_steps: optimizer steps of the run.
        batches: as many batches as the method's `num_batches`, on the model's device.
        loss: loss of a batch. None: the model computes it.
    """

    seed: int
    num_steps: int
    batches: Sequence[Any]
    loss: Loss | None = None


class MaskAdapter(LoraMethod):
    """The adapter whose entries a mask selects. Its keys are those of the method `lora`."""

    name: Literal["lora", "rslora", "dora"] = "lora"


class AbstractMaskMethod(AbstractMethod):
    """Trains the entries that a mask selects. Keys not listed here are settings of the mask.

    Attributes:
        always: names or globs of parameters that train whole at every step, e.g. ["*.embed_tokens.weight"]. A
            classification head does so with every method.
        lean_accumulation: reduce the gradient of each forward pass at once instead of adding up whole gradients. See
            `gradselect.SparseOptimizer`.
    """

    always: tuple[str, ...] = ()
    lean_accumulation: bool = False

    @property
    def num_batches(self) -> int:
        """Number of batches that the mask is estimated from before the first step."""
        return 0

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
        adapter: select among the weights of a LoRA instead, which is merged at the end, e.g. {rank: 8}.
    """

    mask_class: ClassVar[type[AbstractMask]]

    among: tuple[str, ...] | None = None
    adapter: MaskAdapter | None = None

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
