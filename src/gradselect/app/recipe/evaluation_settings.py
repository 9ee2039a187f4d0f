"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradselect.app.data import check_template, columns_of
from gradselect.usage import UsageError

HUB_DATA = {"gsm8k": ("openai/gsm8k", "main"), "math": ("HuggingFaceH4/MATH-500", None)}
"""Hub id and configuration of the data of a task."""

TASKS = ("gsm8k", "math", "generation", "loss", "classification")
CLASSIFICATION_KEYS = ("text", "text_pair", "label", "labels", "columns")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_PROMPT = "Question: {question}\nAnswer:"
DEFAULT_STOP = ("\nQuestion:",)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of one model on one task. Decoding is greedy, so there is no seed.

    Args:
        model: a folder with a checkpoint (or a PEFT adapter), or the id of a model on the hub.
        task: "gsm8k" (a number after `####`), "math" (a boxed expression), "generation" (a text like one of several
            references, by chrF and BLEU), "loss" (nats per target token) or "classification" (labels or scores, by a
            model with a head for them).
        data: a `.jsonl .json .csv .tsv .parquet .txt` file (docs/data.md has all), a folder of such files, or the id of
            a data set on the hub. Default: the hub's test set of gsm8k or math.
        subset: configuration of a data set on the hub.
        split: split of a data set on the hub, or of a folder whose files are named after splits.
        limit: evaluate only this many rows, from the first.
        prompt: template with columns in braces, as in the recipe of the training. `{question}` and `{query}` stand for
            the question, whatever its column is called. Default: "Question: {question}\\nAnswer:"; for a loss on data
            with the columns prompt and completion, "{prompt}".
        completion: template of the reference answer (for "loss": of the target text). Default: the usual column names
            are tried, and a loss puts a space before the answer. For "generation" a column in braces may hold a list of
            references.
        text: for "classification": template of the text. This key and the next four default to those of the recipe
            that the model was trained with, if it is in the model's folder. For "loss": template of a whole text,
            instead of prompt and completion. Default: the column text, if there is one.
        text_pair: template of the second text.
        label: column that holds the label or the score.
        labels: labels as in that column, in the order of the head's outputs. Default: the labels of the model.
        columns: column names of a CSV or TSV file without a header.
        rows_key: key of the rows in a JSON file that holds one object. Default: the only list of objects.
        as_chat: send the prompt as a user's message through the tokenizer's chat template.
        batch_size: items per forward pass.
        max_new_tokens: limit of one answer. Default: 512 for gsm8k, 1024 for math and 256 for generation, at most half
            of the context.
        stop: an answer ends before any of these strings.
        dtype: dtype of the weights: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", ...
        output: new folder for `items.jsonl` and `result.json`. None: nothing is written.
        harness: tasks of lm-eval to run instead of `task`; see `run_harness`.
        num_fewshot: for `harness`: solved examples in the prompt. Default: the number of each task.

    Raises:
        UsageError: a value is not allowed.

    Example:
        >>> EvaluationSettings(model="out/model", task="gsm8k", data="test.jsonl", limit=100).batch_size
        16
    """

    model: str | Path
    task: str | None = None
    data: str | Path | None = None
    subset: str | None = None
    split: str = "test"
    limit: int | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    rows_key: str | None = None
    as_chat: bool = False
    batch_size: int = 16
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = DEFAULT_STOP
    dtype: str = "auto"
    device: str = "auto"
    output: str | Path | None = None
    harness: tuple[str, ...] = ()
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        self._check_task()
        self._check_templates()
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} is not a positive number; write {name}=8, say")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if "" in self.stop:
            raise UsageError("an empty stop string ends every answer at once; leave it out")

    def _check_task(self) -> None:
        if self.harness and self.task is not None:
            raise UsageError(f"got task={self.task!r} and harness={self.harness}; give one of them")
        if self.harness:
            self._check_harness()
            return
        if self.num_fewshot is not None:
            raise UsageError(f"num_fewshot={self.num_fewshot} is for tasks of lm-eval; write it with harness")
        if self.task is None:
            raise UsageError(f"no task is named; write task={TASKS[0]} (or {', '.join(TASKS[1:])}), or harness=...")
        if self.task not in TASKS:
            raise UsageError(f"task={self.task!r} is not one of {', '.join(TASKS)}; tasks of lm-eval go to harness")
        if self.task not in HUB_DATA and self.data is None:
            raise UsageError(f"the task {self.task} has no data of its own; write data=test.jsonl")
        self._check_keys_of_task()

    def _check_keys_of_task(self) -> None:
        others = {"prompt", "completion"} if self.task == "classification" else {*CLASSIFICATION_KEYS}
        others -= {"columns"}  # describes the file, so it fits every task
        others -= {"text"} if self.task == "loss" else set()
        for name in (name for name in sorted(others) if getattr(self, name) is not None):
            raise UsageError(f"{name}={getattr(self, name)!r} is not for the task {self.task}; leave it out")
        writes = self.task not in ("loss", "classification")
        for name, default in (("max_new_tokens", None), ("stop", DEFAULT_STOP)):
            if not writes and getattr(self, name) != default:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is for tasks whose answers the model writes, not for "
                    f"{self.task}; leave it out"
                )
        if self.task == "loss" and self.text is not None:
            for name in (name for name in ("prompt", "completion", "as_chat") if getattr(self, name)):
                raise UsageError(
                    f"{name}={getattr(self, name)!r} beside text={self.text!r}: the loss is that of a whole text or "
                    "that of a completion after its prompt; leave one of them out"
                )
        if self.as_chat and self.task == "classification":
            raise UsageError("as_chat is not for the task classification, which reads the text alone; leave it out")

    def _check_harness(self) -> None:
        for name in ("data", "subset", "rows_key", "prompt", "completion", "max_new_tokens", *CLASSIFICATION_KEYS):
            if getattr(self, name) is not None:
                raise UsageError(f"{name}={getattr(self, name)!r}: tasks of lm-eval bring their own; leave it out")

    def _check_templates(self) -> None:
        for name in ("prompt", "completion", "text", "text_pair"):
            template = getattr(self, name)
            if template is not None and not columns_of(check_template(template)):
                raise UsageError(f"{name}={template!r} names no column; write e.g. {DEFAULT_PROMPT!r}")
