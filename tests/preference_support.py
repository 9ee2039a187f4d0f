"""TRL's preference, reward and sampling trainers with a tiny model, and a witness of each optimizer step."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tiny_models import VOCABULARY, decoder, seeded
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import gradselect as gs
from gradselect.integrations.transformers import SelectiveTraining

KINDS = {
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "reward": ("trl", "Reward"),
    "grpo": ("trl", "GRPO"),
    "rloo": ("trl", "RLOO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "cpo": ("trl.experimental.cpo", "CPO"),
}
SAMPLING = ("grpo", "rloo")
"""Trainers that draw completions from the model while it trains."""


def trainer_and_arguments(kind):
    """Classes of TRL; a version that lacks them skips the test."""
    room, name = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl says that what is experimental may change
        module = pytest.importorskip(room, reason=f"this version of TRL has no {name}Trainer")
    if not hasattr(module, f"{name}Trainer"):
        pytest.skip(f"this version of TRL has no {name}Trainer")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def tokenizer():
    """A word for each number below 61, and three special tokens."""
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )


def rows(kind):
    """Sixteen prompts; with a better and a worse answer, if no reward function is asked."""
    answers = {} if kind in SAMPLING else {"rejected": " 0 0"}
    return Dataset.from_list(
        [{"prompt": f"{i} {i + 1}", **answers, **({"chosen": f" {i + 2}"} if answers else {})} for i in range(16)]
    )


def num_kinds_of_words(completions, **_):
    """Reward that differs between most samples."""
    return [float(len(set(text.split()))) for text in completions]


def save_model(folder):
    """Write a tiny model: DPO and KTO load their reference model by its path."""
    settings = decoder(layers=2, tied=False) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))).save_pretrained(folder)


def load_model(kind, folder):
    if kind == "reward":
        auto = transformers.AutoModelForSequenceClassification
        return seeded(lambda: auto.from_pretrained(folder, dtype=torch.float32, num_labels=1))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(kind, model, folder, choice, *, lora=False, callbacks=(), **settings):
    """Build a trainer with all its defaults but size, device and outputs.

    Args:
        kind: one of `KINDS`.
        model: a model, or a folder that holds one.
        folder: for checkpoints.
        choice: policy or mask; None: the Trainer's own AdamW.
        lora: True lets the trainer wrap the model with an adapter.
        callbacks: beside ours.
        settings: of the arguments.
    """
    trainer_class, arguments_class = trainer_and_arguments(kind)
    usual = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    parts = {}
    if kind in SAMPLING:
        usual |= {"num_generations": 2, "max_completion_length": 4}
        parts["reward_funcs"] = num_kinds_of_words
    args = arguments_class(output_dir=str(folder), **{**usual, **settings})
    torch.manual_seed(0)  # not every version of TRL seeds before it makes the adapter
    return trainer_class(
        model=model if isinstance(model, torch.nn.Module) else load_model(kind, model),
        args=args,
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        callbacks=[*([] if choice is None else [selective(choice)]), *callbacks],
        # Both matrices random: with one of them zero, the first gradient of the other is zero.
        peft_config=LoraConfig(r=2, init_lora_weights=False) if lora else None,
        **parts,
    )


def selective(choice):
    """The one callback that makes any trainer selective, for a policy or a mask."""
    return SelectiveTraining(**{"mask" if isinstance(choice, gs.AbstractMask) else "policy": choice})


class Witness(TrainerCallback):
    """Looks at each optimizer step: what has a gradient before it, and what it changes.

    Attributes:
        records: of all steps.
        unwanted: by step, names of unselected parameters that have a gradient when the step begins.
        num_changed: by step, number of parameters that the step has changed.
        outside: by step, names of unselected parameters that the step has changed.
        saw_marks: True if hooks of ours were on the model.
    """

    def __init__(self):
        self.records = []
        self.unwanted = []
        self.outside = []
        self.num_changed = []
        self.saw_marks = False

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        inner = optimizer.optimizer
        inner.add_record_hook(self.records.append)
        step = inner.step

        def witnessed(*arguments, **keywords):
            named = dict(model.named_parameters())
            before = {name: parameter.detach().clone() for name, parameter in named.items()}
            self.saw_marks = bool(foreign_marks(model))
            with_gradient = {name for name, parameter in named.items() if parameter.grad is not None}
            result = step(*arguments, **keywords)
            changed = {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}
            selected = selected_parameters(inner)
            # A mask reads and frees each gradient in the backward pass.
            self.unwanted.append(with_gradient - (selected if isinstance(inner, gs.BlockOptimizer) else set()))
            self.outside.append(changed - selected)
            self.num_changed.append(len(changed))
            if isinstance(inner, gs.SparseOptimizer):
                self.outside[-1] |= moved_outside(inner, named, before)
            return result

        inner.step = witnessed

    def check(self, num_steps):
        """Assert that these steps were taken, that they moved something, and nothing that was not selected."""
        assert len(self.records) == num_steps
        assert any(self.num_changed)
        assert not any(self.unwanted)
        assert not any(self.outside)
        assert self.saw_marks


def selected_parameters(optimizer):
    """Names of the parameters that the last step was to move."""
    if isinstance(optimizer, gs.SparseOptimizer):
        return set(optimizer.entries)
    members = optimizer._table.members
    return {name for block in optimizer.last_record.selected for name in members[block]}


def moved_outside(optimizer, named, before):
    """Names of tensors of which an entry outside the mask has moved."""
    moved = set()
    for name, indices in optimizer.entries.items():
        is_same = (named[name].detach() == before[name]).flatten()
        is_same[indices] = True
        if not is_same.all():
            moved.add(name)
    return moved


def foreign_marks(model):
    """Hooks and marks of this package that are on the model."""
    hooks = [
        hook
        for module in model.modules()
        for registry in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registry.values()
    ]
    hooks += [
        hook
        for each in model.parameters()
        for hook in (getattr(each, "_post_accumulate_grad_hooks", None) or {}).values()
    ]
    found = [
        hook for hook in hooks if (getattr(hook, "__module__", None) or type(hook).__module__).startswith("gradselect")
    ]
    attributes = [name for each in model.parameters() for name in vars(each) if name.startswith("gradselect")]
    replaced = [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value).__module__.startswith("gradselect")
    ]
    return [*map(str, found), *attributes, *replaced]
