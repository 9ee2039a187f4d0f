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
    from gradselect.usage import install_command, lacking_packages

    packages = lacking_packages("train")
    advice = install_command(packages) if packages else f"pip install {missing.name}"
    raise SystemExit(f"the command line needs {missing.name}; run: {advice}") from None

from gradselect import __version__
from gradselect.usage import UsageError, install_command, lacking_packages

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
    help="Fine-tune language models by training, at each step, only the part of their weights that gradients select.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}
FIRST, TRAIN, RESULT = "First steps", "Train", "With the trained model"
COMPARE, ELSEWHERE = "Reports and comparisons", "In other frameworks"


def _examples(*commands: str, more: str = "") -> str:
    """Return examples as the text below a command's help: a line each."""
    return "\n\n".join(["Examples:", *(f"gradselect {command}" for command in commands), *([more] if more else [])])


app.command(rich_help_panel=FIRST, epilog=_examples("quickstart", "quickstart my-folder --steps 50"))(quickstart)


@app.command("doctor", context_settings=ANY_WORDS, add_help_option=False, rich_help_panel=FIRST)
def _doctor(words: typer.Context) -> None:
    """Look at this installation: versions, what each feature lacks, devices, and a few training steps on each."""
    raise SystemExit(doctor(words.args))


app.command(
    rich_help_panel=TRAIN,
    epilog=_examples(
        "data Qwen/Qwen2.5-0.5B-Instruct chats.jsonl",
        "data recipes/gsm8k.yaml data.path=my/train.jsonl --row 17",
    ),
)(data)
app.command(
    rich_help_panel=TRAIN,
    epilog=_examples(
        "plan Qwen/Qwen2.5-0.5B-Instruct chats.jsonl --fit 12GiB",
        "plan recipes/gsm8k.yaml data.max_length=256 --all",
    ),
)(plan)
app.command(
    rich_help_panel=TRAIN,
    epilog=_examples(
        "train Qwen/Qwen2.5-0.5B-Instruct chats.jsonl",
        "train Qwen/Qwen2.5-0.5B train.jsonl method.name=lora optimizer.lr=2e-4 run.output=runs/lora",
        "train recipes/gsm8k.yaml data.path=my/train.jsonl --resume",
        more="Exit codes: 0 finished; 2 usage error, explained in one message; 143 stopped by SIGTERM, 130 by SIGINT "
        "(Ctrl-C). Both signals finish the current step and write a checkpoint; a second signal stops at once. The "
        "same command with --resume starts or resumes a run. Repeat it until the run has finished.",
    ),
)(train)
app.command(
    rich_help_panel=TRAIN,
    epilog=_examples(
        "tune recipes/gsm8k.yaml --trials 20",
        "tune recipes/gsm8k.yaml --search optimizer.lr=1e-5:1e-3:log",
        "tune recipes/lora-search.yaml --space adapters",
    ),
)(tune)
app.command(rich_help_panel=RESULT, epilog=_examples("chat runs/gsm8k", "chat runs/gsm8k --temperature 0.7"))(chat)
app.command(
    rich_help_panel=RESULT,
    epilog=_examples(
        "evaluate runs/gsm8k --task gsm8k --data my/test.jsonl",
        "evaluate runs/chat --task loss --data my/chats.jsonl",
    ),
)(evaluate)
app.command(
    rich_help_panel=RESULT,
    epilog=_examples("export runs/gsm8k --hub you/model --dry-run", "export runs/gsm8k --gguf model.gguf --type q8_0"),
)(export)
app.add_typer(delta_commands, rich_help_panel=RESULT)
app.command(
    rich_help_panel=COMPARE,
    epilog=_examples("report runs/gsm8k", "report runs/compare/quick --output page"),
)(report)
app.command(
    rich_help_panel=COMPARE,
    epilog=_examples(
        "compare suites/quick.yaml",
        "compare suites/quick.yaml --only full --only 'AdaGradSelect*' --seeds 1",
    ),
)(compare)


@app.command("launch", context_settings=ANY_WORDS, add_help_option=False, rich_help_panel=ELSEWHERE)
def _launch(words: typer.Context) -> None:
    """Train selectively in any command that ends in a transformers Trainer."""
    raise SystemExit(launch(words.args))


@app.command("plugin-path", context_settings=ANY_WORDS, add_help_option=False, rich_help_panel=ELSEWHERE)
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
    lacking = lacking_packages("train")
    too_old = [package for package in lacking if package.installed]
    if too_old and os.environ.get("LOCAL_RANK", "0") == "0":
        lacks = ", ".join(package.lack for package in too_old)
        _say(f"warning: {lacks}; run: {install_command(too_old)}", style="yellow")
    try:
        app(arguments, prog_name="gradselect")  # completion scripts call it by this name
    except UsageError as error:
        _say(f"error: {error}", style="red")
        raise SystemExit(USAGE_EXIT_CODE) from None
    except ImportError as error:
        if not lacking:  # then the installation is not to blame
            raise
        _say(f"error: {error}; run: {install_command(lacking)}", style="red")
        raise SystemExit(USAGE_EXIT_CODE) from None


def _say(text: str, *, style: str) -> None:
    Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)


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
