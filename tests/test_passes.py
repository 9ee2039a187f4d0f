"""Several forward and backward passes in one step: caches of gradients, recomputation, passes that fail."""

from __future__ import annotations

import pytest
import torch
from preference_support import Witness
from tiny_models import tiny_batch, tiny_llama, tiny_lora, tiny_plain
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

# A cache of gradients ----------------------------------------------------------------------------------------------


class WholeBatch(Trainer):
    """Contrastive loss over the batch: each row must be told from the others."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return contrast(embed(model, inputs["input_ids"]))


class GradientCache(Trainer):
    """The same loss: its gradient at the embeddings first, then one pass through the model for each part."""

    def num_parts(self):
        return 4

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = inputs["input_ids"].chunk(self.num_parts())
        with torch.no_grad():
            embeddings = torch.cat([embed(model, part) for part in parts])
        contrast(embeddings.requires_grad_()).backward()
        assert embeddings.grad is not None
        surrogates = zip(parts, embeddings.grad.chunk(len(parts)), strict=True)
        *first, last = [(part, gradient) for part, gradient in surrogates]
        for part, gradient in first:
            surrogate = (embed(model, part) * gradient).sum() / self.args.gradient_accumulation_steps
            self.accelerator.backward(surrogate)
        return (embed(model, last[0]) * last[1]).sum()


class VaryingCache(GradientCache):
    """Four passes or two, in turns, as where parts are cut by length."""

    def num_parts(self):
        return 2 if self.state.global_step % 2 else 4


def embed(model, ids):
    return functional.normalize(model(input_ids=ids).logits.mean(1), dim=-1)


def contrast(embeddings):
    return functional.cross_entropy(embeddings @ embeddings.T / 0.1, torch.arange(len(embeddings)).roll(1))


def train_contrastively(trainer_class, folder, choice, *, callbacks=(), **settings):
    """Train for six steps, by default at rate 0, so that all trainers see the same gradients."""
    model = tiny_llama(layers=2)
    data = [{"input_ids": tiny_batch(model, seed=seed, batch=1)["input_ids"][0]} for seed in range(32)]
    usual = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.0, "save_strategy": "no"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "remove_unused_columns": False}
    args = TrainingArguments(str(folder), **{**usual, **quiet, **settings})
    kind = "mask" if isinstance(choice, gs.AbstractMask) else "policy"
    witness = Witness()
    trainer = trainer_class(
        *(model, args),
        train_dataset=data,
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {kind: choice, "args": args}),
        callbacks=[SelectionCallback(), witness, *callbacks],
    )
    trainer.train()
    assert len(witness.records) == 6
    assert not any(witness.unwanted)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    return trainer.optimizer.optimizer, witness.records


POLICIES = {
    "grad-norm": lambda: gs.GradNormTopK(count=2),
    "adagradselect": lambda: gs.AdaGradSelect(count=2, explore_steps=6, epsilon_end=1.0),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trainer_class", [GradientCache, VaryingCache])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_policies_read_the_gradients_of_all_passes_without_being_told(trainer_class, accumulation, policy, tmp_path):
    """From the second step on. The first selects by the first pass, and a warning says so."""
    settings = {"gradient_accumulation_steps": accumulation}
    _, cached = train_contrastively(trainer_class, tmp_path, POLICIES[policy](), **settings)
    _, whole = train_contrastively(WholeBatch, tmp_path, POLICIES[policy](), **settings)
    for found, expected in zip(cached[1:], whole[1:], strict=True):
        assert found.explored
        assert found.norms == pytest.approx(expected.norms, rel=1e-3)
        if policy == "grad-norm":  # the other remembers the norms of the first step
            assert found.selected == expected.selected


@pytest.mark.parametrize("trainer_class", [GradientCache, VaryingCache])
def test_masks_select_by_the_gradient_of_all_passes_without_being_told(trainer_class, tmp_path):
    """Also the only selection of a run, which waits for the first step whose passes are known."""

    def entries(trainer_class):
        optimizer, records = train_contrastively(trainer_class, tmp_path, gs.StaticMask(budget=40))
        counts = [sum(record.num_entries.values()) for record in records]
        return {(name, index) for name, found in optimizer.entries.items() for index in found.tolist()}, counts

    found, counts = entries(trainer_class)
    assert len(found) == 40
    assert counts[0] == 0
    assert counts[-1] == 40


def test_more_passes_are_expected_until_eight_windows_had_fewer(caplog):
    """Windows of two and three passes in turns are read whole; one outlier costs memory for eight steps only."""
    model = tiny_llama(layers=2)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0)

    def step(num_passes):
        for seed in range(num_passes):
            model(**tiny_batch(model, seed=seed)).loss.backward()
        num_left = sum(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        return num_left, optimizer.last_record.norms

    expected = [step(number)[1] for number in (1, 2, 2, 3, 3)][2::2]
    caplog.clear()
    for number in (2, 3, 2, 3):
        assert step(number)[1] == pytest.approx(expected[number - 2])
    assert not caplog.text
    streamed = [step(1)[0] for _ in range(9)]
    assert len(set(streamed[:8])) == 1
    assert streamed[8] < streamed[0]


def test_a_loop_can_free_unselected_gradients_before_it_clips():
    """In a window with fewer passes than expected, of which only the loop knows that no further one comes."""
    model = tiny_llama(layers=2)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0)
    for num_passes in (3, 2):
        for seed in range(num_passes):
            model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.finish_window()
        named = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        members = {block.name: block.parameter_names for block in gs.partition(tiny_llama(layers=2))}
        assert named == list(members[optimizer.last_record.selected[0]])
    assert max(optimizer.last_record.norms.values()) > 1e-3


def test_a_stop_keeps_the_number_of_expected_passes():
    def stepped(optimizer, model, numbers):
        for number in numbers:
            for seed in range(number):
                model(**tiny_batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.last_record.norms

    models = [tiny_llama(layers=2) for _ in range(2)]
    first, second = (gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0) for model in models)
    stepped(first, models[0], [3, 2, 1])
    second.load_state_dict(first.state_dict())
    numbers = [1] * 5 + [3]
    assert stepped(first, models[0], numbers) == stepped(second, models[1], numbers)


# Recomputation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("choice", ["grad-norm", "id3"])
def test_checkpoints_change_nothing(choice, reentrant, caplog):
    """Each reentrant one runs a backward pass of its own; they were counted as passes of the step."""

    def trained(model):
        if choice == "id3":
            optimizer = gs.SparseOptimizer(model, gs.ID3(budget=60, steps=3), lr=1e-2)
        else:
            optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
        records = []
        optimizer.add_record_hook(records.append)
        for seed in range(4):
            batch = tiny_batch(model, seed=seed)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, records

    plain, records = trained(tiny_lora(layers=3))
    model = tiny_lora(layers=3)
    checkpoint_all(model.get_base_model(), reentrant=reentrant)
    found_model, found = trained(model)
    assert found == records
    assert all(torch.equal(*pair) for pair in zip(found_model.parameters(), plain.parameters(), strict=True))
    assert "backward passes" not in caplog.text


def trained_in_parts(choice, *, reentrant, is_shared):
    """Two forward passes in each step, or one through a layer that is there twice; weights and records after it."""
    model = tiny_llama(layers=2)
    if is_shared:
        model.model.layers[1] = model.model.layers[0]
    checkpoint_all(model, reentrant=reentrant)
    if isinstance(choice, gs.AbstractPolicy):
        settings = {"update_in_backward": True} if isinstance(choice, gs.Fixed) else {}
        optimizer = gs.BlockOptimizer(model, choice, rule=gs.SGDRule(momentum=0.0), lr=1e-2, **settings)
    else:
        optimizer = gs.SparseOptimizer(model, choice, rule=gs.SGDRule(momentum=0.0), lr=1e-2)
    records = []
    optimizer.add_record_hook(records.append)
    for seed in range(3):
        ids = tiny_batch(model, seed=seed)["input_ids"]
        losses = [model(input_ids=rows, labels=rows).loss for rows in ((ids,) if is_shared else (ids, ids.flip(1)))]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, records


@pytest.mark.parametrize(
    "choice",
    [
        gs.ID3(budget=60, steps=3),
        gs.TopGradient(density=0.1, among=("*.layers.*",)),
        gs.GradNormTopK(count=1, among=("layers",)),
        gs.Fixed(("layer.0", "layer.1")),
    ],
    ids=lambda choice: type(choice).__name__,
)
def test_gradients_that_arrive_in_parts_are_added_up(choice, caplog):
    """Each forward pass through a reentrant checkpoint brings a part: masks selected nothing, blocks by one part."""
    model, records = trained_in_parts(choice, reentrant=False, is_shared=False)
    found_model, found = trained_in_parts(choice, reentrant=True, is_shared=False)
    for found_record, record in zip(found, records, strict=True):
        if isinstance(record, gs.MaskRecord):
            assert found_record.num_entries == record.num_entries
        else:
            assert found_record.selected == record.selected
            assert found_record.norms == pytest.approx(record.norms)
    for found_weight, weight in zip(found_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found_weight, weight)
    assert "selects" not in caplog.text


def test_a_layer_that_is_used_twice_is_selected_by_its_whole_gradient_from_the_second_step_on(caplog):
    """Nothing tells the first step that a part is not all."""
    _, found = trained_in_parts(gs.ID3(budget=60, steps=3), reentrant=True, is_shared=True)
    assert [record.num_new for record in found] == [0, 40, 20]
    assert "arrived in several parts within one backward pass" in caplog.text
    assert "accumulation_steps" not in caplog.text
    with pytest.raises(gs.UsageError, match=r"a part of the gradient of .* write use_reentrant=False"):
        trained_in_parts(gs.Fixed(("layer.0",)), reentrant=True, is_shared=True)


def test_blocks_of_layers_that_are_used_twice_are_measured_by_their_whole_gradient(caplog):
    policy = gs.GradNormTopK(count=1, among=("layers",))
    (_, found), (_, records) = [
        trained_in_parts(policy, reentrant=reentrant, is_shared=True) for reentrant in (True, False)
    ]
    assert [record.norms for record in found] == [pytest.approx(record.norms) for record in records]


def test_a_model_inside_a_reentrant_checkpoint():
    """A cache of gradients by torch's own means: each part of the batch is a checkpoint, and a pass."""
    model = tiny_llama(layers=2)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0)

    def step(embeddings):
        contrast(embeddings).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.last_record

    ids = tiny_batch(model, seed=0, batch=4)["input_ids"]
    token = torch.zeros((), requires_grad=True)
    whole = step(embed(model, ids))
    for _ in range(2):
        parts = [
            checkpoint(lambda part, _: embed(model, part), part, token, use_reentrant=True) for part in ids.chunk(2)
        ]
        found = step(torch.cat(parts))
    assert found.norms == pytest.approx(whole.norms, rel=1e-3)
    assert found.selected == whole.selected


# Passes of others --------------------------------------------------------------------------------------------------


def test_what_others_thaw_between_the_passes_is_frozen_again_whatever_the_model_returns():
    """A dataclass here; transformers' outputs are mappings."""
    model = tiny_plain()
    optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.2",)), lr=1e-2)
    selected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for seed in range(2):
        output = model(**tiny_batch(model, seed=seed))
        model.requires_grad_(True)
        output.loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == selected
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} <= selected
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_reference_that_shares_modules(with_gradients):
    """A second forward pass through shared layers, also one that records a graph which nobody uses."""

    class Reference(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.head = model.model, torch.nn.Linear(16, 8)

        def forward(self, ids):
            return self.head(self.model(input_ids=ids).last_hidden_state)

    def trained(*, with_reference):
        model = tiny_llama(layers=2)
        reference = Reference(model)
        optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
        records = []
        optimizer.add_record_hook(records.append)
        for seed in range(3):
            batch = tiny_batch(model, seed=seed)
            loss = model(**batch).loss
            if with_reference:
                with torch.set_grad_enabled(with_gradients):
                    logits = reference(batch["input_ids"])
                loss = loss + 0.0 * logits.detach().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, records

    (plain, records), (found_model, found) = trained(with_reference=False), trained(with_reference=True)
    assert found == records
    assert all(torch.equal(*pair) for pair in zip(found_model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_after_a_pass_that_failed_the_next_one_is_read(reentrant):
    """As when memory runs out, and the loop tries again without zero_grad()."""

    def records(*, fails):
        model = tiny_llama(layers=2)
        if reentrant:
            checkpoint_all(model, reentrant=True)
        optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=0.0)
        for seed in range(3):
            batch = tiny_batch(model, seed=seed)
            if fails and seed == 1:
                handle = model.model.layers[0].register_forward_hook(fail_in_backward)
                with pytest.raises(MemoryError):
                    model(**batch).loss.backward()
                handle.remove()
                for parameter in model.parameters():
                    parameter.grad = None
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield optimizer.last_record

    assert list(records(fails=True)) == list(records(fails=False))


def checkpoint_all(model, *, reentrant):
    # transformers before 5.23 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def fail_in_backward(module, arguments, output):
    def fail(_):
        raise MemoryError

    if output.requires_grad:  # not in the forward pass of a reentrant checkpoint
        output.register_hook(fail)


@pytest.mark.parametrize("choice", [gs.GradNormTopK(count=1), gs.ID3(budget=60, steps=3)], ids=["grad-norm", "id3"])
@pytest.mark.parametrize("trainer_class", [WholeBatch, GradientCache])
def test_a_backward_pass_between_two_steps_is_no_part_of_the_next(trainer_class, choice, tmp_path):
    """As of a callback that measures gradients on other data and clears them through the model."""

    class Measures(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **_):
            embed(model, tiny_batch(model, seed=9)["input_ids"]).square().mean().mul(1e3).backward()
            model.zero_grad()

    settings = {"learning_rate": 1e-2, "max_grad_norm": 0.0}
    plain, records = train_contrastively(trainer_class, tmp_path, choice, **settings)
    measured, found = train_contrastively(trainer_class, tmp_path, choice, callbacks=[Measures()], **settings)
    assert found == records
    for one, other in zip(measured._model.parameters(), plain._model.parameters(), strict=True):
        assert torch.equal(one, other)
