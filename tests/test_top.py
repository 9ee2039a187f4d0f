"""Exact streaming top-k of entries."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from gradselect.entries import top_k as _top
from gradselect.entries.top_k import StreamingTopK
from gradselect.masks import ID3
from gradselect.reference import top_entries

SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=30)


def pairs(top):
    positions, indices, _ = top.result()
    return list(zip(positions.tolist(), indices.tolist(), strict=True))


@settings(deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=5), st.integers(0, 40), st.randoms())
def test_equals_sorting_everything_whatever_the_order(tensors, count, random):
    """Ties, infinities and NaN. Scores of -inf never count, because none is above the threshold -inf."""
    scores = [torch.tensor(values) for values in tensors]
    top = StreamingTopK(count)
    order = list(range(len(scores)))
    random.shuffle(order)
    for position in order:
        top.add(scores[position], position=position)
    finite = [score.masked_fill(score == -math.inf, math.nan) for score in scores]
    assert pairs(top) == sorted(top_entries(finite, count))


def test_equals_sorting_when_it_forgets_on_the_way(monkeypatch):
    monkeypatch.setattr(_top, "SLACK", 0)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, 50, (length,), generator=generator).float() for length in (300, 7, 1000, 64)]
    for count in (1, 5, 60, 900, 2000):
        top = StreamingTopK(count)
        for position in (2, 0, 3, 1):
            for start in range(0, scores[position].numel(), 100):
                top.add(scores[position][start : start + 100], position=position, offset=start)
        assert pairs(top) == sorted(top_entries(scores, count))


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40, 700, 20_000])
def test_scanning_equals_scoring_everything(monkeypatch, count, dtype, exponent):
    """With a bound on the gradient most entries are never scored; the result is the same, values included.

    A NaN hides no other entry, although it is the extreme of its whole column.
    """
    monkeypatch.setattr(_top, "CHUNK", {"cpu": 4096})
    generator = torch.Generator().manual_seed(1)
    mask = ID3(budget=1, steps=1, exponent=exponent, eps=0.1)
    lengths = (300, 20_001, 5, 9_000)
    weights = [torch.randn(length, generator=generator).mul(0.05).to(dtype) for length in lengths]
    scales = (1.0, 0.1, 3.0, 1.0)
    gradients = [
        torch.randn(n, generator=generator).mul(scale).to(dtype) for n, scale in zip(lengths, scales, strict=True)
    ]
    gradients[1][::3] = 0.0
    for gradient in gradients:
        gradient[::50] = math.nan
    top = StreamingTopK(count, above=0.0)
    for position in (3, 1, 0, 2):
        top.scan(weights[position], gradients[position], position=position, score=mask.score, least=mask.least_gradient)
    scores = [mask.score(w.float(), g.float()) for w, g in zip(weights, gradients, strict=True)]
    scores = [score.masked_fill(score <= 0, math.nan) for score in scores]
    assert pairs(top) == sorted(top_entries(scores, count))
    positions, indices, values = top.result()
    for position, index, value in zip(positions.tolist(), indices.tolist(), values.tolist(), strict=True):
        assert value == float(gradients[position][index])


def test_a_tensor_without_entries_offers_none():
    mask = ID3(budget=1, steps=1)
    top = StreamingTopK(2)
    top.scan(torch.empty(0), torch.empty(0), position=0, score=mask.score, least=mask.least_gradient)
    assert pairs(top) == []


def test_holds_about_the_wanted_number_of_entries():
    top = StreamingTopK(100)
    generator = torch.Generator().manual_seed(2)
    for position in range(50):
        top.add(torch.rand(10_000, generator=generator), position=position)
        assert top._num_kept <= 2 * 100 + _top.SLACK
