"""Forms of a prompt: the chat template of the model, or the template of the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from gradselect.app.data import columns_of, optional_columns_of, render
from gradselect.app.evaluate import LanguageModel, encode_prompt
from gradselect.app.results import RunRecord, read_run
from gradselect.app.runtime import RunFolder
from gradselect.usage import UsageError

Turn = tuple[str, str]
"""What the user said, and the answer."""


class AbstractForm(ABC):
    """Form of the prompt that is made of what a user types.

    Attributes:
        fields: what the user is asked for, in order.
        remembers: True if a prompt holds the turns before it.
    """

    fields: tuple[str, ...] = ("you",)
    remembers: bool = False

    @abstractmethod
    def encode(self, said: Mapping[str, str], turns: Sequence[Turn], model: LanguageModel) -> list[int]:
        """Return the tokens of the prompt."""

    @abstractmethod
    def describe(self) -> str:
        """Say in one line what becomes of the user's words."""


@final
@dataclass(frozen=True)
class ChatForm(AbstractForm):
    """Messages in the model's own chat template, with all turns so far.

    Args:
        system: text of a system message before them.
    """

    system: str | None = None
    remembers = True

    def encode(self, said: Mapping[str, str], turns: Sequence[Turn], model: LanguageModel) -> list[int]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, answer in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": said["you"]})
        try:
            return list(
                model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            )
        # A template is a program of the model's author and may refuse, e.g. a system message.
        except Exception as error:
            raise UsageError(f"the chat template of the model refuses these messages: {error}") from error

    def describe(self) -> str:
        return "messages go through the model's chat template"


@final
class TemplateForm(AbstractForm):
    """Prompt of the training, with what the user says in place of its columns. It holds no earlier turn.

    Args:
        template: `data.prompt` of the recipe; "{you}" to go on from the user's own words.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self.fields = columns_of(template) + optional_columns_of(template)

    def encode(self, said: Mapping[str, str], turns: Sequence[Turn], model: LanguageModel) -> list[int]:
        text = render(self._template, said)
        return list(encode_prompt(text, language_model=model, as_chat=False, room=None).ids)

    def describe(self) -> str:
        if self._template == "{you}":
            return "the model goes on from your words; it does not see earlier ones"
        return f"the prompt is that of the training, {self._template!r}; it holds no earlier turn"


def form_for(path: str | Path, tokenizer: Any, *, system: str | None, as_chat: bool) -> AbstractForm:
    """Return the form that the model in a folder was trained on; of another model its chat template, if it has one.

    Raises:
        UsageError: the run has not finished, its model writes no text, or an option does not fit.
    """
    form = _trained_form(path, system) or (ChatForm(system) if tokenizer.chat_template else TemplateForm("{you}"))
    if as_chat and not isinstance(form, ChatForm):
        form = ChatForm(system)
    if isinstance(form, ChatForm) and not tokenizer.chat_template:
        raise UsageError("--as-chat: the model's tokenizer has no chat template; leave it off")
    if system is not None and not isinstance(form, ChatForm):
        raise UsageError("--system needs a chat template, and this model was not trained with one; leave it off")
    return form


def check_writes_text(path: str | Path) -> None:
    """Refuse a run that has no model yet, or one that writes no text.

    Raises:
        UsageError: says what to do instead.
    """
    record = _record(path)
    if record is None:
        return
    if record.status != "finished":
        folder = RunFolder(Path(path))
        newest = folder.newest_checkpoint()
        checkpoint = "" if newest is None else f", or give its newest checkpoint: {newest}"
        raise UsageError(f"the run in {path} has not finished; resume it with --resume{checkpoint}")
    if record.recipe.get("data", {}).get("format") == "classification":
        raise UsageError(f"the run in {path} has trained a classification head, which writes no text; use evaluate")
    if record.recipe.get("data", {}).get("format") == "random":
        raise UsageError(f"the run in {path} was trained on random tokens, so no model was kept")


def _trained_form(path: str | Path, system: str | None) -> AbstractForm | None:
    record = _record(path)
    data = {} if record is None else record.recipe.get("data", {})
    match data.get("format"):
        case "prompt-completion" if not data.get("as_chat"):
            return TemplateForm(data["prompt"])
        case "prompt-completion" | "chat":
            return ChatForm(system)
        case "text":
            return TemplateForm("{you}")
        case "preference" | "prompts" if data.get("as_chat"):
            return ChatForm(system)
        # One column alone may hold messages, which the record does not say: that is for the model's tokenizer to tell.
        case "preference" | "prompts" if _has_words(data["prompt"]):
            return TemplateForm(data["prompt"])
    return None


def _has_words(template: str) -> bool:
    return [f"{{{column}}}" for column in columns_of(template)] != [template]


def _record(path: str | Path) -> RunRecord | None:
    file = RunFolder(Path(path)).run_file
    return read_run(file) if file.is_file() else None
