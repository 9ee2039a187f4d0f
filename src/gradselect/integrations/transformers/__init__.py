"""Selective training in an unmodified `transformers.Trainer`, and in trainers built on it, such as TRL's and axolotl's.

    trainer = Trainer(model, args, callbacks=[SelectiveTraining(policy=AdaGradSelect(fraction=0.2))])

With `mask=ID3(density=0.01)` in place of `policy` it selects entries instead of blocks. `SelectiveTraining` brings two
parts, which can also be given apart:

    optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"args": args, "policy": AdaGradSelect(fraction=0.2)}),
    callbacks=[SelectionCallback(jsonl="selection.jsonl")],

The factory builds the optimizer. The callback passes it what only the Trainer knows, and adds its records to the
Trainer's logs. `AdaLoraCallback` lowers the ranks of PEFT's AdaLoRA, which no Trainer does.
"""

from gradselect.integrations.reporting import summarise

from .adalora import AdaLoraCallback
from .callback import SelectionCallback
from .checkpointing import checkpoint_selected
from .factory import SelectiveOptimizerFactory
from .training import SelectiveTraining

__all__ = [
    "AdaLoraCallback",
    "SelectionCallback",
    "SelectiveOptimizerFactory",
    "SelectiveTraining",
    "checkpoint_selected",
    "summarise",
]
