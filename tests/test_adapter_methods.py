"""Adapters of this package: what is refused, what is theirs alone, and recipes that name them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_support import ADAPTERS, disturbed, layers_of, trains, wrapped
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, peft_types
from test_integration_transformers import arguments, examples
from tiny_models import tiny_bert, tiny_llama
from torch import nn
from torch.nn import Parameter
from train_fixtures import assert_same_weights, build, parse, quiet, train_until, weights
from transformers import AutoModelForCausalLM, Trainer

from gradselect import UsageError, adapters
from gradselect.adapters.registration import register
from gradselect.app.export import export_gguf, model_card, read_exported
from gradselect.app.models import load_weights, merge_command
from gradselect.app.train import train
from gradselect.methods import parse_method

pytestmark = [
    # TRL 1.16 uses names that transformers 5.23 has replaced.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
every = pytest.mark.parametrize("name", ADAPTERS)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return classes of modules, and weights with the information if they train."""
    modules = {name: type(module) for name, module in model.named_modules()}
    return modules | {name: (each.detach().clone(), each.requires_grad) for name, each in model.named_parameters()}


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert torch.equal(after[name][0], value[0])
            assert after[name][1] == value[1]
        else:
            assert after[name] is value


# What is refused ----------------------------------------------------------------------------------------------------

BAD_TARGETS = {
    "nothing": (["no_such"], r"target_modules=\['no_such'\] matches no layer.*LlamaForCausalLM has.*'q_proj'"),
    "one of two": (["q_proj", "v_porj"], r"target_modules=\['v_porj'\] matches no layer.*nearest: 'v_proj'"),
    "pattern": (
        r".*\.no_such",
        r"target_modules='\.\*.*no_such' matches no layer.*(Write e\.g\. target_modules='all-linear'|Leave)",
    ),
    "norms": (["q_proj", "norm"], r"cannot change 'model.norm', which is of the class LlamaRMSNorm; it knows Linear"),
    "tied": (["q_proj", "lm_head"], r"'lm_head' shares its weight with another layer"),
}


@every
@pytest.mark.parametrize("case", BAD_TARGETS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_target_that_does_not_fit_is_refused_and_the_model_is_as_before(name: str, case: str) -> None:
    targets, message = BAD_TARGETS[case]
    if isinstance(targets, list) and not ADAPTERS[name].takes_linears:
        pytest.skip("its layers are others; see its own tests")
    model = tiny_llama(layers=2, tied=True)
    before = state_of(model)
    with pytest.raises(UsageError, match=message):
        wrapped(model, ADAPTERS[name].make(target_modules=targets))
    assert_as_before(model, before)
    assert not hasattr(model, "peft_config")


def layers_in(model: nn.Module) -> list[str]:
    """Return the numbers of the layers that have adapters."""
    return sorted({next(part for part in layer.path.split(".") if part.isdecimal()) for layer in layers_of(model)})


@every
@pytest.mark.parametrize("kind", ["default", "names", "paths", "pattern"])
def test_layers_to_transform_holds_whatever_the_targets_are(name: str, kind: str, tmp_path: Path) -> None:
    case = ADAPTERS[name]
    paths = [layer.path for layer in layers_of(case.adapted(target_modules=case.targets))]
    pattern = rf".*\.({'|'.join(case.targets)})"
    targets = {"names": case.targets, "paths": paths, "pattern": pattern}
    settings = {"target_modules": targets[kind]} if kind in targets else {}
    model = case.adapted(layers_to_transform=[1], **settings)
    assert layers_in(model) == ["1"]
    model.save_pretrained(tmp_path)
    assert layers_in(peft.PeftModel.from_pretrained(case.build(), tmp_path)) == ["1"]


@pytest.mark.parametrize("num_layers", [2, 3, 8])
def test_layers_to_transform_chooses_among_all_linear_layers_of_a_model_of_any_size(num_layers: int) -> None:
    model = wrapped(tiny_llama(layers=num_layers), ADAPTERS["ether"].make(layers_to_transform=[0, 1]))
    assert layers_in(model) == ["0", "1"]
    assert len(layers_of(model)) == 2 * 7
    model = wrapped(
        tiny_llama(layers=num_layers), ADAPTERS["ether"].make(layers_to_transform=1, layers_pattern="layers")
    )
    assert layers_in(model) == ["1"]


@every
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": [0, 7]}, r"names the layers \[7\], and \w+ has the layers \[0, 1\]"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "no numbered layers that layers_pattern finds"),
        ({"layers_to_transform": [0], "target_modules": ["lm_head"]}, r"in layers_to_transform=\[0\]"),
        ({"layers_pattern": "layers"}, r"which is left out; write e\.g\. layers_to_transform"),
    ],
)
def test_layers_that_are_not_there_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    model = ADAPTERS[name].build()
    before = state_of(model)
    with pytest.raises(UsageError, match=message):
        wrapped(model, ADAPTERS[name].make(**settings))
    assert_as_before(model, before)


def test_a_second_adapter_that_does_not_fit_leaves_the_first_as_it_was() -> None:
    case = ADAPTERS["ether"]
    model = case.adapted(target_modules=["q_proj"])
    before = state_of(model)
    for config in (case.make(num_blocks=3), case.make(target_modules=["q_proj", "norm"])):
        with pytest.raises(UsageError, match=r"does not divide|cannot change"):
            model.add_adapter("second", config)
        assert_as_before(model, before)
        assert list(model.peft_config) == ["default"]


SETTINGS = [
    (
        "ether",
        {"num_blocks": 3},
        r"num_blocks=3 does not divide the 16 inputs of .*write num_blocks=2",
    ),
    ("ether", {"num_blocks": 64}, r"num_blocks=64 does not divide the 16 inputs.*write num_blocks=8"),
    ("ether", {"num_blocks": 16}, r"num_blocks=16 leaves one number a block.* the 16 inputs of .*write num_blocks=8"),
    ("etherplus", {"num_blocks": 16}, r"leaves one number a block, which cannot train, of the 16 .*num_blocks=8"),
    ("etherplus", {"num_blocks": 32, "target_modules": ["down_proj"]}, "one number a block.*the 32 inputs.*=8"),
    ("etherplus", {"num_blocks": 0}, "num_blocks=0 is not a whole number from 1 on"),
    ("propulsion", {"degree": 0}, "degree=0 is not a whole number from 1 on"),
    ("propulsion", {"degree": 1.5}, "degree=1.5 is not a whole number"),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_a_setting_that_does_not_fit_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    model = tiny_llama(layers=2)
    before = state_of(model)
    with pytest.raises(UsageError, match=message):
        wrapped(model, ADAPTERS[name].make(**settings))
    assert_as_before(model, before)


def test_a_layer_of_a_single_output_takes_one_block_and_no_more() -> None:
    model = nn.Sequential(nn.Linear(6, 1))
    with pytest.raises(UsageError, match=r"num_blocks=2 does not divide the 1 outputs of '0'; write num_blocks=1"):
        peft.get_peft_model(model, adapters.EtherPlusConfig(target_modules=["0"], num_blocks=2))
    peft.get_peft_model(model, adapters.EtherPlusConfig(target_modules=["0"], num_blocks=1))


def test_attention_of_torch_which_never_calls_its_output_layer_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UsageError, match=r"cannot change 'attention.out_proj'"):
        peft.get_peft_model(model, adapters.EtherConfig(target_modules=["out_proj"]))


@every
def test_quantised_weights_take_no_adapter(name: str) -> None:
    model = ADAPTERS[name].adapted()
    layers = layers_of(model)
    layers[-1].get_base_layer().weight = Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="has quantised weights, which cannot take an adapter"):
        model.merge_and_unload()


def test_weights_that_would_not_be_finite_are_refused() -> None:
    model = ADAPTERS["propulsion"].adapted()
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.propulsion_scale_bias["default"][0] = torch.inf
    plain = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="would not be finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, plain)


# The extension point of PEFT ----------------------------------------------------------------------------------------


def load_registration() -> Any:
    """Import the file that registers methods once more, as in a new process."""
    path = Path(adapters.__file__).with_name("registration.py")
    spec = importlib.util.spec_from_file_location("registration_again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_peft_without_the_extension_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft_types, "register_peft_method")
    with pytest.raises(UsageError, match=r"cannot be extended.*pip install -U 'peft>=0\.20'"):
        load_registration()


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "peft.mapping")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'peft>=0\.20'"):
        load_registration()


@every
def test_a_method_that_peft_has_got_itself_is_pefts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ADAPTERS[name]
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType[name.upper()], peft.LoraConfig)
    register(case.config, None)  # leaves PEFT's
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]] is peft.LoraConfig
    with pytest.raises(UsageError, match=rf"has a method '{name}' of its own; use peft.*LoraConfig"):
        case.make()


# Theirs alone -------------------------------------------------------------------------------------------------------


def test_counts_of_ether_are_those_of_its_table_for_deberta() -> None:
    """Table 4: ETHER+ on all linear layers of DeBERTa-v3-base has 0.33 million, ETHER a quarter of that."""
    with torch.device("meta"):
        layer = nn.ModuleDict(
            {name: nn.Linear(768, 768) for name in "qkvo"} | {"up": nn.Linear(768, 3072), "down": nn.Linear(3072, 768)}
        )
        model = nn.ModuleList([layer for _ in range(1)])
    names = ["q", "k", "v", "o", "up", "down"]
    plus = peft.get_peft_model(model, adapters.EtherPlusConfig(target_modules=names), low_cpu_mem_usage=True)
    per_layer = sum(each.numel() for each in plus.parameters() if each.requires_grad)
    assert round(12 * per_layer / 1e6, 2) == 0.33
    one = peft.get_peft_model(plus.unload(), adapters.EtherConfig(target_modules=names), low_cpu_mem_usage=True)
    assert 4 * sum(each.numel() for each in one.parameters() if each.requires_grad) == per_layer


def test_a_reflection_keeps_lengths_and_is_its_own_inverse() -> None:
    model = ADAPTERS["ether"].adapted()
    for layer in layers_of(model):
        weight = layer.get_base_layer().weight.detach()
        once, _ = layer.transformed("default", weight, None)
        twice, _ = layer.transformed("default", once, None)
        torch.testing.assert_close(once.norm(dim=1), weight.norm(dim=1))
        torch.testing.assert_close(twice, weight, rtol=0, atol=1e-6)
        change, _ = layer.transformed("default", torch.eye(layer.in_features), None)
        assert float((change.detach() - torch.eye(layer.in_features)).norm()) == pytest.approx(2 * 4**0.5, rel=1e-5)


def test_a_bend_is_never_further_from_the_identity_than_a_reflection() -> None:
    layer = layers_of(ADAPTERS["etherplus"].adapted(noise=10))[0]
    unchanged = torch.eye(16)
    for bent in (layer.before("default", unchanged), layer.after("default", unchanged, unchanged)):
        assert 0.1 < float((bent.detach() - unchanged).norm()) <= 2 * 4**0.5 + 1e-5


def test_blocks_of_columns_have_their_own_normals() -> None:
    """With one normal changed only the columns of its block change; the authors' code changes rows."""
    layer = layers_of(ADAPTERS["ether"].adapted())[0]
    weight = layer.get_base_layer().weight
    before, _ = layer.transformed("default", weight, None)
    with torch.no_grad():
        layer.ether_u["default"][1] += 1
    after, _ = layer.transformed("default", weight, None)
    changed = (after != before).any(dim=0)
    assert changed.tolist() == [4 <= column < 8 for column in range(16)]


def test_the_trainer_leaves_the_scale_of_propulsion_out_of_weight_decay(tmp_path: Path) -> None:
    model = ADAPTERS["propulsion"].adapted(modules_to_save=["lm_head"])
    args = arguments(tmp_path, weight_decay=0.5)
    trainer = Trainer(model=model, args=args, train_dataset=examples(2))
    decayed = set(trainer.get_decay_parameter_names(model))
    scales = {name for name in trains(model) if "propulsion_" in name}
    assert scales
    assert not scales & decayed
    assert trains(model).keys() - scales <= decayed
    trainer.create_optimizer()
    named = {id(each): name for name, each in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        assert {named[id(each)] in scales for each in group["params"]} == {group["weight_decay"] == 0}


def test_decay_of_any_optimizer_pulls_propulsion_to_the_base_model() -> None:
    model = ADAPTERS["propulsion"].adapted(noise=0.5)
    layer = layers_of(model)[0]
    before = layer.scale("default").detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    sum(0 * each.sum() for each in model.parameters() if each.requires_grad).backward()  # pyright: ignore
    optimizer.step()
    after = layer.scale("default").detach()
    assert ((after - 1).abs() < (before - 1).abs()).all()


@pytest.mark.parametrize("degree", [1, 15])
def test_a_step_of_adamw_moves_the_factor_by_the_degree_times_the_rate(degree: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    adapted: Any = peft.get_peft_model(model, adapters.PropulsionConfig(target_modules=["0"], degree=degree))
    (layer,) = layers_of(adapted)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-4)
    adapted(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (layer.scale("default") - 1).abs().tolist() == pytest.approx([degree * 1e-4] * 3, rel=1e-2)


def test_propulsion_scales_embeddings_and_biases_too() -> None:
    model: Any = wrapped(
        tiny_bert(layers=2).eval(), adapters.PropulsionConfig(target_modules=["token_type_embeddings", "query"])
    )
    disturbed(model, 0.1)
    kinds = {type(layer.get_base_layer()) for layer in layers_of(model)}
    assert kinds == {nn.Embedding, nn.Linear}
    tokens = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        unmerged = model(**tokens).logits
        torch.testing.assert_close(model.merge_and_unload()(**tokens).logits, unmerged, rtol=0, atol=1e-5)


# Recipes ------------------------------------------------------------------------------------------------------------

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
RECIPES: dict[str, dict[str, Any]] = {
    "ether": {"num_blocks": 4},
    "etherplus": {},
    "propulsion": {"degree": 3},
    "lorta": {"rank": 2},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_merges_and_goes_on_after_a_stop(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": name, **RECIPES[name]}
    length = {"steps": 4, "save_every": 2}
    train(parse(place, method=method, run={"output": str(tmp_path / "whole"), **length}), console=quiet())
    if name == "etherplus":
        stopped = parse(place, method=method, run={"output": str(tmp_path / "stopped"), **length})
        train_until(stopped, step=3, monkeypatch=monkeypatch)
        train(stopped, console=quiet(), resume=True)
        assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    ours, before = weights(tmp_path / "whole"), weights(place / "model")
    assert ours.keys() == before.keys()
    changed = {each.split(".")[-2] for each in ours if not torch.equal(ours[each], before[each])}
    assert changed == (LINEARS if ADAPTERS[name].takes_linears else ATTENTION)
    saved = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == name.upper()
    # The adapter alone, as `gradselect evaluate` and `chat` load it.
    model, missing = load_weights(AutoModelForCausalLM, tmp_path / "whole" / "adapter", key="model")
    assert not missing
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = {"input_ids": torch.arange(3, 9)[None]}
    torch.testing.assert_close(model(**tokens).logits, merged(**tokens).logits, rtol=0, atol=1e-5)
    assert merge_command(tmp_path / "whole" / "adapter").startswith("python -c 'import gradselect.adapters; ")
    card = model_card(read_exported(tmp_path / "whole", adapter=True), name="you/adapter")
    assert "import gradselect.adapters" in card.split("from peft import")[0]
    with pytest.raises(UsageError, match=f"of the kind {name.upper()}, and GGUF has adapters of LoRA only"):
        export_gguf(read_exported(tmp_path / "whole", adapter=True))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "ether", "num_blocks": 3}, r"method: num_blocks=3 does not divide the 16 inputs"),
        ({"name": "propulsion", "targets": ["no_such"]}, r"method: targets=\['no_such'\] matches no layer"),
        ({"name": "peft", "type": "ETHER", "options": {"num_blocks": 3}}, "does not divide the 16 inputs"),
        ({"name": "lorta", "rank": 17}, "method: rank=17 is above the width of the projections, 16"),
        (
            {"name": "lorta", "targets": "all-linear"},
            "method: LoRTA adapts attention projections only; leave targets",
        ),
        ({"name": "hiwi"}, r"method: the MLP layers of a model of the type 'llama' are not known.*name: lora"),
        ({"name": "hiwi", "targets": ["up_proj"]}, r"method: HiWi.*up_proj' has no bias.*layers in targets whose"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    method: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build(place, tmp_path, method=method)


def test_id3_selects_among_the_entries_of_any_adapter(place: Path, tmp_path: Path) -> None:
    method = {"name": "id3", "budget": 20, "adapter": {"name": "etherplus", "num_blocks": 4}}
    trainer, inputs = build(place, tmp_path, method=method, optimizer={"warmup": 0})
    model: Any = trainer.model
    before = trains(model)
    trainer.train()
    after = {name: model.get_parameter(name).detach() for name in before}
    assert all("etherplus_" in name for name in before)
    assert 0 < sum(int((after[name] != before[name]).sum()) for name in before) <= 20
    assert inputs.model is model.get_base_model()


def test_the_adapter_of_a_mask_is_a_lora_unless_it_has_a_name() -> None:
    method: Any = parse_method({"name": "id3", "density": 0.1, "adapter": {"rank": 2}})
    assert (method.adapter.name, method.adapter.rank) == ("lora", 2)
    with pytest.raises(UsageError, match=r"method\.adapter\.name = 'ehter': unknown, did you mean 'ether'"):
        parse_method({"name": "id3", "density": 0.1, "adapter": {"name": "ehter"}})
