"""The suites on SmolLM2: valid, with grids alike, twins that differ in the policy alone, and methods that start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama

from gradselect import BlockOptimizer
from gradselect.app.compare import load_suite
from gradselect.app.compare.suite import slug
from gradselect.app.recipe import AbstractAdapterMethod, FullMethod

REPOSITORY = Path(__file__).resolve().parent.parent
SUITES = {
    name: load_suite(REPOSITORY / "suites" / f"{name}.yaml")
    for name in ("smollm2", "smollm2-half", "smollm2-memory", "e2e")
}
STEPS = load_suite(REPOSITORY / "suites" / "smollm2-steps.yaml")
METHODS = {name: entry.method for suite in SUITES.values() for name, entry in suite.methods.items()}
TWINS = [
    name for name in METHODS if name.startswith("AdaGradSelect") and name.replace("AdaGradSelect", "uniform") in METHODS
]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_full_a_budget_and_files_that_it_makes(name: str) -> None:
    suite = SUITES[name]
    assert suite.name == name
    assert suite.budget is not None
    assert (suite.budget.time_of, suite.budget.share) == ("full", 0.5 if name in ("smollm2-half", "e2e") else 1)
    assert (suite.recipe.run.steps, suite.recipe.run.batch_size, suite.recipe.model.dtype) == (72, 16, "bfloat16")
    made = {Path(str(preparation.makes)).parent for preparation in suite.prepare}
    evaluations = [*suite.evaluations.values(), *suite.forgetting.values()]
    read = [suite.recipe.data.path, *(evaluation.data for evaluation in evaluations)]
    assert {Path(path).parent for path in map(str, read)} <= {*made, Path("suites")}
    assert Path(suite.recipe.model.path).parent in made
    for preparation in suite.prepare:
        assert (REPOSITORY / preparation.command.split()[1]).is_file()


def test_half_is_the_same_comparison_in_half_of_the_time() -> None:
    assert SUITES["smollm2-half"].methods == SUITES["smollm2"].methods
    assert SUITES["smollm2-half"].recipe == SUITES["smollm2"].recipe


def test_steps_has_the_methods_of_the_others_in_half_of_the_steps_without_a_budget() -> None:
    whole = SUITES["smollm2"]
    assert STEPS.budget is None
    assert STEPS.recipe == whole.recipe.model_copy(update={"run": whole.recipe.run.model_copy(update={"steps": 36})})
    for name, entry in STEPS.methods.items():
        halved = {"explore_steps": 9} if hasattr(entry.method, "explore_steps") else {}
        assert entry.method == whole.methods[name].method.model_copy(update=halved), name
        assert entry.rates == whole.methods[name].rates, name


def test_on_a_gpu_are_the_same_methods_at_rates_around_the_best_of_a_cpu() -> None:
    on_gpu, whole = load_suite(REPOSITORY / "suites" / "smollm2-gpu.yaml"), SUITES["smollm2"]
    on_cpu = whole.recipe.model_copy(update={"model": whole.recipe.model.model_copy(update={"attention": "auto"})})
    assert (on_gpu.recipe, on_gpu.seeds, on_gpu.search) == (on_cpu, 3, None)
    for name, entry in on_gpu.methods.items():
        assert entry.method == whole.methods[name].method, name
        (best,) = {
            float(path.name.split(".lr-")[1].split(".seed")[0])
            for path in (REPOSITORY / "benchmarks" / "results" / "smollm2").glob(f"{slug(name)}.lr-*.score.json.gz")
        }
        assert entry.rates == pytest.approx((best / 2, best, 2 * best)), name


@pytest.mark.parametrize("name", SUITES)
def test_grids_hold_four_rates_a_factor_of_two_apart(name: str) -> None:
    for method, entry in SUITES[name].methods.items():
        rates = entry.rates
        assert [rate / rates[0] for rate in rates] == pytest.approx([1, 2, 4, 8]), method


def test_methods_of_one_name_are_the_same_in_all_suites() -> None:
    for suite in (SUITES["e2e"], SUITES["smollm2-memory"]):
        shared = set(suite.methods) & set(SUITES["smollm2"].methods)
        assert {name: suite.methods[name] for name in shared} == {
            name: SUITES["smollm2"].methods[name] for name in shared
        }
    assert set(SUITES["e2e"].methods) <= set(SUITES["smollm2"].methods)


def test_a_suite_drops_an_evaluation_of_its_base_with_null() -> None:
    assert set(SUITES["smollm2"].evaluations) == {"solved", "transfer", "loss"}
    assert set(SUITES["e2e"].evaluations) == {"texts", "loss"}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_selects_as_many_from_the_same_blocks(name: str) -> None:
    own, twin = METHODS[name], METHODS[name.replace("AdaGradSelect", "uniform")]
    for key in ("fraction", "count", "blocks", "among", "always", "residency"):
        assert getattr(own, key) == getattr(twin, key), key


def test_what_explores_does_so_for_a_quarter_of_the_run() -> None:
    explored = {name: method.explore_steps for name, method in METHODS.items() if hasattr(method, "explore_steps")}
    assert len(explored) > 10
    assert explored.pop("AdaGradSelect, the paper's") is None  # an epoch
    assert set(explored.values()) == {18}


def test_in_little_memory_selections_of_layers_keep_no_state() -> None:
    assert SUITES["smollm2-memory"].budget is not None
    assert SUITES["smollm2-memory"].budget.memory == 1_200_000_000
    for name, entry in SUITES["smollm2-memory"].methods.items():
        assert ("drop" in name) <= (getattr(entry.method, "residency", "") == "drop"), name


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=12, tied=True)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if not isinstance(method, AbstractAdapterMethod)]
)
def test_every_method_takes_two_steps(name: str, model: Any) -> None:
    method = METHODS[name]
    method = method.with_masters() if isinstance(method, FullMethod) else method
    copied = tiny_llama(layers=10, tied=True) if getattr(method, "parts", None) else model
    before = {key: value.clone() for key, value in copied.state_dict().items()}
    batch = tiny_batch(copied, seed=0)
    optimizer = method.make_optimizer(copied, lr=1e-2, num_steps=72)
    if isinstance(optimizer, BlockOptimizer):
        optimizer.policy.fill_explore_steps(62, run_steps=72)
    for _ in range(2 if name != "GRASS" else 5):  # GRASS only looks at first
        copied(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    after = copied.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before if key in after)


def test_ten_prompts_of_everyday_questions() -> None:
    assert {suite.samples.prompts for suite in SUITES.values() if suite.samples} == {"suites/chat-prompts.jsonl"}
    lines = (REPOSITORY / "suites" / "chat-prompts.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.keys() == {"prompt", "completion"} and all(row.values()) for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows) == 10
