"""The report: run directories in, one self-contained HTML page out. Imports no torch."""

from fairlead.report.build import build_report

__all__ = ["build_report"]
