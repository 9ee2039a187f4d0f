"""Rewards for drawn answers: the rule-based answer checker, or functions of the user by import path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradselect import UsageError
from gradselect.app.answers import FIND_ANSWER, FIND_REFERENCE, Judge
from gradselect.app.data import Row, place_of, render
from gradselect.app.inputs import Inputs
from gradselect.app.recipe import BUILT_IN_REWARDS, AbstractSamplingTrainer, PromptData, Recipe
from gradselect.usage import first_line

OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that every reward function may take beside the columns of the data."""


class AbstractReward(ABC):
    """Rewards a batch of answers, and checks what comes back.

    Args:
        name: name in logs.
        inputs: the data.
        settings: section `data` of the recipe.
        may_abstain: True if it may return None, because there are other rewards.
    """

    def __init__(self, name: str, inputs: Inputs, settings: PromptData, *, may_abstain: bool) -> None:
        self.__name__ = name
        self._settings = settings
        self._may_abstain = may_abstain
        self._rows = {part: source.rows for part, source in inputs.examples.sources.items()}
        self._paths = {part: source.path for part, source in inputs.examples.sources.items()}

    @abstractmethod
    def reward(self, rows: Sequence[Row], places: Sequence[tuple[str, int]], **given: Any) -> Any:
        """Return a number for each answer.

        Args:
            rows: row of each answer's prompt, as in the file.
            places: part of the data ("train") and place in it, for each answer.
            given: arguments of TRL.
        """

    def close(self) -> None:
        """Free what the reward holds."""

    def __call__(self, *, source: Sequence[str], row: Sequence[int], **given: Any) -> list[float | None]:
        places = list(zip(source, row, strict=True))
        rows = [self._rows[part][place] for part, place in places]
        found = self.reward(rows, places, **given)
        try:
            rewards = [None if reward is None else float(reward) for reward in found]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"trainer.reward={self.__name__} returned {found!r:.80}, which is no list of numbers: "
                f"{first_line(error)}"
            ) from None
        if len(rewards) != len(rows):
            raise UsageError(
                f"trainer.reward={self.__name__} returned {len(rewards)} rewards for {len(rows)} answers; return one "
                "for each of `completions`"
            )
        for reward, place, completion in zip(rewards, places, given["completions"], strict=True):
            self._check(reward, place, completion)
        return rewards

    def _check(self, reward: float | None, place: tuple[str, int], completion: str) -> None:
        if reward is None and self._may_abstain:
            return
        if reward is None or not math.isfinite(reward):
            advice = "; None, for no opinion, needs a second reward" if reward is None else ""
            raise UsageError(
                f"trainer.reward={self.__name__} returned {reward} for an answer to {self.name_row(place)} "
                f"({completion!r:.80}); return a finite number{advice}"
            )

    def name_row(self, place: tuple[str, int]) -> str:
        """Return the place of a row for messages."""
        part, index = place
        return place_of(self._rows[part], index, path=self._paths[part])


class AnswerReward(AbstractReward):
    """1 if the answer is right, else 0, by the rules of `gradselect evaluate`. An undecided one is not right."""

    def __init__(self, name: str, inputs: Inputs, settings: PromptData, *, may_abstain: bool) -> None:
        super().__init__(name, inputs, settings, may_abstain=may_abstain)
        self._judge = Judge()
        self._find = FIND_ANSWER[name]
        assert settings.answer is not None
        self._references: dict[tuple[str, int], str] = {}
        for part, rows in self._rows.items():
            for index, row in enumerate(rows):
                try:
                    self._references[part, index] = FIND_REFERENCE[name](render(settings.answer, row))
                except UsageError as error:
                    raise UsageError(f"{self.name_row((part, index))}: trainer.reward={name}: {error}") from None

    def reward(self, rows: Sequence[Row], places: Sequence[tuple[str, int]], **given: Any) -> list[float]:
        found = [self._find(completion) for completion in given["completions"]]
        return [float(self._is_right(*pair)) for pair in zip(places, found, strict=True)]

    def _is_right(self, place: tuple[str, int], answer: str | None) -> bool:
        return answer is not None and bool(self._judge.equal(self._references[place], answer))

    def close(self) -> None:
        self._judge.__exit__(None, None, None)


class FunctionReward(AbstractReward):
    """A function of the user. It gets the columns of the data as lists, by name, and what TRL gives."""

    def __init__(
        self, name: str, inputs: Inputs, settings: PromptData, *, may_abstain: bool, function: Callable[..., Any]
    ) -> None:
        super().__init__(name, inputs, settings, may_abstain=may_abstain)
        self._function = function
        parameters = inspect.signature(function).parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self._takes = None if takes_all else set(parameters)
        first = self._rows["train"][0]
        columns = {*map(str, first), *(["answer"] if settings.answer is not None else [])} - {"prompt"}
        if taken := sorted(columns & {*OF_TRL}):
            raise UsageError(f"the column {taken[0]!r} has the name of an argument of rewards; rename it in the data")
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [one.name for one in parameters.values() if one.kind in kinds and one.default is one.empty]
        for parameter in needed:
            if parameter not in columns and parameter not in OF_TRL:
                raise UsageError(
                    f"trainer.reward={name} asks for {parameter!r}, which is no column; it can ask for "
                    f"{', '.join([*OF_TRL, *sorted(columns)])}"
                )

    def reward(self, rows: Sequence[Row], places: Sequence[tuple[str, int]], **given: Any) -> Any:
        messages = [json.loads(text) if text else None for text in given.pop("messages")]
        if messages[0] is not None:
            answers = given["completions"]
            given |= {"prompts": messages, "completions": [[{"role": "assistant", "content": one}] for one in answers]}
        names = dict.fromkeys(str(name) for row in rows for name in row if name != "prompt")
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        if self._settings.answer is not None:
            columns["answer"] = [render(self._settings.answer, row) for row in rows]
        arguments = {**columns, **given}
        if self._takes is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._takes}
        try:
            return self._function(**arguments)
        except Exception as error:
            raise UsageError(
                f"trainer.reward={self.__name__} raised {type(error).__name__}: {first_line(error)}{_where(error)}"
            ) from error


def make_rewards(recipe: Recipe, inputs: Inputs) -> list[AbstractReward]:
    """Return the rewards of a recipe.

    Raises:
        UsageError: a function cannot be imported or asks for what the data do not have, or a row has no reference.
    """
    trainer, data = recipe.trainer, recipe.data
    assert isinstance(trainer, AbstractSamplingTrainer)
    assert isinstance(data, PromptData)
    may_abstain = len(trainer.reward) > 1
    rewards: list[AbstractReward] = []
    for name in trainer.reward:
        if name in BUILT_IN_REWARDS:
            rewards.append(AnswerReward(name, inputs, data, may_abstain=may_abstain))
        else:
            function = load_function(name)
            rewards.append(FunctionReward(name, inputs, data, may_abstain=may_abstain, function=function))
    return rewards


def load_function(name: str) -> Callable[..., Any]:
    """Import the function "package.module:function" or "file.py:function". Its module is run, as a script is.

    Raises:
        UsageError: there is no such file, module or function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"trainer.reward={name}: {place} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    function = vars(module).get(attribute)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise UsageError(f"trainer.reward={name}: {place} has no function {attribute!r}; its functions are: {known}")
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"trainer.reward={name} is an async function; give one that returns the rewards")
    return function


def _load_file(path: Path) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"trainer.reward: {path}: no such file; paths are relative to the folder the command runs in")
    spec = importlib.util.spec_from_file_location(f"gradselect_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    """Import a module; one in the folder the command runs in is found too."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _where(error: BaseException) -> str:
    """Return the last line of the user's code that an error went through."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})"
