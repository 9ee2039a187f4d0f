"""Methods that train blocks: what they share, and those that are more than the settings of one policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self

from pydantic import PositiveInt, field_validator, model_validator
from torch import nn

from gradselect.blocks import AbstractPolicy, BlockOptimizer, Borders, partition
from gradselect.core import AbstractResidency, AbstractRule, AdamW8bitRule, AdamWRule, Drop, Keep, Offload
from gradselect.policies import All, Fixed

from .base import RunFacts
from .selection import AbstractSelectionMethod

Residency = Literal["keep", "offload", "drop"]


class AbstractBlockMethod(AbstractSelectionMethod):
    """Trains, at every step, the blocks that a policy selects. Keys not listed here are settings of the policy.

    Attributes:
        always: blocks that train at every step beside the selected ones, e.g. ["embedding"].
        residency: place of the optimizer state of unselected blocks: on the device (keep), in host memory (offload),
            nowhere (drop).
        blocks: size of a block: a layer, one matrix of a layer ("layer.3.self_attn.q_proj"), or a range of columns or
            rows of every linear of a layer ("layer.3.columns.0"). See `gradselect.partition`.
        parts: number of ranges of columns or rows, 8 by default.
        update_in_backward: in steps whose blocks are known beforehand, update each weight within the backward pass, so
            that one gradient exists at a time. Needs optimizer.max_grad_norm=0 and run.accumulation=1.
        moment_bits: bits of each number in AdamW's moments. 8 takes a quarter of the memory
            (`gradselect.AdamW8bitRule`).
        coasting: steps in which a block that has just left moves on by its momentum (`gradselect.Borders`).
        coasting_decay: factor of each of these steps against the one before, beside the momentum's own decay.
        exit_step: move a block that leaves once, by all of its momentum.
        rewarm_steps: updates over which the learning rate of a block that returns rises to its full value.
        rewarm_after: least number of steps without an update after which a block returns.
        rewarm_first: warm a block's first updates of all too.
        rate_by_visits: exponent in [0, 1] by which blocks that are seldom selected take larger steps.
        rate_cap: largest factor of that kind.
    """

    renamed: ClassVar[Mapping[str, str]] = {"units": "blocks"}
    optimizer_class = BlockOptimizer

    always: tuple[str, ...] = ()
    residency: Residency = "offload"
    blocks: Literal["layer", "matrix", "columns", "rows"] = "layer"
    parts: PositiveInt | None = None
    update_in_backward: bool = False
    moment_bits: Literal[8, 32] = 32
    coasting: int = Borders.coasting
    coasting_decay: float = Borders.coasting_decay
    exit_step: bool = Borders.exit_step
    rewarm_steps: int = Borders.rewarm_steps
    rewarm_after: int = Borders.rewarm_after
    rewarm_first: bool = Borders.rewarm_first
    rate_by_visits: float = Borders.rate_by_visits
    rate_cap: float = Borders.rate_cap

    @abstractmethod
    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        """Return the policy for a model with these blocks, given by names and aliases."""

    def optimizer_options(self, model: nn.Module, facts: RunFacts, *, head: Collection[str] = ()) -> dict[str, Any]:
        blocks = partition(model, by=self.blocks, parts=self.parts)
        heads = [block.name for block in blocks if not set(head).isdisjoint(block.parameter_names)]
        names = [name for block in blocks for name in (block.name, *block.aliases)]
        return {
            "policy": self.policy(seed=facts.seed, block_names=names),
            "always": (*self.always, *heads),
            "residency": self.place(),
            "rule": self.rule(),
            "borders": self.borders(),
            "update_in_backward": self.update_in_backward,
            "blocks": blocks,
        }

    def place(self) -> AbstractResidency:
        """Return the residency as an object."""
        return {"keep": Keep(), "offload": Offload(), "drop": Drop()}[self.residency]

    def rule(self) -> AbstractRule:
        """Return the update rule as an object."""
        return AdamW8bitRule(fused=None) if self.moment_bits == 8 else AdamWRule(fused=None)

    def borders(self) -> Borders:
        """Return the rules for blocks that leave the selection or return to it."""
        return Borders(**self.model_dump(include={field.name for field in fields(Borders)}))

    @model_validator(mode="after")
    def check_slices(self) -> Self:
        """Refuse a number of slices without slices, and one that makes none."""
        if self.parts is not None and self.blocks not in ("columns", "rows"):
            raise ValueError(
                f"method.parts={self.parts} is a number of slices, and method.blocks={self.blocks} makes none: write "
                "method.blocks=columns, or leave method.parts out"
            )
        if self.parts == 1:
            raise ValueError("method.parts=1 makes no slices: write method.parts=8, or method.blocks=layer")
        return self

    @model_validator(mode="after")
    def check_policy(self) -> Self:
        """Let the policy and the border rules check their settings. Their errors become errors of the recipe."""
        self.policy(seed=0, block_names=())
        self.borders().check_rule(self.rule())
        return self


class LastMethod(AbstractBlockMethod):
    """The last layers of the model, at every step.

    Attributes:
        count: number of layers.
    """

    name: Literal["last"]
    count: PositiveInt = 2
    residency: Residency = "keep"

    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        in_layers = [name for name in block_names if name.startswith("layer.")]
        layers = list(dict.fromkeys(name.split(".")[1] for name in in_layers))
        last = [name for name in in_layers if name.split(".")[1] in layers[-self.count :]]
        return Fixed(tuple(last) or ("layer.*",))


def has_other_layers(names: Sequence[str]) -> bool:
    """True if the layers of the language model are one of several stacks, as beside a vision tower.

    Args:
        names: of the blocks, aliases included; the language model's layers are "layer.0" and so on.
    """
    return any(name.startswith("layer.") for name in names) and any(".layer." in name for name in names)


class FixedMethod(AbstractBlockMethod):
    """`gradselect.Fixed`: the named blocks, at every step.

    Attributes:
        names: names, aliases or globs of the blocks, e.g. ["layer.4", "head"].
    """

    name: Literal["fixed"]
    names: tuple[str, ...]
    residency: Residency = "keep"

    @field_validator("blocks", mode="before")
    @classmethod
    def refuse_names(cls, value: Any) -> Any:
        """Refuse a list: earlier versions kept the names of blocks under this key."""
        if isinstance(value, list | tuple):
            listed = ", ".join(map(str, value))
            raise ValueError(f"the names of blocks are now method.names: write method.names=[{listed}]")
        return value

    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        return Fixed(self.names)


class FullMethod(AbstractSelectionMethod):
    """Every weight at every step: AdamW, with fp32 masters if the model is bfloat16."""

    optimizer_class = BlockOptimizer

    name: Literal["full"]

    def optimizer_options(self, model: nn.Module, facts: RunFacts, *, head: Collection[str] = ()) -> dict[str, Any]:
        return self.with_masters().optimizer_options(model, facts, head=head)

    def with_masters(self) -> AllMethod:
        """Return full fine-tuning on `gradselect.BlockOptimizer`, which keeps the masters."""
        return AllMethod()


class AllMethod(AbstractBlockMethod):
    """`gradselect.All`: full fine-tuning as a selection. A recipe writes `full`."""

    name: Literal["full"] = "full"
    residency: Residency = "keep"

    def policy(self, *, seed: int, block_names: Sequence[str]) -> AbstractPolicy:
        return All()
