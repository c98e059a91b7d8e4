"""The stage `report`."""

from __future__ import annotations

from pathlib import Path

from medcl.config import ReportConfig
from medcl.report.html import write_run_report


def write_report(config: ReportConfig) -> Path:
    """Writes report.html of a run from what its folder holds.

    Raises:
        MedclError: the folder is not a run.
    """
    return write_run_report(Path(config.run))
