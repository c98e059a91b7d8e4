"""The stage `report`."""

from __future__ import annotations

from pathlib import Path

from medcl.config import ReportConfig
from medcl.report.bags import write_bag_report
from medcl.report.html import write_run_report
from medcl.runtime.run import read_config


def write_report(config: ReportConfig) -> Path:
    """Writes report.html of a run from what its folder holds.

    Raises:
        MedclError: the folder is not a run.
    """
    run = Path(config.run)
    if read_config(run).get("stage") == "mil fit":
        return write_bag_report(run)
    return write_run_report(run)
