"""Base class of every section of a recipe or suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Values written by a user: checked once, never changed. An unknown key is an error.

    A key of several values also takes a single word, or words separated by commas: `report_to: wandb`.

    Attributes:
        renamed: today's key for each old one, so that the error can name it.
        with_commas: keys of several values of which one may hold a comma, so that a single text is not split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    with_commas: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def split_words(cls, values: Any) -> Any:
        """Make tuples of texts where a key takes several values."""
        if not isinstance(values, Mapping):
            return values
        return {key: _words(cls, key, v) if v is None or isinstance(v, str) else v for key, v in values.items()}


def _words(settings: type[Settings], key: Any, text: str | None) -> str | tuple[str, ...] | None:
    several = _keys_of_several(settings)
    if key not in several or text in several[key]:
        return text
    if text is None:  # nothing behind the sign: `report_to:`
        return ()
    return (text,) if key in settings.with_commas else tuple(word.strip() for word in text.split(",") if word.strip())


@cache
def _keys_of_several(settings: type[Settings]) -> dict[str, tuple[Any, ...]]:
    """Return the keys of several words or numbers, each with the other values that it takes."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, field in settings.model_fields.items():
        options = list(_options(field.annotation))
        lists = [get_args(option)[:1] for option in options if get_origin(option) is tuple]
        if lists and str not in options and not any(_is_section(kind) for kinds in lists for kind in kinds):
            literals = [option for option in options if get_origin(option) is Literal]
            words = [word for literal in literals for word in get_args(literal)]
            found[name] = (*words, None) if type(None) in options else (*words,)
    return found


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows, without what is annotated."""
    if get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    elif get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    else:
        yield annotation


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
