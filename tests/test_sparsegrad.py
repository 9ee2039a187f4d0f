"""SparseGrad: the same function in another basis, and a gradient concentrated in few entries."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import (
    tiny_bart,
    tiny_batch,
    tiny_bert,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_lora,
    tiny_mixtral,
    tiny_opt,
    tiny_phi3,
    tiny_plain,
    tiny_qwen2,
    tiny_qwen2_moe,
    tiny_roberta,
    tiny_sequential,
    tiny_t5,
)
from torch import Tensor, nn
from torch.nn import functional

import gradselect as gs
from gradselect import sparsegrad
from gradselect.sparsegrad import RotatedLinear
from gradselect.sparsegrad.bases import GramMatrices
from gradselect.sparsegrad.gradient_energy import energy_share
from gradselect.sparsegrad.rotated import Bases

SHARED = Path(os.environ.get("GRADSELECT_SHARED", Path(__file__).parents[2] / "shared"))
REAL_MODEL = SHARED / "models" / "llama-3.5M-tinystories"
REAL_TEXT = SHARED / "data" / "gsm8k" / "train.jsonl"

MLP_OF_LAYER_1 = {
    tiny_llama: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    tiny_qwen2: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    tiny_phi3: ["mlp.gate_up_proj", "mlp.down_proj"],
    tiny_gpt2: ["mlp.c_fc", "mlp.c_proj"],
    tiny_opt: ["fc1", "fc2"],
    tiny_bert: ["intermediate.dense", "output.dense"],
    tiny_bert_classifier: ["intermediate.dense", "output.dense"],
    tiny_roberta: ["intermediate.dense", "output.dense"],
    tiny_t5: [f"layer.{n}.DenseReluDense.{name}" for n in (1, 2) for name in ("wi", "wo")],
    tiny_bart: ["fc1", "fc2", "fc1", "fc2"],
    tiny_qwen2_moe: [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")],
    tiny_plain: ["up", "down"],
}
"""What is rotated in block 1 of each model, or in those of an encoder and a decoder."""


def deberta(*, layers: int = 2) -> nn.Module:
    config = transformers.DebertaV2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        relative_attention=True,
        pos_att_type="p2c|c2p",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.DebertaV2ForSequenceClassification(config)


def batches_for(model: nn.Module, *, count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    batches = [tiny_batch(model, seed=seed + number) for number in range(count)]
    if "Classification" in type(model).__name__:
        return [{**batch, "labels": batch["labels"][:, 0] % 2} for batch in batches]
    return batches


def converted(make: Callable[..., nn.Module] = tiny_llama, **settings) -> tuple[nn.Module, gs.TopGradient]:
    model = make(layers=2)
    return model, sparsegrad.convert(model, batches_for(model), **settings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batches_for(model, seed=99)[0]).logits


def orthogonal(size: int, *, seed: int) -> Tensor:
    square = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square).Q


def some_bases(*, outputs: int, inputs: int) -> Bases:
    output, input = orthogonal(outputs, seed=1).float(), orthogonal(inputs, seed=2).float()
    return Bases(output=output, input=input)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


# the bases -------------------------------------------------------------------------------------------


def concentrated_gradients(*, count: int = 8) -> tuple[list[Tensor], Tensor, Tensor]:
    """G = Aᵀ C B, with A and B orthogonal and nearly all of C in its upper left corner, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = orthogonal(60, seed=3), orthogonal(40, seed=4)
    gradients = []
    for _ in range(count):
        core = torch.zeros(60, 40, dtype=torch.float64)
        core[:4, :4] = torch.randn(4, 4, dtype=torch.float64, generator=generator)
        noise = 1e-3 * torch.randn(60, 40, dtype=torch.float64, generator=generator)
        gradients.append(left.T @ core @ right + noise)
    return gradients, left, right


def bases_of(gradients: list[Tensor]) -> Bases:
    grams = GramMatrices(gradients[0])
    for gradient in gradients:
        grams.add(gradient)
    return grams.bases(dtype=torch.float64)


def test_the_bases_are_those_of_the_higher_order_svd() -> None:
    """Twin: the left singular vectors of the two unfoldings of the stacked gradients. Signs are free."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    bases = bases_of(gradients)
    of_outputs = torch.linalg.svd(torch.cat(gradients, dim=1), full_matrices=False).U
    of_inputs = torch.linalg.svd(torch.cat([gradient.T for gradient in gradients], dim=1), full_matrices=False).U
    for found, wanted in ((bases.output, of_outputs), (bases.input, of_inputs)):
        torch.testing.assert_close((found @ wanted).abs(), torch.eye(len(wanted), dtype=torch.float64))


def test_the_bases_are_orthogonal_to_the_last_bit_of_fp32() -> None:
    gradients = [gradient.float() for gradient in concentrated_gradients()[0]]
    grams = GramMatrices(gradients[0])
    for gradient in gradients:
        grams.add(gradient)
    for basis in grams.bases(dtype=torch.float32).buffers():
        off = basis.double() @ basis.double().T - torch.eye(len(basis))
        assert off.abs().max() < 2**-24


def test_only_the_right_bases_concentrate_the_energy() -> None:
    """Public code has the input basis transposed: then one side is mixed once more instead of being put in order."""
    gradients, _, _ = concentrated_gradients(count=12)
    bases = bases_of(gradients[:8])
    right = [bases.output @ gradient @ bases.input.T for gradient in gradients[8:]]
    transposed = [bases.output @ gradient @ bases.input for gradient in gradients[8:]]
    shares = [sum(energy_share(gradient, 0.01) for gradient in kind) / 4 for kind in (right, transposed, gradients[8:])]
    assert shares[0] > 0.95
    assert shares[0] > shares[1] + 0.3
    assert shares[0] > shares[2] + 0.5


def test_energy_share_is_that_of_the_largest_squares() -> None:
    gradient = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    assert energy_share(gradient, 0.5) == pytest.approx(13 / 14)
    assert energy_share(gradient, 0.01) == pytest.approx(9 / 14)
    assert energy_share(gradient, 1.0) == pytest.approx(1.0)


# one layer -------------------------------------------------------------------------------------------


def plain_linear(*, bias: bool = True) -> nn.Module:
    return nn.Linear(5, 7, bias=bias)


def plain_conv1d() -> nn.Module:
    conv = transformers.pytorch_utils.Conv1D(7, 5)
    nn.init.normal_(conv.bias)
    return conv


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("make", [plain_linear, lambda: plain_linear(bias=False), plain_conv1d])
def test_outputs_and_all_gradients_are_those_of_the_plain_layer(make: Callable[[], nn.Module], num_tokens: int) -> None:
    """dW̃ = V dW Uᵀ; public code gives the bias a gradient in the rotated basis. Few tokens are rotated, many not."""
    torch.manual_seed(0)
    plain = make()
    bases = some_bases(outputs=7, inputs=5)
    rotated = RotatedLinear(copy.deepcopy(plain), bases=bases, owns_bases=True)
    weighting = torch.randn(2, num_tokens, 7)
    results = []
    for layer in (plain, rotated):
        torch.manual_seed(1)
        hidden = torch.randn(2, num_tokens, 5, requires_grad=True)
        output = layer(hidden)
        (output * weighting).sum().backward()
        results.append((output, hidden.grad))
    torch.testing.assert_close(results[1], results[0])
    gradient = plain.weight.grad if isinstance(plain, nn.Linear) else plain.weight.grad.T
    torch.testing.assert_close(rotated.rotated_weight.grad, bases.output @ gradient @ bases.input.T)
    if plain.bias is not None:
        torch.testing.assert_close(rotated.bias.grad, plain.bias.grad)
    assert rotated.weight.shape == plain.weight.shape
    torch.testing.assert_close(rotated.weight, plain.weight)


def test_the_plain_layer_comes_back_as_itself() -> None:
    torch.manual_seed(0)
    plain = plain_conv1d()
    weight, bias = plain.weight.detach().clone(), plain.bias
    rotated = RotatedLinear(plain, bases=some_bases(outputs=7, inputs=5), owns_bases=True)
    back = rotated.eval().unrotated()
    assert back is plain
    assert not back.training
    assert back.bias is bias
    torch.testing.assert_close(back.weight.detach(), weight)


def test_in_bf16_converting_and_folding_costs_one_rounding_of_the_weight() -> None:
    """Bases in bf16 are orthogonal to three digits only: W̃ needs their inverse, not their transpose.

    Rounding to bf16 changes a weight by 2⁻⁹ to 2⁻¹⁰ of itself; without the inverse the error would be twice that.
    """
    torch.manual_seed(0)
    plain = nn.Linear(48, 96, bias=False).bfloat16()
    weight = plain.weight.detach().clone()
    bases = some_bases(outputs=96, inputs=48).bfloat16()
    rotated = RotatedLinear(plain, bases=bases, owns_bases=True)
    assert rotated.rotated_weight.dtype == torch.bfloat16
    exact = bases.output.double().T @ rotated.rotated_weight.double() @ bases.input.double()
    assert relative_error(exact, weight) < 2**-9
    hidden = torch.randn(64, 48).bfloat16()
    assert relative_error(rotated(hidden), hidden.double() @ weight.double().T) < 2**-7
    assert relative_error(rotated.unrotated().weight, weight) < 2**-8


# whole models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*MLP_OF_LAYER_1, deberta], ids=lambda make: make.__name__)
def test_converting_and_folding_keep_the_function_and_the_names(make: Callable[..., nn.Module]) -> None:
    model = make(layers=2)
    before, names = logits(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    mask = sparsegrad.convert(model, batches_for(model), density=0.05)
    assert isinstance(mask, gs.TopGradient)
    assert mask.density == 0.05
    rotated = [name for name, module in model.named_modules() if isinstance(module, RotatedLinear)]
    assert rotated
    assert list(mask.among) == [f"{name}.rotated_weight" for name in rotated]
    assert set(mask.among) <= dict(model.named_parameters()).keys()
    torch.testing.assert_close(logits(model), before)
    assert sparsegrad.fold(model) == len(rotated)
    torch.testing.assert_close(logits(model), before)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("make", MLP_OF_LAYER_1, ids=lambda make: make.__name__)
def test_the_linears_of_mlps_are_rotated_and_no_others(make: Callable[..., nn.Module]) -> None:
    model, _ = converted(make)
    rotated = [name for name, module in model.named_modules() if isinstance(module, RotatedLinear)]
    in_layer_1 = [
        name for name in rotated if name.split(".")[[part.isdigit() for part in name.split(".")].index(True)] == "1"
    ]
    assert [name.split(".1.", 1)[1] for name in in_layer_1] == MLP_OF_LAYER_1[make]
    assert len(rotated) == 2 * len(in_layer_1)


def test_a_bf16_model_keeps_its_dtype_and_its_function_to_two_digits() -> None:
    model = tiny_llama(layers=2, dtype=torch.bfloat16)
    before = logits(model)
    sparsegrad.convert(model, batches_for(model))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert relative_error(logits(model), before) < 0.02
    sparsegrad.fold(model)
    assert relative_error(logits(model), before) < 0.01


def test_a_sequential_and_a_loss_of_the_users_own() -> None:
    model = tiny_sequential(layers=3)
    tokens = [batch["input_ids"] for batch in batches_for(model)]
    before = model(tokens[0])

    def loss(of_model: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(of_model(batch).flatten(0, 1), batch.flatten())

    sparsegrad.convert(model, tokens, loss=loss)
    torch.testing.assert_close(model(tokens[0]), before)
    assert len(sparsegrad.energy(model, tokens, loss=loss)) == 6
    assert sparsegrad.fold(model) == 6


def test_every_second_block_and_named_linears() -> None:
    model = tiny_llama(layers=4)
    mask = sparsegrad.convert(model, batches_for(model), layers=("*.up_proj", "*.down_proj"), every=2)
    names = [f"model.layers.{n}.mlp.{name}.rotated_weight" for n in (0, 2) for name in ("up_proj", "down_proj")]
    assert list(mask.among) == names


def test_frozen_linears_are_left_out_unless_they_are_named() -> None:
    model = tiny_llama(layers=2)
    model.model.layers[0].requires_grad_(False)
    assert len(sparsegrad.convert(model, batches_for(model)).among) == 3


def test_batches_are_read_once() -> None:
    model = tiny_llama(layers=2)
    assert len(sparsegrad.convert(model, iter(batches_for(model))).among) == 6


# nothing else changes --------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers and counts its calls, in every mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, **batch: Tensor):
        self.num_calls += 1
        torch.rand(())
        return self.model(**batch)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def test_estimating_leaves_the_model_and_the_random_state_as_they_were() -> None:
    """Public code fine-tunes the model meanwhile."""
    model = Noisy(tiny_llama(layers=2))
    batches = batches_for(model)
    model.train()
    model.model.model.layers[1].eval()
    model.model.model.embed_tokens.requires_grad_(False)
    model(**batches[0]).loss.backward()
    model.zero_grad(set_to_none=False)
    before = snapshot(model)
    sparsegrad.convert(model, batches, layers=("*.up_proj",))
    sparsegrad.energy(model, batches)
    after = snapshot(model)
    torch.testing.assert_close(after["random"], before["random"], rtol=0, atol=0)
    for aspect in ("values", "gradients", "trains", "modes"):
        others = {name: item for name, item in before[aspect].items() if "up_proj" not in name}
        for name, item in others.items():
            found = after[aspect][name]
            same = torch.equal(found, item) if aspect == "values" else found is item
            assert same, (aspect, name)
    assert not any(parameter.requires_grad for parameter in model.model.model.embed_tokens.parameters())
    rotated = [parameter for name, parameter in model.named_parameters() if "rotated" in name]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in rotated)


def test_a_failing_batch_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(layers=2)
    before = snapshot(model)
    with pytest.raises(gs.UsageError, match="no loss"):
        sparsegrad.convert(model, [*batches_for(model), {"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    after = snapshot(model)
    torch.testing.assert_close(after["values"], before["values"], rtol=0, atol=0)
    assert after["trains"] == before["trains"]
    assert after["modes"] == before["modes"]
    assert all(gradient is None for gradient in after["gradients"].values())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_gradients_see_no_dropout() -> None:
    """Dropout would mix its noise into the bases: the same batch gives the same bases twice."""
    model = tiny_llama(layers=2)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    twin = copy.deepcopy(model)
    sparsegrad.convert(model, batches_for(model))
    torch.rand(())
    sparsegrad.convert(twin, batches_for(twin))
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


# shared bases and checkpoints ------------------------------------------------------------------------


def bases_in(model: nn.Module) -> list[Bases]:
    return [module.bases for module in model.modules() if isinstance(module, RotatedLinear)]


@pytest.mark.parametrize("change", [lambda model: model, lambda model: model.double(), copy.deepcopy])
def test_layers_of_one_kind_share_one_pair_of_bases_wherever_the_model_goes(change) -> None:
    """As buffers of each layer, every `.to(...)` would copy them per layer."""
    model, _ = converted()
    moved = change(model)
    assert len(bases_in(moved)) == 6
    assert len(set(bases_in(moved))) == 3
    assert set(bases_in(moved)) <= set(moved.modules())
    if moved is not model:
        assert set(bases_in(moved)).isdisjoint(bases_in(model)) == (change is copy.deepcopy)
    assert {bases.output.dtype for bases in bases_in(moved)} == {next(moved.parameters()).dtype}
    assert sum("shared_bases" in name for name in moved.state_dict()) == 6
    logits(moved)


def test_a_checkpoint_of_a_converted_model_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """Through safetensors, which refuses tensors that share storage; into a model with bases of its own."""
    model, _ = converted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    saved = load_safetensors(tmp_path)
    other = tiny_llama(layers=2)
    sparsegrad.convert(other, batches_for(other, seed=50))
    missing, unexpected = other.load_state_dict(saved, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_plain_model_that_loads_the_checkpoint_of_a_converted_one_is_right(tmp_path: Path) -> None:
    """A user who forgets `fold` must not get a model with rotated or random weights."""
    for make in (tiny_llama, tiny_gpt2):
        model, _ = converted(make)
        model.save_pretrained(tmp_path / make.__name__)
        plain = make(layers=2)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        plain.load_state_dict(load_safetensors(tmp_path / make.__name__), strict=False)
        plain.tie_weights()
        torch.testing.assert_close(logits(plain), logits(model))


def test_a_converted_model_rotates_a_plain_checkpoint() -> None:
    model, _ = converted()
    tuned = tiny_llama(layers=2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(tuned.state_dict())  # strict: it used to miss the bases
    torch.testing.assert_close(logits(model), logits(tuned))


def test_a_checkpoint_of_rotated_weights_without_their_bases_is_refused() -> None:
    model, _ = converted()
    state = {name: tensor for name, tensor in model.state_dict().items() if "shared_bases" not in name}
    with pytest.raises(RuntimeError, match="shared_bases"):
        model.load_state_dict(state)


def load_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5], ids=lambda make: make.__name__)
def test_training_lowers_the_loss_and_folding_keeps_what_was_learnt(make: Callable[..., nn.Module]) -> None:
    model, mask = converted(make, density=0.05)
    batch = batches_for(model)[0]
    untouched = {name: p.detach().clone() for name, p in model.named_parameters() if "rotated_weight" not in name}
    optimizer = gs.SparseOptimizer(model, mask=mask, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    chosen = {name: len(indices) for name, indices in optimizer.entries.items()}
    sizes = {name: model.get_parameter(name).numel() for name in mask.among}
    assert chosen == {name: round(0.05 * size) for name, size in sizes.items()}
    optimizer.close()
    before = logits(model)
    sparsegrad.fold(model)
    torch.testing.assert_close(logits(model), before)
    for name, values in untouched.items():
        assert torch.equal(model.get_parameter(name), values)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_trains_beside_the_rotated_weights() -> None:
    model, mask = converted(tiny_bert_classifier, density=0.05)
    optimizer = gs.SparseOptimizer(model, mask=mask, always=("classifier.*",), lr=1e-2)
    head = model.classifier.weight.detach().clone()
    model(**batches_for(model)[0]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, head)


# user mistakes ---------------------------------------------------------------------------------------


def tied() -> nn.Module:
    model = tiny_plain(layers=2)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def quantised() -> nn.Module:
    model = tiny_plain(layers=2)
    model.blocks[1].up.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    return model


def partly_frozen() -> nn.Module:
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp.requires_grad_(False)
    return model


MISTAKES = [
    (tiny_llama, {"density": 0}, r"density=0 is outside"),
    (tiny_llama, {"density": 1.5}, r"density=1.5 is outside"),
    (tiny_llama, {"every": 0}, r"every=0"),
    (tiny_llama, {"layers": ("*.up_prj",)}, r"'\*.up_prj' matches no linear.*nearest: .*up_proj"),
    (tiny_llama, {"layers": ("lm_head",)}, r"'lm_head' matches no linear in the repeated layers"),
    (tiny_llama, {"layers": ()}, r"layers=\(\) names no layer"),
    (tiny_llama, {"layers": ("*layers.1.*proj",), "every": 2}, r"every=2 leaves no linear layer.* blocks \[1\]"),
    (tiny_mixtral, {}, r"no linear layer of an MLP in its repeated layers"),
    (tiny_lora, {}, r"none of the \d+ linear layers of MLPs can be rotated; the first is frozen"),
    (lambda: nn.Linear(3, 3), {}, r"no linear layer of an MLP"),
    (partly_frozen, {"layers": ("*.up_proj",)}, r"'model.layers.1.mlp.up_proj' is frozen"),
    (quantised, {"layers": ("*.up",)}, r"'blocks.1.up' is quantised"),
    (tied, {}, r"blocks.0.up.weight and blocks.1.up.weight are one tensor"),
]


@pytest.mark.parametrize(("make", "settings", "message"), MISTAKES)
def test_mistakes_are_named(make: Callable[[], nn.Module], settings: dict, message: str) -> None:
    model = make()
    with pytest.raises(gs.UsageError, match=message):
        sparsegrad.convert(model, batches_for(model), **settings)
    assert not any(isinstance(module, RotatedLinear) for module in model.modules())


def test_batches_that_teach_nothing_are_refused() -> None:
    model = tiny_llama(layers=2)
    with pytest.raises(gs.UsageError, match="batches is empty"):
        sparsegrad.convert(model, [])
    with pytest.raises(gs.UsageError, match="a batch is a list"):
        sparsegrad.convert(model, [[1, 2]])
    with pytest.raises(gs.UsageError, match=r"have energy 0\.0"):
        sparsegrad.convert(model, batches_for(model), loss=lambda of, batch: 0 * of(**batch).loss)
    with pytest.raises(gs.UsageError, match="have energy nan"):
        sparsegrad.convert(model, batches_for(model), loss=lambda of, batch: float("nan") * of(**batch).loss)


def test_converting_twice_and_folding_nothing_are_refused() -> None:
    model, _ = converted(layers=("*.up_proj",))
    with pytest.raises(gs.UsageError, match="rotated already"):
        sparsegrad.convert(model, batches_for(model))
    sparsegrad.fold(model)
    with pytest.raises(gs.UsageError, match="no rotated linear"):
        sparsegrad.fold(model)
    with pytest.raises(gs.UsageError, match="no rotated linear"):
        sparsegrad.energy(model, batches_for(model))
    assert len(sparsegrad.convert(model, batches_for(model)).among) == 6


def test_a_model_that_an_optimizer_holds_is_refused_until_it_is_closed() -> None:
    model = tiny_llama(layers=2)
    optimizer = gs.SparseOptimizer(model, mask=gs.TopGradient(density=0.1), lr=1e-3)
    with pytest.raises(gs.UsageError, match="trained by an optimizer"):
        sparsegrad.convert(model, batches_for(model))
    optimizer.close()
    assert len(sparsegrad.convert(model, batches_for(model)).among) == 6


# real input ------------------------------------------------------------------------------------------


def real_batches(*, count: int) -> list[dict[str, Tensor]]:
    """Return worked problems as a running text, 8 × 64 tokens per batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL_MODEL)
    rows = [json.loads(line) for line in REAL_TEXT.read_text("utf-8").splitlines()[: 10 * count]]
    texts = [f"{row['question']}\n{row['answer']}\n" for row in rows]
    tokens = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    return [{"input_ids": each, "labels": each} for each in tokens[: count * 512].view(count, 8, 64)]


@pytest.mark.skipif(not (REAL_MODEL.exists() and REAL_TEXT.exists()), reason=f"{SHARED} with a real model not at hand")
def test_on_a_real_model_few_rotated_entries_hold_the_gradient_of_batches_never_seen() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(REAL_MODEL, dtype=torch.float32)
    batches = real_batches(count=6)
    before = model(**batches[5]).logits.detach()
    sparsegrad.convert(model, batches[:4])
    torch.testing.assert_close(model(**batches[5]).logits.detach(), before, rtol=1e-3, atol=1e-3)
    rows = sparsegrad.energy(model, batches[4:], densities=(0.01,))
    assert len(rows) == 18
    assert all(row.rotated > 1.3 * row.original for row in rows)
    assert sum(row.rotated for row in rows) / 18 > 0.8
    sparsegrad.fold(model)
    torch.testing.assert_close(model(**batches[5]).logits.detach(), before, rtol=1e-3, atol=1e-3)
