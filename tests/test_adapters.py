"""The contract of every adapter of this package: as LoRA in PEFT, and equal to its dense twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_support import ADAPTERS, layers_of
from tiny_models import tiny_batch
from torch.nn import functional

every = pytest.mark.parametrize("name", ADAPTERS)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output = model(**tiny_batch(model, seed=0))
    return output.logits


# Function -----------------------------------------------------------------------------------------------------------


@every
def test_a_layer_computes_what_its_dense_twin_does(name: str) -> None:
    """Values, and gradients of the input and of every parameter of the adapter, in fp64."""
    case = ADAPTERS[name]
    model = case.adapted(model=case.build().double())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    for layer in layers_of(model):
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, 3, layer.out_features, dtype=torch.float64)
        found = {}
        for way, y in (("ours", layer(x)), ("dense", functional.linear(x, *case.twin(layer)))):
            found[way] = y, torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True)
        torch.testing.assert_close(found["ours"][0], found["dense"][0], rtol=0, atol=1e-12)
        assert any(each is not None for each in found["ours"][1][1:])
        for ours, dense in zip(found["ours"][1], found["dense"][1], strict=True):
            assert (ours is None) == (dense is None)
            if ours is not None:
                torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-11)
