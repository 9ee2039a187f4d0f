"""Results of a comparison -> one page with tables and pictures."""

from .report import ReportSummary, write_report

__all__ = ["ReportSummary", "write_report"]
