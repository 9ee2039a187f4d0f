"""Levers on memory: updates inside the backward pass, 8-bit moments, checkpointing and chunked losses."""

from __future__ import annotations

import importlib.util
import io
from collections import Counter

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, causal, tiny_batch, tiny_llama

import gradselect as gs
from gradselect.app.recipe.load import parse_recipe
from gradselect.app.train.method_setup import _block_options
from gradselect.core.adamw_8bit import bucketize, dequantise, quantise
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory, checkpoint_selected

POLICIES = {
    "adagradselect": lambda: gs.AdaGradSelect(fraction=0.4, explore_steps=3, every=2),
    "gradnorm": lambda: gs.GradNormTopK(fraction=0.3),
    "grass": lambda: gs.GradNormTopK(count=2, refresh=3, temperature=0.1, ema=0.9, probe_steps=1),
    "uniform": lambda: gs.Uniform(count=2),
    "cyclic": lambda: gs.Cyclic(every=2, count=2),
    "fixed": lambda: gs.Fixed(("layer.2", "norm")),
    "all": lambda: gs.All(),
    "misa": lambda: gs.MISA(share=0.4, every=3),
}
SETTINGS = {
    "fp32, tied, checkpoints, embedding always": ({"tied": True}, {"residency": gs.Keep()}),
    "bf16 with masters, offload": ({"dtype": torch.bfloat16}, {"residency": gs.Offload()}),
}


def build(policy, model_settings, **settings):
    model = tiny_llama(layers=3, **model_settings)
    if model_settings.get("tied"):
        model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
        settings["always"] = "embedding"
    blocks = gs.partition(model, by="matrix") if isinstance(policy, gs.MISA) else None
    return model, gs.BlockOptimizer(model, policy, lr=1e-2, weight_decay=0.1, blocks=blocks, **settings)


def checkpoint(function, *inputs):
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


def train(model, optimizer, steps, *, first=0):
    for step in range(first, first + steps):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# Update inside the backward pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", POLICIES)
def test_updating_in_the_backward_pass_is_the_ordinary_training_bitwise(name, case):
    """Weights, records and the whole optimizer state, through a resume in the middle."""
    model_settings, settings = SETTINGS[case]
    model, optimizer = build(POLICIES[name](), model_settings, **settings)
    records = []
    optimizer.add_record_hook(records.append)
    train(model, optimizer, 8)

    early, ours = build(POLICIES[name](), model_settings, update_in_backward=True, **settings)
    our_records = []
    ours.add_record_hook(our_records.append)
    train(early, ours, 4)
    other, again = build(POLICIES[name](), model_settings, update_in_backward=True, **settings)
    other.load_state_dict(early.state_dict())
    again.load_state_dict(saved_and_loaded(ours.state_dict()))
    again.add_record_hook(our_records.append)
    train(other, again, 4, first=4)

    assert our_records == records
    assert same(weights(other), weights(model))
    for key, state in optimizer.state_dict()["state"].items():
        assert same(again.state_dict()["state"][key], state)


def test_at_most_one_gradient_exists_in_steps_that_know_their_selection():
    model = tiny_llama(layers=3)
    live = []

    def count(_):
        live.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # before the optimizer's own
    optimizer = gs.BlockOptimizer(
        model, gs.AdaGradSelect(fraction=0.5, explore_steps=1), lr=1e-2, always="head", update_in_backward=True
    )
    peaks = []
    for step in range(3):
        live.clear()
        model(**tiny_batch(model, seed=step)).loss.backward()
        peaks.append(max(live))
        assert (optimizer.memory()["gradients"] == 0) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()
        if step > 0:
            members = {block.name: block.parameters for block in gs.partition(model)}
            moved = [p for name in optimizer.last_record.selected for p in members[name]]
            assert peaks[-1] == max(p.nbytes for p in moved)
            assert len(live) == len(moved)
    assert peaks[1] < peaks[0]


def test_what_the_user_thaws_in_between_does_not_move():
    model, optimizer = build(gs.Fixed(("layer.2",)), {}, update_in_backward=True)
    before = weights(model)
    model.requires_grad_(True)
    train(model, optimizer, 1)
    assert {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])} == {
        name for name in before if ".layers.2." in name
    }


def test_a_second_backward_pass_before_the_step_is_refused_and_moves_nothing():
    model, optimizer = build(gs.Fixed(("layer.1", "layer.2")), {}, update_in_backward=True)
    model(**tiny_batch(model, seed=0)).loss.backward()
    once = weights(model)
    with pytest.raises(gs.UsageError, match="second backward pass"):
        model(**tiny_batch(model, seed=1)).loss.backward()
    assert same(weights(model), once)
    with pytest.raises(gs.UsageError, match=r"save after optimizer\.step"):
        optimizer.state_dict()
    optimizer.zero_grad()
    train(model, optimizer, 2)
    assert optimizer.num_steps == 2


def test_a_newer_optimizer_silences_the_older_ones_updates():
    model, older = build(gs.All(), {}, update_in_backward=True)
    newer = gs.BlockOptimizer(model, gs.All())
    before = weights(model)
    model(**tiny_batch(model, seed=0)).loss.backward()
    assert same(weights(model), before)
    newer.close()
    older.close()
    model(**tiny_batch(model, seed=0)).loss.backward()
    assert same(weights(model), before)


def test_what_needs_all_gradients_at_once_is_refused_with_an_update_in_the_backward_pass(monkeypatch):
    model = tiny_llama(layers=1)

    def build_with(**settings):
        return gs.BlockOptimizer(model, gs.All(), update_in_backward=True, **settings)

    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(gs.UsageError, match="accumulation_steps=2"):
        build_with(accumulation_steps=2)
    with pytest.raises(gs.UsageError, match="bfloat16, which needs no scaler"):
        build_with(grad_scaler=scaler)
    optimizer = build_with()
    with pytest.raises(gs.UsageError, match="accumulation_steps=3"):
        optimizer.accumulation_steps = 3
    with pytest.raises(gs.UsageError, match="grad_scaler"):
        optimizer.grad_scaler = scaler
    monkeypatch.setattr(importlib.import_module("gradselect.blocks.set_up"), "is_running", lambda: True)
    with pytest.raises(gs.UsageError, match=r"torch\.distributed"):
        build_with()


# Moments of 8 bits -------------------------------------------------------------------------------------------------

GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def large_llama(**settings):
    """Model with matrices of at least 4096 entries; its norms keep fp32 moments."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return causal(config, **settings)


def test_a_moment_is_off_by_at_most_half_a_step_of_the_map():
    """Steps of the signed map are widest at the top: 0.9 / 64 of the largest of 256 numbers."""
    values = torch.randn(4 * 256, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 1).repeat(256)
    codes, scales = quantise(values, signed=True)
    off = (dequantise(codes, scales, signed=True) - values).abs().view(-1, 256)
    assert codes.dtype == torch.uint8
    assert torch.equal(scales, values.view(-1, 256).abs().amax(1))
    assert (off <= 0.5 * 0.9 / 64 * scales[:, None] * 1.0001).all()
    assert torch.equal(dequantise(*quantise(torch.zeros(256), signed=False), signed=False), torch.zeros(256))
    again, _ = quantise(dequantise(codes, scales, signed=True), signed=True)
    assert torch.equal(again, codes)


def test_the_search_without_branches_finds_what_bucketize_finds():
    values = torch.cat([torch.linspace(-1, 1, 4001), torch.tensor([-0.0, 0.0, torch.inf, -torch.inf])])
    borders = torch.linspace(-0.9, 0.9, 255)
    values = torch.cat([values, borders])
    assert torch.equal(bucketize(values, borders), torch.bucketize(values, borders, right=True, out_int32=True))


def test_tensors_that_are_small_or_no_multiple_of_a_block_are_adamws_bitwise():
    for shape in ((4095,), (4097,), (64,), (17, 300)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = weight.clone(), weight.clone()
        state, twin = gs.AdamW8bitRule().make_state(ours), gs.AdamWRule().make_state(theirs)
        for _ in range(3):
            gs.AdamW8bitRule().update([ours], [weight], [state], GROUP)
            gs.AdamWRule().update([theirs], [weight], [twin], GROUP)
        assert torch.equal(ours, theirs)
        assert same(state, twin)


def test_the_first_step_is_adamws_and_parts_are_updated_as_the_whole(monkeypatch):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))

    def moved(rule, *, dtype=torch.float32, steps):
        ours = weight.to(dtype, copy=True)
        state = rule.make_state(ours)
        for step in range(steps):
            rule.update([ours], [weight.to(dtype) * (step + 1)], [state], GROUP)
        return ours

    assert torch.equal(moved(gs.AdamW8bitRule(), steps=1), moved(gs.AdamWRule(), steps=1))
    whole, half = moved(gs.AdamW8bitRule(), steps=3), moved(gs.AdamW8bitRule(), dtype=torch.bfloat16, steps=3)
    torch.testing.assert_close(half.float(), whole, rtol=0.02, atol=0.02)  # bf16 has 8 bits
    monkeypatch.setattr(importlib.import_module("gradselect.core.adamw_8bit"), "PART", {"cpu": 1024})
    assert torch.equal(moved(gs.AdamW8bitRule(), steps=3), whole)


@pytest.mark.parametrize("part", [1024, 8192, 2**24])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_quantised_together_are_as_each_alone_bitwise(part, fused, dtype, monkeypatch):
    """Small ones between large ones, with counters of their own; parts that hold several, and pieces of one."""
    shapes = ((64, 64), (64,), (96, 64), (17, 300), (64, 64), (256, 64))
    rule, generator = gs.AdamW8bitRule(fused=fused), torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(4)]
    ends = []
    for together in (True, False):
        monkeypatch.setattr(importlib.import_module("gradselect.core.adamw_8bit"), "PART", {"cpu": part})
        weights = [start.clone() for start in starts]
        states = [rule.make_state(weight) for weight in weights]
        rule.update(weights[:2], grads[0][:2], states[:2], GROUP)  # their counters are ahead
        for slopes in grads:
            if together:
                rule.update(weights, slopes, states, GROUP)
            else:
                for weight, slope, state in zip(weights, slopes, states, strict=True):
                    rule.update([weight], [slope], [state], GROUP)
        ends.append((weights, states))
    (weights, states), (alone, states_alone) = ends
    assert all(map(torch.equal, weights, alone))
    assert all(map(same, states, states_alone))
    assert [int(state["step"]) for state in states] == [5, 5, 4, 4, 4, 4]


def test_on_an_accelerator_a_part_holds_many_tensors():
    """The tensors of a whole layer are quantised with the kernels of one."""
    rule, module = gs.AdamW8bitRule(), importlib.import_module("gradselect.core.adamw_8bit")
    with torch.device("meta"):
        weights = [torch.empty(shape) for shape in ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896))]
        pieces = [piece for w in weights for piece in module._pieces(w, w, rule.make_state(w))]
    assert [[piece.size for piece in part] for part in module._parts(pieces)] == [[w.numel() for w in weights]]


def test_what_is_kept_are_adamws_moments_rounded_to_their_own_maps():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    state, twin = gs.AdamW8bitRule().make_state(weight), gs.AdamWRule().make_state(weight)
    for rule, kept in ((gs.AdamW8bitRule(), state), (gs.AdamWRule(), twin)):
        rule.update([weight.clone()], [weight], [kept], GROUP)
    assert state["step"] == twin["step"] == 1
    for name, signed, widest in (("exp_avg", True, 0.9 / 64), ("exp_avg_sq", False, 0.9 / 128)):
        kept = dequantise(state[name].view(-1), state[f"{name}_scale"], signed=signed)
        off = (kept - twin[name].view(-1)).abs().view(-1, 256)
        assert (off <= 0.5 * widest * state[f"{name}_scale"][:, None] * 1.0001).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residency", [gs.Keep(), gs.Offload(), gs.Drop()])
def test_moments_of_8_bits_resume_bitwise_and_are_counted_to_the_byte(residency, dtype):
    def build():
        model = large_llama(dtype=dtype)
        policy = gs.Cyclic(every=2, order="ascending")
        return model, gs.BlockOptimizer(model, policy, lr=1e-2, rule=gs.AdamW8bitRule(), residency=residency)

    model, optimizer = build()
    train(model, optimizer, 3)
    other, again = build()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert again.memory() == optimizer.memory()
    train(model, optimizer, 2, first=3)
    train(other, again, 2, first=3)
    assert same(weights(other), weights(model))

    touched = list(gs.partition(model))[:3]
    seen = {id(p): p for block in touched for p in block.parameters}
    expected = sum(2 * p.numel() + 8 * p.numel() // 256 if p.numel() >= 4096 else 8 * p.numel() for p in seen.values())
    tensors = [t for state in optimizer.state.values() for key, t in state.items() if key not in ("step", "master")]
    memory = optimizer.memory()
    counted = memory["state_on_device"] + memory["state_on_host"]
    masters = (4 if dtype == torch.bfloat16 else 0) * sum(p.numel() for p in seen.values())
    assert sum(t.nbytes for t in tensors) == counted - (memory["state_on_host"] and masters - memory["masters"])
    if not isinstance(residency, gs.Drop):
        assert counted + memory["masters"] == expected + masters
    assert all(t.dtype in (torch.uint8, torch.float32) for t in tensors)


def test_losses_with_moments_of_8_bits_are_near_adamws():
    """Within 3 % after 30 steps on 8 batches, where the loss falls by a quarter."""
    losses = {}
    for rule in (gs.AdamWRule(), gs.AdamW8bitRule()):
        model = large_llama()
        optimizer = gs.BlockOptimizer(model, gs.Uniform(count=2), always="head", lr=2e-3, rule=rule)
        for step in range(30):
            loss = model(**tiny_batch(model, seed=step % 8)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses[type(rule)] = sum(model(**tiny_batch(model, seed=seed)).loss.item() for seed in range(8)) / 8
    start = sum(large_llama()(**tiny_batch(model, seed=seed)).loss.item() for seed in range(8)) / 8
    assert losses[gs.AdamWRule] < 0.8 * start
    assert losses[gs.AdamW8bitRule] == pytest.approx(losses[gs.AdamWRule], rel=0.03)
    assert losses[gs.AdamW8bitRule] != losses[gs.AdamWRule]


def test_a_checkpoint_of_another_rule_is_refused():
    written = gs.BlockOptimizer(tiny_llama(layers=1), gs.All(), rule=gs.AdamW8bitRule()).state_dict()
    with pytest.raises(gs.UsageError, match=r"rule: 'AdamW8bitRule' there, 'AdamWRule' here"):
        gs.BlockOptimizer(tiny_llama(layers=1), gs.All()).load_state_dict(written)


@pytest.mark.filterwarnings("ignore")  # its import warns
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_moments_of_8_bits_are_torchaos():
    """Its eager formula on its own tensors; a number half-way between two codes may round to either."""
    adam = importlib.import_module("torchao.optim.adam")
    moments = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(128, 256, generator=generator)
    theirs = ours.clone()
    first, second = moments.zeros(ours.shape, True), moments.zeros(ours.shape, False)
    rule, step = gs.AdamW8bitRule(), torch.zeros(())
    state = rule.make_state(ours)
    for _ in range(20):
        gradient = torch.randn(ours.shape, generator=generator)
        rule.update([ours], [gradient], [state], GROUP)
        step += 1
        lr = torch.tensor(GROUP["lr"])
        adam.single_param_adam(
            theirs, gradient, step, first, second, None, lr, *GROUP["betas"], 0.1, GROUP["eps"], True, False
        )
    for codes, moment in ((state["exp_avg"], first), (state["exp_avg_sq"], second)):
        assert (codes != moment.codes).float().mean() < 1e-3
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-3


# In a Trainer and in a recipe --------------------------------------------------------------------------------------

RECIPE = {
    "model": {"path": "somewhere"},
    "data": {"format": "random", "length": 8},
    "optimizer": {"lr": 1e-3, "max_grad_norm": 0.0},
    "run": {"output": "out", "steps": 2},
}


def test_a_trainer_that_clips_is_refused_with_an_update_in_the_backward_pass(tmp_path):
    """Refused at construction if the factory knows the arguments, otherwise when training begins."""
    clipping = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    options = {"policy": gs.All(), "update_in_backward": True, "lr": 1e-3}
    with pytest.raises(gs.UsageError, match=r"max_grad_norm=1\.0: when the Trainer clips"):
        SelectiveOptimizerFactory()(tiny_llama(layers=1), clipping, **options)
    trainer = transformers.Trainer(
        tiny_llama(layers=1),
        clipping,
        train_dataset=[{name: tensor[0] for name, tensor in tiny_batch(tiny_llama(layers=1), seed=0).items()}],
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, options),
        callbacks=[SelectionCallback()],
    )
    with pytest.raises(gs.UsageError, match="when the Trainer clips"):
        trainer.train()


def test_a_recipes_levers_reach_the_optimizer_and_are_refused_where_they_cannot_work():
    method = {"name": "uniform", "count": 1, "update_in_backward": True, "moment_bits": 8}
    recipe = parse_recipe({**RECIPE, "method": method}, source="it")
    options = _block_options(recipe.method, recipe, tiny_llama(layers=1), head=())
    optimizer = gs.BlockOptimizer(tiny_llama(layers=1), **{**options, "blocks": None})
    assert optimizer.update_in_backward
    assert optimizer.rule == gs.AdamW8bitRule(fused=False)
    for section, key, value in (("optimizer", "max_grad_norm", 1.0), ("run", "accumulation", 2)):
        values = {**RECIPE, "method": method, section: {**RECIPE[section], key: value}}
        with pytest.raises(gs.UsageError, match=r"set\s+optimizer\.max_grad_norm=0 run\.accumulation=1"):
            parse_recipe(values, source="it")


def test_a_plan_counts_the_levers_to_the_byte():
    model, policy = large_llama(dtype=torch.bfloat16), gs.Fixed(("layer.1", "head"))
    levers = {"rule": gs.AdamW8bitRule(), "update_in_backward": True}
    found = gs.plan(model, policy, batch_size=2, sequence_length=8, **levers)
    optimizer = gs.BlockOptimizer(model, policy, **levers)
    train(model, optimizer, 1)
    memory, planned = optimizer.memory(), found.step("exploit").moments["backward"]
    assert (planned.masters, planned.state_on_device) == (memory["masters"], memory["state_on_device"])
    selected = [p for block in gs.partition(model) if block.name in ("layer.1", "head") for p in block.parameters]
    assert planned.gradients == max(p.nbytes for p in selected)


# Checkpoints and chunked losses ------------------------------------------------------------------------------------


def test_only_layers_that_the_backward_pass_visits_run_twice():
    """transformers' own way makes the embedding's output require a gradient, and runs all layers twice."""
    model, plain = tiny_llama(), tiny_llama()
    checkpoint_selected(model)
    runs = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    pair = [gs.BlockOptimizer(each, gs.Cyclic(every=1, order="descending"), lr=1e-2) for each in (model, plain)]
    for step in range(6):
        runs.clear()
        selected = pair[0].trainable
        for each in (model, plain):
            each(**tiny_batch(each, seed=step)).loss.backward()
        assert gradients(model) == gradients(plain)
        lowest = {"head": 4, "norm": 4, "embedding": 0}.get(selected[0]) or int(selected[0].rpartition(".")[2])
        lowest = 0 if step == 0 else lowest  # the first step looks at everything that the loss reaches
        assert runs == {number: 1 + (number >= lowest) for number in range(4)}
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()


def gradients(model):
    return {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}


def test_a_head_that_trains_alone_gets_its_gradient_from_trls_chunked_loss():
    """In float32, whose sums round in another order."""
    found = {}
    for chunked in (False, True):
        model = tiny_llama()
        options = {}
        if chunked:
            importlib.import_module("trl.trainer.utils").add_fused_lm_head(model)
            options["fused_lm_head"] = True
        optimizer = gs.BlockOptimizer(model, gs.Fixed(("head",)))
        batch = tiny_batch(model, seed=0)
        model(input_ids=batch["input_ids"], labels=batch["labels"], **options).loss.backward()
        assert list(gradients(model)) == ["lm_head.weight"]
        assert optimizer.trainable == ("head",)
        found[chunked] = model.lm_head.weight.grad
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available(),
    reason="liger-kernel is not installed, or there is no GPU for its kernels",
)
def test_ligers_fused_loss_gives_the_head_its_gradient_where_the_norm_below_it_trains_too():
    """With the head alone there is no gain; docs/memory.md says what to write."""
    loss_of = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    hidden = torch.randn(64, 32, device="cuda", requires_grad=True)
    labels = torch.arange(64, device="cuda")
    fused = torch.randn(128, 32, device="cuda", requires_grad=True)
    plain = fused.detach().clone().requires_grad_()
    loss_of(fused, hidden, labels).backward()
    torch.nn.functional.cross_entropy(hidden.detach() @ plain.T, labels).backward()
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-3, atol=1e-5)
