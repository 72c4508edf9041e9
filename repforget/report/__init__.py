"""A run folder -> report.html (one self-contained file), report.md, plots and result.json."""

from __future__ import annotations

from repforget.report.data import RESULT_FILE, ReportData, load, save
from repforget.report.render import write

__all__ = ["RESULT_FILE", "ReportData", "load", "save", "write"]
