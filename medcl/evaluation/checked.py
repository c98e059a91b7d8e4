"""The check that scores go through: has the network seen what it is scored on?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcl.checkpoint import weights_hash
from medcl.dataset.case import Case, Manifest
from medcl.errors import MedclError
from medcl.evaluation.evaluate import prediction_files
from medcl.evaluation.statistics import counted
from medcl.io.nifti import read_maker
from medcl.leakage.audit import checked, compared, refuse, stamp
from medcl.leakage.seen import SELECTION, seen_by, seen_in
from medcl.runtime.run import log, read_config


def check_run(run: Path, manifest: Manifest, cases: Sequence[Case], subjects: str, allowed: bool) -> dict[str, Any]:
    """The check of a run before it predicts its own `test` or `val` subjects.

    Raises:
        MedclError: they were seen, and the user has not allowed it.
    """
    validated = subjects == "val"
    result = _compared(run, manifest, cases, allowed, run, SELECTION if validated else "")
    note = "the weights were chosen by their scores on these validation subjects, which flatters them"
    return checked([result], stamp(result, run), notes=[note] if validated else [])


def check_folder(predictions: Path, manifest: Manifest, allowed: bool) -> dict[str, Any]:
    """The check of a folder of label maps: against all that the run which made each of them has seen.

    Raises:
        MedclError: a network has seen what it is scored on, and the user has not allowed it.
    """
    files = prediction_files(predictions)
    made: dict[tuple[str, str], list[Case]] = {}
    for case in manifest.labelled:
        if case.id in files:
            made.setdefault(read_maker(files[case.id]), []).append(case)
    results, marks, gaps = [], [], []
    for (path, weights), cases in made.items():
        run, those = Path(path), f"{counted(len(cases), 'prediction')}, such as {cases[0].id}"
        if not path:
            gaps.append(f"nothing is known of what made {those}: whether it has seen them was not checked")
            continue
        if not (run / "weights" / "contract.json").exists():
            gaps.append(f"{run.name}, which made {those}, is not where it was: what it has seen was not checked")
            continue
        if weights_hash(run) != weights:
            gaps.append(f"{run.name}, which made {those}, has other weights by now: those were checked")
        result = _compared(run, manifest, cases, allowed, predictions)
        results.append(result)
        marks += stamp(result, run)
    for gap in gaps:
        log.warning("%s.", gap)
    return checked(results, list(dict.fromkeys(marks)), gaps)


def _compared(
    run: Path, manifest: Manifest, cases: Sequence[Case], allowed: bool, where: Path, stage: str = ""
) -> dict[str, Any]:
    trained = read_config(run) if (run / "config.yaml").exists() else {}
    store = str(trained.get("store") or "")
    seen = seen_by(run)
    if not (seen.volumes or seen.gaps):
        raise MedclError("has no record of a volume that it has seen", run, "Copy the whole run folder again.")
    result = compared(seen, seen_in(manifest, cases, stage, store=store), store=store)
    refuse(result, allowed or bool(trained.get("allow_leakage")), where, "score volumes that were not seen")
    if result["sentence"]:
        log.warning("%s.", result["sentence"])
    return result
