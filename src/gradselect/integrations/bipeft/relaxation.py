"""Relaxation of the choices: logits, draws by Gumbel-softmax, and gates on the ranks of every LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .settings import SearchSettings
from .sites import Site


def draw(logits: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    """Return one-hot draws with the gradient of the Gumbel-softmax.

    The value is exactly one-hot. Adding `soft - soft` is exact; the usual `hard - soft + soft` rounds.

    Args:
        logits: (sites, choices).
        temperature: of the softmax.
        generator: source of the noise.
    """
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = ((logits + noise) / temperature).softmax(-1)
    return _largest(soft) + (soft - soft.detach())


class Relaxation:
    """Logits of the choices at every site, and what has been decided.

    Args:
        num_sites: number of sites.
        settings: those of the search.

    Attributes:
        switches: (sites, 2), logits of "no adapter" and "adapter".
        sizes: (sites, ranks), logits of the ranks.
        is_kept: (sites), False where the adapter is dropped for good.
        is_fixed: (sites), True where the rank is fixed.
    """

    def __init__(self, num_sites: int, settings: SearchSettings) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        ranks = settings.ranks
        self.switches = self._small_noise(num_sites, 2)
        self.sizes = self._small_noise(num_sites, len(ranks))
        self.is_kept = torch.ones(num_sites, dtype=torch.bool)
        self.is_fixed = torch.zeros(num_sites, dtype=torch.bool)
        # Row r has ones for the first ranks[r] of the largest rank.
        self._columns = torch.tensor([[float(c < rank) for c in range(ranks[-1])] for rank in ranks])

    def _small_noise(self, *shape: int) -> Tensor:
        return (1e-3 * torch.randn(*shape, generator=self._generator)).requires_grad_()

    def gates(self, on: Tensor, sizes: Tensor) -> Tensor:
        """Return the factor of each column: (sites, largest rank).

        Args:
            on: (sites), 1 where the site has an adapter.
            sizes: (sites, ranks), one-hot.
        """
        return on[:, None] * (sizes @ self._columns)

    def draw_switches(self, step: int) -> Tensor:
        """Return 0 or 1 for every site, with gradient. A dropped site gets a constant 0."""
        return self._draw(self.switches, step)[:, 1] * self.is_kept

    def draw_sizes(self, step: int) -> Tensor:
        """Return a one-hot rank for every site, with gradient. A fixed rank is constant."""
        return torch.where(self.is_fixed[:, None], self.best_sizes(), self._draw(self.sizes, step))

    def best_sizes(self) -> Tensor:
        """Return the likeliest rank of every site, one-hot, without gradient."""
        return _largest(self.sizes.detach())

    def best_ranks(self) -> list[int]:
        """Return the likeliest rank of every site as a number."""
        return [self._settings.ranks[index] for index in self.sizes.argmax(-1).tolist()]

    def penalty(self) -> Tensor:
        """Return the mean distance of the logits from their own softmax, which keeps them small."""
        distances = ((logits.softmax(-1) - logits).abs().mean() for logits in (self.switches, self.sizes))
        return self._settings.pull * sum(distances, start=torch.zeros(()))

    def expected_costs(self, costs: Tensor) -> Tensor:
        """Return the expected parameters of every site, as if it has an adapter.

        Args:
            costs: (sites, ranks), parameters at each rank.
        """
        likely = torch.where(self.is_fixed[:, None], self.best_sizes(), self.sizes.detach().softmax(-1))
        return (likely * costs).sum(-1)

    def _draw(self, logits: Tensor, step: int) -> Tensor:
        return draw(logits, temperature=self._settings.temperature(step), generator=self._generator)


class Gated:
    """The LoRA of every site times a gate for each of its columns, until `close`.

    Args:
        sites: the sites; a hook on `down` multiplies its output.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._gates: Tensor | None = None
        self._device = sites[0].down.weight.device
        self._hooks = [site.down.register_forward_hook(self._hook(index)) for index, site in enumerate(sites)]

    def set(self, gates: Tensor) -> None:
        """Use these gates from now on: (sites, largest rank)."""
        self._gates = gates.to(self._device)  # in one copy

    def close(self) -> None:
        """Remove the gates."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            assert self._gates is not None
            return output * self._gates[index].to(output)

        return multiply


def _largest(rows: Tensor) -> Tensor:
    return functional.one_hot(rows.detach().argmax(-1), rows.shape[-1]).to(rows)
