"""A conversation with a model, its answers streamed word by word."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gradselect.app.evaluate import (
    EvaluationSettings,
    LanguageModel,
    check_folder,
    greedy_config,
    load_language_model,
    resolve_max_new_tokens,
)
from gradselect.app.models import generate_with
from gradselect.usage import UsageError

from .forms import AbstractForm, check_writes_text, form_for

DEFAULT_MAX_NEW_TOKENS = 256


class Conversation:
    """Turns of a user and a model.

    Args:
        model: the model with its tokenizer.
        form: how words become a prompt.
        max_new_tokens: token limit of an answer.
        temperature: 0 for greedy answers; else they are drawn at this temperature.

    Attributes:
        turns: what was said and answered so far.
        num_forgotten: oldest turns that no longer fit into the context.
    """

    def __init__(self, model: LanguageModel, form: AbstractForm, *, max_new_tokens: int, temperature: float) -> None:
        self.form = form
        self.turns: list[tuple[str, str]] = []
        self.num_forgotten = 0
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._config = greedy_config(model, max_new_tokens=max_new_tokens, stop=())
        if temperature:
            # From the model's whole distribution: nothing is cut off in silence.
            self._config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)

    @torch.inference_mode()
    def answer(self, said: Mapping[str, str], *, write: Callable[[str], None]) -> str:
        """Pass the answer on to `write`, piece by piece, and return it.

        Raises:
            UsageError: the prompt alone does not fit into the model's context.
        """
        ids = self._fitting(said)
        tokens = torch.tensor([ids], device=self._model.device)
        streamer = _streamer(self._model.tokenizer, write)
        generate_with(
            self._model.model,
            self._config,
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            tokenizer=self._model.tokenizer,
            streamer=streamer,
        )
        text = "".join(streamer.pieces)
        if self.form.remembers:
            self.turns.append((said[self.form.fields[0]], text))
        return text

    def clear(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.num_forgotten = 0

    def _fitting(self, said: Mapping[str, str]) -> list[int]:
        """Return the tokens of the prompt, without the oldest turns if the context is too short for them."""
        context = self._model.context
        room = None if context is None else context - self._max_new_tokens
        ids = self.form.encode(said, self.turns, self._model)
        while room is not None and len(ids) > room and self.turns:
            del self.turns[0]
            self.num_forgotten += 1
            ids = self.form.encode(said, self.turns, self._model)
        if room is not None and len(ids) > room:
            raise UsageError(
                f"the prompt has {len(ids)} tokens; the model's context of {context} has room for {room} beside an "
                f"answer of {self._max_new_tokens} (--max-new-tokens)"
            )
        if not ids:
            raise UsageError("the prompt is empty; say something")
        return ids


def open_conversation(
    model: str | Path,
    *,
    system: str | None = None,
    as_chat: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    dtype: str = "auto",
    device: str = "auto",
) -> Conversation:
    """Load a model to talk with.

    Args:
        model: folder of a run or of a checkpoint, or an id on the hub.
        system: text of a system message.
        as_chat: use the chat template of the model even if it was trained on prompts of another form.
        max_new_tokens: token limit of an answer. Default: 256, at most half of the context.
        temperature: 0 for greedy answers; else they are drawn at this temperature.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, ...

    Raises:
        UsageError: the model cannot be used, or an option does not fit it.

    Example:
        >>> conversation = open_conversation("runs/smol")  # doctest: +SKIP
        >>> conversation.answer({"question": "How many is 2 + 3?"}, write=print)  # doctest: +SKIP
    """
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature} is negative or no number; write 0 for greedy answers, or e.g. 0.7")
    check_writes_text(model)
    check_folder(model)
    loaded = load_language_model(EvaluationSettings(model=model, task="gsm8k", dtype=dtype, device=device))
    form = form_for(model, loaded.tokenizer, system=system, as_chat=as_chat)
    limit = resolve_max_new_tokens(max_new_tokens, default=DEFAULT_MAX_NEW_TOKENS, context=loaded.context)
    return Conversation(loaded, form, max_new_tokens=limit, temperature=temperature)


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    # Here rather than above: transformers is slow to import, and errors come first.
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Keeps and passes on what it would print."""

        pieces: list[str]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces.append(text)
            write(text)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.pieces = []
    return streamer
