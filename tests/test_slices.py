"""Slices: linear layers of which some columns or rows train, exact to the plain layer and at their own cost."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from slice_support import is_linked, parts_of
from tiny_models import tiny_batch, tiny_gpt2, tiny_llama, tiny_lora, tiny_mixtral
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter, functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gradselect as gs
from gradselect.slices import SlicedLinear, slice_linear, sliced_linears
from gradselect.slices.sliced_linear import bounds_of

KINDS = ("columns", "rows")


def linear(*, by: str, parts: int = 4, bias: bool = True, columns: int = 10, rows: int = 7) -> SlicedLinear:
    """Return a sliced layer with a fixed weight."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=bias)
    slice_linear(layer, by=by, parts=parts)
    assert isinstance(layer, SlicedLinear)
    return layer


def plain_of(layer: SlicedLinear) -> nn.Linear:
    """Return a plain layer of the same weights."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
    plain.load_state_dict(layer.state_dict())
    return plain


def activate(layer: SlicedLinear, numbers: tuple[int, ...]) -> list[Parameter]:
    """Let these slices alone train; return them."""
    for number, name in enumerate(layer.slice_names):
        layer.get_parameter(name).requires_grad_(number in numbers)
    return [layer.get_parameter(layer.slice_names[number]) for number in numbers]


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("active", [(0,), (1, 2), (0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10), (0, 10)])
def test_gradients_are_parts_of_the_whole_gradient(by: str, active: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """To rounding: a product of fewer columns may add in another order.

    The gradient of the input is equal to the bit.
    """
    layer = linear(by=by)
    plain, chosen = plain_of(layer), activate(layer, active)
    one = torch.randn(shape).requires_grad_()
    other = one.detach().clone().requires_grad_()
    out, expected = layer(one), plain(other)
    assert torch.equal(out, expected)
    factor = torch.randn_like(out)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    assert plain.weight.grad is not None
    parts = parts_of(plain.weight.grad, layer)
    for number, parameter in zip(active, chosen, strict=True):
        torch.testing.assert_close(parameter.grad, parts[number], rtol=1e-6, atol=1e-6)
    assert [layer.get_parameter(name).grad is not None for name in layer.slice_names] == [
        number in active for number in range(4)
    ]
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert torch.equal(layer.bias.grad, plain.bias.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", KINDS)
def test_gradients_are_right_to_the_last_digit_of_float64(by: str) -> None:
    layer = linear(by=by).double()
    chosen = activate(layer, (1, 3))
    x = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *chosen), check_batched_grad=False)


@pytest.mark.parametrize("by", KINDS)
def test_a_layer_that_is_used_twice_adds_its_gradients(by: str) -> None:
    layer = linear(by=by, columns=6, rows=6)
    plain, (chosen,) = plain_of(layer), activate(layer, (1,))
    x = torch.randn(3, 6)
    layer(layer(x).tanh()).sum().backward()
    plain(plain(x).tanh()).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(chosen.grad, parts_of(plain.weight.grad, layer)[1])


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same(by: str, reentrant: bool) -> None:
    layer, x = linear(by=by), torch.randn(3, 10, requires_grad=True)
    (chosen,) = activate(layer, (2,))
    layer(x).square().sum().backward()
    expected, chosen.grad = chosen.grad, None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()  # type: ignore[union-attr]
    assert torch.equal(chosen.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", KINDS)
def test_autocast_computes_as_in_the_plain_layer(by: str) -> None:
    layer, x = linear(by=by), torch.randn(3, 10)
    plain, (chosen,) = plain_of(layer), activate(layer, (1,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = layer(x), plain(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    expected.float().sum().backward()
    assert plain.weight.grad is not None
    assert chosen.grad is not None
    assert chosen.grad.dtype is torch.float32
    torch.testing.assert_close(chosen.grad, parts_of(plain.weight.grad, layer)[1], rtol=1e-2, atol=1e-2)


def test_neighbours_share_one_product_and_no_memory() -> None:
    """A slice whose gradient is freed early must not be kept alive by its neighbour."""
    layer = linear(by="rows")
    one, other = activate(layer, (1, 2))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 10)).sum().backward()
    names = counter.get_flop_counts()["Global"]
    assert len(names) == 2  # addmm of the forward pass, one mm of the backward pass
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.untyped_storage().data_ptr() != other.grad.untyped_storage().data_ptr()
    assert one.grad.untyped_storage().nbytes() == one.grad.nbytes


def test_a_write_between_forward_and_backward_is_an_error() -> None:
    layer = linear(by="columns")
    (chosen,) = activate(layer, (1,))
    out = layer(torch.randn(3, 10)).sum()
    with torch.no_grad():
        chosen.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        out.backward()


# Cost ----------------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Three layers that read one tensor, as q, k and v do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Projections(), Projections()])


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of storages that the graph keeps, without the weights."""
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage().data_ptr()) not in known:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held = module(x)
    del held
    return sum(kept.values())


@pytest.mark.parametrize(("autocast", "itemsize"), [(False, 4), (True, 2)])
def test_columns_keep_their_part_of_the_input_once_for_all_layers_that_read_it(autocast: bool, itemsize: int) -> None:
    model = Stack()
    gs.partition(model, by="columns", parts=8)
    layer = model.layers[0]
    for each in sliced_linears(layer).values():
        activate(each, (3,))
        each.bias.requires_grad_(False)
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert saved_bytes(layer, x) == 10 * 64 // 8 * itemsize


def test_rows_keep_the_input_itself() -> None:
    model = Stack()
    gs.partition(model, by="rows", parts=8)
    for each in sliced_linears(model.layers[0]).values():
        activate(each, (3,))
    assert saved_bytes(model.layers[0], torch.randn(10, 64)) == 10 * 64 * 4


def test_an_input_that_is_written_to_between_two_layers_is_copied_again() -> None:
    model = Stack()
    gs.partition(model, by="columns", parts=8)
    layer = model.layers[0]
    for each in sliced_linears(layer).values():
        activate(each, (0,))
    x = torch.randn(2, 64)
    first = x.clone()
    out = layer.q(x)
    x.mul_(2.0)
    (out + layer.k(x)).sum().backward()
    ones = torch.ones(2, 32)
    torch.testing.assert_close(layer.q.weight_columns_0.grad, ones.t() @ first[:, :8])
    torch.testing.assert_close(layer.k.weight_columns_0.grad, ones.t() @ x[:, :8])


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize(("active", "share"), [((0,), 1 / 8), ((0, 5), 1 / 4), (tuple(range(8)), 1.0), ((), 0.0)])
def test_flops_of_the_weight_gradient_are_the_share_of_the_active_slices(
    by: str, active: tuple[int, ...], share: float
) -> None:
    layer = linear(by=by, parts=8, columns=64, rows=32)
    activate(layer, active)
    x = torch.randn(10, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == (2 + share) * 2 * 10 * 64 * 32


# The module ----------------------------------------------------------------------------------------------------------


def test_parts_differ_by_one_at_most() -> None:
    assert bounds_of(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))
    for size in range(1, 40):
        for parts in range(1, size + 1):
            sizes = [end - first for first, end in bounds_of(size, parts)]
            assert sum(sizes) == size
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("by", KINDS)
def test_the_layer_stays_the_same_object_with_its_hooks(by: str) -> None:
    layer = nn.Linear(8, 8)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    before, weight = layer.weight.detach().clone(), layer.weight.data_ptr()
    slice_linear(layer, by=by, parts=2)
    layer(torch.ones(1, 8))
    assert isinstance(layer, nn.Linear)
    assert calls == ["called"]
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == weight
    assert not layer.weight.requires_grad
    assert layer.weight.shape == (8, 8)
    assert f"{by}=2" in repr(layer)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 72


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(torch.bfloat16).to(torch.float64),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: model.share_memory(),
    ],
)
def test_copies_and_moves_keep_slices_and_weight_one_tensor(by: str, change) -> None:
    model = Stack()
    gs.partition(model, by=by, parts=3)
    changed = change(model)
    assert is_linked(changed)
    layer = changed.layers[0].q
    with torch.no_grad():
        layer.get_parameter(layer.slice_names[1]).fill_(7.0)
    first, end = layer.slice_bounds[1]
    assert torch.equal(
        layer.weight.narrow(layer.slice_dim, first, end - first), layer.get_parameter(layer.slice_names[1])
    )
    assert layer.shared_inputs is changed.layers[0].k.shared_inputs
    assert layer.shared_inputs is not changed.layers[1].q.shared_inputs
    if changed is not model:
        assert not (model.layers[0].q.weight == 7.0).any()


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_move_keeps_parameters_marks_and_gradients() -> None:
    layer = linear(by="columns")
    parameters = [layer.get_parameter(name) for name in layer.slice_names]
    activate(layer, (1,))
    parameters[0].mark = "kept"
    layer(torch.ones(1, 10)).sum().backward()
    layer.to(torch.float64)
    assert [layer.get_parameter(name) is each for name, each in zip(layer.slice_names, parameters, strict=True)] == [
        True
    ] * 4
    assert parameters[0].mark == "kept"
    assert [each.requires_grad for each in parameters] == [False, True, False, False]
    assert parameters[1].grad is not None
    assert parameters[1].grad.dtype is torch.float64


def test_new_memory_of_a_slice_becomes_part_of_the_weight() -> None:
    layer = linear(by="columns")
    layer.get_parameter("weight_columns_2").data = torch.full((7, 2), 3.0)
    x = torch.randn(2, 10)
    out = layer(x)
    assert torch.equal(layer.weight[:, 6:8], torch.full((7, 2), 3.0))
    assert torch.equal(out, functional.linear(x, layer.weight, layer.bias))
    assert is_linked(layer)


# State dicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KINDS)
def test_state_dicts_are_those_of_the_plain_model(by: str) -> None:
    model = tiny_llama(layers=2)
    plain = copy.deepcopy(model)
    gs.partition(model, by=by, parts=4)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    model.load_state_dict(plain.state_dict())
    assert is_linked(model)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight)
    plain.load_state_dict(model.state_dict())


def test_faults_of_a_state_dict_are_named_as_in_the_plain_layer() -> None:
    layer, plain = linear(by="columns"), nn.Linear(10, 7)
    for state in (
        {"weight": torch.zeros(7, 10)},
        {"weight": torch.zeros(3, 3), "bias": torch.zeros(7), "more": torch.ones(1)},
    ):
        messages = []
        for each in (layer, plain):
            with pytest.raises(RuntimeError) as error:
                each.load_state_dict(state)
            messages.append(str(error.value).replace("SlicedLinear", "Linear"))
        assert messages[0] == messages[1]
        assert layer.load_state_dict({"bias": torch.zeros(7)}, strict=False) == plain.load_state_dict(
            {"bias": torch.zeros(7)}, strict=False
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_by_assignment_makes_the_tensor_the_weight(device: str) -> None:
    layer = linear(by="rows").to(device)
    tensor = torch.randn(7, 10)
    layer.load_state_dict({"weight": tensor, "bias": torch.zeros(7)}, assign=True)
    assert layer.weight.data_ptr() == tensor.data_ptr()
    assert is_linked(layer)
    assert all(layer.get_parameter(name).requires_grad for name in layer.slice_names)


def test_a_saved_model_is_a_plain_checkpoint(tmp_path) -> None:
    model = tiny_llama(layers=2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    gs.partition(model, by="columns", parts=4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(type(module) is not SlicedLinear for module in loaded.modules())
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


# The partition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KINDS)
def test_blocks_hold_one_range_of_every_linear_of_a_layer(by: str) -> None:
    model = tiny_llama(layers=2)
    blocks = gs.partition(model, by=by, parts=2)
    assert [block.name for block in blocks] == [
        *("embedding", f"layer.0.{by}.0", f"layer.0.{by}.1", "layer.0.vectors"),
        *(f"layer.1.{by}.0", f"layer.1.{by}.1", "layer.1.vectors", "norm", "head"),
    ]
    first = blocks[1]
    assert first.parameter_names[0] == f"model.layers.0.self_attn.q_proj.weight_{by}_0"
    assert len(first.parameters) == 7
    placed = [id(parameter) for block in blocks for parameter in block.parameters]
    assert sorted(placed) == sorted(map(id, model.parameters()))


def test_matrices_outside_linears_are_blocks_of_their_own() -> None:
    names = [block.name for block in gs.partition(tiny_mixtral(layers=1), by="columns", parts=4)]
    assert "layer.0.mlp.experts.down_proj" in names
    assert "layer.0.columns.3" in names


def test_cutting_twice_is_cutting_once_and_other_parts_cut_anew() -> None:
    model = tiny_llama(layers=2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    first = gs.partition(model, by="columns", parts=4)
    again = gs.partition(model, by="columns", parts=4)
    assert [block.name for block in first] == [block.name for block in again]
    assert all(
        a is b
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one.parameters, other.parameters, strict=True)
    )
    other = gs.partition(model, by="rows", parts=2)
    assert "layer.1.rows.1" in [block.name for block in other]
    assert is_linked(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_joining_gives_the_plain_model_back() -> None:
    model = tiny_llama(layers=2)
    plain = copy.deepcopy(model)
    calls: list[str] = []
    module = model.model.layers[1].mlp.up_proj
    module.register_forward_hook(lambda *_: calls.append("called"))
    gs.partition(model, by="columns", parts=4)
    assert gs.join_slices(model) == 14
    assert model.model.layers[1].mlp.up_proj is module
    assert type(module) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert vars(module).keys() == vars(plain.model.layers[1].mlp.up_proj).keys()
    batch = tiny_batch(model, seed=1)
    model(**batch).loss.backward()
    assert calls == ["called"]
    assert module.weight.grad is not None
    with pytest.raises(gs.UsageError, match="has no slices to join"):
        gs.join_slices(model)


def test_frozen_linears_and_those_of_adapters_stay_whole() -> None:
    model = tiny_llama(layers=2)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    gs.partition(model, by="columns", parts=4)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is SlicedLinear
    with pytest.raises(gs.UsageError, match=r"no nn.Linear that can be cut into columns"):
        gs.partition(tiny_lora(layers=2), by="columns", parts=2)


def test_a_small_linear_stays_whole_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    names = [block.name for block in gs.partition(tiny_llama(layers=2), by="rows", parts=10)]
    assert "layer.0.self_attn.k_proj" in names
    assert "4 linear layers have fewer rows than 10 parts" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "columns", "parts": 1}, "parts=1 is not a whole number from 2 on"),
        ({"by": "columns", "parts": 2.5}, "parts=2.5 is not a whole number"),
        ({"by": "columns", "parts": 100}, "parts=100 is more than the 32 columns of any linear layer"),
        ({"by": "layer", "parts": 8}, 'write by="columns" or by="rows"'),
        ({"by": "column"}, "by='column' is unknown"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(gs.UsageError, match=message):
        gs.partition(tiny_llama(layers=2), **options)  # type: ignore[arg-type]


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(gs.UsageError, match=r"'transformer.h.0' has no nn.Linear that can be cut into columns"):
        gs.partition(tiny_gpt2(layers=2), by="columns")


def test_a_sliced_model_is_refused_where_whole_weights_are_needed() -> None:
    model = tiny_llama(layers=2)
    blocks = gs.partition(model, by="columns", parts=4)
    assert [block.name for block in gs.partition(model)] == ["embedding", "layer.0", "layer.1", "norm", "head"]
    with pytest.raises(gs.UsageError, match=r'14 linear layers are cut into slices.*by="matrix" needs whole'):
        gs.partition(model, by="matrix")
    with pytest.raises(gs.UsageError, match="a mask needs whole weights"):
        gs.SparseOptimizer(model, gs.TopGradient(density=0.1), lr=1e-3)
    with pytest.raises(gs.UsageError, match=r"gs.sparsegrad.convert needs whole weights"):
        gs.sparsegrad.convert(model, [])
    with pytest.raises(gs.UsageError, match=r'blocks=partition\(model, by="columns", parts=4\)'):
        gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-3)
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-3, blocks=blocks)
    with pytest.raises(gs.UsageError, match="an optimizer holds the model"):
        gs.partition(model, by="columns", parts=2)
    with pytest.raises(gs.UsageError, match="an optimizer holds the model"):
        gs.join_slices(model)
    optimizer.close()
    assert gs.join_slices(model) == 14
