"""The methods of fine-tuning that a recipe can name; here those that choose blocks, and the list of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from gradselect import (
    MISA,
    AbstractPolicy,
    AbstractResidency,
    AbstractRule,
    AdaGradSelect,
    AdamW8bitRule,
    AdamWRule,
    All,
    Cyclic,
    Drop,
    Fixed,
    GradNormTopK,
    Keep,
    Offload,
    Uniform,
)

from .adapter_methods import AdaLoraMethod, LoraMethod, OtherAdapterMethod
from .mask_methods import BitFitMethod, GMTMethod, ID3Method, LIFTMethod, MePropMethod, SparseGradMethod, StaticMethod
from .peer_methods import BAdamPackageMethod, GaLoreMethod
from .settings import Settings

Residency = Literal["keep", "offload", "drop"]


class AbstractBlockMethod(Settings, ABC):
    """Trains, at every step, the blocks that a policy chooses; keys that are not explained here are the policy's own.

    Attributes:
        always: blocks that train at every step beside the policy's choice, e.g. ["embedding"].
        residency: where the optimizer state of a block lives while it is not selected: on the device (keep), in host
            memory (offload), nowhere (drop).
        units: what a block is: a layer, or a matrix in one ("layer.3.self_attn.q_proj"); see `gradselect.partition`.
        update_in_backward: in steps that know their blocks beforehand, update each weight within the backward pass, so
            that one gradient exists at a time; needs optimizer.max_grad_norm=0 and run.accumulation=1.
        moment_bits: of a number in AdamW's moments; 8 takes a quarter of the memory (`gradselect.AdamW8bitRule`).
    """

    always: tuple[str, ...] = ()
    residency: Residency = "offload"
    units: Literal["layer", "matrix"] = "layer"
    update_in_backward: bool = False
    moment_bits: Literal[8, 32] = 32

    @abstractmethod
    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        """The policy, for a model with these blocks."""

    def place(self) -> AbstractResidency:
        """The residency as an object."""
        return {"keep": Keep(), "offload": Offload(), "drop": Drop()}[self.residency]

    def rule(self) -> AbstractRule:
        """The update formula as an object."""
        return AdamW8bitRule() if self.moment_bits == 8 else AdamWRule()

    def policy_options(self) -> dict[str, Any]:
        """The keys that are the policy's own."""
        return self.model_dump(exclude={"name", *AbstractBlockMethod.model_fields})

    @model_validator(mode="after")
    def check_policy(self) -> Self:
        """The policy checks its own settings; what it has against them is the recipe's error."""
        self.policy(seed=0, blocks=())
        return self


class AdaGradSelectMethod(AbstractBlockMethod):
    """`gradselect.AdaGradSelect`; `explore_steps` is by default the number of steps of the first epoch."""

    name: Literal["adagradselect"]
    fraction: float | None = None
    count: int | None = None
    explore_steps: int | None = None
    epsilon_end: float = 0.01
    delta: float = 1.0
    rank_by: Literal["cumulative", "step"] = "cumulative"
    norm: Literal["l2", "rms"] = "l2"
    draw: Literal["top-k", "multinomial"] = "top-k"
    among: tuple[str, ...] | None = None
    every: int = 1
    discount: float = 1.0
    coverage: int | None = None
    delta_growth: float = 0.0

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return AdaGradSelect(seed=seed, **self.policy_options())


class GradNormMethod(AbstractBlockMethod):
    """`gradselect.GradNormTopK`: every step a full backward pass, then the blocks of largest gradient norm train."""

    name: Literal["gradnorm"]
    fraction: float | None = None
    count: int | None = None
    refresh: int = 1
    temperature: float | None = None
    ema: float | None = None
    probe_steps: int = 0
    norm: Literal["l2", "rms"] = "l2"
    among: tuple[str, ...] | None = None

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return GradNormTopK(seed=seed, **self.policy_options())


class GrassMethod(GradNormMethod):
    """GRASS (Tian et al., arXiv 2604.07808) on `gradselect.GradNormTopK`; the numbers are a choice, not the paper's."""

    name: Literal["grass"]  # pyright: ignore[reportIncompatibleVariableOverride]
    refresh: int = 20
    temperature: float | None = 1e-3
    ema: float | None = 0.9
    probe_steps: int = 20
    norm: Literal["l2", "rms"] = "rms"
    among: tuple[str, ...] | None = ("layer.*",)


class UniformMethod(AbstractBlockMethod):
    """`gradselect.Uniform`: random blocks, the baseline that a learned choice has to beat."""

    name: Literal["uniform"]
    fraction: float | None = None
    count: int | None = None
    every: int = 1
    among: tuple[str, ...] | None = None

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return Uniform(seed=seed, **self.policy_options())


class LisaMethod(AbstractBlockMethod):
    """LISA (Pan et al., arXiv 2403.17919): random layers for a while, and embedding, final norm and head always."""

    name: Literal["lisa"]
    count: int = 2
    every: int = 20
    always: tuple[str, ...] = ("embedding", "norm", "head")
    residency: Residency = "keep"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return Uniform(seed=seed, **self.policy_options())


class BAdamMethod(AbstractBlockMethod):
    """BAdam (Luo, Yu, Li, arXiv 2404.02827) on `gradselect.Cyclic`: one layer at a time, its state dropped after it."""

    name: Literal["badam"]
    every: int = 50
    order: Literal["random", "ascending", "descending"] = "random"
    count: int = 1
    among: tuple[str, ...] | None = ("layer.*",)
    residency: Residency = "drop"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return Cyclic(seed=seed, **self.policy_options())


class MisaMethod(AbstractBlockMethod):
    """MISA (Liu et al., arXiv 2511.00056): matrices of the layers, drawn by importance, state dropped after a period.

    `gradselect.MISA` says what of it is the paper's.
    """

    name: Literal["misa"]
    share: float = 0.03
    every: int = 50
    eta: float = 1.0
    ema: float = 0.9
    among: tuple[str, ...] | None = ("layer.*.*.*",)
    residency: Residency = "drop"
    units: Literal["layer", "matrix"] = "matrix"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return MISA(seed=seed, **self.policy_options())


class LastMethod(AbstractBlockMethod):
    """The last `count` layers of the model, at every step."""

    name: Literal["last"]
    count: PositiveInt = 2
    residency: Residency = "keep"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        layers = list(dict.fromkeys(name.split(".")[1] for name in blocks if name.startswith("layer.")))
        last = [name for name in blocks if name.startswith("layer.") and name.split(".")[1] in layers[-self.count :]]
        return Fixed(tuple(last) or ("layer.*",))


class FixedMethod(AbstractBlockMethod):
    """`gradselect.Fixed`: the named blocks, at every step."""

    name: Literal["fixed"]
    blocks: tuple[str, ...]
    residency: Residency = "keep"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return Fixed(self.blocks)


class FullMethod(Settings):
    """Every weight at every step: AdamW, with float32 master weights where the model is bfloat16."""

    name: Literal["full"]

    def with_masters(self) -> AllMethod:
        """The same on `gradselect.BlockOptimizer`, which keeps the master weights."""
        return AllMethod()


class AllMethod(AbstractBlockMethod):
    """`gradselect.All`: full fine-tuning as a selection; a recipe writes `full`."""

    residency: Residency = "keep"

    def policy(self, *, seed: int, blocks: Sequence[str]) -> AbstractPolicy:
        return All()


Method = Annotated[
    AdaGradSelectMethod
    | GradNormMethod
    | GrassMethod
    | UniformMethod
    | LisaMethod
    | BAdamMethod
    | MisaMethod
    | LastMethod
    | FixedMethod
    | FullMethod
    | LoraMethod
    | AdaLoraMethod
    | OtherAdapterMethod
    | BAdamPackageMethod
    | GaLoreMethod
    | ID3Method
    | GMTMethod
    | StaticMethod
    | LIFTMethod
    | BitFitMethod
    | SparseGradMethod
    | MePropMethod,
    Field(discriminator="name"),
]
