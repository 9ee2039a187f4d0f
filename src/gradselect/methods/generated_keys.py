"""Recipe keys made from the fields of a dataclass: the settings of a policy, mask or evaluation stand in one place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Sequence
from functools import reduce
from operator import or_
from types import ModuleType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Field

from gradselect.blocks import AbstractPolicy
from gradselect.entries import AbstractMask

Kind = TypeVar("Kind", AbstractPolicy, AbstractMask)


def dataclass_keys(settings: type, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return type and default of each field, as `pydantic.create_model` takes them.

    Fields that the class inherits come last. `field(init=False)` is state and gives no key.

    Args:
        settings: a dataclass.
        without: fields that give no key.
    """
    types = get_type_hints(settings)
    own = inspect.get_annotations(settings)
    fields = sorted(dataclasses.fields(settings), key=lambda field: field.name not in own)
    return {
        field.name: (_as_key(types[field.name]), _default(field))
        for field in fields
        if field.init and field.name not in without
    }


def _as_key(annotation: Any) -> Any:
    """Return the type with tuples in place of sequences: settings never change."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Sequence:
        return tuple[arguments[0], ...]
    if origin in (Union, UnionType):
        return reduce(or_, map(_as_key, arguments))
    return annotation


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def named_classes(package: ModuleType, kind: type[Kind]) -> dict[str, type[Kind]]:
    """Return the policies or masks that a package lists and that have a method name, by that name."""
    listed = [getattr(package, name) for name in package.__all__]
    classes = [value for value in listed if isinstance(value, type) and issubclass(value, kind)]
    return {value.method_name: value for value in classes if value.method_name is not None}


def one_of(*values: str) -> Any:
    """Return the type of a key that takes these values only."""
    return Literal[values]


def describe(selector: type) -> str:
    """Return name and first docstring line of a policy or mask, as the description of its method."""
    return f"`gradselect.{selector.__name__}`: {inspect.cleandoc(selector.__doc__ or '').splitlines()[0]}"
