"""The stages `evaluate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medcl.config import CompareConfig, EvaluateConfig
from medcl.dataset.case import Manifest
from medcl.dataset.splits import Split, cases_of
from medcl.errors import MedclError
from medcl.evaluation.checked import check_folder, check_run
from medcl.evaluation.compare import compare as compare_runs
from medcl.evaluation.evaluate import score_folder
from medcl.runtime.run import log, read_config, setup_log
from medcl.store.stage import load_source


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Scores a folder of label maps, or a run on its own test subjects.

    Returns:
        What evaluation.json holds.

    Raises:
        MedclError: nothing to score, or a prediction on another grid than its reference.
    """
    setup_log()
    predictions = Path(config.predictions)
    if not predictions.is_dir():
        raise MedclError("no such folder", predictions, "Give a folder of label maps, or a run folder.")
    if (predictions / "config.yaml").exists():
        return _evaluate_run(predictions, config)
    if not config.reference:
        raise MedclError("nothing to compare with", "--reference", "Give a folder of labelled scans.")
    manifest = load_source(config.reference, config.channel)
    out = Path(config.out) if config.out else predictions
    audit = check_folder(predictions, manifest, config.allow_leakage)
    return score_folder(
        predictions, manifest, out, tolerance_mm=config.tolerance, absent=config.absent, audit=audit
    )  # fmt: skip


def _evaluate_run(run: Path, config: EvaluateConfig) -> dict[str, Any]:
    from medcl.segmentation.predict import Predictor, predict_cases

    trained = read_config(run)
    if trained.get("stage") != "finetune":
        raise MedclError("is not the run of a fine-tuning", run, "Evaluate what `medcl finetune` wrote.")
    manifest = (
        load_source(config.reference, config.channel) if config.reference else Manifest.load(run / "manifest.json")
    )
    split = Split.load(run / "split.json")
    subjects = getattr(split, config.subjects)
    cases = cases_of(manifest, subjects, labelled=True)
    if not cases:
        where = config.reference or "SCANS"
        raise MedclError(
            f"has no labelled {config.subjects} subject" + (f" in {where}" if config.reference else ""), run,
            f"For others: `medcl predict {run} {where} OUT`, then `medcl evaluate OUT {where}`.",
        )  # fmt: skip
    audit = check_run(run, manifest, cases, config.subjects, config.allow_leakage)
    out = Path(config.out) if config.out else run / config.subjects
    log.info("%s: %d %s volumes of %d subjects.", run, len(cases), config.subjects, len(subjects))
    predict_cases(Predictor(run, str(trained["accelerator"]), str(trained["precision"])), manifest, cases, out)
    return score_folder(
        out, manifest.with_cases(cases), out, subjects=subjects, tolerance_mm=config.tolerance,
        absent=config.absent, audit=audit,
    )  # fmt: skip


def compare(config: CompareConfig) -> dict[str, Any]:
    """Paired comparison of two arms of evaluated runs; writes compare.json and compare.csv.

    Raises:
        MedclError: the runs do not pair up: other draws, other test subjects, or not evaluated.
    """
    runs, baseline = [Path(run) for run in config.runs], [Path(run) for run in config.baseline]
    return compare_runs(runs, baseline, Path(config.out), names=config.names, absent=config.absent)
