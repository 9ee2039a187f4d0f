"""The command line: `gradselect train` and `gradselect evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"the command line needs {missing.name}; run: pip install 'gradselect[train]'") from None

from . import UsageError, __version__
from ._compare_command import compare
from ._delta_commands import app as delta_commands
from ._plan_command import plan
from ._report_command import report
from ._tune_command import tune

if TYPE_CHECKING:
    from .evaluate import EvaluationSettings

app = typer.Typer(
    name="gradselect",
    help="Fine-tune language models at full-parameter quality while training, at any moment, only what matters now.",
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

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can put right becomes one message and exit code 2."""
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


# The imports of each command stand inside it: `--help` should not wait for them.


@app.command(
    epilog="Exit codes: 0 finished; 2 something to put right, said in one message; 143 stopped by SIGTERM and 130 by "
    "SIGINT (Ctrl-C), after the step under way and with a checkpoint, a second signal ends at once. The same command "
    "with --resume begins a run, goes on with one, and may be repeated until it has finished."
)
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file; recipes/ has examples.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace the recipe's, e.g. optimizer.lr=1e-4.", metavar="KEY=VALUE"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in run.output; without one, begin.")
    ] = False,
) -> None:
    """Fine-tune a model as RECIPE says; the result is a plain Hugging Face checkpoint in run.output."""
    from .train import Preempted, load_recipe
    from .train import train as carry_out

    words = ["gradselect", "train", recipe, *(overrides or [])]
    go_on = shlex.join([*words, "--resume"])
    try:
        carry_out(
            load_recipe(recipe, overrides or []), resume=resume, command=[*words, *(["--resume"] if resume else [])]
        )
    except Preempted as stopped:
        typer.echo(f"{stopped.message}; go on with: {go_on}", err=True)
        raise
    except KeyboardInterrupt:
        typer.echo(f"interrupted; go on from the newest checkpoint with: {go_on}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder with a checkpoint, or an id on the hub.", metavar="MODEL")],
    task: Annotated[str | None, typer.Option(help="gsm8k, math, loss or classification.")] = None,
    data: Annotated[str | None, typer.Option(help="A data file, or the id of a data set on the hub.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the hub.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Template with columns in braces, as in the recipe.")] = None,
    completion: Annotated[str | None, typer.Option(help="Template of the reference answer.")] = None,
    text: Annotated[str | None, typer.Option(help="Template of the text to classify.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Template of the second text to classify.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or score.")] = None,
    labels: Annotated[str | None, typer.Option(help="The labels in the order of the head, with commas.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns of a file that names none, with commas.")] = None,
    as_chat: Annotated[bool, typer.Option("--as-chat", help="Send the prompt through the chat template.")] = False,
    batch_size: Annotated[int, typer.Option(help="Items of a forward pass.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of one answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="An answer ends before this text; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    output: Annotated[str | None, typer.Option(help="A new folder for items.jsonl and result.json.")] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-eval instead of a task, with commas.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples in the prompt of lm-eval's tasks.")] = None,
) -> None:
    """Measure MODEL: accuracy on worked problems or labels, loss on a text, or published tasks through lm-eval."""
    from .evaluate import EvaluationSettings
    from .train._messages import collected_messages

    settings = EvaluationSettings(
        model=model,
        task=task,
        data=data,
        subset=subset,
        split=split,
        limit=limit,
        prompt=_with_line_ends(prompt),
        completion=_with_line_ends(completion),
        text=_with_line_ends(text),
        text_pair=_with_line_ends(text_pair),
        label=label,
        labels=tuple(labels.split(",")) if labels else None,
        columns=tuple(columns.split(",")) if columns else None,
        as_chat=as_chat,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        **({"stop": tuple(end.replace("\\n", "\n") for end in stop)} if stop else {}),
        dtype=dtype,
        device=device,
        output=output,
        harness=tuple(harness.split(",")) if harness else (),
        num_fewshot=num_fewshot,
    )
    with collected_messages(Console(stderr=True)):
        if settings.harness:
            _evaluate_published(settings)
        else:
            _evaluate_task(settings)


def _evaluate_task(settings: EvaluationSettings) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from .evaluate import evaluate as measure

    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluate", total=None)
        result = measure(settings, on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    typer.echo(result.summary())
    _say_where(settings)


def _evaluate_published(settings: EvaluationSettings) -> None:
    from .evaluate import run_harness

    for name, metrics in run_harness(settings).scores.items():
        for metric, value in metrics.items():
            typer.echo(f"{name}  {metric}  {value:.4f}")
    _say_where(settings)


def _say_where(settings: EvaluationSettings) -> None:
    if settings.output is not None:
        typer.echo(f"items and settings in {settings.output}")


def _with_line_ends(template: str | None) -> str | None:
    """A shell hands on a backslash and an n where a line end is meant."""
    return None if template is None else template.replace("\\n", "\n")
