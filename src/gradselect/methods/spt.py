"""SPT: adapters on some matrices, masks on others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from gradselect import spt
from gradselect.entries import AbstractMask

from .adapters import Rank
from .masks import AbstractMaskMethod, RunFacts

Share = Annotated[float, Field(gt=0, le=1)]


class SPTMethod(AbstractMaskMethod):
    """SPT (He et al., arXiv 2303.08566): `gradselect.spt` gives a LoRA to matrices dense in sensitive entries.

    `gradselect.spt.convert` says which parts are from the paper. The adapters are merged at the end.

    Attributes:
        budget: number of entries to train. Give it or `density`.
        density: share of the candidates' entries.
        rank: rank of the adapters.
        matrix_share: a matrix gets an adapter if its sensitive entries number this share of the adapter's entries.
        vector_share: a vector trains whole if this share of its entries is sensitive.
        dropout: dropout on the adapters' input.
        among: names or globs of the candidate parameters. None: linear layers, vectors of the layers, norms.
        calibration_batches: batches from which the sensitivities are taken.
    """

    name: Literal["spt"]
    budget: PositiveInt | None = None
    density: Share | None = None
    rank: Rank = 8
    matrix_share: Share = 0.1
    vector_share: Share = 0.2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    among: tuple[str, ...] | None = None
    calibration_batches: PositiveInt = 16

    @property
    def num_batches(self) -> int:
        return self.calibration_batches

    @model_validator(mode="after")
    def check_size(self) -> Self:
        """Refuse two sizes, and none."""
        if (self.budget is None) == (self.density is None):
            raise ValueError(
                f"got budget={self.budget} and density={self.density}; give one of them, e.g. density=0.01"
            )
        return self

    def forecast_options(self, model: nn.Module, *, head: Collection[str], with_adapters: bool) -> dict[str, Any]:
        """Return mask and `always` of the optimizer as they may turn out, for a plan. See `gradselect.spt.forecast`."""
        parts = spt.forecast(model, with_adapters=with_adapters, **self._settings())
        return {"mask": parts.mask, "always": (*self.always, *parts.always, *head)}

    def scored_names(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of which the batches give a sensitivity."""
        return spt.candidate_names(model, among=self.among)

    def optimizer_options(self, model: nn.Module, facts: RunFacts, *, head: Collection[str] = ()) -> dict[str, Any]:
        self.check_batches(facts)
        parts = self._convert(model, facts)
        return {
            "mask": parts.mask,
            "always": (*self.always, *parts.always, *head),
            "lean_accumulation": self.lean_accumulation,
        }

    def make_mask(self, model: nn.Module, facts: RunFacts) -> AbstractMask:
        return self._convert(model, facts).mask

    def _convert(self, model: nn.Module, facts: RunFacts) -> spt.SPT:
        return spt.convert(
            model, facts.batches, loss=facts.loss, seed=facts.seed, earlier=facts.earlier, **self._settings()
        )

    def _settings(self) -> dict[str, Any]:
        own = ("budget", "density", "rank", "matrix_share", "vector_share", "dropout", "among")
        return {name: getattr(self, name) for name in own}
