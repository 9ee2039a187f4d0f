"""HiWi: an adapter of the biases of a layer, of which only its result is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError, check_whole

from .config import AdapterConfig
from .layer import AdapterLinear
from .registration import register
from .tuner import AdapterTuner

MLP_LAYERS = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "mpnet", "vit"),
        r".*\.layer\.\d+\.(intermediate|output)\.dense",
    ),
    **dict.fromkeys(("opt", "bart", "mbart", "marian", "whisper", "phi", "clip", "siglip"), r".*\.fc[12]"),
    **dict.fromkeys(("distilbert",), r".*\.ffn\.lin[12]"),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "starcoder2"), r".*\.mlp\.c_(fc|proj)"),
    **dict.fromkeys(("gpt_neox", "bloom"), r".*\.dense_(h_to_4h|4h_to_h)"),
}
"""Layers of the MLPs, by type of the model in transformers."""


@final
@dataclass
class HiwiConfig(AdapterConfig):
    """HiWi: b' = b + ReLU(b W_down) W_up for the bias b of a layer.

    The adapter changes the parameters and not what flows through the model, so that b' is all that is left of it:
    merging puts b' in the place of b, and nothing is slower. 2 · size · rank parameters train for each bias.

    A layer without a bias, or with a bias of zeros, is refused: with b = 0 neither factor ever gets a gradient. That
    rules out Llama, Qwen and most decoders of today. The same would befall a number under the ReLU that begins below
    zero, because b never changes: so the signs of W_down are drawn such that all begin above it.

    Args:
        rank: width of the adapter, at most the size of the bias. The paper's value is not known to us.
        target_modules: None: the two layers of each MLP, which the paper adapts; known for BERT, RoBERTa, DeBERTa,
            ELECTRA, MPNet, DistilBERT, GPT-2, OPT, BART, GPT-NeoX and their like.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gradselect.adapters import HiwiConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = get_peft_model(model, HiwiConfig(target_modules=["0"], rank=2))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        16

    Reference: Liao, Meng, Monz, "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv 2305.16742,
    section 4.
    """

    method: ClassVar[str] = "hiwi"

    target_modules: list[str] | str | None = None
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("rank", self.rank)


@final
class HiwiLinear(AdapterLinear):
    """A linear layer with an adapted bias."""

    adapter_layer_names = ("hiwi_down", "hiwi_up")
    hiwi_down: nn.ParameterDict
    hiwi_up: nn.ParameterDict

    def add(self, adapter: str, config: HiwiConfig) -> None:
        bias = self.plain_bias
        check_bias(bias, self.path)
        if config.rank > len(bias):
            raise UsageError(
                f"rank={config.rank} is above the size of the bias of {self.path!r}, {len(bias)}; write e.g. "
                f"rank={min(8, len(bias))}"
            )
        down = torch.empty(len(bias), config.rank)
        nn.init.kaiming_uniform_(down.T, a=math.sqrt(5))
        if not bias.is_meta:
            down *= (bias.detach().float().cpu() @ down).sign()
        self.hiwi_down[adapter] = Parameter(down)
        self.hiwi_up[adapter] = Parameter(torch.zeros(config.rank, len(bias)))

    @property
    def plain_bias(self) -> Tensor:
        """Bias of the base model, also while an adapter is merged."""
        merged_over = None if self._plain is None else self._plain[1]
        return self.plain_layer.bias if merged_over is None else merged_over

    def shift(self, adapter: str) -> Tensor:
        """Return b' - b."""
        down, up = self.hiwi_down[adapter], self.hiwi_up[adapter]
        return (self.plain_bias.to(down.dtype) @ down).relu() @ up

    def after(self, adapter: str, y: Tensor, x: Tensor) -> Tensor:
        return (y + self.shift(adapter)).to(y.dtype)

    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, None if bias is None else bias + self.shift(adapter)


def check_bias(bias: Tensor | None, path: str) -> None:
    """Check that a bias can be adapted.

    Raises:
        UsageError: there is none, or it is zero.
    """
    lacks = "has no bias" if bias is None else "has a bias of zeros"
    if bias is None or (not bias.is_meta and not bias.detach().any()):
        raise UsageError(
            f"HiWi computes the new bias of a layer from the old one, and {path!r} {lacks}: its adapter would never "
            "get a gradient. Name layers in target_modules whose biases are not zero, or train another adapter: "
            "peft.LoraConfig(r=8), in a recipe method={name: lora, rank: 8}"
        )


@final
class HiwiModel(AdapterTuner):
    """PEFT's side of HiWi."""

    prefix = "hiwi_"
    tuner_layer_cls = HiwiLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            if kind not in MLP_LAYERS:
                raise UsageError(
                    f"the MLP layers of a model of the type {kind!r} are not known to HiWi; name layers with a bias: "
                    'target_modules=["fc1", "fc2"]. A model without biases, such as Llama, cannot be adapted so: train '
                    "peft.LoraConfig(r=8), in a recipe method={name: lora, rank: 8}"
                )
            peft_config.target_modules = MLP_LAYERS[kind]
        return peft_config

    def _check_layer(self, layer: nn.Module, path: str) -> None:
        super()._check_layer(layer, path)
        bias: Any = layer.bias
        check_bias(bias, path)


register(HiwiConfig, HiwiModel)
