"""The command `gradselect chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gradselect.usage import UsageError

from .hub import check_reachable
from .loading import LOADING, command_stages
from .output import accept_any_text

if TYPE_CHECKING:
    from gradselect.app.chat import Conversation


def chat(
    model: Annotated[
        str, typer.Argument(help="Folder of a run or of a checkpoint, or an id on the hub.", metavar="MODEL")
    ],
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="Use the chat template, also if training used another prompt.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Token limit of an answer. Default: 256.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token. Else answers are drawn.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Talk with MODEL in the form that it was trained on.

    /clear forgets the conversation, /exit or Ctrl-D ends it.
    """
    accept_any_text()
    stages = command_stages(stderr=True)
    with stages.open(LOADING) as stage:
        from gradselect.app.runtime import HubId, collected_messages

        check_reachable([HubId("model", model, "model")], say=stages.say)
        from gradselect.app.chat import open_conversation

        stage.become("loading the model")
        with collected_messages(Console(stderr=True)):
            conversation = open_conversation(
                model,
                system=system,
                as_chat=as_chat,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                dtype=dtype,
                device=device,
            )
    typer.echo(f"{model}: {conversation.form.describe()}. /clear forgets, /exit or Ctrl-D ends.")
    with collected_messages(Console(stderr=True)):
        _talk(conversation)


def _talk(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys in input()
    forgotten = 0
    while (said := _ask(conversation.form.fields)) is not None:
        if not said:
            conversation.clear()
            forgotten = 0
        if not any(text.strip() for text in said.values()):
            continue
        try:
            conversation.answer(said, write=_write)
        except UsageError as error:
            typer.echo(f"note       {error}", err=True)
        except KeyboardInterrupt:
            typer.echo("\nnote       the answer was interrupted and is not remembered", err=True)
        typer.echo("")
        if conversation.num_forgotten > forgotten:
            forgotten = conversation.num_forgotten
            typer.echo(f"note       the context is full; oldest turns forgotten so far: {forgotten}", err=True)


def _ask(fields: Sequence[str]) -> dict[str, str] | None:
    """Return what the user says for each field; None at the end, empty to forget the conversation."""
    said: dict[str, str] = {}
    for field in fields:
        try:
            line = input(f"{field}> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo("")
            return None
        if line.strip() in ("/exit", "/quit"):
            return None
        if line.strip() == "/clear":
            return {}
        said[field] = line
    return said


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
