"""BitFit: the tensors that count as biases."""

import pytest
import torch
from mask_support import offered
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn

from gradselect import BitFit, SparseOptimizer, UsageError


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_the_biases_of_a_model_train_whole_and_nothing_else(build) -> None:
    model = build(layers=1)
    mask = BitFit().bind(offered(model))
    assert set(mask.names) == {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    chosen = mask.choose(0, model)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        name: list(range(model.get_parameter(name).numel())) for name in mask.names
    }


def test_biases_that_torch_names_otherwise_count() -> None:
    mask = BitFit().bind(offered(nn.ModuleDict({"rnn": nn.GRU(2, 3), "attention": nn.MultiheadAttention(4, 2)})))
    assert set(mask.names) == {
        *("rnn.bias_ih_l0", "rnn.bias_hh_l0", "attention.in_proj_bias", "attention.out_proj.bias"),
    }


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5])
def test_a_model_without_biases_is_refused_with_the_norms_to_train_instead(build) -> None:
    """T5 has a matrix with the name relative_attention_bias."""
    with pytest.raises(UsageError, match=r'no trainable parameter is a bias; .* BitFit\(among=\("\*norm\*",\)\)'):
        BitFit().bind(offered(build(layers=1)))


def test_among_names_other_tensors_of_one_dimension() -> None:
    names = BitFit(among="*").bind(offered(tiny_llama(layers=1))).names
    assert names
    assert all("norm" in name for name in names)


def test_the_set_is_chosen_once() -> None:
    optimizer = SparseOptimizer(tiny_llama(layers=1), BitFit(among="*norm*"))
    choices = [optimizer.mask.choice(step, 48) for step in range(3)]  # type: ignore[attr-defined]
    assert choices[1:] == [None, None]
    assert sum(indices.numel() for indices in optimizer.entries.values()) == 48
    assert optimizer.memory()["masters"] == 0
    assert all(indices.dtype == torch.int64 for indices in optimizer.entries.values())
