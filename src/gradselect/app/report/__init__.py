"""Results of a comparison, or one training run -> one page with tables and pictures."""

from .read_run import is_run
from .report import ReportSummary, write_report
from .run_report import RunReport, write_run_report

__all__ = ["ReportSummary", "RunReport", "is_run", "write_report", "write_run_report"]
