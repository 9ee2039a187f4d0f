"""Answers of a model in training, without any effect on the training."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from gradselect.app.models import generate_with, greedy_settings
from gradselect.app.progress import Stage

from .samples import Sample

MAX_SECONDS = 30.0
"""Time for all answers of one validation."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of the model.

    Args:
        text: its text, without special tokens.
        is_finished: False if it was cut off by the limit of tokens or time.
    """

    text: str
    is_finished: bool = True


class AbstractAnswerer(ABC):
    """Answers samples.

    Args:
        samples: the samples.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)

    @property
    @abstractmethod
    def how(self) -> str:
        """Kind and limits of the answers, for the heading above them."""

    @abstractmethod
    def answers(self, model: nn.Module, stage: Stage, *, is_stopping: Callable[[], bool]) -> list[Answer]:
        """Return an answer to each sample.

        Args:
            model: in evaluation mode.
            stage: shows how far it is.
            is_stopping: returns True if the rest is not worth waiting for.
        """


class GreedyAnswerer(AbstractAnswerer):
    """Continues prompts greedily, in one batch.

    Args:
        samples: the samples.
        tokenizer: tokenizer of the model.
        ends: tokens that end an answer beside those of model and tokenizer.
        max_new_tokens: limit on the tokens of an answer.
    """

    def __init__(self, samples: Sequence[Sample], *, tokenizer: Any, ends: Sequence[int], max_new_tokens: int) -> None:
        super().__init__(samples)
        self._tokenizer = tokenizer
        self._ends = ends
        self._max_new_tokens = max_new_tokens

    @property
    def how(self) -> str:
        return f"greedy, at most {self._max_new_tokens} tokens"

    def answers(self, model: nn.Module, stage: Stage, *, is_stopping: Callable[[], bool]) -> list[Answer]:
        tokenizer = self._tokenizer
        generator: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        config = greedy_settings(
            generator,
            tokenizer,
            pad_token=pad,
            ends=self._ends,
            max_new_tokens=self._max_new_tokens,
            # Off in the config of many models that train.
            use_cache=True,
        )
        device = next(generator.parameters()).device
        prompts = [torch.tensor(sample.ids, device=device) for sample in self.samples]
        ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")  # (3, 180)
        mask = pad_sequence([torch.ones_like(each) for each in prompts], batch_first=True, padding_side="left")
        stage.total = self._max_new_tokens
        limit = _Limit(stage, num_before=ids.shape[1], is_stopping=is_stopping)
        written = generate_with(
            generator,
            config,
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList([limit]),
        )
        return [self._read(row, ends=config.eos_token_id or ()) for row in written[:, ids.shape[1] :].tolist()]

    def _read(self, ids: list[int], *, ends: Sequence[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text: Any = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text=text, is_finished=end < len(ids))


class _Limit(StoppingCriteria):
    """Ends all answers when the time is over, and shows how many tokens there are."""

    def __init__(self, stage: Stage, *, num_before: int, is_stopping: Callable[[], bool]) -> None:
        self._stage = stage
        self._num_before = num_before
        self._is_stopping = is_stopping
        self._ends_at = time.monotonic() + MAX_SECONDS

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._stage.done = input_ids.shape[1] - self._num_before
        is_over = self._is_stopping() or time.monotonic() > self._ends_at
        return torch.full((input_ids.shape[0],), is_over, device=input_ids.device)


class LabelPredictor(AbstractAnswerer):
    """Predicts labels or scores, in one batch.

    Args:
        samples: the samples.
        make_batch: returns the batch of these samples, on the model's device.
        names: labels in the order of the outputs. None: scores.
    """

    def __init__(
        self, samples: Sequence[Sample], *, make_batch: Callable[[], dict[str, Tensor]], names: Sequence[str] | None
    ) -> None:
        super().__init__(samples)
        self._make_batch = make_batch
        self._names = names

    @property
    def how(self) -> str:
        return "predicted scores" if self._names is None else "predicted labels"

    def answers(self, model: nn.Module, stage: Stage, *, is_stopping: Callable[[], bool]) -> list[Answer]:
        logits: Tensor = model(**self._make_batch()).logits  # (3, 2)
        if self._names is None:
            return [Answer(text=f"{score:.4g}") for score in logits.flatten().tolist()]
        return [Answer(text=str(self._names[best])) for best in logits.argmax(-1).tolist()]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate the model inside the block, without gradients; leave it and all random states as they were.

    Modes, buffers and other attributes of its modules are restored: a rotary embedding notes the longest text so far.
    """
    modules = [*model.modules()]
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({each.device.index for each in model.parameters() if each.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, before, own in zip(modules, attributes, buffers, strict=True):
                vars(module).clear()
                vars(module).update(before)
                module._buffers.clear()
                module._buffers.update(own)
            for buffer, value in values:
                buffer.copy_(value)
            random.setstate(python)
            np.random.set_state(numpy)
