"""Models of several stacks: the language model's blocks are found by their short names, in presets too."""

from __future__ import annotations

import pytest
import tiny_models
from pydantic import TypeAdapter

import gradselect as gs
from gradselect.methods import AbstractBlockMethod, Method

COMPOSITE = {
    "gemma3": (tiny_models.tiny_gemma3_vision, "language_model"),
    "qwen2_vl": (tiny_models.tiny_qwen2_vl, "language_model"),
    "smolvlm": (tiny_models.tiny_smolvlm, "text_model"),
}
each_model = pytest.mark.parametrize(("build", "label"), COMPOSITE.values(), ids=COMPOSITE)


def preset(name: str, model, **settings: object) -> gs.BlockOptimizer:
    """The optimizer that the command builds for a preset, with the default blocks."""
    method = TypeAdapter(Method).validate_python({"name": name, **settings})
    assert isinstance(method, AbstractBlockMethod)
    blocks = gs.partition(model, by=method.blocks)
    names = [name for block in blocks for name in (block.name, *block.aliases)]
    return gs.BlockOptimizer(model, method.policy(seed=0, block_names=names), always=method.always, blocks=blocks)


@each_model
def test_the_language_models_blocks_have_short_aliases_and_no_others(build, label):
    blocks = gs.partition(build())
    short = {alias for block in blocks for alias in block.aliases}
    assert {"embedding", "layer.0", "layer.1", "layer.2", "norm"} <= short
    assert all(block.name.startswith(label) for block in blocks if block.aliases)


@each_model
@pytest.mark.parametrize("name", ["lisa", "badam", "misa", "grass"])
def test_presets_select_among_the_layers_of_the_language_model(build, label, name):
    settings = {"count": 2} if name == "grass" else {}
    policy = preset(name, build(), **settings).policy
    assert {block.split(".layer.")[0] for block in policy.names} == {label}
    assert {block.split(".")[2] for block in policy.names} == {"0", "1", "2"}


@each_model
def test_lisa_always_trains_embedding_norm_and_head_of_the_language_model(build, label):
    always = preset("lisa", build())._always
    assert {f"{label}.embedding", f"{label}.norm"} <= set(always)
    assert not any(name.startswith("vis") for name in always)


def test_the_last_layers_are_those_of_the_language_model():
    assert preset("last", tiny_models.tiny_qwen2_vl()).trainable == ("language_model.layer.1", "language_model.layer.2")


@pytest.mark.parametrize("build", [tiny_models.tiny_t5, tiny_models.tiny_bart, tiny_models.tiny_llama])
def test_encoder_decoders_and_single_stacks_have_no_short_names(build):
    assert {alias for block in gs.partition(build()) for alias in block.aliases} <= {"head"}


def test_in_a_single_stack_lisa_selects_among_everything_as_before():
    policy = preset("lisa", tiny_models.tiny_llama()).policy
    assert policy.settings()["among"] is None
