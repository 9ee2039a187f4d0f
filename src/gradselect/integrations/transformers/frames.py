"""The Trainer and the callback handler that call us: stack frames are the only way to them. Calls at its moments."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

Kind = TypeVar("Kind", Trainer, CallbackHandler)


def caller_of(kind: type[Kind]) -> Kind | None:
    """Return the innermost object of `kind` with a method that is running now."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def call_after_training(trainer: Trainer, callback: Callable[[], None]) -> None:
    """Call `callback` when `trainer.train()` ends in any way, also by an exception, which no callback is told of.

    Args:
        trainer: gets an attribute `train` in front of its method.
        callback: a bound method, held weakly.
    """
    trainer_of, call_of = weakref.ref(trainer), weakref.WeakMethod(callback)

    @functools.wraps(type(trainer).train)
    def train(*args: Any, **kwargs: Any) -> Any:
        owner = trainer_of()
        assert owner is not None
        try:
            return type(owner).train(owner, *args, **kwargs)
        finally:
            if (call := call_of()) is not None:
                call()

    trainer.train = train


def call_before_clipping(accelerator: Accelerator, callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` before gradients are clipped or their norm is read; return a function that ends this."""
    clip = accelerator.clip_grad_norm_

    @functools.wraps(clip)
    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        callback()
        return clip(*args, **kwargs)

    def end() -> None:
        vars(accelerator).pop(clip.__name__, None)

    vars(accelerator)[clip.__name__] = clip_grad_norm_
    return end
