"""GMT: the entries that it selects."""

import math

import pytest
import torch
from torch import Tensor

from gradselect import GMT
from gradselect.entries import top_k as _top
from gradselect.masks import gmt
from gradselect.masks.gmt import kth_largest_by_digits, kth_largest_magnitude

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_top.CHUNK, "cpu", 40)


def tensors(*, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Values over many orders of magnitude, with repetitions, zeros and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 9), (31,), (1,), (4, 4))]
    made = [each * 10.0 ** torch.randint(-6, 3, each.shape, generator=generator) for each in made]
    made[0][1] = 0.0
    made[1][3:9] = made[1][2]
    made[3][0, 0], made[3][2, 2] = math.inf, -math.inf
    return [each.to(dtype) for each in made]


def ranked(values: list[Tensor]) -> list[float]:
    return sorted((abs(value) for each in values for value in each.double().view(-1).tolist()), reverse=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_that_of_a_full_sort(dtype: torch.dtype) -> None:
    for seed in range(3):
        values = tensors(seed=seed, dtype=dtype)
        expected = ranked(values)
        counts = [*range(1, len(expected), 9), len(expected)]
        assert [kth_largest_magnitude(values, count) for count in counts] == [expected[count - 1] for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_a_threshold_guessed_from_a_sample_is_exact_and_so_is_one_made_of_digits(
    monkeypatch: pytest.MonkeyPatch, ties: bool, dtype: torch.dtype
) -> None:
    """With ties most entries are at the edge of the estimate from the sample. Half precision is one digit."""
    monkeypatch.setattr(gmt, "SAMPLE", 256)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(length, generator=generator).to(dtype) for length in (3000, 17, 9000)]
    if ties:
        values = [each.round() for each in values]
    expected = ranked(values)
    for count in (1, 2, 50, 2400, 6000, 12_000, 12_017):
        assert kth_largest_magnitude(values, count) == expected[count - 1]
        assert kth_largest_by_digits(values, count) == expected[count - 1]


def test_the_threshold_of_mixed_dtypes_is_exact() -> None:
    values = [*tensors(seed=0, dtype=torch.bfloat16), *tensors(seed=1, dtype=torch.float64)]
    assert [kth_largest_magnitude(values, count) for count in (1, 20, 77, 186)] == [
        ranked(values)[count - 1] for count in (1, 20, 77, 186)
    ]


def test_nan_is_never_kept() -> None:
    gradient = torch.tensor([3.0, math.nan, -2.0, 1.0, -math.nan])
    assert kth_largest_magnitude([gradient], 2) == 2.0
    for fraction in (0.4, 1.0):
        (kept,) = GMT(fraction=fraction).masks([gradient])
        assert not kept[[1, 4]].any()


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_kept_is_what_a_sort_keeps_in_its_scope(scope: str, fraction: float) -> None:
    gradients = [torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(4)]
    kept = GMT(fraction=fraction, scope=scope).masks(gradients)  # type: ignore[arg-type]
    groups = [gradients] if scope == "global" else [[gradient] for gradient in gradients]
    thresholds = [ranked(group)[max(1, round(fraction * 42 * len(group))) - 1] for group in groups]
    thresholds = thresholds * len(gradients) if scope == "global" else thresholds
    for gradient, each, threshold in zip(gradients, kept, thresholds, strict=True):
        assert each.dtype == torch.bool
        assert torch.equal(each, gradient.abs() >= threshold)


def test_all_entries_that_tie_with_the_last_are_kept_whatever_the_order() -> None:
    gradient = torch.tensor([1.0, -2.0, 2.0, 3.0, 2.0])
    (kept,) = GMT(fraction=0.4).masks([gradient])
    assert kept.tolist() == [False, True, True, True, True]
    (reversed_kept,) = GMT(fraction=0.4).masks([gradient.flip(0)])
    assert reversed_kept.flip(0).tolist() == kept.tolist()


def test_where_too_few_gradients_differ_from_zero_all_entries_are_kept() -> None:
    (kept,) = GMT(fraction=0.5).masks([torch.tensor([0.0, 4.0, 0.0, -0.0])])
    assert kept.all()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_without_a_gradient_there_is_nothing_to_mask(scope: str) -> None:
    assert GMT(scope=scope).masks([]) == []  # type: ignore[arg-type]
