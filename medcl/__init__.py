"""medcl: self-supervised learning on 3D medical images.

`medcl.pretrain(config)`, `medcl.finetune(config)` and the other stages take the dataclasses of `medcl.config`; each is
imported when first used, so that `import medcl` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Waiting threads should sleep: with spinning ones a single busy neighbour makes two-thread torch many times slower. It
# has to be said before torch is loaded; a value set by the user wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_STAGES = {
    "scan": "medcl.data.stage",
    "prepare": "medcl.data.stage",
    "pretrain": "medcl.pretext.stage",
    "finetune": "medcl.downstream.stage",
    "predict": "medcl.downstream.predict",
    "evaluate": "medcl.evaluation.stage",
    "compare": "medcl.evaluation.stage",
    "write_report": "medcl.report.stage",
    "export": "medcl.checkpoint",
}
_CONFIGS = tuple(f"{stage.split('_')[-1].capitalize()}Config" for stage in _STAGES)

__all__ = [*_STAGES, *_CONFIGS]

if TYPE_CHECKING:
    from medcl.checkpoint import export as export
    from medcl.config import (
        CompareConfig as CompareConfig,
    )
    from medcl.config import (
        EvaluateConfig as EvaluateConfig,
    )
    from medcl.config import (
        ExportConfig as ExportConfig,
    )
    from medcl.config import (
        FinetuneConfig as FinetuneConfig,
    )
    from medcl.config import (
        PredictConfig as PredictConfig,
    )
    from medcl.config import (
        PrepareConfig as PrepareConfig,
    )
    from medcl.config import (
        PretrainConfig as PretrainConfig,
    )
    from medcl.config import (
        ReportConfig as ReportConfig,
    )
    from medcl.config import (
        ScanConfig as ScanConfig,
    )
    from medcl.data.stage import prepare as prepare
    from medcl.data.stage import scan as scan
    from medcl.downstream.predict import predict as predict
    from medcl.downstream.stage import finetune as finetune
    from medcl.evaluation.stage import compare as compare
    from medcl.evaluation.stage import evaluate as evaluate
    from medcl.pretext.stage import pretrain as pretrain
    from medcl.report.stage import write_report as write_report


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return getattr(importlib.import_module(_STAGES[name]), name)
    if name in _CONFIGS:
        return getattr(importlib.import_module("medcl.config"), name)
    raise AttributeError(f"module 'medcl' has no attribute {name!r}")
