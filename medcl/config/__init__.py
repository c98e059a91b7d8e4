"""One frozen dataclass a stage: the command line, the YAML files and the Python API all take these.

Imports nothing heavy, so that `medcl --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from medcl.config.benchmark import BenchmarkConfig as BenchmarkConfig
from medcl.config.kinds import nearest as nearest
from medcl.config.mil import MILEvaluateConfig as MILEvaluateConfig
from medcl.config.mil import MILFitConfig as MILFitConfig
from medcl.config.mil import MILPredictConfig as MILPredictConfig
from medcl.config.mil import MILPrepareConfig as MILPrepareConfig
from medcl.config.mil import MILPretrainConfig as MILPretrainConfig
from medcl.config.results import AuditConfig as AuditConfig
from medcl.config.results import CompareConfig as CompareConfig
from medcl.config.results import DoctorConfig as DoctorConfig
from medcl.config.results import EvaluateConfig as EvaluateConfig
from medcl.config.results import ExportConfig as ExportConfig
from medcl.config.results import PredictConfig as PredictConfig
from medcl.config.results import ReportConfig as ReportConfig
from medcl.config.stages import FinetuneConfig as FinetuneConfig
from medcl.config.stages import PrepareConfig as PrepareConfig
from medcl.config.stages import PretrainConfig as PretrainConfig
from medcl.config.stages import ScanConfig as ScanConfig
from medcl.errors import MedclError

T = TypeVar("T")


def from_mapping(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a dataclass from a mapping.

    Raises:
        MedclError: a key is unknown (the nearest known one is named) or a required one is missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise MedclError(f"unknown key {key!r}", where, nearest(key, known))
    missing = [
        name
        for name, f in known.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MedclError(f"{', '.join(missing)} missing", where, "Give it on the command line or in the config.")
    try:
        return kind(**values)
    except MedclError as error:
        if where.startswith("medcl "):  # a command: its flags need no further place
            raise
        raise MedclError(error.what, f"{where}, {str(error.where).lstrip('-')}", error.remedy) from None
