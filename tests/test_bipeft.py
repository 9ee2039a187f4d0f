"""BIPEFT: the relaxed model is the dense one, draws are honest, the set freezes once stable, the budget holds."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_gpt2, tiny_llama, tiny_t5
from torch.func import functional_call
from torch.nn import functional

from gradselect import UsageError
from gradselect.integrations.bipeft import AdapterSearch, Allocation, SearchSettings, budget_of_rank, sites_of
from gradselect.integrations.bipeft.relaxation import Gated, Relaxation, draw
from gradselect.integrations.bipeft.selection import Scores, Stability, best_set, fit_budget, to_drop, to_fix

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
RANKS = (1, 2, 4)


def with_lora(build=tiny_llama, **options):
    """A tiny model with a LoRA of rank 4 whose `up` is not zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    settings["fan_in_fan_out"] = build is tiny_gpt2
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(build(layers=2), LoraConfig(**settings))
        for site in sites_of(model):
            torch.nn.init.normal_(site.up.weight, std=0.1)
    return model


def settings(**changes):
    return SearchSettings(**{"budget": 400, "num_steps": 20, "ranks": RANKS, "begin": 0.0, **changes})


def searched(model, steps=None, **changes):
    search = AdapterSearch(model, settings(**changes))
    while not search.is_done and (steps is None or search.num_steps < steps):
        number = search.num_steps
        search.step([tiny_batch(model, seed=number)], tiny_batch(model, seed=1000 + number))
    return search


# the relaxed forward pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5, tiny_gpt2])
def test_the_gated_adapter_is_the_dense_update_and_so_are_its_gradients(build):
    """Twin: W + on * scale * sum over the ranks of p_r * B[:, :r] A[:r], as dense matrices, column by column."""
    model = with_lora(build).double()
    sites, names = sites_of(model), {name for name, _ in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(len(sites), generator=generator, dtype=torch.float64).requires_grad_()
    sizes = torch.rand(len(sites), len(RANKS), generator=generator, dtype=torch.float64).requires_grad_()
    relaxation = Relaxation(len(sites), settings())
    relaxation._columns = relaxation._columns.double()
    gated = Gated(sites)
    gated.set(relaxation.gates(on, sizes))
    batch = tiny_batch(model, seed=0)
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, [on, sizes])
    gated.close()

    dense = {}
    for index, site in enumerate(sites):
        name = next(n for n in names if n.endswith(f"{site.name}.base_layer.weight"))
        weight = model.get_parameter(name)
        update = torch.zeros(site.up.out_features, site.down.in_features, dtype=torch.float64)
        for choice, rank in enumerate(RANKS):
            for column in range(rank):
                outer = torch.outer(site.up.weight[:, column], site.down.weight[column])
                update = update + on[index] * sizes[index, choice] * site.scale * outer
        dense[name] = weight + (update.T if build is tiny_gpt2 else update)  # its layers are in x out
    with model.disable_adapter():
        expected = functional_call(model, dense, kwargs=batch).loss
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [on, sizes]), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().min() > 0


def test_without_a_search_the_model_is_as_before():
    model = with_lora()
    batch = tiny_batch(model, seed=0)
    before = model(**batch).loss
    search = AdapterSearch(model, settings())
    search._gated.set(torch.zeros(len(search.sites), 4))
    with model.disable_adapter():
        assert torch.equal(model(**batch).loss, before) is False
        without = model(**batch).loss
    assert torch.equal(model(**batch).loss, without)
    search.finish()
    assert torch.equal(model(**batch).loss, before)


def test_draws_are_exactly_one_hot_and_as_likely_as_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3).clone().requires_grad_()
    drawn = draw(logits, temperature=1.7, generator=torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(-1), atol=0.03, rtol=0)


def test_the_gradient_of_a_draw_is_that_of_the_soft_draw():
    """Twin: the softmax of the same noise, element by element."""
    logits = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    noise = -torch.empty(1, 3).exponential_(generator=torch.Generator().manual_seed(5)).log()
    drawn = draw(logits, temperature=2.5, generator=torch.Generator().manual_seed(5))
    (ours,) = torch.autograd.grad(drawn[0, 1], logits)
    soft = [math.exp(value / 2.5) for value in (logits.detach() + noise)[0].tolist()]
    soft = [value / sum(soft) for value in soft]
    expected = [soft[1] * ((i == 1) - soft[i]) / 2.5 for i in range(3)]
    torch.testing.assert_close(ours[0], torch.tensor(expected))


def test_the_temperature_falls_along_a_line():
    ours = settings(num_steps=5, temperatures=(5.0, 1.0))
    assert [ours.temperature(step) for step in range(5)] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert settings(num_steps=1).temperature(0) == 5.0


# the two levels ---------------------------------------------------------------------------------------------


def test_layers_and_ranks_are_searched_in_turns_and_weights_stay_in_the_architecture_step():
    model = with_lora()
    search = AdapterSearch(model, settings(pull=0.0))
    moved = []
    for number in range(4):
        # Without decay a logit moves only if the loss of this step has a gradient for it.
        search._logits_optimizer = torch.optim.SGD([search.relaxation.switches, search.relaxation.sizes], lr=1.0)
        before = [logits.detach().clone() for logits in (search.relaxation.switches, search.relaxation.sizes)]
        weights = [site.down.weight.detach().clone() for site in search.sites]
        search._architecture_step(tiny_batch(model, seed=number))
        assert all(torch.equal(site.down.weight, old) for site, old in zip(search.sites, weights, strict=True))
        after = (search.relaxation.switches, search.relaxation.sizes)
        moved.append([not torch.equal(old, new) for old, new in zip(before, after, strict=True)])
        search.num_steps += 1
    assert moved == [[True, False], [False, True]] * 2


def test_the_weight_step_has_the_mean_gradient_and_loss_of_its_batches(monkeypatch):
    """Twin: the mean of the losses in one backward pass. All layers are on, so that the draws are the same."""
    model = with_lora()
    search = AdapterSearch(model, settings())
    monkeypatch.setattr(search.relaxation, "draw_switches", lambda step: torch.ones(len(search.sites)))
    batches = [tiny_batch(model, seed=seed) for seed in range(3)]
    loss = search._weight_step(batches)
    ours = [site.up.weight.grad.clone() for site in search.sites]
    search._gated.set(search.relaxation.gates(torch.ones(len(search.sites)), search.relaxation.best_sizes()))
    expected = torch.stack([model(**batch).loss for batch in batches]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = torch.autograd.grad(expected, [site.up.weight for site in search.sites])
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)
        assert other.abs().max() > 1e-4


def test_the_weight_step_moves_only_what_trains():
    model = with_lora()
    search = AdapterSearch(model, settings())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    batch = tiny_batch(model, seed=0)
    search.step([batch, batch], batch)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    logits = [search.relaxation.switches.grad.clone(), search.relaxation.sizes.grad.clone()]
    search._weight_step([batch])
    now = (search.relaxation.switches.grad, search.relaxation.sizes.grad)
    assert all(map(torch.equal, logits, now))  # no gradient from the weights


def test_a_loss_that_is_not_finite_ends_the_search():
    model = with_lora()
    search = AdapterSearch(model, settings(), loss=lambda model, batch: model(**batch).loss * math.nan)
    with pytest.raises(UsageError, match="the validation loss of search step 1 is nan; lower the learning rate"):
        search.step([tiny_batch(model, seed=0)], tiny_batch(model, seed=1))


def test_the_same_seed_finds_the_same():
    first, second, other = (searched(with_lora(), seed=seed, num_steps=8).finish() for seed in (0, 0, 3))
    assert first == second
    assert first.ranks != other.ranks


# early selection --------------------------------------------------------------------------------------------


def test_scores_are_the_moving_average_of_the_sensitivity():
    """Twin: explicit sums."""
    torch.manual_seed(0)
    steps = [[[(torch.randn(2, 3), torch.randn(3, 2)) for _ in range(2)] for _ in range(2)] for _ in range(3)]
    scores, expected = Scores(torch.tensor([12.0, 24.0]).double(), decay=0.85), [0.0, 0.0]
    for train, validation in steps:
        scores.update(train, validation)
        for site, size in enumerate((12, 24)):
            cosines = []
            for ours, theirs in zip(train[site], validation[site], strict=True):
                dot = sum(float(a * b) for a, b in zip(ours.flatten(), theirs.flatten(), strict=True))
                cosines.append(dot / float(ours.norm() * theirs.norm()))
            sums = [sum(float(m.abs().sum()) for m in products[site]) for products in (train, validation)]
            value = (sums[0] + sum(cosines) / 2 * sums[1]) / size
            expected[site] = 0.85 * expected[site] + 0.15 * value
    assert scores.values.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_best_set_passes_over_what_does_not_fit_and_leaves_out_what_is_dropped():
    scores, costs = [4.0, 3.0, 2.0, 1.0], [10, 95, 20, 30]
    assert best_set(scores, costs, budget=60, allowed=[True] * 4) == [True, False, True, True]
    assert best_set(scores, costs, budget=60, allowed=[False, True, True, True]) == [False, False, True, True]


def test_a_set_is_stable_when_it_is_like_the_five_before_it():
    stability, settled, other = Stability(threshold=0.85), [True, True, False, False], [False, False, True, True]
    assert [stability.is_stable(settled) for _ in range(5)] == [False] * 5
    assert stability.is_stable(settled)
    assert not stability.is_stable(other)
    assert not stability.is_stable(settled)  # four of five cosines are 1, their mean is 0.8
    assert [stability.is_stable(settled) for _ in range(5)][-1]


def test_the_worst_are_dropped_up_to_the_amount_and_at_least_one():
    scores, costs, every = [3.0, 1.0, 2.0], [10, 10, 10], [True] * 3
    assert to_drop(scores, costs, amount=20, allowed=every) == [1, 2]
    assert to_drop(scores, costs, amount=1, allowed=every) == [1]
    assert to_drop(scores, costs, amount=1, allowed=[True, False, True]) == [2]
    assert to_drop(scores, costs, amount=0, allowed=every) == []


def test_the_ranks_that_move_least_are_fixed_first():
    still, moving = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[0.0, 0.9], [0.9, 0.0]])
    history = [torch.stack([moving[step], still[step]]) for step in range(2)]
    none = torch.zeros(2, dtype=torch.bool)
    # One of two likeliest ranks is the same: half of two, shared among one round or two.
    assert to_fix(history, is_fixed=none, rounds_left=1) == [1, 0]
    assert to_fix([history[0], history[0] * 1.1], is_fixed=none, rounds_left=2) in ([0], [1])
    assert to_fix(history, is_fixed=none, rounds_left=2) == []
    assert to_fix(history[:1], is_fixed=none, rounds_left=2) == []


def test_a_stable_set_freezes():
    """After the first round what is dropped stays off, and what is fixed stays at its rank."""
    model = with_lora()
    search = AdapterSearch(model, settings(num_steps=30, threshold=0.0))
    states = []
    while not search.is_done:
        batch = tiny_batch(model, seed=search.num_steps)
        search.step([batch], batch)
        states.append((search.relaxation.is_kept.clone(), search.relaxation.is_fixed.clone()))
    assert search._stable_from == 6  # the sixth set is the first that has five before it
    assert search.num_steps == 5 + search._settings.prunings
    for (kept, fixed), (kept_next, fixed_next) in itertools.pairwise(states):
        assert not (kept_next & ~kept).any()
        assert not (fixed & ~fixed_next).any()
    kept, fixed = states[-1]
    assert fixed.all()
    assert 0 < (~kept).sum() < len(kept)
    for step in range(50):
        on, sizes = search.relaxation.draw_switches(step), search.relaxation.draw_sizes(step)
        assert not on[~kept].any()
        assert torch.equal(sizes, search.relaxation.best_sizes())
    costs = search.relaxation.expected_costs(search._costs)
    assert (costs * kept).sum() < search._settings.budget + costs.max()  # `finish` takes care of the rest


def test_without_a_stable_set_the_scores_of_the_last_step_decide():
    found = searched(with_lora(), threshold=1.1, num_steps=10).finish()
    assert found.stable_from is None
    assert 0 < found.num_parameters <= 400


# the budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "budget"), [(tiny_llama, 33), (tiny_llama, 150), (tiny_llama, 1000), (tiny_t5, 400)])
def test_the_budget_holds_and_nothing_more_would_fit(build, budget):
    model = with_lora(build)
    sites = sites_of(model)
    found = searched(model, budget=budget, num_steps=12).finish()
    assert found.num_parameters <= budget
    config = found.lora_config(model.peft_config["default"])
    fresh = get_peft_model(build(layers=2), config)
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == found.num_parameters
    assert {site.name: site.down.out_features for site in sites_of(fresh)} == found.ranks
    assert {site.scale for site in sites_of(fresh)} == {2.0}
    for site in sites:
        rank = found.ranks.get(site.name, 0)
        steps = [higher - rank for higher in RANKS if higher > rank]
        assert not steps or found.num_parameters + site.num_parameters(rank=min(steps)) > budget


def test_what_is_too_much_is_dropped_from_the_lowest_score_and_the_rest_is_used():
    ours = settings(budget=100)
    assert fit_budget([4, 4, 4], [3.0, 1.0, 2.0], [10, 10, 10], ours) == [4, 2, 4]
    assert fit_budget([1, 0, 0], [1.0, 3.0, 2.0], [10, 10, 90], ours) == [4, 4, 0]
    assert fit_budget([4, 4, 4], [3.0, 1.0, 2.0], [10, 10, 10], settings(budget=80)) == [4, 0, 4]


def test_ranks_are_refused_that_do_not_fit_and_so_are_budgets():
    model = with_lora()
    sites = sites_of(model)
    least, whole = min(site.num_parameters(rank=1) for site in sites), budget_of_rank(sites, rank=4)
    for changes, complaint in [
        ({"ranks": (1, 8)}, "the LoRA has rank 4, and the ranks to search end in 8"),
        ({"budget": least - 1}, f"below the smallest layer, which takes {least} parameters at rank 1"),
        ({"budget": whole}, rf"holds rank 4 on all {len(sites)} layers \({whole:,} parameters\)"),
    ]:
        with pytest.raises(UsageError, match=complaint):
            AdapterSearch(model, settings(**changes))
    for changes, complaint in [
        ({"ranks": (4, 1)}, "must be positive and ascend"),
        ({"ranks": ()}, "must be positive and ascend"),
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"begin": 1.0}, "begin=1.0 must be"),
        ({"temperatures": (5.0, 0.0)}, "must be above 0"),
    ]:
        with pytest.raises(UsageError, match=complaint):
            settings(**changes)


def test_models_without_a_plain_lora_are_refused():
    with pytest.raises(UsageError, match="needs a model with a LoRA, not LlamaForCausalLM"):
        AdapterSearch(tiny_llama(layers=2), settings())
    with pytest.raises(UsageError, match="has no plain LoRA; turn off use_dora"):
        sites_of(get_peft_model(tiny_llama(layers=2), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)))
    embedding = get_peft_model(tiny_llama(layers=2), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(UsageError, match="embed_tokens has no pair of linear layers as its LoRA"):
        sites_of(embedding)
    uneven = get_peft_model(
        tiny_llama(layers=2), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 3})
    )
    with pytest.raises(UsageError, match="differ in alpha / rank"):
        AdapterSearch(uneven, settings(budget=100))


def test_a_site_with_signal_beats_one_without():
    """Only one layer can lower the loss; the search gives the budget to it."""
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.useful, self.idle = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.useful(x) + 0.001 * self.idle(x)

    model = get_peft_model(Two(), LoraConfig(r=4, lora_alpha=8, target_modules=["useful", "idle"]))
    target = torch.randn(8, 8)

    def loss(model, batch):
        return functional.mse_loss(model(batch), batch @ target)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    search = AdapterSearch(model, settings(budget=64, num_steps=60), loss=loss, optimizer=optimizer)
    while not search.is_done:
        search.step([torch.randn(16, 8)], torch.randn(16, 8))
    assert search.finish().ranks == {"useful": 4}


def test_an_allocation_says_its_ranks_as_peft_s_options():
    found = Allocation(
        ranks={"a.q": 4, "b.q": 4, "b.v": 1},
        num_parameters=9,
        budget=9,
        num_sites=4,
        stable_from=1,
        num_steps=2,
        scale=0.5,
    )
    assert found.options() == {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["a.q", "b.q", "b.v"],
        "rank_pattern": {"b.v": 1},
        "alpha_pattern": {"b.v": 0.5},
    }
