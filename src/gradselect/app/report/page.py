"""Structure of the page, and the page as HTML."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .charts import Chart
from .table import Table

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Table, charts or lines of a section.

    Args:
        title: heading; empty if the heading of the section is enough.
        text: one or two sentences above the rest.
        is_folded: True to show it only after a click.
    """

    title: str = ""
    text: str = ""
    table: Table | None = None
    charts: tuple[Chart, ...] = ()
    lines: tuple[str, ...] = ()
    is_folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and the parts below it."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Input of the template."""

    title: str
    facts: tuple[str, ...]
    findings: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def charts(self) -> tuple[Chart, ...]:
        return tuple(chart for section in self.sections for part in section.parts for chart in part.charts)


def render(page: Page) -> str:
    """Return the page as HTML; pictures and style are inside."""
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
