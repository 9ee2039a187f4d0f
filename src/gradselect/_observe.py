"""Gradient norms of blocks, seen during the backward pass; gradients that cannot matter any more go at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ._errors import UsageError

Score = Callable[[str, float], float]


class GradientObserver:
    """Measures ||g_b||_2 of each watched block b when the last of its gradients has arrived.

    With `stream`, only the blocks of the `keep` largest scores so far hold gradients: when a block completes, the worst
    of the best `keep + 1` loses its own at once. The backward pass visits one block after the other, so at most
    `keep + 1` watched blocks hold gradients at any moment.

    A block of which a parameter gets no gradient (an expert without tokens, say) is never complete during the backward
    pass; `finish` measures it. Hooks are registered once, while everything is trainable: torch refuses one on a frozen
    parameter, but an early one survives being frozen. Each parameter is marked with the observer (`gradselect_owner`):
    a partition of the model sees then that it is frozen for the moment only, and a discarded observer falls silent.

    Args:
        blocks: the parameters of each block, by block name, in model order.
        accumulation_steps: backward passes before an optimizer step; a gradient is read after the last.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Parameter]], *, accumulation_steps: int = 1) -> None:
        self.accumulation_steps = accumulation_steps
        self.norms: dict[str, float] = {}
        self._blocks = {name: tuple(parameters) for name, parameters in blocks.items()}
        self._rank = {name: position for position, name in enumerate(self._blocks)}
        self._watched: frozenset[str] = frozenset()
        self._score: Score | None = None
        self._keep = 0
        self._scale: Callable[[], float] = float
        self._arrivals: dict[Parameter, int] = {}
        self._incomplete: dict[str, int] = {}
        self._leaders: dict[str, float] = {}
        for parameter in self._parameters():
            parameter.gradselect_owner = id(self)  # pyright: ignore[reportAttributeAccessIssue]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_weak_hook(self, name))
            for name, parameters in self._blocks.items()
            for parameter in parameters
        ]

    def watch(self, names: Sequence[str], *, scale: Callable[[], float]) -> None:
        """Measure these blocks in the backward passes to come; norms are divided by `scale()`."""
        self._watched = frozenset(names)
        self._scale = scale
        self._score = None
        self.restart()

    def stream(self, *, keep: int, score: Score) -> None:
        """After `watch`: keep the gradients of the `keep` watched blocks of largest `score(name, norm)` only."""
        self._keep = keep
        self._score = score

    def restart(self) -> None:
        """A new window: nothing has arrived yet."""
        self.norms = {}
        self._arrivals = {}
        self._leaders = {}
        self._incomplete = {name: len(self._blocks[name]) for name in self._watched}

    def finish(self) -> None:
        """Measure what the hooks did not see complete: unused parameters, an accumulation window cut short."""
        for name in self._blocks:
            if name in self._watched and name not in self.norms:
                self._complete(name)

    def owns(self, parameter: Tensor) -> bool:
        """Whether no newer observer has been put on the same model."""
        return getattr(parameter, "gradselect_owner", None) == id(self)

    def close(self) -> None:
        """Remove the hooks and the marks."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters():
            if self.owns(parameter):
                del parameter.gradselect_owner  # pyright: ignore[reportAttributeAccessIssue]

    def arrived(self, name: str, parameter: Parameter) -> None:
        """The hook: one backward pass has added to the gradient of `parameter` of block `name`."""
        if name not in self._watched or not self.owns(parameter):
            return
        arrivals = self._arrivals[parameter] = self._arrivals.get(parameter, 0) + 1
        if arrivals > self.accumulation_steps:
            raise UsageError(
                f"backward pass {arrivals} before optimizer.step(), but accumulation_steps={self.accumulation_steps}: "
                "gradients were read, and some released, after that many; for gradient accumulation write "
                "BlockOptimizer(..., accumulation_steps=<backward passes per step>), or call optimizer.zero_grad() "
                "where a step was skipped"
            )
        if arrivals == self.accumulation_steps:
            self._incomplete[name] -= 1
            if self._incomplete[name] == 0:
                self._complete(name)

    def _parameters(self) -> list[Parameter]:
        return [parameter for parameters in self._blocks.values() for parameter in parameters]

    def _complete(self, name: str) -> None:
        self.norms[name] = gradient_norm(self._blocks[name]) / self._scale()
        if self._score is not None:
            self._leaders[name] = self._score(name, self.norms[name])
            if len(self._leaders) > self._keep:
                self._release_worst()

    def _release_worst(self) -> None:
        worst = min(self._leaders, key=lambda name: (_ordered(self._leaders[name]), -self._rank[name]))
        del self._leaders[worst]
        for parameter in self._blocks[worst]:
            parameter.grad = None


def gradient_norm(parameters: Sequence[Parameter]) -> float:
    """L2 norm, in fp32, of the gradients of `parameters` taken as one vector; without any gradient 0.0."""
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0


def _ordered(score: float) -> float:
    return score if score == score else float("-inf")  # NaN ranks last, as in the policy's own decision


def _weak_hook(observer: GradientObserver, name: str) -> Callable[[Tensor], None]:
    """A hook that does not keep the observer, and with it a discarded optimizer, alive."""
    reference = weakref.ref(observer)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            assert isinstance(parameter, Parameter)
            alive.arrived(name, parameter)

    return hook
