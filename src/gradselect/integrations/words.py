"""A method in words, as it is typed on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from gradselect.usage import UsageError


def read_words(words: str | Sequence[str], *, source: str) -> dict[str, Any]:
    """Return the keys of a method that is written in words.

    Args:
        words: the method's name and `key=value`, with values in YAML; one that begins with * is text.
        source: place of the words, for errors.

    Raises:
        UsageError: there is no name, or a word is neither a name nor `key=value`.

    Example:
        >>> read_words("adagradselect fraction=0.3 always=[embedding,norm]", source="--optim_args")
        {'name': 'adagradselect', 'fraction': 0.3, 'always': ['embedding', 'norm']}
    """
    given = words.split() if isinstance(words, str) else list(words)
    if given and "=" not in given[0]:
        given[0] = f"name={given[0]}"
    keys: dict[str, Any] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise UsageError(f"{source} has the word {word!r}, which is no key=value; {_advice(source)}")
        if not value:  # as a variable of the shell that is not set leaves it
            raise UsageError(f"{source} has {word!r} without a value; write one behind the sign, or leave the word out")
        if key in keys:
            raise UsageError(f"{source} has {key!r} twice; leave one out")
        if value.startswith("*"):  # a glob, which YAML takes for an alias; the schema splits it at commas
            keys[key] = value
            continue
        try:
            keys[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"{source} has {word!r}, whose value is no YAML; {_advice(source)}") from None
    if "name" not in keys:
        raise UsageError(f"{source}={' '.join(given)!r} names no method; {_advice(source)}")
    return keys


def _advice(source: str) -> str:
    return f"write e.g. {source} 'adagradselect fraction=0.2 always=[embedding]'"
