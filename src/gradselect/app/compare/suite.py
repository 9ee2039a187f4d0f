"""The suite of a comparison: every key that its YAML file may hold, its type and its default."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from gradselect import UsageError
from gradselect.app.recipe import (
    AbstractSamplingTrainer,
    ClassificationData,
    EvaluationSettings,
    Method,
    Place,
    RandomData,
    Recipe,
    Settings,
    dataclass_keys,
    explain,
    ids_of_evaluation,
    ids_of_recipe,
    merge,
    read_values,
    with_overrides,
)
from gradselect.app.runtime import HubId
from gradselect.app.stats import MEAN_CHRF
from gradselect.usage import matching, nearest

from .budget import Budget
from .samples import Samples
from .search import Search

NOT_SHARED = {
    "method": "write each method below methods",
    "optimizer.lr": "write the learning rates of each method as methods.<name>.rates",
    "run.output": "every run has a folder of its own",
    "run.seed": "write how many seeds there are as seeds",
}
"""Keys that a suite's `recipe` must not have, with the advice for the user."""

OF_GENERATION = (MEAN_CHRF, "chrf", "bleu")
"""Scores that an evaluation of texts may name; the others are of classifications."""

NOT_OF_AN_EVALUATION = {"model", "output", "harness", "num_fewshot"}
"""Fields of `EvaluationSettings` that are no keys of a suite."""


def _as_preparations(value: Any) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return [{"command": entry} if isinstance(entry, str) else entry for entry in value]


def _without_dropped(value: Any) -> Any:
    """Drop methods or evaluations that are null: the suite does not want them from its base."""
    return {name: entry for name, entry in value.items() if entry is not None} if isinstance(value, Mapping) else value


def _as_sets(value: Any) -> Any:
    """Return the sets of `forgetting` by name; a single set without a name gets the empty one."""
    if not isinstance(value, Mapping):
        return {} if value is None else {"": value}
    given = {key: entry for key, entry in value.items() if entry is not None}
    sets = [key for key, entry in given.items() if isinstance(entry, Mapping)]
    others = [key for key in given if key not in sets]
    if sets and others:
        raise ValueError(
            f"{others[0]} is a key of a single set, and {sets[0]} the name of a set; write all sets by name, e.g. "
            "{wikitext: {task: loss, data: known.txt}}, and null for keys of a base: {" + f"{others[0]}: null" + "}"
        )
    return given if sets or not given else {"": given}


def _with_placeholders(value: Any) -> Any:
    """Complete the shared part of a recipe with placeholders for the values of each run."""
    if not isinstance(value, Mapping):
        return value
    for key, advice in NOT_SHARED.items():
        section, _, name = key.rpartition(".")
        inside = value.get(section) if section else value
        if isinstance(inside, Mapping) and name in inside:
            raise ValueError(f"{key} is not for a suite: {advice}")
    stand_in = {"method": {"name": "full"}, "optimizer": {"lr": 1.0}, "run": {"output": "-", "seed": 0}}
    return merge(value, stand_in)


class Preparation(Settings):
    """A command that makes data or the base model.

    Attributes:
        command: words as a shell splits them, run without a shell; "python" is the Python that runs the comparison.
        makes: file or folder that the command makes. If it exists, the command is skipped. Without this key the
            command runs each time.
    """

    command: Annotated[str, Field(min_length=1)]
    makes: Place | None = None


_EvaluationKeys: Any = create_model(
    "_EvaluationKeys", __base__=Settings, **dataclass_keys(EvaluationSettings, without=NOT_OF_AN_EVALUATION)
)


class Evaluation(_EvaluationKeys):
    """Settings of `gradselect evaluate`, without the model; the keys are those of `EvaluationSettings`.

    Attributes:
        metric: the score of a classification or of a generation. Default: accuracy, for scores the Pearson correlation,
            for a generation the mean chrF of its texts.
    """

    with_commas: ClassVar[tuple[str, ...]] = ("stop",)

    task: str
    metric: Literal["accuracy", "matthews", "f1", "pearson", "spearman", "mean_chrf", "chrf", "bleu"] | None = None

    @model_validator(mode="after")
    def check_settings(self) -> Self:
        """Check the settings by making them once."""
        self.settings("-")
        task = "generation" if self.metric in OF_GENERATION else "classification"
        if self.metric is not None and self.task != task:
            raise ValueError(f"metric={self.metric} is for task: {task}, not {self.task}; leave metric out")
        return self

    def settings(self, model: str | Path) -> EvaluationSettings:
        """Return the settings for `model`."""
        return EvaluationSettings(model=model, **self.model_dump(exclude={"metric"}))


class MethodEntry(Settings):
    """A method and its learning rates.

    Attributes:
        method: as the section `method` of a recipe.
        rates: the grid; every seed runs at the best by `Suite.rank_by`. A single rate needs no search.
    """

    method: Method
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def check_rates(self) -> Self:
        if len(set(self.rates)) != len(self.rates):
            raise ValueError(f"rates={list(self.rates)} holds a rate twice; write each once")
        return self


class Suite(Settings):
    """A comparison of methods on the same work.

    Attributes:
        name: of the suite, in results and file names.
        about: purpose of the suite.
        prepare: commands that make the data or the base model.
        recipe: shared by all methods, without method, learning rate, seed and output: the protocol.
        evaluations: of every trained model, by name; none to compare speed and memory only. Null drops one of `base`.
        forgetting: losses, measured for the base and for every trained model, by name of the set; the only one of a
            suite needs no name.
        samples: prompts that the base model and seed 0 of every method answer.
        rank_by: selects the learning rate: the loss on held-out training examples, never a test score.
        search: successive halving of the learning rates. None: every rate runs at full length.
        widen: rates beyond its grid, at most, that a method tries while its best rate is at the edge; each as far from
            the last as that from its neighbour.
        budget: cost that every run may take, in place of the recipe's number of steps.
        seeds: number of seeds of each method at its best rate: 0, 1, ...
        methods: by their name in tables; null drops a method of `base`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str = ""
    prepare: Annotated[tuple[Preparation, ...], BeforeValidator(_as_preparations)] = ()
    recipe: Annotated[Recipe, BeforeValidator(_with_placeholders)]
    evaluations: Annotated[dict[str, Evaluation], Field(default_factory=dict), BeforeValidator(_without_dropped)]
    forgetting: Annotated[dict[str, Evaluation], BeforeValidator(_as_sets)] = Field(default_factory=dict)
    samples: Samples | None = None
    rank_by: Literal["validation_loss"] = "validation_loss"
    search: Search | None = None
    widen: NonNegativeInt = 0
    budget: Budget | None = None
    seeds: PositiveInt = 3
    methods: Annotated[dict[str, MethodEntry], Field(min_length=1), BeforeValidator(_without_dropped)]

    @model_validator(mode="after")
    def check_names(self) -> Self:
        taken: dict[str, str] = {}
        for name in self.methods:
            if not slug(name):
                raise ValueError(f"methods: {name!r} has no letter and no digit to name a file by")
            if (other := taken.setdefault(slug(name), name)) != name:
                raise ValueError(f"methods: {other!r} and {name!r} would both be the file {slug(name)!r}; rename one")
        return self

    @model_validator(mode="after")
    def check_budget(self) -> Self:
        reference = None if self.budget is None else self.budget.time_of
        if reference is not None and reference not in self.methods:
            close = nearest(reference, list(self.methods))
            raise ValueError(f"budget.time_of={reference!r} names no method of this suite; write one of {close}")
        return self

    @model_validator(mode="after")
    def check_search(self) -> Self:
        searched = [name for name, entry in self.methods.items() if len(entry.rates) > 1]
        if searched and self.recipe.data.validation is None:
            raise ValueError(
                f"recipe.data.validation: missing, and {searched[0]!r} has several rates to choose from by the loss on "
                "held-out examples; write e.g. validation: 0.02"
            )
        if searched and isinstance(trainer := self.recipe.trainer, AbstractSamplingTrainer):
            rates = self.methods[searched[0]].rates
            raise ValueError(
                f"recipe.trainer.name={trainer.name}: {searched[0]!r} has several rates to choose from by the loss on "
                "held-out prompts, which says nothing of how good the answers are; write one rate for each method, "
                f"e.g. rates: [{rates[0]:g}], or each rate as a method of its own, and compare their evaluations"
            )
        if isinstance(self.recipe.data, RandomData) and (self.evaluations or self.forgetting or self.samples):
            raise ValueError(
                "evaluations, forgetting, samples: a model that is trained on random data is not kept; leave them out"
            )
        if isinstance(self.recipe.data, ClassificationData) and self.samples is not None:
            raise ValueError("samples: with recipe.data.format=classification no model writes answers; leave it out")
        for name, entry in self.forgetting.items():
            if entry.task != "loss":
                key = f"forgetting.{name}.task" if name else "forgetting.task"
                raise ValueError(f"{key}={entry.task!r}: forgetting is a loss; write task: loss")
        return self

    def training_recipe(self, method: str, *, lr: float, seed: int, output: str | Path) -> Recipe:
        """Return the recipe of one run."""
        return self.recipe.model_copy(
            update={
                "method": self.methods[method].method,
                "optimizer": self.recipe.optimizer.model_copy(update={"lr": lr}),
                "run": self.recipe.run.model_copy(
                    # Nobody reads the answers of these runs.
                    update={"seed": seed, "output": str(output), "sample_answers": 0}
                ),
            }
        )

    def chosen(self, only: Sequence[str]) -> list[str]:
        """Return the methods that `only` names, by name, slug or glob, in the suite's order; all if it is empty.

        Raises:
            UsageError: one of them matches no method.
        """
        if not only:
            return list(self.methods)
        by_slug = {slug(name): glob.escape(name) for name in self.methods}
        patterns = [by_slug.get(pattern, pattern) for pattern in only]
        return list(matching(self.methods, patterns, key="--only", kind="method", ignore_case=True))


def slug(name: str) -> str:
    """Return the name as part of a file name: "AdaGradSelect 20 %" becomes "adagradselect-20"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ids_of_suite(suite: Suite) -> Iterator[HubId]:
    """Yield the base model and the data of a suite that are no files of this machine."""
    yield from ids_of_recipe(suite.recipe)
    evaluations = [*suite.evaluations.values(), *suite.forgetting.values()]
    for evaluation in evaluations:
        yield from (one for one in ids_of_evaluation(evaluation.settings("-")) if one.kind == "dataset")


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read the suite in a YAML file, with `key=value` overrides such as "recipe.run.steps=100".

    A suite may extend another one: `base:` names its file, relative to its own folder.

    Raises:
        UsageError: no such file, broken YAML, or keys and values that do not fit, one line for each.

    Example:
        >>> load_suite("suites/quick.yaml", ["seeds=1"]).seeds
        1
    """
    values = read_values(Path(path), kind="suite", sections=tuple(Suite.model_fields))
    if {"model", "data"} <= values.keys() and "methods" not in values:
        raise UsageError(
            f"{path} is a recipe, which trains one model, and no suite; write: gradselect train {path}; in a suite it "
            "stands under `recipe`, beside `methods`"
        )
    return parse_suite(with_overrides(values, overrides), source=str(path))


def parse_suite(values: Mapping[str, Any], *, source: str) -> Suite:
    """Return the suite of plain `values`; errors call them `source`.

    Raises:
        UsageError: one line for each wrong value.
    """
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        lines = (f"  {line}" for line in explain(error, root=Suite))
        raise UsageError("\n".join([f"{source} is no valid suite:", *lines])) from None
