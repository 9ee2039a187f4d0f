"""BlockOptimizer in an unmodified trl.SFTTrainer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import VOCABULARY, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import gradselect as gs
from gradselect.integrations.transformers import SelectionCallback, SelectiveOptimizerFactory

# trl and peft use names that transformers has replaced since.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]


def tokenizer():
    """A word for each number below 61, and three special tokens."""
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None
    )


def additions(count):
    pairs = [(a, b) for a in range(8) for b in range(8)][:count]
    return Dataset.from_list([{"prompt": f"{a} {b}", "completion": f" {a + b}"} for a, b in pairs])


def build(folder, choice, *, callbacks=(), peft_config=None, **settings):
    kind = "mask" if isinstance(choice, gs.AbstractMask) else "policy"
    usual = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = SFTConfig(str(folder), **{**usual, **settings})
    return SFTTrainer(
        tiny_llama(),
        args=args,
        train_dataset=additions(20),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {kind: choice, "args": args}),
        callbacks=[SelectionCallback(), *callbacks],
        peft_config=peft_config,
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Recorder(TrainerCallback):
    """Keeps the records of the run and the parameters that each step changed."""

    def __init__(self):
        self.records = []
        self.changed = []

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        optimizer.optimizer.add_record_hook(self.records.append)
        self._before = weights(model)

    def on_step_end(self, args, state, control, *, model, **_):
        after = weights(model)
        self.changed.append({name for name in after if not torch.equal(after[name], self._before[name])})
        self._before = after


def count_layer_runs(model):
    """Count the runs of each layer: one more for each checkpoint that the backward pass visits."""
    runs = Counter()
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            index = int(name.split(".")[-2])
            module.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    return runs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_prompt_completion_data_trains_what_is_selected_and_nothing_else(accumulation, tmp_path):
    recorder = Recorder()
    trainer = build(
        tmp_path,
        gs.AdaGradSelect(count=2, delta=9.0),
        callbacks=[recorder],
        gradient_accumulation_steps=accumulation,
        weight_decay=0.5,
    )
    members = {block.name: set(block.parameter_names) for block in gs.partition(trainer.model)}
    trainer.train()
    assert {record.explored for record in recorder.records} == {True, False}
    for record, changed in zip(recorder.records, recorder.changed, strict=True):
        assert changed == set().union(*(members[name] for name in record.selected))
    assert all("selection/blocks" in log for log in trainer.state.log_history if "loss" in log)


def test_it_learns(tmp_path):
    trainer = build(tmp_path, gs.AdaGradSelect(fraction=0.4, delta=9.0, preset="paper"), max_steps=40)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] / 2


def test_checkpointing_which_is_its_default_keeps_the_backward_pass_short(tmp_path):
    trainer = build(tmp_path, gs.Fixed(("layer.2", "head")), max_steps=1)
    assert trainer.args.gradient_checkpointing
    runs = count_layer_runs(trainer.model)
    trainer.train()
    assert runs == {0: 1, 1: 1, 2: 2, 3: 2}


def test_stopped_and_resumed_it_ends_bitwise_equal(tmp_path):
    def start(**settings):
        policy = gs.AdaGradSelect(count=2, delta=9.0)
        return build(tmp_path, policy, save_steps=1, gradient_accumulation_steps=2, **settings)

    whole = start(max_steps=5, save_strategy="steps")
    whole.train()
    for stop in range(1, 5):
        resumed = start(max_steps=5)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        for name, weight in weights(resumed.model).items():
            assert torch.equal(weight, whole.model.get_parameter(name)), (stop, name)


def test_adapters_are_the_blocks_of_a_peft_model(tmp_path):
    recorder = Recorder()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = build(tmp_path, gs.Cyclic(every=2, order="ascending"), callbacks=[recorder], peft_config=lora)
    runs = count_layer_runs(trainer.model)
    trainer.train()
    assert runs == {0: 8, 1: 10, 2: 12, 3: 12}  # a layer of adapters is frozen below the selected one
    assert [record.selected for record in recorder.records[::2]] == [("layer.0",), ("layer.1",), ("layer.2",)]
    for record, changed in zip(recorder.records, recorder.changed, strict=True):
        assert changed
        assert all(f"layers.{record.selected[0].removeprefix('layer.')}." in name for name in changed)
        assert all("lora_" in name for name in changed)
