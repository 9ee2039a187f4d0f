"""The Trainer and the callback handler that call us: stack frames are the only way to them. Calls at its moments."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, final

from accelerate import Accelerator
from transformers import Trainer


def call_after_training(trainer: Trainer, callback: Callable[[], None]) -> None:
    """Call `callback` when `trainer.train()` ends in any way, also by an exception, which no callback is told of.

    Args:
        trainer: gets an attribute `train` in front of its method.
        callback: a bound method, held weakly.
    """
    _call_after("train", trainer, callback, only_if_it_fails=False)


def call_if_training_fails(trainer: Trainer, callback: Callable[[], None]) -> None:
    """Call `callback` when an exception ends the `train()` of `trainer` that is running already.

    Args:
        trainer: gets an attribute in front of its method that runs an epoch, or a step in versions without that.
        callback: a bound method, held weakly.
    """
    name = "_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step"
    _call_after(name, trainer, callback, only_if_it_fails=True)


def _call_after(name: str, trainer: Trainer, callback: Callable[[], None], *, only_if_it_fails: bool) -> None:
    trainer_of, call_of = weakref.ref(trainer), weakref.WeakMethod(callback)
    method = getattr(type(trainer), name)

    def carry_out(owner: Trainer, *args: Any, **kwargs: Any) -> Any:
        is_done = False
        try:
            result = getattr(type(owner), name)(owner, *args, **kwargs)
            is_done = only_if_it_fails
        finally:
            if not is_done and (call := call_of()) is not None:
                call()
        return result

    def first(owner: Trainer, *args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, _InFront(method, carry_out, owner=trainer_of))
        return carry_out(owner, *args, **kwargs)

    # It holds the Trainer, as nothing else does in `Trainer(...).train()`. That is a cycle, so the first call ends it:
    # whoever calls again holds the Trainer, and one that has trained is freed when it is dropped.
    setattr(trainer, name, _InFront(method, first, owner=lambda: trainer))


@final
class _InFront:
    """Callable in front of a method of a Trainer. A copy of the Trainer, or a pickled one, has the method alone.

    Args:
        method: of the class.
        call: gets the Trainer before the arguments.
        owner: returns the Trainer.
    """

    def __init__(self, method: Any, call: Callable[..., Any], *, owner: Callable[[], Any]) -> None:
        functools.update_wrapper(self, method)
        self._name = method.__name__
        self._call = call
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        assert owner is not None
        return self._call(owner, *args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._owner(), self._name)


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
