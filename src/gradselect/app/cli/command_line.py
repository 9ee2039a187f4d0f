"""Entry point of `gradselect`: all commands, and the exit code of errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"the command line needs {missing.name}; run: pip install 'gradselect[train]'") from None

from gradselect import UsageError, __version__

from .compare import compare
from .data import data
from .delta import app as delta_commands
from .evaluate import evaluate
from .plan import plan
from .report import report
from .train import train
from .tune import tune

app = typer.Typer(
    name="gradselect",
    help="Fine-tune language models at full-parameter quality, training in each step only the part that matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(delta_commands)
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

USAGE_EXIT_CODE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A `UsageError` prints one message and exits with code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(arguments)
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
