r"""Saliences: scores of importance. `StaticMask` selects the entries of largest salience.

There are three kinds, by what they read:

    GradientSalience    weight and gradient of the entry    gradient snip force taylor fisher
    WeightSalience      the weight alone, or nothing        magnitude smallest_magnitude random
    ModelSalience       runs of the whole model             synflow grasp

In the formulas w is the value of an entry, g = dL/dw its gradient, L the mean loss, E the mean over batches.

Reference: Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", arXiv 2412.13488,
compares all of these except `random` and `smallest_magnitude`.

Example:
    >>> import gradselect as gs
    >>> mask = gs.StaticMask(density=0.01, salience=gs.salience.snip)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .calibration import Batch, Probe, Scores, sum_of_outputs, widened


@dataclass(frozen=True)
class AbstractSalience(ABC):
    """Base class of all saliences.

    Attributes:
        name: name in `gradselect.salience`.
        has_loss: True if it needs a loss.
        needs_batches: True if the loss must come from `batches`, because the gradient of one step is not enough.
    """

    name: ClassVar[str]
    has_loss: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = False


@dataclass(frozen=True)
class GradientSalience(AbstractSalience):
    """Salience of an entry from its weight and gradient.

    Attributes:
        averages_scores: True to average the scores of several batches; False to score their mean gradient.
    """

    has_loss = True
    averages_scores: ClassVar[bool] = False

    @abstractmethod
    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return a score per entry in the shape of `weight`; larger is better."""

    def estimate(self, probe: Probe) -> Scores:
        """Return the scores over the batches of `probe`."""
        if self.averages_scores:
            return probe.mean(lambda batch: self._scores(probe, probe.gradients(batch)))
        return self._scores(probe, probe.mean(probe.gradients))

    def _scores(self, probe: Probe, gradients: Scores) -> Scores:
        return {
            tensor.name: self.score(widened(tensor.parameter.detach()), gradients.pop(tensor.name))
            for tensor in probe.tensors
        }


@dataclass(frozen=True)
class WeightSalience(AbstractSalience):
    """Salience of an entry from its weight only, or from a random draw.

    Attributes:
        draws: True if it draws from `generator`, equally often for every entry.
    """

    draws: ClassVar[bool] = False

    @abstractmethod
    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Return a score per entry in the shape of `weight`; larger is better. `generator` is on the same device."""


@dataclass(frozen=True)
class ModelSalience(AbstractSalience):
    """Salience from runs of the whole model."""

    @abstractmethod
    def estimate(self, probe: Probe) -> Scores:
        """Return the scores of the tensors of `probe`."""


@final
@dataclass(frozen=True)
class Gradient(GradientSalience):
    """|E g|: the steepest descent of the loss. The best in the comparison of arXiv 2412.13488, with a static mask.

    Example:
        >>> Gradient().score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])).tolist()
        [0.5, 3.0]
    """

    name = "gradient"

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs()


@final
@dataclass(frozen=True)
class Snip(GradientSalience):
    """|w E g|: first-order change of the loss when the weight is removed.

    Reference: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv
    1810.02340.

    Example:
        >>> Snip().score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])).tolist()
        [1.0, 3.0]
    """

    name = "snip"

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()


@final
@dataclass(frozen=True)
class Force(GradientSalience):
    """-w E g: first-order increase of the loss when the weight is removed; the sign counts.

    Reference: de Jorge et al., "Progressive Skeletonization: Trimming more fat from a network at initialization",
    arXiv 2006.09081.

    Example:
        >>> Force().score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])).tolist()
        [-1.0, 3.0]
    """

    name = "force"

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return -(weight * gradient)


@final
@dataclass(frozen=True)
class Taylor(GradientSalience):
    """E (w g)^2: squared first-order change of the loss. On one batch it ranks like `snip`.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv 1906.10771.

    Example:
        >>> Taylor().score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])).tolist()
        [1.0, 9.0]
    """

    name = "taylor"
    averages_scores = True

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).square()


@final
@dataclass(frozen=True)
class Fisher(GradientSalience):
    """E g^2: diagonal of the empirical Fisher information, by batch. On one batch it ranks like `gradient`.

    Reference: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839, where g is the
    gradient of a single example: give batches of one example for that.

    Example:
        >>> Fisher().score(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])).tolist()
        [0.25, 9.0]
    """

    name = "fisher"
    averages_scores = True

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.square()


@final
@dataclass(frozen=True)
class Magnitude(WeightSalience):
    """|w|: the largest weights first.

    Example:
        >>> Magnitude().score(torch.tensor([2.0, -1.0]), torch.Generator()).tolist()
        [2.0, 1.0]
    """

    name = "magnitude"

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return widened(weight).abs()


@final
@dataclass(frozen=True)
class SmallestMagnitude(WeightSalience):
    """-|w|: the smallest weights first, as in PaFI.

    Reference: Liao, Meng, Monz, "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv 2305.16742.

    Example:
        >>> SmallestMagnitude().score(torch.tensor([2.0, -1.0]), torch.Generator()).tolist()
        [-2.0, -1.0]
    """

    name = "smallest_magnitude"

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return -widened(weight).abs()


@final
@dataclass(frozen=True)
class Random(WeightSalience):
    """u ~ U(0, 1), drawn per entry: all sets of the given size are equally likely.

    The draws are float64, so that they practically never tie. `gradselect.SpaRTA` draws each entry independently, so
    its number of entries varies; this one is exact.

    Reference: Rios et al., "Sparsity May Be All You Need: Sparse Random Parameter Adaptation", arXiv 2502.15975.

    Example:
        >>> scores = Random().score(torch.zeros(3), torch.Generator().manual_seed(0))
        >>> bool((scores >= 0).all() and (scores < 1).all())
        True
    """

    name = "random"
    draws = True

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)


@final
@dataclass(frozen=True)
class SynFlow(ModelSalience):
    """|w dR/dw|, R the sum of the model's outputs with |w| in place of every weight: the flow through w.

    The input is `inputs_embeds` of ones, shape (1, 2, width of the embedding), or the user's batches without their
    labels. R sums the output if it is a tensor, else the first of the outputs. The length, and activation functions
    that stay as they are, are our choice. The paper is about images and ReLU, which |w| makes the identity. The code of
    arXiv 2412.13488 replaces activation functions and softmax by the identity.

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", arXiv
    2006.05467.

    Example:
        >>> from gradselect.entries import MaskTensor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, -4.0]])
        >>> tensors = [MaskTensor(name="weight", parameter=layer.weight, module=layer)]
        >>> SynFlow().estimate(Probe(model=layer, tensors=tensors, batches=[{"input": torch.ones(1, 2)}]))
        {'weight': tensor([[3., 4.]])}
    """

    name = "synflow"

    def estimate(self, probe: Probe) -> Scores:
        magnitudes = {name: parameter.detach().abs() for name, parameter in probe.model.named_parameters()}
        leaves = {tensor.name: magnitudes[tensor.name].requires_grad_() for tensor in probe.tensors}

        def flow(batch: Batch) -> Scores:
            slopes = probe.derivatives(probe.run(magnitudes, batch, sum_of_outputs), leaves)
            return {name: slope.mul_(leaves[name].detach()).abs_() for name, slope in slopes.items()}

        return probe.mean(flow)


@final
@dataclass(frozen=True)
class Grasp(ModelSalience):
    """w (H E g), H the Hessian of the mean loss: removing such a weight lowers the norm of the gradient most.

    The paper prunes the entries of largest -w (H g). We train the others, of largest w (H g), as the code of arXiv
    2412.13488 does, which divides the logits by 200 first. It differentiates the backward pass, so attention runs
    without fused kernels.

    Reference: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", arXiv
    2002.07376.

    Example:
        >>> from gradselect.entries import MaskTensor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, -4.0]])
        >>> tensors = [MaskTensor(name="weight", parameter=layer.weight, module=layer)]
        >>> loss = lambda model, batch: model.weight.square().sum() / 2  # g = w, H = 1
        >>> Grasp().estimate(Probe(model=layer, tensors=tensors, batches=[{}], loss=loss))
        {'weight': tensor([[ 9., 16.]])}
    """

    name = "grasp"
    has_loss = True
    needs_batches = True

    def estimate(self, probe: Probe) -> Scores:
        # The fused kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = probe.mean(probe.gradients)
            products = probe.mean(lambda batch: probe.hessian_products(batch, gradients))
        return {tensor.name: products.pop(tensor.name).mul_(tensor.parameter.detach()) for tensor in probe.tensors}


gradient = Gradient()
snip = Snip()
force = Force()
taylor = Taylor()
fisher = Fisher()
magnitude = Magnitude()
smallest_magnitude = SmallestMagnitude()
random = Random()
synflow = SynFlow()
grasp = Grasp()
