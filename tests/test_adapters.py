"""The contract of every adapter of this package: it behaves as LoRA does in PEFT, and equals its dense twin."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_support import ADAPTERS, AdapterCase, disturbed, layers_of, trains, wrapped
from peft.utils import PeftType
from test_delta import round_trip
from test_integration_transformers import arguments, examples
from tiny_models import tiny_batch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer

import gradselect as gs
from gradselect.blocks import StepCost

pytestmark = [
    # PEFT asks transformers 5 for a property that was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
every = pytest.mark.parametrize("name", ADAPTERS)
NUM_STEPS = 3


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**tiny_batch(model, seed=0)).logits


def rest(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of everything that does not."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Function -----------------------------------------------------------------------------------------------------------


@every
def test_a_layer_computes_what_its_dense_twin_does(name: str) -> None:
    """Values, and gradients of the input and of every parameter of the adapter, in fp64."""
    case = ADAPTERS[name]
    for build in case.models:
        assert_equals_twin(case, case.adapted(model=build().double(), task_type=None))


def assert_equals_twin(case: AdapterCase, model: Any) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model):
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, generator=generator).requires_grad_()
        grad = torch.randn(2, 3, layer.out_features, dtype=torch.float64, generator=generator)
        ours, dense = layer(x), functional.linear(x, *case.twin(layer))
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
        found = [torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True) for y in (ours, dense)]
        assert any(each is not None for each in found[0][1:])
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_do_what_layer_and_adapter_do(name: str, dtype: torch.dtype) -> None:
    """In fp32 to 1e-5. Asked back, the plain weights are those of before, bit for bit."""
    case = ADAPTERS[name]
    for build in case.models:
        model = case.adapted(model=build().to(dtype).eval(), task_type=None)
        assert {each.dtype for each in trains(model).values()} == {torch.float32}
        base, unmerged = rest(model), logits(model)
        with model.disable_adapter():
            plain = logits(model)
        assert (plain - unmerged).abs().max() > 1e-3
        model.merge_adapter(safe_merge=True)
        atol = 1e-5 if dtype == torch.float32 else 0.1 * float(unmerged.abs().max())
        torch.testing.assert_close(logits(model), unmerged, rtol=0, atol=atol)
        with model.disable_adapter():  # takes the adapter out again
            assert torch.equal(logits(model), plain)
        assert same(rest(model), base)
        merged = model.merge_and_unload()
        assert not layers_of(merged)
        torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=atol)


@every
def test_merging_into_a_model_in_fp64_rounds_to_fp64(name: str) -> None:
    """It rounded to fp32."""
    case = ADAPTERS[name]
    for build in case.models:
        model = case.adapted(model=build().double().eval(), task_type=None)
        unmerged = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), unmerged, rtol=0, atol=1e-13)


@every
def test_a_new_adapter_changes_nothing(name: str) -> None:
    case = ADAPTERS[name]
    model = case.adapted(noise=0)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model), plain) == case.is_neutral


@every
def test_the_number_of_parameters_is_the_papers(name: str) -> None:
    case = ADAPTERS[name]
    model = case.adapted()
    assert sum(each.numel() for each in trains(model).values()) == case.count(model) > 0
    assert all(case.config.method + "_" in each for each in trains(model))


@every
def test_no_matrix_as_large_as_a_weight_is_built(name: str) -> None:
    """In a forward and backward pass with few rows nothing that is made reaches the size of a weight."""
    model = ADAPTERS[name].adapted()
    layer = max(layers_of(model), key=lambda each: each.in_features)
    size = min(layer.in_features, layer.out_features) ** 2
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            # A view of the layer's weight is not made.
            known = {each.untyped_storage().data_ptr() for each in model.parameters()}
            made.extend(
                each.numel()
                for each in torch.utils._pytree.tree_leaves(result)
                if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in known
            )
            return result

    x = torch.randn(1, layer.in_features, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert made
    assert max(made) < size


# PEFT ---------------------------------------------------------------------------------------------------------------


@every
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    """Through PEFT and through transformers, which both find the method by its name; also with a head beside it."""
    case = ADAPTERS[name]
    model = case.adapted(modules_to_save=["lm_head"], target_modules=case.targets)
    assert any(".modules_to_save." in each for each in trains(model))
    model.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(case.build(), tmp_path, is_trainable=True)
    assert same(trains(loaded), trains(model))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"] == model.peft_config["default"]
    case.build().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    theirs: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(theirs.merge_and_unload()), logits(model.merge_and_unload()))


@every
def test_transformers_loads_a_folder_with_an_adapter(name: str, tmp_path: Path) -> None:
    case = ADAPTERS[name]
    case.build().save_pretrained(tmp_path / "base")
    model = case.adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    if case.is_shared:
        pytest.skip("transformers injects layers without PEFT's model, where shared weights live")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(theirs), logits(model))


@every
def test_on_a_bf16_model_only_what_is_active_trains(name: str, tmp_path: Path) -> None:
    """PEFT casts adapters to fp32 and makes their parameters anew."""
    case = ADAPTERS[name]
    model = case.adapted(model=case.build().to(torch.bfloat16))
    assert {parameter.dtype for parameter in trains(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(case.build().to(torch.bfloat16), tmp_path)
    assert not trains(loaded)
    model.add_adapter("second", case.make())
    assert not any(".second" in each for each in trains(model))


@every
def test_adapters_with_the_same_object_of_settings_are_two(name: str) -> None:
    """LoRTA found an adapter by its settings: a second one with them took the first one's factors away."""
    case = ADAPTERS[name]
    config = case.make()
    model = disturbed(wrapped(case.build(), config), 0.3)
    first = logits(model)
    model.add_adapter("second", config)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert all(".second" in each for each in trains(model))


class Scaled(nn.Linear):
    """A layer with weights of 8-bit floats, which are its matrix only after they are multiplied by a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.scale = layer.weight.detach().abs().max() / 448
        weight = (layer.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.float() * self.scale, self.bias)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "hiwi"])  # which changes biases only
def test_weights_of_8_bit_floats_are_adapted_and_not_merged(name: str) -> None:
    """Merging ignored their scale, and the merged model computed something else. LoRTA's factors had 8 bits too."""
    case = ADAPTERS[name]
    base: Any = case.build()
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] != "lm_head":
            setattr(base.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], Scaled(module))
    model = case.adapted(model=base)
    assert {each.dtype for each in trains(model).values()} == {torch.float32}
    adapted = logits(model)
    with pytest.raises(gs.UsageError, match="has quantised weights, which cannot take an adapter"):
        model.merge_adapter()
    assert torch.equal(logits(model), adapted)


@every
def test_several_adapters_live_in_one_model(name: str) -> None:
    case = ADAPTERS[name]
    model = case.adapted()
    first = logits(model)
    model.add_adapter("second", case.make())
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert all(".second" in each for each in trains(model))
    disturbed(model, 0.2, seed=2)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    if not case.is_shared:
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second" in each for each, _ in model.named_parameters())


@every
def test_its_type_is_one_of_pefts(name: str) -> None:
    config = ADAPTERS[name].make()
    kind: Any = PeftType(name.upper())
    assert config.peft_type is kind is getattr(PeftType, name.upper())
    assert kind in list(PeftType)
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert type(peft.get_peft_config({"peft_type": name.upper(), "task_type": "CAUSAL_LM"})) is type(config)


# Training -----------------------------------------------------------------------------------------------------------


def step(model: Any, optimizer: Any, seed: int) -> None:
    model(**tiny_batch(model, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@every
def test_only_the_adapter_moves(name: str) -> None:
    model = ADAPTERS[name].adapted(noise=0.1)
    before, base = trains(model), rest(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(NUM_STEPS):
        step(model, optimizer, seed)
    assert same(rest(model), base)
    assert not any(torch.equal(value, before[each]) for each, value in trains(model).items())


@every
def test_id3_trains_some_entries_of_it_and_leaves_the_others_bit_identical(name: str) -> None:
    model = ADAPTERS[name].adapted(noise=0.1)
    before, base = trains(model), rest(model)
    optimizer = gs.SparseOptimizer(model, mask=gs.ID3(budget=6, steps=NUM_STEPS), lr=1e-2, weight_decay=0.1)
    for seed in range(NUM_STEPS):
        step(model, optimizer, seed)
    after = {each: model.get_parameter(each).detach() for each in before}
    assert 0 < sum(int((after[each] != before[each]).sum()) for each in before) <= 6
    assert all(torch.equal(model.get_parameter(each), value) for each, value in base.items())


@every
def test_full_fine_tuning_would_not_cost_what_it_adds(name: str) -> None:
    case = ADAPTERS[name]
    model, base = case.adapted(), case.build()
    costs = [StepCost.of_model(each, gs.partition(each)) for each in (model, base)]
    assert costs[0].full == costs[1].full
    assert costs[0].total == costs[1].total + costs[0].num_adapted


@every
def test_its_patches_have_the_names_of_its_file(name: str) -> None:
    case = ADAPTERS[name]
    model, follower = (case.adapted(noise=0.1) for _ in range(2))
    optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    step(model, optimizer, 0)
    patch = optimizer.changed_entries()
    assert set(patch) == set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    gs.delta.apply_patch(follower, patch)
    assert same(trains(follower), trains(model))


@every
def test_a_delta_holds_what_it_changed(name: str, tmp_path: Path) -> None:
    case = ADAPTERS[name]
    case.build().save_pretrained(tmp_path / "base")
    case.adapted().merge_and_unload().save_pretrained(tmp_path / "tuned")
    assert round_trip(tmp_path, tmp_path / "base", tmp_path / "tuned")


@every
def test_the_trainer_trains_it_and_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    case = ADAPTERS[name]

    def start(folder: Path, *, resume: Path | None = None) -> Trainer:
        model = case.adapted(noise=0.1)
        trainer = Trainer(
            model=model,
            args=arguments(folder, max_steps=4, save_strategy="steps", save_steps=2),
            train_dataset=examples(16),
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole = start(tmp_path / "whole")
    resumed = start(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-2")
    ours, theirs = (trains(each.model) for each in (whole, resumed))  # pyright: ignore[reportArgumentType]
    assert same(ours, theirs)
    assert not same(ours, trains(case.adapted(noise=0.1)))
