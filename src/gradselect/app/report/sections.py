"""The page of a comparison, section by section."""

from __future__ import annotations

from collections.abc import Iterable

from gradselect.integrations.pictures import chart_settings

from .budget_section import budget_parts
from .comparison import compare_results
from .cost_sections import cost_parts, trade_off_parts
from .findings import facts, findings
from .page import Page, Part, Section
from .protocol_section import protocol_parts
from .read_results import Results
from .result_sections import difference_parts, left_out_parts, rate_parts, result_parts
from .sample_section import sample_parts
from .table import Namer
from .training_sections import convergence_parts, selection_parts


def build_page(results: Results) -> Page:
    """Build the page, its sections in reading order; empty sections are left out."""
    comparison = compare_results(results)
    name = Namer(comparison.marks)
    with chart_settings():
        sections = (
            _section("results", "Results", result_parts(comparison, name)),
            _section("differences", "Significant differences", difference_parts(comparison, name)),
            _section("samples", "Sample answers", sample_parts(comparison, name)),
            _section("trade-offs", "Score against cost", trade_off_parts(comparison, name)),
            _section("budget", "Budget and calibration", budget_parts(comparison, name)),
            _section("costs", "Time and memory", cost_parts(comparison, name)),
            _section("convergence", "Convergence", convergence_parts(comparison)),
            _section("selection", "Selected blocks and entries", selection_parts(comparison, name)),
            _section("rates", "Search of the learning rate", rate_parts(comparison, name)),
            _section("left-out", "Left out", left_out_parts(comparison, name)),
            _section("protocol", "Protocol, versions, commands", protocol_parts(comparison)),
        )
    return Page(
        title=f"Comparison of methods: {results.runs[0].record.suite}",
        facts=tuple(facts(comparison)),
        findings=tuple(findings(comparison)),
        sections=tuple(section for section in sections if section.parts),
    )


def _section(key: str, title: str, parts: Iterable[Part]) -> Section:
    return Section(key=key, title=title, parts=tuple(parts))
