"""YAML of plain values, read without harm from any text."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from gradselect.usage import printable

MAX_LEVELS = 32
MAX_VALUES = 20_000
"""Far above the largest recipe or suite that makes sense, and cheap for any machine."""

_UNWRITABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters and lone surrogates: no file name can hold them, no file can be written with them."""

_TYPED = re.compile(r"(\\+)([nt])")
"""Backslashes before a letter that they may make a line end or a tab."""


def read_yaml(text: str) -> Any:
    """Return the values in a YAML text.

    Raises:
        ValueError: says in one line what is wrong.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError(f"more than {MAX_LEVELS} levels deep") from None
    # PyYAML passes on what Python raises for a value that only looks like a date (2024-13-45) or a number.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None


def read_typed(text: str) -> str:
    r"""Return a text as it was typed, with line ends and tabs for the two characters \n and \t, which shells pass on.

    A backslash before them that is to stay is doubled. Backslashes before anything else are themselves.

    Raises:
        ValueError: it holds a character that no file can hold.

    Example:
        >>> read_typed(r"{question}\nAnswer with \\text, not \frac:")
        '{question}\nAnswer with \\text, not \\frac:'
    """
    if _UNWRITABLE.search(text):
        raise ValueError(f"{text!r:.60} holds a character that cannot be written")
    return _TYPED.sub(lambda found: found[1][: len(found[1]) // 2] + _read_escape(found), text)


def as_typed(text: str) -> str:
    """Return a text in the form that `read_typed` reads, on one line."""
    doubled = re.sub(r"\\+(?=[nt\n\t])", lambda found: 2 * found[0], text)
    return doubled.replace("\n", "\\n").replace("\t", "\\t")


def _read_escape(found: re.Match[str]) -> str:
    is_escape = len(found[1]) % 2
    return {"n": "\n", "t": "\t"}[found[2]] if is_escape else found[2]


class _PlainLoader(yaml.SafeLoader):
    """Loader without tags of objects, duplicate keys, or aliases that grow far beyond their text.

    PyYAML silently takes the last of equal keys. An alias of an alias of an alias costs PyYAML nothing, but whoever
    walks over the values meets a billion of them ("billion laughs").
    """

    _num_levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._num_levels == MAX_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_LEVELS} levels deep", problem_mark=self.get_mark())
        self._num_levels += 1
        node = super().compose_node(parent, index)
        self._num_levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _num_nodes(node, known={}, depth=0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            # The parent class refuses keys without a hash.
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r:.60} stands twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = super().construct_scalar(node)
        if _UNWRITABLE.search(text):
            raise yaml.MarkedYAMLError(
                problem=f"{text!r:.60} holds a character that cannot be written", problem_mark=node.start_mark
            )
        return text


def _num_nodes(node: yaml.Node, *, known: dict[int, int], depth: int) -> int:
    """Return the number of values below a node, with every alias written out.

    Args:
        node: node of the document.
        known: number of values of nodes that were counted before, by id.
        depth: levels above the node.
    """
    if depth > MAX_LEVELS:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_LEVELS} levels deep, or an alias of itself", problem_mark=node.start_mark
        )
    if id(node) not in known:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        children = [] if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_num_nodes(child, known=known, depth=depth + 1) for child in children)
    if known[id(node)] > MAX_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_VALUES:,} values with its aliases written out", problem_mark=node.start_mark
        )
    return known[id(node)]
