"""medcl: self-supervised learning on 3D medical images.

`medcl.pretrain(config)`, `medcl.finetune(config)` and the other stages take the dataclasses of `medcl.config`; each is
imported when first used, so that `import medcl` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from medcl.version import VERSION

__version__ = VERSION

# Waiting threads should sleep: with spinning ones a single busy neighbour makes two-thread torch many times slower. It
# has to be said before torch is loaded; a value set by the user wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_STAGES = {
    "scan": "medcl.store.stage",
    "prepare": "medcl.store.stage",
    "pretrain": "medcl.pretext.stage",
    "finetune": "medcl.segmentation.stage",
    "predict": "medcl.segmentation.predict",
    "evaluate": "medcl.evaluation.stage",
    "compare": "medcl.evaluation.stage",
    "benchmark": "medcl.efficiency.stage",
    "audit": "medcl.leakage.audit",
    "write_report": "medcl.report.stage",
    "export": "medcl.checkpoint",
    "doctor": "medcl.checkup",
}
# stages of bags, whose functions have longer names at home
_BAGS = {
    "mil_pretrain": "medcl.mil.pretrain:pretrain_patches",
    "mil_prepare": "medcl.mil.prepare:prepare_bags",
    "mil_fit": "medcl.mil.stage:fit",
    "mil_predict": "medcl.mil.stage:predict_bags",
    "mil_evaluate": "medcl.mil.evaluation:evaluate_bags",
}
_CONFIGS = (
    *(f"{stage.split('_')[-1].capitalize()}Config" for stage in _STAGES),
    *(f"MIL{stage.split('_')[-1].capitalize()}Config" for stage in _BAGS),
)

__all__ = [*_STAGES, *_BAGS, *_CONFIGS]

if TYPE_CHECKING:
    from medcl.checkpoint import export as export
    from medcl.checkup import doctor as doctor
    from medcl.config import (
        AuditConfig as AuditConfig,
    )
    from medcl.config import (
        BenchmarkConfig as BenchmarkConfig,
    )
    from medcl.config import (
        CompareConfig as CompareConfig,
    )
    from medcl.config import (
        DoctorConfig as DoctorConfig,
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
        MILEvaluateConfig as MILEvaluateConfig,
    )
    from medcl.config import (
        MILFitConfig as MILFitConfig,
    )
    from medcl.config import (
        MILPredictConfig as MILPredictConfig,
    )
    from medcl.config import (
        MILPrepareConfig as MILPrepareConfig,
    )
    from medcl.config import (
        MILPretrainConfig as MILPretrainConfig,
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
    from medcl.efficiency.stage import benchmark as benchmark
    from medcl.evaluation.stage import compare as compare
    from medcl.evaluation.stage import evaluate as evaluate
    from medcl.leakage.audit import audit as audit
    from medcl.mil.evaluation import evaluate_bags as mil_evaluate  # noqa: F401
    from medcl.mil.prepare import prepare_bags as mil_prepare  # noqa: F401
    from medcl.mil.pretrain import pretrain_patches as mil_pretrain  # noqa: F401
    from medcl.mil.stage import fit as mil_fit  # noqa: F401
    from medcl.mil.stage import predict_bags as mil_predict  # noqa: F401
    from medcl.pretext.stage import pretrain as pretrain
    from medcl.report.stage import write_report as write_report
    from medcl.segmentation.predict import predict as predict
    from medcl.segmentation.stage import finetune as finetune
    from medcl.store.stage import prepare as prepare
    from medcl.store.stage import scan as scan


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return getattr(importlib.import_module(_STAGES[name]), name)
    if name in _BAGS:
        module, function = _BAGS[name].split(":")
        return getattr(importlib.import_module(module), function)
    if name in _CONFIGS:
        return getattr(importlib.import_module("medcl.config"), name)
    raise AttributeError(f"module 'medcl' has no attribute {name!r}")
