"""Results of a comparison -> one page with tables and pictures."""

from ._report import ReportSummary as ReportSummary
from ._report import write_report as write_report

__all__ = ["ReportSummary", "write_report"]
