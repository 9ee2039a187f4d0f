"""The command `gradselect evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gradselect.app.progress import fitted

from .hub import check_reachable
from .loading import LOADING, command_stages
from .output import accept_any_text

if TYPE_CHECKING:
    from gradselect.app.progress import Stages
    from gradselect.app.recipe import EvaluationSettings


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or an id on the hub.", metavar="MODEL")],
    task: Annotated[str | None, typer.Option(help="gsm8k, math, generation, loss or classification.")] = None,
    data: Annotated[str | None, typer.Option(help="Data file or folder, or the id of a data set on the hub.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the hub, or of a folder.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Number of rows to use, from the first.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Template of the prompt, with columns in braces, as in a recipe.")
    ] = None,
    completion: Annotated[str | None, typer.Option(help="Template of the reference answer.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Template of the text to classify, or of a whole text for its loss.")
    ] = None,
    text_pair: Annotated[str | None, typer.Option(help="Template of the second text to classify.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or score.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels in the order of the head, separated by commas.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of a file without a header, separated by commas.")
    ] = None,
    rows_key: Annotated[str | None, typer.Option(help="Key of the rows in a JSON file that holds one object.")] = None,
    as_chat: Annotated[bool, typer.Option("--as-chat", help="Send the prompt through the chat template.")] = False,
    batch_size: Annotated[int, typer.Option(help="Items per forward pass.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token limit of an answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    output: Annotated[str | None, typer.Option(help="New folder for items.jsonl and result.json.")] = None,
    show: Annotated[
        int | None, typer.Option(help="Number of answers to show.", min=0, show_default="5 on a terminal, else 0")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead of --task, separated by commas.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples in the prompts of lm-eval.")] = None,
) -> None:
    """Evaluate MODEL: accuracy on worked problems or labels, texts against references, loss, or tasks of lm-eval."""
    options, stages = locals(), command_stages(stderr=True)
    del options["show"]
    with stages.open(LOADING):
        settings = _settings(**options)
        from gradselect.app.recipe import ids_of_evaluation

        check_reachable(ids_of_evaluation(settings), say=stages.say)
        from gradselect.app.runtime import collected_messages

    with collected_messages(stages.console):
        if settings.harness:
            _evaluate_published(settings, stages)
        else:
            _evaluate_task(settings, stages, num_shown=show)


def _settings(*, stop: list[str] | None, **options: Any) -> EvaluationSettings:
    """Return the settings: lists are split at commas, and texts get their line ends."""
    from gradselect.app.recipe import EvaluationSettings

    for name in ("prompt", "completion", "text", "text_pair"):
        options[name] = None if options[name] is None else _typed(name, options[name])
    for name in ("labels", "columns", "harness"):
        options[name] = tuple(options[name].split(",")) if options[name] else None
    if stop:
        options["stop"] = tuple(_typed("stop", end) for end in stop)
    return EvaluationSettings(**{**options, "harness": options["harness"] or ()})


def _evaluate_task(settings: EvaluationSettings, stages: Stages, *, num_shown: int | None) -> None:
    with stages.open(LOADING) as stage:
        from gradselect.app.evaluate import NUM_SHOWN, answer_lines
        from gradselect.app.evaluate import evaluate as measure

        stage.become("loading model and data")

        def show(done: int, total: int) -> None:
            if stage.total is None:
                stage.become("evaluating", total=total, done=done)
            stage.done = done

        result = measure(settings, on_progress=show)
    console = Console()
    if num_shown is None:
        num_shown = NUM_SHOWN if console.is_terminal else 0
    accept_any_text()
    for line in answer_lines(result, count=num_shown):
        console.print(fitted(line, console, indent=14), highlight=False, markup=False, soft_wrap=True)
    typer.echo(result.summary())
    _print_output(settings)


def _evaluate_published(settings: EvaluationSettings, stages: Stages) -> None:
    with stages.open(LOADING):
        from gradselect.app.evaluate import run_harness

    for name, metrics in run_harness(settings).scores.items():
        for metric, value in metrics.items():
            typer.echo(f"{name}  {metric}  {value:.4f}")
    _print_output(settings)


def _print_output(settings: EvaluationSettings) -> None:
    if settings.output is not None:
        typer.echo(f"items and settings in {settings.output}")


def _typed(option: str, text: str) -> str:
    from gradselect.app.recipe import read_typed
    from gradselect.usage import UsageError

    try:
        return read_typed(text)
    except ValueError as error:
        raise UsageError(f"--{option.replace('_', '-')}: {error}") from None
