"""Every property of a partition, over models of every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradselect import Block, UsageError, partition
from gradselect.blocks.partitioning import resolve_names
from gradselect.blocks.structure import find_stacks


def layers(count: int, side: str = "") -> list[str]:
    return [f"{side}layer.{number}" for number in range(count)]


TIED = ["embedding", *layers(4), "norm"]
UNTIED = ["embedding", *layers(4), "norm", "head"]
ENCODER = ["embedding", *layers(4), "head"]


@dataclass(kw_only=True)
class Case:
    """A model, the names of its blocks in order, and those that have aliases."""

    build: Callable[[], nn.Module]
    blocks: list[str]
    aliases: dict[str, tuple[str, ...]]


def untied(model: nn.Module) -> nn.Module:
    """The model with a head of its own; how T5 1.1 comes from a checkpoint, whatever its config says."""
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.get_parameter("weight").detach().clone())
    return model


def case(build: Callable[[], nn.Module], blocks: list[str], **aliases: tuple[str, ...]) -> Case:
    return Case(build=build, blocks=blocks, aliases=aliases)


CASES = {
    "llama": case(tiny_models.tiny_llama, UNTIED),
    "llama, tied": case(lambda: tiny_models.tiny_llama(tied=True), TIED, embedding=("head",)),
    "llama, one layer": case(lambda: tiny_models.tiny_llama(layers=1), ["embedding", *layers(1), "norm", "head"]),
    "llama, twelve layers": case(lambda: tiny_models.tiny_llama(layers=12), ["embedding", *layers(12), "norm", "head"]),
    "llama, no head": case(lambda: tiny_models.tiny_llama().get_submodule("model"), ["embedding", *layers(4), "norm"]),
    "qwen2": case(tiny_models.tiny_qwen2, TIED, embedding=("head",)),
    "phi3": case(tiny_models.tiny_phi3, TIED, embedding=("head",)),
    "gemma": case(tiny_models.tiny_gemma, TIED, embedding=("head",)),
    "gemma2": case(tiny_models.tiny_gemma2, TIED, embedding=("head",)),
    "gpt2": case(tiny_models.tiny_gpt2, TIED, embedding=("head",)),
    "opt": case(tiny_models.tiny_opt, [*TIED, "project_out", "project_in"], embedding=("head",)),
    "bert": case(tiny_models.tiny_bert, ENCODER),
    "bert, classifier": case(tiny_models.tiny_bert_classifier, [*ENCODER, "pooler"]),
    "roberta": case(tiny_models.tiny_roberta, ENCODER),
    "t5": case(
        tiny_models.tiny_t5,
        ["embedding", *layers(3, "encoder."), "encoder.norm", *layers(3, "decoder."), "decoder.norm"],
        embedding=("head",),
    ),
    "t5, untied": case(
        lambda: untied(tiny_models.tiny_t5()),
        ["embedding", *layers(3, "encoder."), "encoder.norm", *layers(3, "decoder."), "decoder.norm", "head"],
    ),
    "bart": case(
        tiny_models.tiny_bart,
        ["embedding", *layers(3, "encoder."), *layers(3, "decoder.")],
        embedding=("head",),
    ),
    "mixtral": case(tiny_models.tiny_mixtral, ["embedding", *layers(3), "norm", "head"]),
    "qwen2-moe": case(tiny_models.tiny_qwen2_moe, ["embedding", *layers(3), "norm", "head"]),
    "lora": case(tiny_models.tiny_lora, layers(4)),
    "lora, whole modules": case(
        lambda: tiny_models.tiny_lora(modules_to_save=("embed_tokens", "norm", "lm_head")),
        ["embedding", *layers(4), "norm", "head"],
    ),
    "plain": case(tiny_models.tiny_plain, UNTIED),
    "plain, tied": case(lambda: tiny_models.tiny_plain(tied=True), TIED, embedding=("head",)),
    "sequential": case(tiny_models.tiny_sequential, UNTIED),
    "torch encoder-decoder": case(
        lambda: nn.Transformer(16, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=16, batch_first=True),
        [*layers(2, "encoder."), "encoder.norm", *layers(2, "decoder."), "decoder.norm"],
    ),
    "two models": case(
        lambda: nn.ModuleDict({"teacher": tiny_models.tiny_llama(), "student": tiny_models.tiny_gpt2(layers=2)}),
        [*(f"teacher.{name}" for name in UNTIED), *(f"student.{name}" for name in ["embedding", *layers(2), "norm"])],
        **{"student.embedding": ("student.head",)},
    ),
}


@pytest.fixture(params=CASES, scope="module")
def table(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(table: Case) -> nn.Module:
    return table.build()


def names_of(blocks: Iterable[Block]) -> list[str]:
    return [block.name for block in blocks]


def contents(blocks: Iterable[Block]) -> dict[str, tuple[str, ...]]:
    return {block.name: block.parameter_names for block in blocks}


def assert_complete_and_disjoint(model: nn.Module, blocks: tuple[Block, ...]) -> None:
    """Each parameter that trains stands in exactly one block, under its name and in the model's order."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = [pair for block in blocks for pair in zip(block.parameter_names, block.parameters, strict=True)]
    assert sorted(name for name, _ in pairs) == sorted(trained)
    assert all(trained[name] is parameter for name, parameter in pairs)
    order = list(trained)
    for block in blocks:
        assert block.parameters
        assert list(block.parameter_names) == sorted(block.parameter_names, key=order.index)


def has_unique_names(blocks: tuple[Block, ...]) -> bool:
    return len(set(names_of(blocks))) == len(blocks)


# every model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "matrix"])
def test_each_trained_parameter_stands_in_one_block(model, by):
    blocks = partition(model, by=by)
    assert_complete_and_disjoint(model, blocks)
    assert has_unique_names(blocks)


def test_blocks_are_named_and_ordered_as_the_model_is(model, table):
    assert names_of(partition(model)) == table.blocks


def test_tied_weights_give_aliases_and_nothing_else_does(model, table):
    assert {block.name: block.aliases for block in partition(model) if block.aliases} == table.aliases


def test_layer_blocks_hold_the_parameters_of_their_layer(model):
    """The number is that of the layer in its container; in a flat Sequential it counts from the first layer."""
    first = 1 if isinstance(model, nn.Sequential) else 0
    for block in partition(model):
        side, _, number = block.name.rpartition("layer.")
        if number.isdigit():
            assert all(str(int(number) + first) in name.split(".") for name in block.parameter_names)
            assert all(side in name for name in block.parameter_names)


def test_matrices_divide_the_layers_and_nothing_else(model):
    whole, fine = contents(partition(model)), contents(partition(model, by="matrix"))
    assert len(fine) > len(whole)
    for name, parameter_names in whole.items():
        parts = [part for part in fine if part == name or ("layer." in name and part.startswith(f"{name}."))]
        assert sorted(each for part in parts for each in fine[part]) == sorted(parameter_names)


def test_a_matrix_block_holds_one_matrix_and_vectors_of_its_module(model):
    for block in partition(model, by="matrix"):
        if "layer." in block.name:
            matrices = [parameter for parameter in block.parameters if parameter.ndim > 1]
            modules = {name.rpartition(".")[0] for name in block.parameter_names}
            if block.name.endswith(".vectors"):
                assert not matrices
            else:
                assert len(matrices) == len(modules) == 1


def test_an_optimizer_that_has_frozen_blocks_changes_nothing(table):
    model = table.build()
    for by in ("layer", "matrix"):
        before = partition(model, by=by)
        for parameter in (parameter for block in before[1:] for parameter in block.parameters):
            parameter.gradselect_frozen = True
            parameter.requires_grad_(False)
        after = partition(model, by=by)
        assert contents(after) == contents(before)
        assert [block.aliases for block in after] == [block.aliases for block in before]


def test_names_stay_when_less_trains(table):
    """A user who freezes the first block and the last layers still calls the rest by the same names."""
    model = table.build()
    before = partition(model)
    frozen = {0, *range(len(before) // 2, len(before))}
    for index in frozen:
        for parameter in before[index].parameters:
            parameter.requires_grad_(False)
    left = {block.name: block.parameter_names for index, block in enumerate(before) if index not in frozen}
    assert contents(partition(model)) == left


def test_patterns_for_all_parameters_form_all_blocks(model):
    assert contents(partition(model, patterns={"all": "*"})) == {"all": contents_of_one(model)}


def contents_of_one(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


# what stands in which block ---------------------------------------------------------------------------


def test_embedding_takes_positions_and_its_norm():
    assert len(contents(partition(tiny_models.tiny_bert()))["embedding"]) == 5
    assert contents(partition(tiny_models.tiny_gpt2()))["embedding"] == (
        "transformer.wte.weight",
        "transformer.wpe.weight",
    )
    bart = contents(partition(tiny_models.tiny_bart()))["embedding"]
    assert "model.encoder.layernorm_embedding.weight" in bart
    assert "model.decoder.embed_positions.weight" in bart


class Words(nn.Module):
    """An embedding of one's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 16))


class ModelWithWords(nn.Module):
    """Answers `get_input_embeddings`, and says of the other that it has none, as models of images do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()
        self.emb_ln = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.zeros(()))
        self.stack = nn.ModuleList(tiny_models.PlainLayer() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_embedding_is_what_the_model_calls_its_input_embeddings():
    blocks = contents(partition(ModelWithWords()))
    assert list(blocks) == ["embedding", *layers(2), "scale"]
    assert blocks["embedding"] == ("words.table", "emb_ln.weight", "emb_ln.bias")


def test_head_is_what_the_model_calls_its_output_embeddings():
    """The value head comes last in the model, but is not its head."""
    model = tiny_models.tiny_llama()
    model.add_module("value", nn.Linear(16, 1))
    assert names_of(partition(model)) == [*UNTIED, "value"]


def test_head_without_such_a_call_is_the_outermost_and_last_module_with_a_matrix():
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(4, 16), "net": nn.Module(), "first": nn.Linear(2, 2), "last": nn.Linear(2, 2)}
    )
    model["net"].add_module("stack", nn.ModuleList(tiny_models.PlainLayer() for _ in range(2)))
    model["net"].add_module("pooler", nn.Linear(2, 2))
    assert names_of(partition(model)) == ["embedding", *layers(2), "head", "pooler", "first"]
    assert contents(partition(model))["head"] == ("last.weight", "last.bias")


def test_head_may_be_registered_before_the_layers():
    """Some classifiers of transformers are; what leads into the layers of a plain model must not be taken for one."""
    model = nn.Module()
    model.add_module("classifier", nn.Linear(16, 2))
    model.add_module("backbone", tiny_models.tiny_llama().get_submodule("model"))
    assert names_of(partition(model)) == UNTIED
    model.get_submodule("backbone").add_module("pooler", nn.Linear(16, 16))
    assert names_of(partition(model)) == [*UNTIED, "pooler"]
    series = nn.Module()
    series.add_module("project_in", nn.Linear(3, 16))
    series.add_module("backbone", nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False))
    assert names_of(partition(series)) == [*layers(2), "project_in"]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, dim_feedforward=16, batch_first=True)


def test_lora_weights_are_in_the_layer_they_adapt():
    blocks = contents(partition(tiny_models.tiny_lora()))
    assert all(
        ".lora_" in name and f".layers.{number}." in name for number in range(4) for name in blocks[f"layer.{number}"]
    )
    assert all(len(names) == 4 for names in blocks.values())


def test_layers_without_adapters_are_left_out_and_the_others_keep_their_numbers():
    model = tiny_models.tiny_lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.1." not in name)
    assert names_of(partition(model)) == ["layer.0", "layer.2", "layer.3"]


def test_experts_do_not_pass_for_layers():
    """A list of experts inside each layer: the outer list counts."""
    stack = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))}) for _ in range(2)
    )
    assert names_of(partition(nn.ModuleDict({"stack": stack}))) == ["layer.0", "layer.1"]


def test_vectors_of_a_layer_come_after_its_matrices():
    """GPT-2 registers a norm first."""
    first = [name for name in names_of(partition(tiny_models.tiny_gpt2(), by="matrix")) if "layer.0." in name]
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert first == [f"layer.0.{name}" for name in [*matrices, "vectors"]]


def test_stacked_experts_are_a_matrix_block_each():
    names = names_of(partition(tiny_models.tiny_mixtral(), by="matrix"))
    assert {"layer.1.mlp.experts.gate_up_proj", "layer.1.mlp.experts.down_proj", "layer.1.vectors"} <= set(names)


def test_a_list_of_linears_is_no_stack_beside_real_layers():
    model = tiny_models.tiny_plain()
    model.add_module("probes", nn.ModuleList(nn.Linear(16, 2) for _ in range(9)))
    assert names_of(partition(model))[1:5] == layers(4)


def test_a_list_of_linears_is_a_stack_if_there_is_no_other():
    model = nn.ModuleDict({"stack": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    assert names_of(partition(model)) == layers(3)
    assert names_of(partition(model, by="matrix")) == layers(3)


def test_hybrid_layers_of_two_classes_are_one_stack():
    layer = [nn.TransformerEncoderLayer, tiny_models.PlainLayer]
    stack = nn.ModuleList(kind(16, 2) if kind is layer[0] else kind() for kind in layer * 2)
    assert names_of(partition(nn.ModuleDict({"stack": stack}))) == layers(4)


def test_a_dict_with_numbers_for_keys_is_a_list():
    """torchtitan's models number their layers so."""
    model = tiny_models.tiny_plain()
    named = nn.ModuleDict({"tokens": nn.Embedding(4, 16), "layers": nn.ModuleDict(), "head": nn.Linear(16, 4)})
    for number in range(12):
        named["layers"][str(number)] = tiny_models.PlainLayer()
    assert names_of(partition(named)) == ["embedding", *layers(12), "head"]
    by_name = nn.ModuleDict({"first": tiny_models.PlainLayer(), "second": tiny_models.PlainLayer()})
    model.add_module("others", by_name)
    assert names_of(partition(model))[1:5] == layers(4)


def test_a_list_of_different_parts_is_searched_for_layers():
    parts = nn.ModuleList([nn.Embedding(4, 16), nn.Sequential(*(tiny_models.PlainLayer() for _ in range(3)))])
    assert names_of(partition(parts)) == ["embedding", *layers(3)]


def test_layers_shared_by_two_stacks_are_one_with_an_alias():
    layer = [tiny_models.PlainLayer() for _ in range(2)]
    model = nn.ModuleDict({"encoder": nn.ModuleList(layer), "decoder": nn.ModuleList(layer)})
    blocks = partition(model)
    assert names_of(blocks) == ["encoder.layer.0", "encoder.layer.1"]
    assert [block.aliases for block in blocks] == [("decoder.layer.0",), ("decoder.layer.1",)]


def test_a_head_registered_before_its_tied_embedding_is_an_alias_all_the_same():
    model = nn.Module()
    model.add_module("out", nn.Linear(16, 64, bias=False))
    model.add_module("backbone", tiny_models.tiny_llama().get_submodule("model"))
    model.get_submodule("out").weight = model.get_submodule("backbone.embed_tokens").weight
    embedding = partition(model)[0]
    assert (embedding.name, embedding.parameter_names, embedding.aliases) == ("embedding", ("out.weight",), ("head",))


def test_num_elements_counts_every_weight():
    model = tiny_models.tiny_qwen2()
    assert sum(block.num_elements for block in partition(model)) == sum(each.numel() for each in model.parameters())


# patterns --------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_wins_and_the_rest_is_as_by_default():
    model = tiny_models.tiny_llama()
    blocks = partition(model, patterns={"q": "*q_proj*", "attention": ["*self_attn*", "model.norm.*"]})
    assert_complete_and_disjoint(model, blocks)
    found = contents(blocks)
    assert names_of(blocks) == ["embedding", "q", "attention", *layers(4), "head"]
    assert len(found["q"]) == 4
    assert len(found["attention"]) == 4 * 3 + 1
    assert not any("self_attn" in name for name in found["layer.0"])


def test_a_pattern_may_mean_a_tied_weight_by_either_name():
    model = tiny_models.tiny_llama(tied=True)
    blocks = partition(model, patterns={"words": "lm_head.weight"})
    assert contents(blocks)["words"] == ("model.embed_tokens.weight",)
    assert not any(block.aliases for block in blocks)


def test_patterns_may_replace_a_default_block_whole():
    blocks = contents(partition(tiny_models.tiny_opt(), patterns={"embedding": ["*embed_*", "*project_in*"]}))
    assert len(blocks["embedding"]) == 3
    assert "project_in" not in blocks


def test_patterns_that_name_everything_need_no_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert contents(partition(model, patterns={"low": "0.*", "high": "2.*"})) == {
        "low": ("0.weight", "0.bias"),
        "high": ("2.weight", "2.bias"),
    }


# what the user may get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.ModuleDict({"tokens": nn.Embedding(4, 4), "out": nn.Linear(4, 4)}),
        nn.ModuleDict({"stack": nn.ModuleList([]), "out": nn.Linear(4, 4)}),
        nn.ModuleDict({"stack": nn.ModuleList([nn.ReLU(), nn.ReLU()]), "out": nn.Linear(4, 4)}),
    ],
    ids=["linear", "mlp", "embedding and head", "empty list", "list without parameters"],
)
def test_no_repeated_layers_says_what_was_looked_for_and_what_to_write(model):
    with pytest.raises(UsageError, match=r"no repeated layers: looked for an nn.ModuleList.*patterns=\{"):
        partition(model)


def test_patterns_that_leave_a_model_without_layers_incomplete_name_what_is_missing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(UsageError, match=r"In no block so far: 2\.weight, 2\.bias$"):
        partition(model, patterns={"low": "0.*"})


def test_nothing_that_trains_is_an_error():
    with pytest.raises(UsageError, match=r"no parameter of LlamaForCausalLM requires a gradient"):
        partition(tiny_models.tiny_llama().requires_grad_(False))
    with pytest.raises(UsageError, match="no parameter of ReLU requires a gradient"):
        partition(nn.ReLU())


def test_a_pattern_that_matches_nothing_names_the_nearest_parameters():
    with pytest.raises(UsageError, match=r"'model\.embed_token\.weight'.*nearest: 'model\.embed_tokens\.weight'"):
        partition(tiny_models.tiny_llama(), patterns={"words": ["*q_proj*", "model.embed_token.weight"]})


def test_a_pattern_for_frozen_parameters_matches_nothing():
    with pytest.raises(UsageError, match="matches no parameter that trains"):
        partition(tiny_models.tiny_lora(), patterns={"words": "*embed_tokens*"})


def test_a_pattern_whose_parameters_are_all_taken_is_an_error():
    with pytest.raises(UsageError, match="block 'q' gets no parameter"):
        partition(tiny_models.tiny_llama(), patterns={"attention": "*self_attn*", "q": "*q_proj*"})


def test_a_pattern_may_not_share_its_name_with_the_rest_of_a_block():
    with pytest.raises(UsageError, match=r"patterns name a block 'layer\.0'.*'model\.layers\.0\.self_attn"):
        partition(tiny_models.tiny_llama(), patterns={"layer.0": "model.layers.0.mlp.*"})


def test_an_unknown_granularity_is_an_error():
    with pytest.raises(UsageError, match=r"by='head' is unknown; write by=\"layer\" or by=\"matrix\""):
        partition(tiny_models.tiny_llama(), by="head")  # pyright: ignore[reportArgumentType]


# names of blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), []),
        ("embedding", ["embedding"]),
        (["norm", "embedding"], ["embedding", "norm"]),
        (["head"], ["embedding"]),
        (["head", "embedding"], ["embedding"]),
        (["layer.*"], layers(4)),
        (["layer.[12]", "layer.2", "norm"], ["layer.1", "layer.2", "norm"]),
        ("*", TIED),
    ],
)
def test_names_aliases_and_globs_become_block_names_in_model_order(patterns, names):
    assert list(resolve_names(partition(tiny_models.tiny_llama(tied=True)), patterns)) == names


def test_a_name_that_no_block_has_is_refused_with_the_nearest():
    blocks = partition(tiny_models.tiny_llama())
    with pytest.raises(UsageError, match=r"'layers\.1' matches no block; nearest: 'layer\.1'"):
        resolve_names(blocks, ["embedding", "layers.1"])
    with pytest.raises(UsageError, match="'embeddings' matches no block; nearest: 'embedding'"):
        resolve_names(blocks, "embeddings")


def test_part_of_a_name_is_not_the_name():
    """ "layer.1" must not take "layer.10", nor a bare "layer" all of them."""
    blocks = partition(tiny_models.tiny_llama(layers=12))
    assert resolve_names(blocks, "layer.1") == ("layer.1",)
    with pytest.raises(UsageError):
        resolve_names(blocks, "layer")


# module trees that nobody thought of -----------------------------------------------------------------

LEAVES = st.sampled_from(
    [lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2), lambda: nn.Embedding(3, 2), nn.ReLU, tiny_models.PlainLayer]
).map(lambda build: build())
NAMES = st.sampled_from(["tokens", "layer", "norm", "head", "embedding", "out"])


def containers(modules: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    several = st.lists(modules, min_size=1, max_size=4)
    numbered = several.map(lambda each: nn.ModuleDict({str(number): module for number, module in enumerate(each)}))
    return several.map(nn.ModuleList) | several.map(lambda each: nn.Sequential(*each)) | numbered | named(modules)


def named(modules: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    return st.dictionaries(NAMES, modules, min_size=1, max_size=4).map(nn.ModuleDict)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tree=named(st.recursive(LEAVES, containers, max_leaves=12)),
    tie=st.booleans(),
    by=st.sampled_from(["layer", "matrix"]),
)
def test_any_tree_with_layers_is_divided_and_any_other_is_refused(tree, tie, by):
    linears = [module for module in tree.modules() if isinstance(module, nn.Linear)]
    if tie and linears:
        linears[-1].weight = linears[0].weight
    if not find_stacks(tree):
        with pytest.raises(UsageError):
            partition(tree, by=by)
        return
    blocks = partition(tree, by=by)
    assert_complete_and_disjoint(tree, blocks)
    assert has_unique_names(blocks)
    assert any("layer." in block.name for block in blocks)


# the models themselves -------------------------------------------------------------------------------


WITHOUT_LOSS = {"llama, no head", "bert, classifier", "sequential", "torch encoder-decoder", "two models"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - WITHOUT_LOSS))
def test_tiny_models_learn_from_a_tiny_batch(name):
    model = CASES[name].build()
    first, second = (model(**tiny_models.tiny_batch(model, seed=1)).loss for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite()
    first.backward()
    assert all(parameter.grad is not None for block in partition(model) for parameter in block.parameters)


def test_tiny_models_leave_the_random_state_alone():
    before = torch.get_rng_state()
    one, two = tiny_models.tiny_llama(), tiny_models.tiny_llama()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
