"""LIFT: the approximation, the selection of entries and tiles, and the candidate matrices."""

import logging

import pytest
import torch
from mask_support import offered
from tiny_models import (
    tiny_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    tiny_mixtral,
    tiny_qwen2_moe,
    tiny_t5,
)
from torch import Tensor, nn

from gradselect import LIFT, SparseOptimizer, UsageError, sparsegrad, spt
from gradselect.masks.lift import largest_entries, largest_tiles, low_rank
from gradselect.usage import listed

MATRIX = "model.layers.0.mlp.up_proj.weight"


def decaying(rows: int, columns: int, *, rate: float, seed: int = 0) -> Tensor:
    """A matrix with singular values 1, rate, rate^2, ..."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return left * rate ** torch.arange(size) @ right.T


def exact(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).float()


def approximation(matrix: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    left, right = low_rank(matrix, rank, generator=torch.Generator().manual_seed(seed))
    assert left.shape == (matrix.shape[0], rank)
    assert right.shape == (rank, matrix.shape[1])
    return left @ right


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (40, 60), (24, 24), (5, 64)])
@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_approximation_is_nearly_the_best_of_its_rank(rows: int, columns: int, rate: float) -> None:
    """The error beyond the best possible one is a share of it, far below 1 % here."""
    matrix = decaying(rows, columns, rate=rate)
    for rank in (1, 4):
        best = torch.linalg.matrix_norm(matrix - exact(matrix, rank))
        assert torch.linalg.matrix_norm(matrix - approximation(matrix, rank)) <= 1.002 * best + 1e-5


def test_of_full_rank_it_is_the_matrix() -> None:
    """Tolerance: float32 rounding of three factorisations."""
    matrix = decaying(20, 12, rate=0.8)
    torch.testing.assert_close(approximation(matrix, 12), matrix, rtol=1e-4, atol=1e-5)


def test_the_entries_are_those_of_an_exact_decomposition() -> None:
    """Some at the margin may differ: the approximation is not exact."""
    matrix = decaying(64, 48, rate=0.7)
    count = 300
    found = largest_entries(approximation(matrix, 4).abs(), count)
    expected = set(exact(matrix, 4).abs().view(-1).topk(count).indices.tolist())
    unreduced = set(matrix.abs().view(-1).topk(count).indices.tolist())
    assert found.tolist() == sorted(found.tolist())
    assert len(expected & set(found.tolist())) >= 0.98 * count
    assert len(expected & unreduced) < 0.98 * count  # else the test could not tell


def test_the_entries_are_those_of_an_exact_decomposition_where_singular_values_fall_slowly() -> None:
    """Two power iterations found 42 % of them here, and 44 % in weights of SmolLM2-135M."""
    matrix = torch.randn(192, 96, generator=torch.Generator().manual_seed(0))
    count = 4 * sum(matrix.shape)
    found = largest_entries(approximation(matrix, 4).abs(), count)
    expected = set(exact(matrix, 4).abs().view(-1).topk(count).indices.tolist())
    assert len(expected.intersection(found.tolist())) >= 0.95 * count


def test_the_mask_takes_the_rank_that_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(48, 64))
    with torch.no_grad():
        model[0].weight.copy_(decaying(64, 48, rate=0.7))
    for rank, mask in ((2, LIFT(rank=2)), (5, LIFT(rank=2, approximation_rank=5)), (3, LIFT(density=336 / 3072))):
        chosen = set(mask.bind(offered(model)).choose(0, model)["0.weight"].tolist())
        expected = exact(model[0].weight.detach(), rank).abs().view(-1).topk(len(chosen)).indices.tolist()
        assert len(chosen.intersection(expected)) >= 0.97 * len(chosen), rank


@pytest.mark.parametrize("shape", [(8, 12), (9, 13), (3, 2), (4, 30)])
def test_blocks_are_those_of_a_plain_loop(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    blocks = []
    for row in range(0, rows, 4):
        for column in range(0, columns, 4):
            block = scores[row : row + 4, column : column + 4]
            inside = [
                r * columns + c for r in range(row, min(row + 4, rows)) for c in range(column, min(column + 4, columns))
            ]
            blocks.append((-block.sum().item(), inside))
    blocks.sort()
    for count in (1, 5, 16, 17, rows * columns):
        count = min(count, rows * columns)
        expected: list[int] = []
        for _, inside in blocks:
            if len(expected) < count:
                expected += inside
        found = largest_tiles(scores, count).tolist()
        assert found == sorted(expected)
        assert count <= len(found) < count + 16


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: tiny_llama(layers=2), 2 * 7),
        (lambda: tiny_gpt2(layers=2), 2 * 4),  # Conv1D, with the matrix transposed
        (lambda: tiny_bert_classifier(layers=2), 2 * 6),  # neither pooler nor classifier
        (lambda: tiny_t5(layers=2), 2 * 6 + 2 * 10),  # neither relative_attention_bias nor the tied head
        (lambda: tiny_lora(layers=2), 2 * 2 * 2),
    ],
    ids=["llama", "gpt2", "bert", "t5", "lora"],
)
def test_it_takes_the_matrices_of_linear_layers_inside_repeated_ones(build, expected: int) -> None:
    model = build()
    tensors = [tensor for tensor in offered(model) if tensor.parameter.requires_grad]
    names = LIFT(density=0.1).bind(tensors).names
    assert len(names) == expected
    assert all(model.get_parameter(name).ndim == 2 for name in names)
    assert not [name for name in names if "lm_head" in name or "shared" in name or "embed" in name]


def test_a_linear_layer_elsewhere_is_taken_only_by_name() -> None:
    model = tiny_llama(layers=1)
    assert LIFT(rank=1, among="lm_head.*").bind(offered(model)).names == ("lm_head.weight",)
    plain = nn.ModuleDict({"up": nn.Linear(4, 4)})
    with pytest.raises(UsageError, match="name matrices of linear layers"):
        LIFT(density=0.1).bind(offered(plain))
    assert LIFT(density=0.1, among="up.*").bind(offered(plain)).names == ("up.weight",)


def test_a_small_matrix_trains_whole_where_the_rank_is_large() -> None:
    chosen = LIFT(rank=7).bind(offered(tiny_llama(layers=1))).choose(0, nn.Identity())
    assert chosen["model.layers.0.self_attn.k_proj.weight"].numel() == 8 * 16
    assert chosen[MATRIX].numel() == 7 * 48


def test_the_sketch_is_drawn_from_the_seed_and_anew_at_each_refresh() -> None:
    """A matrix of pure noise has no gap in its spectrum, so different sketches find different approximations."""
    model = nn.Sequential(nn.Linear(150, 150))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(150, 150, generator=torch.Generator().manual_seed(0)))

    def chosen(seed: int, step: int) -> list[int]:
        return LIFT(rank=1, seed=seed).bind(offered(model)).choose(step, model)["0.weight"].tolist()

    assert chosen(0, 0) == chosen(0, 0)
    assert len({tuple(chosen(seed, step)) for seed in (0, 1) for step in (0, 400)}) == 4


def test_broken_weights_are_refused() -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.get_parameter(MATRIX)[0, 0] = torch.nan
    with pytest.raises(UsageError, match=r"up_proj\.weight' holds weights that are not finite"):
        LIFT(rank=1).bind(offered(model)).choose(0, model)


def test_entries_that_stay_at_a_refresh_keep_their_moments() -> None:
    model = tiny_llama(layers=1)
    optimizer = SparseOptimizer(model, LIFT(rank=1, refresh_every=2), lr=3e-2)
    index = [name for group in optimizer.param_groups for name in group["param_names"]].index(MATRIX)

    def moments() -> dict[int, float]:
        state = optimizer.state_dict()["state"][index]
        return dict(zip(state["indices"].tolist(), state["exp_avg"].tolist(), strict=True))

    for step in range(2):
        if step == 1:
            with torch.no_grad():  # so that the coming refresh chooses otherwise
                model.get_parameter(MATRIX)[:16].mul_(3)
        model(**tiny_batch(model, seed=step)).loss.backward()
        if step == 1:
            before = set(moments())
        optimizer.step()
        optimizer.zero_grad()
    after = moments()
    stayed = before & set(after)
    assert 0 < len(stayed) < len(after)
    assert all(after[entry] != 0.0 for entry in stayed)
    assert all(after[entry] == 0.0 for entry in set(after) - stayed)


def test_experts_that_are_left_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """The experts of a layer are one tensor of three dimensions: most of a model stayed as it was without a word."""
    model = tiny_mixtral()
    experts = {name: each.numel() for name, each in model.named_parameters() if each.ndim == 3}
    inside = sum(each.numel() for name, each in model.named_parameters() if ".layers." in name)
    said = (
        f"takes matrices only: {len(experts)} tensors of three dimensions or more, such as experts, with "
        f"{sum(experts.values()):,} of the {inside:,} weights inside the layers, stay as they are "
        f"({listed(list(experts), most=3)})"
    )
    with caplog.at_level(logging.WARNING):
        SparseOptimizer(model, LIFT(rank=1)).close()
    assert f"LIFT {said}" in caplog.text
    caplog.clear()
    spt.convert(model, [tiny_batch(model, seed=0)], density=0.05, rank=1)
    assert f"SPT {said}" in caplog.text
    caplog.clear()
    other = tiny_qwen2_moe()
    sparsegrad.convert(other, [tiny_batch(other, seed=0)])
    assert "SparseGrad takes matrices only" in caplog.text


def test_a_model_of_matrices_and_named_tensors_need_no_word(caplog: pytest.LogCaptureFixture) -> None:
    SparseOptimizer(tiny_llama(), LIFT(rank=1)).close()
    SparseOptimizer(tiny_mixtral(), LIFT(rank=1, among=("*_proj.weight",))).close()
    assert "takes matrices only" not in caplog.text
