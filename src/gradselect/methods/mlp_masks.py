"""Methods that train the largest gradients in the MLPs: SparseGrad and MeProp."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import nn

from gradselect import sparsegrad
from gradselect.entries import AbstractMask
from gradselect.masks import TopGradient
from gradselect.sparsegrad import choose_layers

from .masks import AbstractMaskMethod, RunFacts


class AbstractMLPMethod(AbstractMaskMethod):
    """The entries of largest gradient at each step, in the linear layers of the MLPs.

    Attributes:
        density: share of the entries of each matrix that train in a step.
        layers: names or globs of linear layers inside repeated layers. None: those of the MLPs.
        every: use only the layers 0, `every`, 2 `every`, ...
        train_rest: train all other parameters whole. By default they are frozen. The paper trains them for encoders
            and not for large decoders.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    layers: tuple[str, ...] | None = None
    every: PositiveInt = 1
    train_rest: bool = False

    def trained_beside(self, model: nn.Module, mask: AbstractMask) -> tuple[str, ...]:
        if not self.train_rest:
            return self.always
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return tuple(name for name in trainable if name not in (mask.among or ()))


class SparseGradMethod(AbstractMLPMethod):
    """SparseGrad: `gradselect.sparsegrad` rotates the MLPs into a basis of sparse gradients, and back at the end.

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
    """MeProp (Sun et al., arXiv 1706.06197), the baseline of the paper of SparseGrad: no rotation."""

    name: Literal["meprop"]

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        linears = choose_layers(model, layers=self.layers, every=self.every)
        return TopGradient(density=self.density, among=tuple(linear.weight_name for linear in linears))
