"""The cost of a step by the formula, against torch's counter of FLOPs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from policy_support import make_blocks
from tiny_models import (
    tiny_batch,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    tiny_phi3,
    tiny_plain,
    tiny_qwen2,
    tiny_t5,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradselect as gs
from gradselect.blocks import StepCost, speed_up_limit

LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Products of linear layers. Attention's own are "bmm" or fused kernels, which the formula leaves out."""


def counted(model: nn.Module, *, seed: int = 0) -> float:
    """FLOPs per token of the linear layers' products in a forward and a backward pass."""
    batch = tiny_batch(model, seed=seed)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(product, 0) for product in LINEAR) / batch["input_ids"].numel()


def trains_only(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_llama(layers=2),
    "llama, tied": lambda: tiny_llama(layers=2, tied=True),
    "qwen2, biases": lambda: tiny_qwen2(layers=2, tied=False),
    "qwen2, tied": lambda: tiny_qwen2(layers=2),
    "plain, tied": lambda: tiny_plain(layers=3, tied=True),
    "phi3, o_proj before qkv_proj": lambda: tiny_phi3(layers=2),
}


@pytest.mark.parametrize("by", ["layer", "matrix"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_every_block_costs_what_torch_counts(build: Callable[[], nn.Module], by: str) -> None:
    """Exactly: each block alone, pairs of far ones, and all."""
    model = build()
    blocks = gs.partition(model, by=by)  # type: ignore[arg-type]
    cost = StepCost.of_model(model, blocks)
    names = [block.name for block in blocks]
    selections = (
        [[name] for name in names] + [[one, names[-1 - place]] for place, one in enumerate(names[:3])] + [names]
    )
    members = {block.name: block.parameter_names for block in blocks}
    full = counted(model)
    assert cost.full == full
    for selection in selections:
        trains_only(model, {each for name in set(selection) for each in members[name]})
        found = counted(model)
        assert cost.relative_time(set(selection)) * cost.full == pytest.approx(found, rel=1e-12), selection
    assert cost.relative_time(names) == 1


@pytest.mark.parametrize("by", ["layer", "matrix"])
@pytest.mark.parametrize("build", [lambda: tiny_gpt2(layers=2), lambda: tiny_bert(layers=2), lambda: tiny_t5(layers=2)])
def test_other_architectures_are_near(build: Callable[[], nn.Module], by: str) -> None:
    """Within 7 % of a full step, never below: BERT's norms come after its matrices, T5's decoder reads two inputs."""
    model = build()
    blocks = gs.partition(model, by=by)  # type: ignore[arg-type]
    cost = StepCost.of_model(model, blocks)
    assert cost.full == pytest.approx(counted(model), rel=0.05)
    for block in blocks:
        trains_only(model, set(block.parameter_names))
        difference = cost.relative_time([block.name]) - counted(model) / cost.full
        assert -1e-9 <= difference < 0.07, block.name


def test_slices_cost_their_own_entries() -> None:
    """Exactly, a slice of the lowest layer and two of different layers."""
    model = tiny_llama(layers=2)
    blocks = gs.partition(model, by="columns", parts=4)
    cost = StepCost.of_model(model, blocks)
    members = {block.name: block.parameter_names for block in blocks}
    for selection in (["layer.0.columns.1"], ["layer.1.columns.0", "layer.1.columns.3"], ["layer.0.vectors", "head"]):
        trains_only(model, {each for name in selection for each in members[name]})
        assert cost.relative_time(selection) * cost.full == pytest.approx(counted(model), rel=1e-12)


def test_an_adapter_costs_its_own_gradients_and_those_of_inputs() -> None:
    model = tiny_lora(layers=3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cost = StepCost.of_model(model, {name: (name,) for name in trained})
    base = StepCost.of_model(tiny_llama(layers=3), ())
    assert cost.full == base.full
    assert cost.relative_time(trained) == pytest.approx(counted(model) / cost.full, rel=0.01)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_factors_that_layers_share_cost_what_a_lora_of_their_rank_does() -> None:
    """Query, key and value of the lowest layer read the lowest product; the factors are in no layer."""
    from peft import LoraConfig, get_peft_model

    from gradselect.adapters import LortaConfig

    lora = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    costs, counts = [], []
    for config in (lora, LortaConfig(rank=3)):
        model: nn.Module = get_peft_model(tiny_llama(layers=2), config)  # type: ignore[assignment]
        trained = {name: (name,) for name, parameter in model.named_parameters() if parameter.requires_grad}
        cost = StepCost.of_model(model, trained)
        costs.append((cost.total, cost.full, cost.backward(trained)))
        counts.append(counted(model))
    assert costs[0] == costs[1]
    assert counts[0] == counts[1]


def test_attention_and_elementwise_work_are_what_the_formula_leaves_out() -> None:
    """On a tiny model with rows of 8 tokens: attention and rotations add 2 to 10 % to what torch counts."""
    model = tiny_llama(layers=3)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    batch = tiny_batch(model, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    everything = counter.get_total_flops() / batch["input_ids"].numel()
    cost = StepCost.of_model(model, gs.partition(model))
    assert 0.02 < everything / cost.full - 1 < 0.10


def test_a_tied_embedding_costs_the_head_and_a_lookup_nothing() -> None:
    tied, apart = tiny_llama(layers=3, tied=True), tiny_llama(layers=3)
    costs = [StepCost.of_model(model, gs.partition(model)) for model in (tied, apart)]
    head = 64 * 16
    assert costs[0].weight_gradients(["embedding"]) == 2 * head
    assert costs[1].weight_gradients(["embedding"]) == 0
    assert costs[0].input_gradients(["embedding"]) == costs[1].input_gradients(["embedding"]) == 2 * costs[1].total
    assert costs[1].input_gradients(["head"]) == 0
    assert costs[1].input_gradients(["norm"]) == costs[1].input_gradients(["norm", "head"]) == 2 * head


def test_frozen_weights_take_part_in_the_forward_pass() -> None:
    model = tiny_llama(layers=3)
    model.model.layers[0].requires_grad_(False)  # type: ignore[union-attr, operator]
    blocks = gs.partition(model)
    assert "layer.0" not in {block.name for block in blocks}
    cost = StepCost.of_model(model, blocks)
    assert cost.full == 6 * StepCost.of_model(tiny_llama(layers=3), ()).total
    assert cost.relative_time(["layer.1"]) == pytest.approx(counted_alone(model, "model.layers.1.") / cost.full)


def counted_alone(model: nn.Module, prefix: str) -> float:
    trains_only(model, {name for name, _ in model.named_parameters() if name.startswith(prefix)})
    return counted(model)


def test_blocks_alone_tell_layers_embedding_and_order() -> None:
    """Blocks of 1, 4, 9, ... entries: embedding, layer.0 to layer.4, norm."""
    cost = StepCost.of_blocks(make_blocks())
    sizes = {f"layer.{number}": (number + 2) ** 2 for number in range(5)} | {"norm": 49}
    assert cost.total == sum(sizes.values())
    assert cost.weight_gradients(["embedding", "layer.1"]) == 2 * 9
    assert cost.input_gradients(["layer.3"]) == 2 * (25 + 36 + 49)
    assert cost.input_gradients(["embedding"]) == 2 * cost.total
    assert cost.input_gradients([]) == 0


def test_the_lowest_matrix_of_a_layer_needs_no_gradient_of_its_input() -> None:
    model = tiny_llama(layers=2)
    cost = StepCost.of_model(model, gs.partition(model, by="matrix"))
    down, gate, key = (
        cost.input_gradients([f"layer.1.{name}"]) for name in ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj")
    )
    head, mlp, output = 2 * 64 * 16, 2 * 16 * 32, 2 * 16 * 16
    assert (down, gate, key) == (head, head + mlp, head + 3 * mlp + output)


def test_times_of_steps_are_averaged_not_their_speed_ups() -> None:
    model = tiny_llama(layers=3)
    blocks = gs.partition(model)
    cost = StepCost.of_model(model, blocks)
    full, fast = [block.name for block in blocks], ["layer.2"]
    assert speed_up_limit([full], cost) == 1
    assert speed_up_limit([full, fast], cost) == pytest.approx(2 / (1 + cost.relative_time(fast)))
    assert speed_up_limit([], cost) is None
