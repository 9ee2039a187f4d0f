"""Allocation: the layers and ranks that a search has found, as a configuration of PEFT."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Layers that get a LoRA, with their ranks.

    Args:
        ranks: rank by name of the layer; layers without an adapter are left out.
        num_parameters: parameters of the adapter.
        budget: what they were to stay within.
        num_sites: number of layers that could have got one.
        stable_from: step after which the first layers were dropped because the best set was stable. None: it never
            was, and the scores of the last step decide.
        num_steps: steps that the search took.
        scale: alpha / rank of every layer.

    Example:
        >>> found = Allocation(ranks={"layers.0.q": 4, "layers.1.v": 8}, num_parameters=240, budget=256, num_sites=8,
        ...                    stable_from=31, num_steps=80, scale=2.0)
        >>> found.options()["rank_pattern"], found.options()["alpha_pattern"]
        ({'layers.1.v': 8}, {'layers.1.v': 16})
    """

    ranks: Mapping[str, int]
    num_parameters: int
    budget: int
    num_sites: int
    stable_from: int | None
    num_steps: int
    scale: float

    def options(self) -> dict[str, Any]:
        """Return arguments of `LoraConfig`: targets, ranks, and alphas that keep alpha / rank the same everywhere."""
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        others = {name: rank for name, rank in self.ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": self._alpha(usual),
            "target_modules": list(self.ranks),
            "rank_pattern": others,
            "alpha_pattern": {name: self._alpha(rank) for name, rank in others.items()},
        }

    def _alpha(self, rank: int) -> float:
        alpha = self.scale * rank
        return int(alpha) if alpha == int(alpha) else alpha

    def lora_config(self, searched: LoraConfig) -> LoraConfig:
        """Return the configuration of the adapter that was found.

        Args:
            searched: configuration of the LoRA of the search; dropout and all else that is not searched come from it.
        """
        config = copy.deepcopy(searched)
        for name, value in self.options().items():
            setattr(config, name, value)
        config.inference_mode = False
        return config
