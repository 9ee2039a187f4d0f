"""Selective training in an unmodified `transformers.Trainer`, and in trainers built on it, such as TRL's and axolotl's.

    trainer = Trainer(
        model=model,
        args=args,
        optimizer_cls_and_kwargs=(SelectiveOptimizerFactory, {"args": args, "policy": AdaGradSelect(fraction=0.2)}),
        callbacks=[SelectionCallback(jsonl="selection.jsonl")],
    )

With `"mask": ID3(budget=320_000, steps=1000)` in place of `"policy"` it selects entries instead of blocks. The factory
builds the optimizer. The callback passes it what only the Trainer knows, and adds its records to the Trainer's logs.
"""

from gradselect.integrations.reporting import summarise

from .callback import SelectionCallback
from .checkpointing import checkpoint_selected
from .factory import SelectiveOptimizerFactory

__all__ = ["SelectionCallback", "SelectiveOptimizerFactory", "checkpoint_selected", "summarise"]
