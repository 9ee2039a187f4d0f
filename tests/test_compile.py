"""Compiled layers: frozen and unfrozen, they train as uncompiled ones and stop compiling soon; else the step raises."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama, tiny_plain
from torch import nn
from torch._dynamo import utils

import gradselect as gs
from gradselect.integrations.compile import compile_blocks

# torch's word on one release of Python, which concerns its speed only
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

POLICY = gs.AdaGradSelect(count=2, delta=9.0, explore_steps=4, among=None)


@pytest.fixture
def limits():
    """Set torch's default limits on compiled variants; restore them afterwards."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        torch._dynamo.reset()
        yield torch._dynamo.config
        torch._dynamo.reset()


def build(model, **options):
    return model, gs.BlockOptimizer(model, POLICY, lr=1e-2, **options)


def num_graphs():
    return utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_toggled_layers_train_as_uncompiled_ones_and_soon_nothing_compiles(limits):
    """Lengths vary. Four layers share their graphs: a fixed length, then four patterns of what requires a gradient."""
    compiled = [tiny_plain(layers=4), tiny_plain(layers=4)]
    for model in compiled:
        assert compile_blocks(model, backend="aot_eager") == tuple(f"blocks.{number}" for number in range(4))
    pairs = [build(tiny_plain(layers=4)), build(compiled[0]), build(compiled[1], update_in_backward=True)]
    start, graphs, selections = num_graphs(), [], set()
    for step in range(16):
        for model, optimizer in pairs:
            model(**tiny_batch(model, seed=step, length=8 + step % 3)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        selections.add(optimizer.last_record.selected)
        graphs.append(num_graphs() - start)
    assert len(selections) > 5
    assert 4 <= graphs[6] == graphs[-1] <= 5
    for (name, weight), *others in zip(*(model.named_parameters() for model, _ in pairs), strict=True):
        assert all(other == name and torch.equal(weight, moved) for other, moved in others), name


def test_both_stacks_of_an_encoder_and_a_decoder_are_compiled(limits):
    stacks = {name: nn.ModuleDict({"layers": tiny_plain(layers=2).blocks}) for name in ("encoder", "decoder")}
    names = compile_blocks(nn.ModuleDict(stacks), backend="eager")
    assert names == ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1")


def test_the_limit_on_variants_is_raised_never_lowered(limits):
    compile_blocks(tiny_plain(layers=3), backend="eager")
    assert limits.recompile_limit == limits.accumulated_recompile_limit == 48
    compile_blocks(tiny_plain(layers=1), backend="eager")
    assert limits.recompile_limit == 48


def test_a_layer_compiles_whole_though_only_a_part_of_it_trains(limits):
    model = tiny_plain(layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".up." in name)
    assert compile_blocks(model, backend="eager") == ("blocks.0", "blocks.1")


def test_a_cache_that_hinders_is_named(limits, caplog):
    with caplog.at_level(logging.WARNING):
        compile_blocks(tiny_llama(layers=1), backend="eager")
    assert "model.config.use_cache = False" in caplog.text


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        compiled_in_place,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["in place", "wrapped", "within a wrapper"],
)
def test_a_model_compiled_whole_trains_and_a_warning_names_the_better_way(wrap, limits, caplog):
    model = tiny_plain(layers=2)
    outside = wrap(model)
    with caplog.at_level(logging.WARNING):
        optimizer = gs.BlockOptimizer(outside, gs.Fixed(["layer.0"]), lr=1e-2)
    assert "compile_blocks(model)" in caplog.text
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == {
        name for name, _ in model.named_parameters()
    }
    outside(**tiny_batch(model, seed=0)).loss.backward()
    optimizer.step()
    assert optimizer.last_record.selected == ("layer.0",)


# a block that compilation has left out ------------------------------------------------------------------------


class LeavesOut(nn.Module):
    """A layer as torch before 2.10 compiled it while it was frozen: no gradient ever reaches its weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        frozen = {name: parameter.detach() for name, parameter in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, frozen, (hidden,))


def train(policy, *, steps, is_compiled=True, **options):
    model = tiny_plain(layers=3)
    model.blocks[1] = LeavesOut(model.blocks[1])
    if is_compiled:
        model.blocks[1]._compiled_call_impl = model.blocks[1]._call_impl
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, always="head", **options)
    for step in range(steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (gs.Fixed(["layer.*"]), {}),
        (gs.Fixed(["layer.*"]), {"update_in_backward": True}),
        (gs.GradNormTopK(count=1), {}),
    ],
    ids=["selected", "updated-in-backward", "losing"],
)
def test_a_block_that_never_gets_a_gradient_raises_where_something_is_compiled(policy, options, monkeypatch):
    monkeypatch.setattr(utils, "counters", {"frames": Counter()})
    assert train(policy, steps=4, **options).num_steps == 4
    monkeypatch.setattr(utils, "counters", {"frames": Counter(ok=1)})
    # Another model of the process is compiled.
    assert train(policy, steps=4, is_compiled=False, **options).num_steps == 4
    train(policy, steps=2, **options)
    with pytest.raises(gs.UsageError, match=r"'layer.1' took part in 3 steps .* no gradient.*pytorch#139476"):
        train(policy, steps=3, **options)
