"""One self-contained page on some stores."""

from classlens.analysis.report.page import write_report

__all__ = ["write_report"]
