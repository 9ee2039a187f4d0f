"""Methods that train single weights: the mask of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from gradselect import GMT, ID3, LIFT, AbstractMask, BitFit, StaticMask, TopGradient, salience, sparsegrad
from gradselect.sparsegrad import choose_layers

from .adapter_methods import LoraMethod
from .settings import Settings

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the loss."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a mask may want to know of the run.

    Args:
        seed: of the run.
        num_steps: optimizer steps of the run.
        batches: the method's `num_batches`, on the model's device.
        loss: of a batch, where the model does not tell it itself.
    """

    seed: int
    num_steps: int
    batches: Sequence[Any]
    loss: Loss | None = None


class MaskAdapter(LoraMethod):
    """The adapter of whose weights a mask chooses; its keys are those of the method `lora`."""

    name: Literal["lora", "rslora", "dora"] = "lora"


class AbstractMaskMethod(Settings, ABC):
    """Trains the single weights that a mask chooses; keys that are not explained here are the mask's own.

    Attributes:
        always: names or globs of parameters that train whole at every step, e.g. ["*.embed_tokens.weight"]. A
            classification head does with every method.
        lean_accumulation: reduce the gradient of each forward pass at once instead of adding up whole gradients; see
            `gradselect.SparseOptimizer`.
    """

    always: tuple[str, ...] = ()
    lean_accumulation: bool = False

    @property
    def num_batches(self) -> int:
        """How many batches the mask is estimated from before the first step."""
        return 0

    @abstractmethod
    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        """The mask, for this model, whose MLPs `sparsegrad` changes in place."""

    def trained_beside(self, model: nn.Module, mask: AbstractMask) -> tuple[str, ...]:
        """Names or globs of what trains whole, for the model that `mask` is for."""
        return self.always


class AbstractFreeMaskMethod(AbstractMaskMethod):
    """A mask on any weights, and on those of an adapter.

    Attributes:
        among: names or globs of the parameters that the mask chooses from; all by default, or what the mask says.
        adapter: choose among the weights of a LoRA instead, which is merged at the end, e.g. {rank: 8}.
    """

    among: tuple[str, ...] | None = None
    adapter: MaskAdapter | None = None

    @abstractmethod
    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        """The mask, which needs no model yet."""

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        return self.plain_mask(facts)

    def mask_options(self) -> dict[str, Any]:
        """The keys that are the mask's own."""
        return self.model_dump(exclude={"name", "adapter", *AbstractMaskMethod.model_fields})

    @model_validator(mode="after")
    def check_mask(self) -> Self:
        """The mask checks its own settings; what it has against them is the recipe's error."""
        self.plain_mask(RunFacts(seed=0, num_steps=1, batches=[{}] * self.num_batches))
        return self


class ID3Method(AbstractFreeMaskMethod):
    """`gradselect.ID3`; `steps` is by default the number of steps of the run."""

    name: Literal["id3"]
    budget: int | None = None
    density: float | None = None
    steps: int | None = None
    exponent: float = 1.0
    eps: float = 0.1

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        return ID3(**{**self.mask_options(), "steps": facts.num_steps if self.steps is None else self.steps})


class GMTMethod(AbstractFreeMaskMethod):
    """`gradselect.GMT`: the entries of largest gradient at each step; dense state."""

    name: Literal["gmt"]
    fraction: float = 0.2
    scope: Literal["tensor", "global"] = "tensor"
    mask: Literal["gradient", "update"] = "gradient"

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        return GMT(**self.mask_options())


class StaticMethod(AbstractFreeMaskMethod):
    """`gradselect.StaticMask`: the entries of largest salience, chosen once.

    Attributes:
        salience: by the name that it has in `gradselect.salience`.
        calibration_batches: batches to estimate the salience from; by default the gradient of the first step is taken.
    """

    name: Literal["static"]
    salience: Literal[
        "gradient",
        "magnitude",
        "smallest_magnitude",
        "random",
        "snip",
        "force",
        "taylor",
        "fisher",
        "synflow",
        "grasp",
    ] = "gradient"
    budget: int | None = None
    density: float | None = None
    scope: Literal["global", "tensor"] = "global"
    refresh_every: int | None = None
    calibration_batches: PositiveInt | None = None

    @property
    def num_batches(self) -> int:
        return self.calibration_batches or 0

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        return StaticMask(
            salience=getattr(salience, self.salience),
            budget=self.budget,
            density=self.density,
            scope=self.scope,
            refresh_every=self.refresh_every,
            batches=facts.batches or None,
            loss=facts.loss if facts.batches and self.salience != "synflow" else None,
            seed=facts.seed,
            among=self.among,
        )


class LIFTMethod(AbstractFreeMaskMethod):
    """`gradselect.LIFT`: the largest entries of low-rank approximations of the matrices."""

    name: Literal["lift"]
    rank: int | None = None
    density: float | None = None
    approximation_rank: int | None = None
    refresh_every: int | None = 400
    block_size: int = 1

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        return LIFT(seed=facts.seed, **self.mask_options())


class BitFitMethod(AbstractFreeMaskMethod):
    """`gradselect.BitFit`: the biases."""

    name: Literal["bitfit"]

    def plain_mask(self, facts: RunFacts) -> AbstractMask:
        return BitFit(**self.mask_options())


class AbstractMLPMethod(AbstractMaskMethod):
    """The largest gradients of each step, in the linears of the MLPs.

    Attributes:
        density: share of the entries of each matrix that moves at a step.
        layers: names or globs of linears in the repeated layers; by default those of the MLPs.
        every: only in layers 0, `every`, 2 `every`, ...
        train_rest: train all other parameters whole; by default they are frozen. The paper does so for encoders and not
            for large decoders.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    layers: tuple[str, ...] | None = None
    every: PositiveInt = 1
    train_rest: bool = False

    def trained_beside(self, model: nn.Module, mask: AbstractMask) -> tuple[str, ...]:
        if not self.train_rest:
            return self.always
        return tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in (mask.among or ())
        )


class SparseGradMethod(AbstractMLPMethod):
    """SparseGrad: `gradselect.sparsegrad` turns the MLPs into a basis of sparse gradients, and back at the end.

    Attributes:
        calibration_batches: batches that the basis is estimated from before the first step.
    """

    name: Literal["sparsegrad"]
    calibration_batches: PositiveInt = 8

    @property
    def num_batches(self) -> int:
        return self.calibration_batches

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        return sparsegrad.convert(
            model, facts.batches, self.density, layers=self.layers, every=self.every, loss=facts.loss
        )


class MePropMethod(AbstractMLPMethod):
    """MeProp (Sun et al., arXiv 1706.06197), as the paper of SparseGrad compares with it: the same, not rotated."""

    name: Literal["meprop"]

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        chosen = choose_layers(model, layers=self.layers, every=self.every)
        return TopGradient(density=self.density, among=tuple(layer.weight_name for layer in chosen))
