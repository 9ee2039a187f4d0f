"""Entry point of `gradselect`: all commands, and the exit code of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    from gradselect.usage import missing_packages

    packages = " ".join(missing_packages("train")) or missing.name
    raise SystemExit(f"the command line needs {missing.name}; run: pip install {packages}") from None

from gradselect import __version__
from gradselect.usage import UsageError

from .chat import chat
from .compare import compare
from .data import data
from .delta import app as delta_commands
from .doctor import doctor
from .entry import USAGE_EXIT_CODE
from .evaluate import evaluate
from .export import export
from .launch import launch
from .plan import plan
from .plugin_path import show_plugin_path
from .quickstart import quickstart
from .report import report
from .train import train
from .tune import tune

app = typer.Typer(
    name="gradselect",
    help="Fine-tune language models at full-parameter quality, training in each step only the part that matters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(delta_commands)
app.command()(quickstart)
app.command()(report)
app.command()(compare)
app.command()(tune)
app.command()(plan)
app.command()(data)
app.command(
    epilog="Exit codes: 0 finished; 2 usage error, explained in one message; 143 stopped by SIGTERM, 130 by SIGINT "
    "(Ctrl-C). Both signals finish the current step and write a checkpoint; a second signal stops at once. The same "
    "command with --resume starts or resumes a run. Repeat it until the run has finished."
)(train)
app.command()(evaluate)
app.command()(chat)
app.command()(export)

ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("launch", context_settings=ANY_WORDS, add_help_option=False)
def _launch(words: typer.Context) -> None:
    """Train selectively in any command that ends in a transformers Trainer."""
    raise SystemExit(launch(words.args))


@app.command("doctor", context_settings=ANY_WORDS, add_help_option=False)
def _doctor(words: typer.Context) -> None:
    """Look at this installation: versions, what each feature lacks, devices, and a few training steps on each."""
    raise SystemExit(doctor(words.args))


@app.command("plugin-path", context_settings=ANY_WORDS, add_help_option=False)
def _plugin_path(words: typer.Context) -> None:
    """Print the path of the plug-in for a framework that loads plug-ins by path."""
    raise SystemExit(show_plugin_path(words.args))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A `UsageError` prints one message and exits with code 2.

    As one of several processes of a launcher, and with the arguments of the process, it ends the process itself.
    """
    is_whole_process = arguments is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        _run(sys.argv[1:] if arguments is None else list(arguments))
    except SystemExit as end:
        if not is_whole_process:
            raise
        from gradselect.app.runtime import end_process

        end_process(end.code if isinstance(end.code, int) else 0)


def _run(arguments: list[str]) -> None:
    try:
        app(arguments, prog_name="gradselect")  # completion scripts call it by this name
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(USAGE_EXIT_CODE) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradselect {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
