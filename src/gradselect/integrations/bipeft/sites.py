"""Sites: the layers that may get a LoRA, as PEFT's LoRA of the largest rank on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn

from gradselect.usage import UsageError

from .settings import SearchSettings

PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Site:
    """A layer that may get a LoRA.

    Args:
        name: name of the layer in the model without an adapter.
        down: PEFT's `lora_A`, from the layer's input to the largest rank.
        up: PEFT's `lora_B`, from there to the layer's output.
        scale: alpha / rank, the same for all ranks.

    Example:
        >>> site = Site(name="q", down=nn.Linear(6, 8, bias=False), up=nn.Linear(8, 4, bias=False), scale=2.0)
        >>> site.num_parameters(rank=3)  # 3 x (6 + 4)
        30
    """

    name: str
    down: nn.Linear
    up: nn.Linear
    scale: float

    def num_parameters(self, *, rank: int) -> int:
        """Return the number of parameters of a LoRA of this rank on the layer."""
        return rank * (self.down.in_features + self.up.out_features)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """Return the sites of a model with a LoRA, in the order of the model.

    Raises:
        UsageError: the model has no LoRA, or one that is not plain.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.ModuleDict({"in": nn.Linear(6, 5), "out": nn.Linear(5, 4)})
        >>> [site.name for site in sites_of(get_peft_model(model, LoraConfig(target_modules=["in", "out"])))]
        ['in', 'out']
    """
    if not isinstance(model, PeftModel):
        raise UsageError(
            f"the search needs a model with a LoRA, not {type(model).__name__}; write "
            'get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))'
        )
    (adapter,) = model.active_adapters
    return tuple(_sites(model, adapter))


def budget_of_rank(sites: tuple[Site, ...], *, rank: int) -> int:
    """Return the parameters of a LoRA of the same rank on every site.

    Example:
        >>> site = Site(name="q", down=nn.Linear(6, 8, bias=False), up=nn.Linear(8, 4, bias=False), scale=2.0)
        >>> budget_of_rank((site, site), rank=2)
        40
    """
    return sum(site.num_parameters(rank=rank) for site in sites)


def check_sites(sites: tuple[Site, ...], settings: SearchSettings) -> None:
    """Check that the LoRA has the largest rank, and that the budget holds one site and less than all.

    Raises:
        UsageError: they do not fit.
    """
    largest = settings.ranks[-1]
    if any(site.down.out_features != largest for site in sites):
        rank = next(site.down.out_features for site in sites if site.down.out_features != largest)
        raise UsageError(f"the LoRA has rank {rank}, and the ranks to search end in {largest}; they must be equal")
    if len({site.scale for site in sites}) > 1:
        raise UsageError("the layers differ in alpha / rank; leave out alpha_pattern")
    smallest = min(site.num_parameters(rank=settings.ranks[0]) for site in sites)
    if settings.budget < smallest:
        raise UsageError(
            f"budget {settings.budget:,} is below the smallest layer, which takes {smallest:,} parameters at rank "
            f"{settings.ranks[0]}; give at least {smallest}"
        )
    whole = budget_of_rank(sites, rank=largest)
    if settings.budget >= whole:
        raise UsageError(
            f"budget {settings.budget:,} holds rank {largest} on all {len(sites)} layers ({whole:,} parameters): there "
            f"is nothing to search; give less, e.g. {whole // 4}"
        )


def _sites(model: PeftModel, adapter: str) -> Iterator[Site]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UsageError(f"the adapter {adapter!r} is no LoRA; give the model a LoRA, e.g. LoraConfig(r=8)")
    for prefixed, layer in layers:
        name = prefixed.removeprefix(PREFIX)
        # The last two read the matrices without calling them, so no gate would act.
        if adapter not in layer.lora_A or isinstance(layer, ParamWrapper | MultiheadAttention):
            raise UsageError(f"{name} has no pair of linear layers as its LoRA; leave it out of target_modules")
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
            raise UsageError(f"{name} has a LoRA of {type(down).__name__}, not of linear layers; leave it out")
        if up.bias is not None or layer.lora_variant:
            raise UsageError(f"{name} has no plain LoRA; turn off use_dora, use_rslora, lora_bias and other variants")
        yield Site(name=name, down=down, up=up, scale=layer.scaling[adapter])


def products(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight times gradient of both matrices of a site; zeros where there is no gradient."""
    first, second = (
        torch.zeros_like(weight) if weight.grad is None else (weight.grad * weight).detach()
        for weight in (site.down.weight, site.up.weight)
    )
    return first, second
