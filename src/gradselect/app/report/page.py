"""What the page consists of, and the page as HTML."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .charts import Chart
from .tables import Table

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table, pictures or lines, with what has to be said of them.

    Args:
        title: heading; empty where the section's says it.
        text: a sentence or two before the rest.
        is_folded: shown when it is asked for.
    """

    title: str = ""
    text: str = ""
    table: Table | None = None
    charts: tuple[Chart, ...] = ()
    lines: tuple[str, ...] = ()
    is_folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template fills in."""

    title: str
    facts: tuple[str, ...]
    findings: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def charts(self) -> tuple[Chart, ...]:
        return tuple(chart for section in self.sections for part in section.parts for chart in part.charts)


def render(page: Page) -> str:
    """The page as HTML, pictures and style inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = _base64
    return environment.get_template(TEMPLATE).render(page=page)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
