"""What the loss never reaches is no candidate: found in the first step, said, saved, taken back when it is reached."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from policy_support import through_torch
from reach_support import Parts, parts, steps, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradselect as gs
from gradselect.blocks import reach

DEAD = ("pooler", "tower", "expert_0", "expert_1")
ALIVE = ("embedding", "layer.0", "layer.1", "layer.2", "layer.3", "layer.4", "norm", "head")
KNOWN = {"unknown": (), "missed": (), "unreached": (), "misses": {}, "anchor": None, "lost": 0}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_first_step_finds_what_the_loss_reaches_and_later_steps_select_among_it(caplog):
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2, seed=3), lr=1e-2)
    assert optimizer.unreached == ()
    selections = steps(model, optimizer, range(20))
    assert optimizer.unreached == DEAD
    assert {name for selection in selections for name in selection} == set(ALIVE)
    assert all(len(selection) == 2 for selection in selections[2:])
    said = " ".join(caplog.messages)
    assert "no candidates any more" in said
    assert all(name in said for name in DEAD)
    assert len(caplog.messages) <= 3


@pytest.mark.parametrize(
    "policy", [gs.Cyclic(every=1), gs.All(), gs.AdaGradSelect(explore_steps=4), gs.MISA(share=0.2)]
)
def test_a_search_computes_no_gradient_of_a_weight_that_is_not_selected(policy):
    model = parts()
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
    trained = {
        id(parameter)
        for block in gs.partition(model)
        if block.name in optimizer.trainable
        for parameter in block.parameters
    }
    arrived: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived.append)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    model(tokens(0)).backward()
    assert {id(parameter) for parameter in arrived} <= trained


def test_a_step_that_selected_only_unreached_blocks_changes_nothing_and_selects_anew(caplog):
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="descending"), lr=1e-2)
    assert optimizer.trainable == ("expert_1",)
    before = weights(model)
    assert steps(model, optimizer, range(1)) == []
    assert same(before, weights(model))
    assert optimizer.num_steps == 0
    assert optimizer.trainable == ("head",)
    assert "step 0 had selected only blocks that the loss does not reach" in caplog.text
    assert steps(model, optimizer, range(1, 3)) == [("head",), ("norm",)]


def test_a_step_trains_the_rest_of_its_selection():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="descending", count=5), lr=1e-2)
    assert optimizer.trainable == ("head", *DEAD)
    assert steps(model, optimizer, range(1)) == [("head",)]
    assert optimizer.update_counts["tower"] == 0


def test_a_block_that_a_batch_reaches_later_is_a_candidate_from_the_next_step_on(caplog):
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-2)
    steps(model, optimizer, range(4))
    before = weights(model)
    model(tokens(9), pictures=True).backward()
    assert model.tower.weight.grad is None  # neither kept nor clipped
    assert optimizer.grad_norm > 0
    optimizer.step()
    optimizer.zero_grad()
    assert "the loss now reaches tower" in caplog.text
    assert torch.equal(model.tower.weight, before["tower.weight"])
    assert optimizer.unreached == ("pooler", "expert_0", "expert_1")
    selections = steps(model, optimizer, range(5, 30), pictures=True)
    assert ("tower",) in selections


def test_a_loss_without_a_selected_block_can_be_differentiated_and_its_step_waits_for_one_that_has_it():
    """A batch without tokens of the only expert that is selected."""
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("expert_0",)), always="norm", lr=1e-2)
    steps(model, optimizer, range(1), expert=0)
    alone = gs.BlockOptimizer(model, gs.Fixed(("expert_0",)), lr=1e-2)
    assert steps(model, alone, range(1), expert=0) == [("expert_0",)]
    assert steps(model, alone, range(1, 3), expert=1) == []
    assert steps(model, alone, range(3, 4), expert=0) == [("expert_0",)]


def test_a_block_without_a_gradient_for_long_is_no_candidate_until_it_is_reached(caplog):
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, among=("norm", "expert_0")), lr=1e-2)
    steps(model, optimizer, range(4), expert=0)
    num_before = optimizer.num_steps
    steps(model, optimizer, range(4, 4 + 3 * reach.MAX_MISSES), expert=1)
    assert optimizer.unreached == ("expert_0",)
    assert "expert_0" in caplog.text
    assert optimizer.num_steps > num_before
    steps(model, optimizer, range(100, 101), expert=0)
    assert optimizer.unreached == ()


@pytest.mark.parametrize("policy", [gs.Fixed(("pooler", "tower")), gs.All(), gs.AdaGradSelect(explore_steps=2)])
def test_a_loss_that_reaches_no_block_at_all_is_refused(policy):
    model = parts()
    for part in (model.tokens, model.layers, model.norm, model.head):
        part.requires_grad_(False)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
    model(tokens(0)).backward()
    with pytest.raises(gs.UsageError, match="the loss reaches no weight of any block that may train: pooler, tower"):
        optimizer.step()


def test_blocks_that_the_user_named_are_said_and_the_rest_goes_on(caplog):
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("pooler", "layer.1")), always=("tower", "norm"), lr=1e-2)
    assert steps(model, optimizer, range(3)) == [("layer.1", "norm")] * 3
    assert optimizer.unreached == ("pooler", "tower")
    assert "2 of 4 blocks" in caplog.text


def test_a_policy_whose_blocks_are_all_unreached_leaves_those_that_always_train():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2, among=DEAD), always="norm", lr=1e-2)
    assert steps(model, optimizer, range(3)) == [("norm",)] * 3


def test_a_stubborn_policy_is_told_to_use_its_candidates():
    class Last(gs.AbstractPolicy):
        def start(self):
            self.last = self.names[-1:]

        def propose(self, step):
            return self.last

    model = parts()
    optimizer = gs.BlockOptimizer(model, Last(), always="norm", lr=1e-2)
    model(tokens(0)).backward()
    with pytest.raises(gs.UsageError, match=r"Last proposes only blocks.*self\.names"):
        optimizer.step()


class FusedHead(nn.Module):
    """Uses the weight of its head without calling the head, as fused losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return (hidden @ self.head.weight.T).square().mean()


def test_a_head_within_a_fused_loss_is_reached_though_it_is_not_called(caplog):
    torch.manual_seed(0)
    model = FusedHead()
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order="ascending"), lr=1e-2)
    for _ in range(8):
        model(torch.ones(2, 4)).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert optimizer.trainable == ("head",) or model.head.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.unreached == ()
    assert optimizer.update_counts == dict.fromkeys(optimizer.blocks, 2)
    assert caplog.messages == []


POLICIES = {
    "uniform": gs.Uniform(count=2),
    "cyclic": gs.Cyclic(every=2),
    "adagradselect": gs.AdaGradSelect(count=2, explore_steps=5),
    "grass": gs.GradNormTopK(count=2, refresh=3, probe_steps=2),
    "misa": gs.MISA(share=0.3, every=2),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("options", [{}, {"update_in_backward": True}, {"residency": gs.Drop()}], ids=str)
def test_where_all_blocks_are_reached_no_bit_changes(policy, options):
    models = [parts(beside=False) for _ in range(2)]
    found = []
    for model, is_known in zip(models, (False, True), strict=True):
        optimizer = gs.BlockOptimizer(model, policy, lr=1e-2, **options)
        if is_known:
            optimizer._pass_hooks.reach.begin(KNOWN)
        found.append(steps(model, optimizer, range(12)))
        assert optimizer.unreached == ()
    assert found[0] == found[1]
    assert same(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_stopped_at_any_step_it_goes_on_alike(policy):
    def fresh():
        model = parts()
        return model, gs.BlockOptimizer(model, policy, lr=1e-2)

    whole, optimizer = fresh()
    selections = steps(whole, optimizer, range(7))
    for stop in range(7):
        model, first = fresh()
        begun = steps(model, first, range(stop))
        saved = through_torch({"model": model.state_dict(), "optimizer": first.state_dict()})
        model, second = fresh()
        model.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        assert second.unreached == first.unreached
        assert begun + steps(model, second, range(stop, 7)) == selections
        assert same(weights(model), weights(whole))


def test_a_checkpoint_from_before_is_loaded_and_the_next_step_finds_what_is_reached():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2, seed=3), lr=1e-2)
    steps(model, optimizer, range(2))
    saved = optimizer.state_dict()
    del saved["selection"]["reach"]
    resumed = gs.BlockOptimizer(model, gs.Uniform(count=2, seed=3), lr=1e-2)
    resumed.load_state_dict(saved)
    assert resumed.unreached == ()
    steps(model, resumed, range(2, 6))
    assert resumed.unreached == DEAD


def test_gradient_accumulation_looks_at_the_whole_window():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=3), lr=1e-2, accumulation_steps=2)
    model(tokens(0), pictures=True).backward()
    model(tokens(1), expert=1).backward()
    optimizer.step()
    optimizer.zero_grad()
    steps(model, optimizer, range(1, 2), passes=2, pictures=True, expert=1)
    assert optimizer.unreached == ("pooler", "expert_0")


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_gradient_scaler_finds_a_gradient_in_a_step_that_selected_only_unreached_blocks(order):
    model = parts()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0)
    optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=1, order=order), lr=1e-2, grad_scaler=scaler)
    for number in range(4):
        scaler.scale(model(tokens(number))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.unreached == DEAD
    assert optimizer.num_steps == (4 if order == "ascending" else 3)
    assert not any(optimizer.update_counts[name] for name in DEAD)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_reached(use_reentrant):
    class Checkpointed(Parts):
        def forward(self, tokens, **batch):
            hidden = self.tokens(tokens)
            for layer in self.layers:
                hidden = checkpoint(layer, hidden, use_reentrant=use_reentrant)
            return self.head(self.norm(hidden)).square().mean()

    torch.manual_seed(0)
    model = Checkpointed()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), always="embedding", lr=1e-2)
    steps(model, optimizer, range(6))
    assert optimizer.unreached == DEAD


def num_probes(model: nn.Module) -> int:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(type(hook).__name__ == "_Probe" for hook in hooks)


def test_a_copy_has_no_probes_and_a_closed_or_dropped_optimizer_leaves_none():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.0",)), lr=1e-2)
    assert num_probes(model) > 2
    assert num_probes(copy.deepcopy(model)) == 0
    steps(model, optimizer, range(2))
    assert num_probes(model) == 2
    optimizer.close()
    assert num_probes(model) == 0
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.0",)), lr=1e-2)
    del optimizer
    model.requires_grad_(False)
    assert not model(tokens(0)).requires_grad


def test_closed_and_used_again_it_knows_what_it_knew():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), lr=1e-2)
    with optimizer:
        steps(model, optimizer, range(4))
    assert optimizer.unreached == DEAD
    with optimizer:
        steps(model, optimizer, range(4, 6))
        assert num_probes(model) == 2
    assert optimizer.unreached == DEAD


def frozen_while_closed(model, optimizer, name):
    optimizer.close()
    for block in gs.partition(model):
        for parameter in block.parameters:
            parameter.requires_grad_(block.name not in name)
    optimizer.reopen()


@pytest.mark.parametrize("num_before", [0, 3])
def test_blocks_that_the_user_freezes_while_it_is_closed_are_no_candidates(num_before, caplog):
    """The policy proposed them, nothing got a gradient, and 20 batches passed before it proposed another."""
    model = parts()
    policy = gs.Cyclic(every=1, count=1, order="ascending", among=("layer.*",))
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
    steps(model, optimizer, range(num_before))
    before = weights(model.layers[1])
    frozen_while_closed(model, optimizer, ("layer.1", "layer.3"))
    assert "2 of 5 blocks were frozen while the optimizer was closed, and are no candidates: layer.1, layer.3" in (
        caplog.text
    )
    selections = steps(model, optimizer, range(num_before, num_before + 6))
    assert {name for selection in selections for name in selection} == {"layer.0", "layer.2", "layer.4"}
    assert optimizer.num_steps == num_before + 6
    assert same(before, weights(model.layers[1]))
    assert not set(optimizer.unreached) & {"layer.1", "layer.3"}
    model.requires_grad_(True)
    frozen_while_closed(model, optimizer, ())
    selections = steps(model, optimizer, range(5))
    assert {name for selection in selections for name in selection} >= {"layer.1", "layer.3"}


def test_a_model_that_is_frozen_whole_while_it_is_closed_is_refused():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.0", "layer.1")), lr=1e-2)
    with pytest.raises(gs.UsageError, match=r"every block that may train was frozen .* layer\.0, layer\.1; thaw"):
        frozen_while_closed(model, optimizer, ("layer.0", "layer.1"))
    model.requires_grad_(True)
    optimizer.reopen()
    assert len(steps(model, optimizer, range(2))) == 2


def test_an_evaluation_without_gradients_tells_nothing():
    model = parts()
    optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-2)
    with torch.no_grad():
        model(tokens(0))
    optimizer.step()
    assert optimizer.unreached == ()
    assert optimizer.num_steps == 0


def test_outputs_keep_their_bits_and_may_change_in_place(caplog):
    model = parts()
    plain = model(tokens(0)).item()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("norm",)), lr=1e-2)
    assert model(tokens(0)).item() == plain
    hidden = model.tokens(tokens(0))
    hidden += 1
    del optimizer


def test_no_path_of_a_log_message_is_above_warning(caplog):
    with caplog.at_level(logging.ERROR, logger="gradselect"):
        steps(model := parts(), gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-2), range(3))
    assert caplog.messages == []
