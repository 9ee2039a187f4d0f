"""The section `data` of a recipe: one class for each format."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from gradselect.app.data import check_template, label_text
from gradselect.methods import Settings

from .values import Count, Place, Tokens


def _check_text(value: object) -> object:
    """Explain what YAML makes of a template without quotes: {answer} is an object with the key answer."""
    if isinstance(value, dict) and all(item is None for item in value.values()):
        columns = ", ".join(map(str, value))
        raise ValueError(f'in YAML a text that begins with a brace needs quotes; write "{{{columns}}}"')
    return value


Template = Annotated[str, BeforeValidator(_check_text), AfterValidator(check_template)]
"""Text with columns of the data in braces, and optional parts: "Question: {question}{?hint: ({hint})}\\nAnswer:"."""

LabelName = Annotated[str, BeforeValidator(label_text)]
"""A label as in the data's column. YAML reads a bare 0 as a number."""


class AbstractDataSettings(Settings):
    """Source of the examples, and limits on them.

    Attributes:
        path: a `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv` or `.txt` file (docs/data.md has all), a folder of such
            files, a pattern (`data/part-*.jsonl`), or the id of a data set on the hub.
        columns: column names of CSV and TSV files without a header. A first line with exactly these names is skipped.
        rows_key: key of the rows in a JSON file that holds one object. Default: the only list of objects.
        subset: name of a configuration of the hub data set.
        split: split of the hub data set, or of a folder whose files are named after splits.
        limit: use only this many rows, from the first.
        validation: data for evaluation during training: a share of the training rows, held out (0.02); a file or
            folder; or, for a hub data set or a folder, the name of one of its splits. A bare word is then a split;
            a folder of that name here is ./word.
        validation_limit: use only this many rows of the validation data, from the first.
        max_length: tokens of an example; longer ones are cut at the end. Default: the model's context, at most 1024.
    """

    path: Place
    columns: tuple[str, ...] | None = None
    rows_key: str | None = None
    subset: str | None = None
    split: str = "train"
    limit: Count | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] | Place | None = None
    validation_limit: Count | None = None
    max_length: Tokens | None = None

    @field_validator("validation", mode="before")
    @classmethod
    def check_share(cls, value: object) -> object:
        """Explain in one line what a number has to be: it may be no share, and no name either."""
        if isinstance(value, int | float) and (isinstance(value, bool) or not 0 < value < 1):
            raise ValueError(
                f"{value!r} is no share of the rows; write one above 0 and below 1, e.g. 0.02, or the name of a "
                "file, a folder or a split; null for none"
            )
        return value


class AbstractTokenData(AbstractDataSettings):
    """Examples for a language model.

    Attributes:
        packing: put several examples into one row of `max_length` tokens. A text that is longer goes on in further
            rows. Attention stays inside each example: a model that does not keep to it is refused.
    """

    packing: bool = False


class PromptCompletionData(AbstractTokenData):
    """A prompt that the model reads and a completion that it learns to write.

    Attributes:
        prompt: template of the prompt.
        completion: template of the completion. The end-of-text token is appended.
        as_chat: make the prompt a user's message and the completion an assistant's, in the model's chat template.
        loss_on: tokens that count in the loss.
    """

    format: Literal["prompt-completion"]
    prompt: Template = "{prompt}"
    completion: Template = "{completion}"
    as_chat: bool = False
    loss_on: Literal["completion", "all"] = "completion"


class ChatData(AbstractTokenData):
    """Conversations, rendered with the model's own chat template. docs/chat.md has the forms that are read.

    Beside the messages a row may have the columns `tools`, `documents`, `system` and `chat_template_kwargs`.

    Attributes:
        messages: column that holds a list of messages, each an object with `role` and `content`, or `from` and `value`.
            Several columns are joined: [prompt, completion].
        tools: column that holds the tools of a row. Default: `tools`, if there is one.
        roles: roles of the chat template, by the names that the data has for them: {Mensch: user}.
        ignore: columns and keys of messages that are left out on purpose. Everything else must reach the model.
        loss_on: tokens that count in the loss. "answers" are all turns of the assistant. "last-answer" is the last of
            them.
    """

    format: Literal["chat"]
    messages: str | Annotated[tuple[str, ...], Field(min_length=1)] = "messages"
    tools: str | None = None
    roles: dict[str, str] | None = None
    ignore: tuple[str, ...] | None = None
    loss_on: Literal["last-answer", "answers", "all"] = "last-answer"

    @model_validator(mode="after")
    def check_ignore(self) -> Self:
        if needed := {"role", "content", "from", "value", *self.message_columns}.intersection(self.ignore or ()):
            raise ValueError(f"ignore={list(self.ignore or ())}: {min(needed)!r} is what a run trains on; take it out")
        return self

    @property
    def message_columns(self) -> tuple[str, ...]:
        """Columns that hold messages."""
        return (self.messages,) if isinstance(self.messages, str) else self.messages


class TextData(AbstractTokenData):
    """Plain text. Every token counts in the loss. The end-of-text token is appended.

    Attributes:
        text: template of an example.
    """

    format: Literal["text"]
    text: Template = "{text}"


class RandomData(Settings):
    """Rows of random tokens, all of one length, to measure time and memory.

    They need no file and no tokenizer. The trained model is not kept.

    Attributes:
        length: tokens of a row. All of them count in the loss.
        vocabulary: draw only tokens below this number. Default: all tokens of the model.
        rows: number of rows.
    """

    format: Literal["random"]
    length: Annotated[int, Field(ge=2, le=2**24)]
    vocabulary: Annotated[int, Field(ge=2, le=10**9)] | None = None
    rows: Count = 512

    @model_validator(mode="after")
    def check_size(self) -> Self:
        if self.rows * self.length > 2**30:
            raise ValueError(f"rows={self.rows} of length={self.length} are more than 2**30 tokens; take fewer rows")
        return self

    @property
    def max_length(self) -> int:
        """Tokens of an example."""
        return self.length

    @property
    def validation(self) -> None:
        """None: random tokens are not evaluated on."""


class ClassificationData(AbstractDataSettings):
    """Texts or pairs of texts, each with a label, for a model with a classification head.

    Attributes:
        text: template of the text.
        text_pair: template of the second text, if any.
        label: column that holds the label.
        labels: all labels as in that column, in the order of the head's outputs. Default: the labels of the training
            rows, in the order of a trained head of the checkpoint that has the same; else sorted as numbers if they
            are numbers, or as text.
        regression: the labels are scores. The head has one output, the loss is the squared error.
    """

    format: Literal["classification"]
    text: Template = "{sentence}"
    text_pair: Template | None = None
    label: str = "label"
    labels: tuple[LabelName, ...] | None = None
    regression: bool = False

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        if self.labels is not None and (
            self.regression or len(set(self.labels)) != len(self.labels) or len(self.labels) < 2
        ):
            raise ValueError(
                f"labels={list(self.labels)} with regression={self.regression}; give two or more different labels, or, "
                "for scores, regression=true and no labels"
            )
        return self


class AbstractAnswerData(AbstractDataSettings):
    """Prompts whose answers are compared or rewarded: plain text, or messages of a conversation.

    A column that holds messages goes through the model's chat template; docs/chat.md has the forms that are read.

    Attributes:
        prompt: template of the prompt, or the column that holds its messages, in braces.
        as_chat: make a prompt of plain text a user's message, and its answers the assistant's, in the chat template.
        tools: column that holds the tools of a conversation. Default: `tools`, if there is one.
        roles: roles of the chat template, by the names that the data has for them: {Mensch: user}.
        ignore: columns and keys of messages that are left out on purpose.
    """

    prompt: Template = "{prompt}"
    as_chat: bool = False
    tools: str | None = None
    roles: dict[str, str] | None = None
    ignore: tuple[str, ...] | None = None


class PreferenceData(AbstractAnswerData):
    """A prompt with a better and a worse answer, or with one answer and its label.

    Rows that have no column of the worse answer are read with `completion` and `label`, for the trainer `kto`. Where
    answers are messages, each may also hold the whole conversation, prompt included.

    Attributes:
        chosen: template of the better answer.
        rejected: template of the worse answer.
        completion: template of an answer that has a label.
        label: column that says if that answer is good: true or false, 1 or 0.
    """

    format: Literal["preference"]
    chosen: Template = "{chosen}"
    rejected: Template = "{rejected}"
    completion: Template = "{completion}"
    label: str = "label"


class PromptData(AbstractAnswerData):
    """Prompts that the model answers while it trains. Rewards see all columns of a row.

    Attributes:
        answer: template of a worked solution that holds the right answer. The rewards gsm8k and math need it; functions
            get it as `answer`.
    """

    format: Literal["prompts"]
    answer: Template | None = None


TokenData = PromptCompletionData | ChatData | TextData
FileData = TokenData | ClassificationData | PreferenceData | PromptData
Data = Annotated[FileData | RandomData, Field(discriminator="format")]


def is_packed(data: Data) -> bool:
    """True if one row holds several examples."""
    return isinstance(data, TokenData) and data.packing
