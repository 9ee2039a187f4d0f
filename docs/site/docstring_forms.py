"""Griffe extension: turns the forms that the docstrings of this library have into those that mkdocstrings renders."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

KNOWN = {"args", "attributes", "raises", "returns", "yields", "examples"}
PAGE = re.compile(r"\bdocs/(?P<page>[a-z-]+)\.md")
OPENS_BLOCK = re.compile(r"^(?P<text>\S.*):$")


class DocstringForms(Extension):
    """Rewrite each docstring as it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one class, function, attribute or module."""
        if obj.docstring is not None:
            obj.docstring.value = PAGE.sub(link_to_page, rewritten(obj.docstring.value))


def link_to_page(name: re.Match[str]) -> str:
    """Return a link from a page of the API, which is in a folder, to the page that a docstring names."""
    return f"[{name['page'].replace('-', ' ')}](../{name['page']}.html)"


def rewritten(text: str) -> str:
    r"""Return a docstring with `Example:` as a section, references as text, and formulas as blocks of code.

    Example:
        >>> rewritten("Add.\n\nThe formula:\n\n    a + b\n\nExample:\n    >>> 1 + 1\n    2\n").splitlines()[4:6]
        ['```text', 'a + b']
    """
    lines, out, position = text.splitlines(), [], 0
    while position < len(lines):
        line = lines[position]
        block, after = indented_block(lines, position + 1)
        opening = OPENS_BLOCK.match(line)
        name = opening["text"].lower() if opening else ""
        if name == "example":
            out.append("Examples:")
        elif line.startswith("Reference:"):
            reference = " ".join([line.removeprefix("Reference:").strip(), *(each.strip() for each in block)])
            out.append(f"**Reference:** {reference.strip()}")
            position = after
            continue
        elif block and name not in KNOWN and not line.startswith(" "):
            out += [line, "", "```text", *block, "```", ""] if line.strip() else ["", "```text", *block, "```", ""]
            position = after
            continue
        elif name in KNOWN or name == "examples":
            out.append(line)
        else:
            out.append(line)
            position += 1
            continue
        out += lines[position + 1 : after]
        position = after
    return "\n".join(out)


def indented_block(lines: list[str], start: int) -> tuple[list[str], int]:
    """Return the block indented by four or more that begins at `start`, without its indent, and the line after it."""
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
        end += 1
    while end > start and not lines[end - 1].strip():
        end -= 1
    block = [line.removeprefix("    ") for line in lines[start:end]]
    while block and not block[0].strip():
        block = block[1:]
    return block, max(end, start)
