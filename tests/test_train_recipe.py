"""YAML and overrides become a checked recipe; each problem gets one line."""

from __future__ import annotations

import copy
import gzip
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import yaml

import gradselect
from gradselect import AbstractMask, AbstractPolicy, UsageError, masks, policies
from gradselect.app.compare import load_suite
from gradselect.app.recipe import (
    AbstractBlockMethod,
    AbstractFreeMaskMethod,
    dataclass_keys,
    dump_recipe,
    load_recipe,
    parse_recipe,
    todays_method,
    todays_recipe,
)
from gradselect.app.train import differences
from gradselect.methods.union import METHODS

VALUES: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"format": "text", "path": "a.txt"},
    "method": {"name": "adagradselect", "fraction": 0.2},
    "optimizer": {"lr": 1e-4},
    "run": {"output": "out", "steps": 3},
}


def write(folder: Path, values: Any = VALUES, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as raised:
        load_recipe(path, overrides)
    return str(raised.value)


def test_a_recipe_written_out_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert load_recipe(write(tmp_path, dump_recipe(recipe), "again.yaml")) == recipe


def test_overrides_replace_single_values(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path), ["optimizer.lr=3e-5", "optimizer.betas=[0.8, 0.9]", "method.always=[embedding]", "run.seed=7"]
    )
    assert recipe.optimizer.lr == 3e-5
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.method.always == ("embedding",)
    assert recipe.run.seed == 7
    assert recipe.method.fraction == 0.2


def test_a_tilde_in_an_override_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_recipe(write(tmp_path), ["run.output=~/out"]).run.output == "/home/me/out"


@pytest.mark.parametrize("order", [1, -1])
def test_another_method_drops_the_keys_of_the_old_one(tmp_path: Path, order: int) -> None:
    overrides = ["method.name=lora", "method.rank=64"][::order]
    method = load_recipe(write(tmp_path), overrides).method
    assert (method.name, method.rank) == ("lora", 64)


def test_a_recipe_writes_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", {name: VALUES[name] for name in ("data", "method", "optimizer")}, "base.yaml")
    path = write(
        tmp_path,
        {"base": "parts/base.yaml", "model": {"path": "m"}, "run": VALUES["run"], "method": {"fraction": 0.1}},
    )
    recipe = load_recipe(path)
    assert (recipe.method.name, recipe.method.fraction, recipe.optimizer.lr) == ("adagradselect", 0.1, 1e-4)


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"base": "recipe.yaml"})
    assert "its own base" in complaint(path)


def test_a_base_that_is_not_there_is_named_with_who_wanted_it(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, {"base": "nix.yaml"}))
    assert "nix.yaml: no such recipe" in said
    assert "recipe.yaml" in said


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown section": (["modle.path=x"], "modle: unknown key, did you mean 'model'?"),
    "unknown key": (["optimizer.weight_deacy=0"], "optimizer.weight_deacy: unknown key, did you mean 'weight_decay'?"),
    "unknown key of a method": (["method.fracton=0.1"], "method.fracton: unknown key, did you mean 'fraction'?"),
    "key of another method": (["method.rank=8"], "method.rank: unknown key"),
    "key of another format": (["data.prompt=x"], "data.prompt: unknown key"),
    "unknown method": (
        ["method.name=adagradselct"],
        "method.name = 'adagradselct': unknown, did you mean 'adagradselect'?",
    ),
    "a search as a method": (
        ["method.name=BIPEFT"],
        "method.name = 'BIPEFT': unknown; it is a search of layers and ranks: gradselect tune RECIPE --space adapters",
    ),
    "a method of the literature": (["method.name=ether+"], "method.name = 'ether+': unknown; write etherplus"),
    "a key of the adapter of a mask": (
        ["method={name: lora-sp, rank: 4}"],
        "method.rank: unknown key; it is one of the adapter: write method.adapter={rank: 4}",
    ),
    "a method in capitals": (["method.name=LORTA"], "method.name = 'LORTA': unknown, did you mean 'lorta'?"),
    "unknown format": (["data.format=chats"], "data.format = 'chats': unknown, did you mean 'chat'?"),
    "no method": (["method=null"], "method = None: input should be"),
    "nothing": (["model.path="], "model.path = None: input should be a valid string"),
    "fraction of zero": (["method.fraction=0"], "fraction=0.0 is outside (0, 1]"),
    "fraction above one": (["method.fraction=1.5"], "fraction=1.5 is outside (0, 1]"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr = -1: input should be greater than 0"),
    "infinite rate": (["optimizer.lr=.inf"], "optimizer.lr = inf: input should be a finite number"),
    "text for a number": (["run.batch_size=many"], "run.batch_size = 'many': input should be a valid integer"),
    "unknown type": (["model.dtype=float16"], "model.dtype = 'float16': input should be 'float32' or 'bfloat16'"),
    "two lengths": (["run.epochs=2", "run.steps=3"], "got steps=3 and epochs=2.0; give one of them"),
    "no length": (["run.steps=null"], "got steps=None and epochs=None; give one of them"),
    "nothing to evaluate on": (["run.evaluate_every=5"], "add e.g. data.validation=0.02"),
    "open brace": (["data.text='{a'"], "a literal brace is written twice"),
    "no column": (["data.text='{}'"], "braces hold the plain name of a column"),
    "attribute": (["data.text='{a.b}'"], "braces hold the plain name of a column"),
    "second beta": (["optimizer.betas=[0.9, 1]"], "optimizer.betas.1 = 1: input should be less than 1"),
    "a method in place of its section": (["method=lora"], "input should be a section of keys; write method.name=lora"),
    "a model in place of its section": (
        ["model=base"],
        "model = 'base': input should be a section of keys; write model.path",
    ),
    "an optimizer": (["optimizer=adam"], "a section of keys; write optimizer.KEY=VALUE (known: lr, weight_decay, "),
    "section of text": (["run=3"], "run = 3: input should be"),
}


@pytest.mark.parametrize(("overrides", "said"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, overrides: list[str], said: str) -> None:
    heading, *problems = complaint(write(tmp_path), *overrides).splitlines()
    assert "recipe.yaml is no valid recipe" in heading
    assert len(problems) == 1
    assert said in problems[0]


def test_every_problem_has_a_line(tmp_path: Path) -> None:
    said = complaint(write(tmp_path), "method.name=x", "run.seed=-1", "model.dtyp=1")
    assert len(said.splitlines()) == 4


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "optimizer: missing" in complaint(write(tmp_path, {k: v for k, v in VALUES.items() if k != "optimizer"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b: c", "no valid YAML"),
        ("model: {path: m}\nmodel: {path: n}", "'model' stands twice"),
        ("run:\n  steps: 1\n  steps: 2", "'steps' stands twice"),
        ("- model", "expected the sections model, data, method, optimizer, run"),
        ("", "expected the sections"),
        ("!!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(write(tmp_path, text))


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "run.steps=[1", ""])
def test_an_override_without_key_or_value_is_refused(tmp_path: Path, override: str) -> None:
    assert repr(override) in complaint(write(tmp_path), override)


NAMED = {
    value.method_name: value
    for value in (*vars(policies).values(), *vars(masks).values())
    if isinstance(value, type) and issubclass(value, AbstractPolicy | AbstractMask) and value.method_name is not None
}


def method_class(name: str) -> Any:
    return next(method for method in METHODS if name in get_args(method.model_fields["name"].annotation))


@pytest.mark.parametrize("name", NAMED)
def test_a_method_has_every_setting_of_its_policy_or_mask_with_the_same_default(name: str) -> None:
    settings = {field.name: field.default for field in fields(NAMED[name]) if field.init and field.name != "seed"}
    keys = {key: info.default for key, info in method_class(name).model_fields.items()}
    shared = {*AbstractBlockMethod.model_fields, *AbstractFreeMaskMethod.model_fields, "name"} - {"among"}
    own = {key: default for key, default in keys.items() if key in settings or key not in shared}
    # `steps` is by default the number of steps of the run.
    assert own == {key: None if key == "steps" else default for key, default in settings.items()}


def test_methods_have_different_names() -> None:
    names = [name for method in METHODS for name in get_args(method.model_fields["name"].annotation)]
    assert len(names) == len(set(names))


def test_keys_of_a_dataclass_have_its_types_with_tuples_for_sequences() -> None:
    keys = dataclass_keys(gradselect.GradNormTopK, without=["seed"])
    assert keys["among"] == (tuple[str, ...] | None, None)
    assert keys["norm"] == (Literal["l2", "rms"], "l2")
    assert dataclass_keys(gradselect.Fixed) == {"blocks": (tuple[str, ...], ...)}
    assert list(dataclass_keys(gradselect.GMT)) == ["fraction", "scope", "among", "mask"]


# Old keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.units=matrix"], "method.units is now method.blocks: write method.blocks=matrix"),
        (
            ["method={name: fixed, blocks: [layer.0, norm]}"],
            "method.blocks: the names of blocks are now method.names: write method.names=[layer.0, norm]",
        ),
    ],
)
def test_an_old_key_is_refused_and_the_new_one_named(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in complaint(write(tmp_path), *overrides)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"name": "uniform", "units": "matrix"}, {"name": "uniform", "blocks": "matrix"}),
        ({"name": "fixed", "blocks": ["a"], "units": "layer"}, {"name": "fixed", "names": ["a"], "blocks": "layer"}),
        # A file from before `units` existed.
        ({"name": "fixed", "blocks": ["a"]}, {"name": "fixed", "names": ["a"]}),
        ({"name": "lora", "rank": 8}, {"name": "lora", "rank": 8}),
    ],
)
def test_a_method_in_an_old_file_gets_todays_keys(then: dict[str, Any], now: dict[str, Any]) -> None:
    assert todays_method(then) == now
    assert todays_method(now) == now
    assert todays_recipe({"method": then, "run": 1}) == {"method": now, "run": 1}


SUITES = Path(__file__).parents[1] / "suites"
RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("small*/*.lr-*.json.gz"))


def test_methods_of_all_committed_results_are_those_of_their_suites() -> None:
    suites = {name: load_suite(SUITES / f"{name}.yaml") for name in ("small", "small-equal-time", "small-variants")}
    assert len(RESULTS) > 60
    for path in RESULTS:
        own = json.loads(gzip.decompress(path.read_bytes()))["gradselect"]
        recipe = parse_recipe({**VALUES, "method": todays_method(own["method_settings"])}, source=path.name)
        if own.get("budget") is None:  # a budget scales the number of explore steps
            assert recipe.method == suites[own["suite"]].methods[own["method"]].method


def test_a_run_that_was_begun_with_old_keys_is_the_same_run(tmp_path: Path) -> None:
    now = {"recipe": load_recipe(write(tmp_path)).model_dump(mode="json"), "model": {}, "data": {}}
    then = copy.deepcopy(now)
    then["recipe"]["method"]["units"] = then["recipe"]["method"].pop("blocks")
    assert list(differences(then, now)) == []
    then["recipe"]["method"]["units"] = "matrix"
    assert list(differences(then, now)) == ["method.blocks: 'matrix' then, 'layer' now"]


def test_a_run_whose_held_out_rows_had_another_name_is_the_same_run() -> None:
    then, now = (
        {"recipe": {}, "model": {}, "data": {"validation": {"path": path, "fingerprint": "ab", "rows_used": 20}}}
        for path in ("a.jsonl [0.02 held out]", "a.jsonl (20 of 1,000 rows held out)")
    )
    assert list(differences(then, now)) == []


# Policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ({"name": "adagradselect", "count": 2, "delta": 3.0}, gradselect.AdaGradSelect(count=2, delta=3.0, seed=5)),
        ({"name": "gradnorm", "fraction": 0.5}, gradselect.GradNormTopK(fraction=0.5, seed=5)),
        ({"name": "uniform", "count": 1}, gradselect.Uniform(count=1, seed=5)),
        ({"name": "lisa"}, gradselect.Uniform(count=2, every=20, seed=5)),
        ({"name": "badam", "every": 7}, gradselect.Cyclic(every=7, among=("layer.*",), seed=5)),
        ({"name": "last", "count": 1}, gradselect.Fixed(("layer.1",))),
        ({"name": "fixed", "names": ["norm"]}, gradselect.Fixed(("norm",))),
    ],
)
def test_a_method_stands_for_a_policy(method: dict[str, Any], policy: gradselect.AbstractPolicy) -> None:
    parsed = parse_recipe({**VALUES, "method": method}, source="recipe").method
    assert isinstance(parsed, AbstractBlockMethod)
    made = parsed.policy(seed=5, block_names=["embedding", "layer.0", "layer.1", "norm"])
    assert (type(made), made.settings()) == (type(policy), policy.settings())


def test_residency_is_an_object() -> None:
    method = {"name": "uniform", "count": 1}
    kept, dropped = (
        parse_recipe({**VALUES, "method": {**method, "residency": name}}, source="recipe").method
        for name in ("keep", "drop")
    )
    assert isinstance(kept, AbstractBlockMethod)
    assert isinstance(dropped, AbstractBlockMethod)
    assert isinstance(kept.place(), gradselect.Keep)
    assert isinstance(dropped.place(), gradselect.Drop)


def test_badam_drops_state_and_lisa_trains_the_ends_always() -> None:
    badam = parse_recipe({**VALUES, "method": {"name": "badam"}}, source="recipe").method
    lisa = parse_recipe({**VALUES, "method": {"name": "lisa"}}, source="recipe").method
    assert badam.residency == "drop"
    assert lisa.always == ("embedding", "norm", "head")
