"""Scores a folder of predicted label maps against a manifest's references."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Case, Manifest
from medcl.dataset.checks import check_grid, check_label_values, values_of, whole_labels
from medcl.dataset.labels import read_label, read_label_file
from medcl.errors import MedclError
from medcl.evaluation import statistics
from medcl.evaluation.absence import COUNTS, INSTEAD, absences, check_absent, how_absent, other_rule, with_absence_rule
from medcl.evaluation.metrics import MEASURES, OUTCOMES, segmentation_scores
from medcl.evaluation.statistics import Interval, bootstrap_mean, counted
from medcl.io.formats import volume_suffix
from medcl.io.geometry import Volume
from medcl.leakage.audit import checked, notes_on
from medcl.runtime.files import read_json, write_json, write_text
from medcl.runtime.run import log

EVALUATION_VERSION = 1
UNKNOWN = "nothing is known of what made these predictions: whether it has seen them was not checked"
COLUMNS = ("case", "subject", "class", "name", "outcome", *MEASURES, "volume_pred_ml", "volume_ref_ml")
_PARSE: dict[str, Callable[[str], Any]] = {"case": str, "subject": str, "class": int, "name": str, "outcome": str}

Row = dict[str, Any]


def score_folder(
    predictions: Path,
    manifest: Manifest,
    out: Path,
    *,
    subjects: Collection[str] | None = None,
    tolerance_mm: float | None = None,
    absent: str = "nothing",
    audit: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores every labelled case that has a prediction, and writes `evaluation.csv` and `evaluation.json`.

    The classes scored are those the manifest names and those found in the references. The overall figure is the mean
    over subjects of the mean over their cases of the mean over foreground classes.

    Args:
        predictions: folder of `<case id>.nii.gz` (or another volume suffix), each on its reference's grid.
        manifest: says which cases have a reference, and where.
        out: folder for the two files.
        subjects: only these; None for all.
        tolerance_mm: surface distance that NSD forgives, in mm; None takes one voxel along the finest axis (the median
            of the cases scored).
        absent: what a class counts that a reference and its prediction both lack, see `absence`.
        audit: the check that these predictions have gone through (`medcl.evaluation.checked`); without one, the result
            says that nothing is known of what made them.

    Returns:
        What `evaluation.json` holds: counts, intervals per class and overall, missing predictions, conventions.

    Raises:
        MedclError: there is nothing to score. One prediction among others that cannot be scored (unreadable, another
            grid, labels that are not whole numbers) is logged, listed and left out.
    """
    if tolerance_mm is not None and not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise MedclError(f"{tolerance_mm} mm makes no sense", "--tolerance", "Give a length of 0 mm or more.")
    check_absent(absent)
    cases = [case for case in manifest.labelled if subjects is None or case.subject in subjects]
    if not cases:
        chosen = "no subject chosen has a label map" if subjects is not None else "no case has a label map"
        raise MedclError(f"{chosen}, so nothing can be scored", manifest.root, "Point to the labelled data.")
    found = prediction_files(Path(predictions))
    scored = [case for case in cases if case.id in found]
    if not scored:
        raise MedclError(
            f"holds no prediction for any of the {len(cases)} labelled cases",
            predictions,
            f"Files must be named after the case, such as {cases[0].id}.nii.gz: write them with `medcl predict`.",
        )
    if tolerance_mm is None:
        tolerance_mm = round(float(np.median([min(case.spacing) for case in scored])), 4)
        log.info("NSD forgives %g mm, one voxel along the finest axis (--tolerance takes another).", tolerance_mm)
    named = {value: name for value, name in manifest.label_names.items() if value != 0}
    rows: list[Row] = []
    referenced: set[int] = set()
    unscored: dict[str, str] = {}
    for case in scored:
        try:
            case_rows, values = _score_case(found[case.id], manifest, case, named, tolerance_mm)
        except MedclError as error:
            log.warning("%s", error)
            unscored[case.id] = str(error)
            continue
        rows += case_rows
        referenced |= values
    if len(unscored) == len(scored):
        raise MedclError(
            f"none of {counted(len(scored), 'prediction')} can be scored", predictions, next(iter(unscored.values()))
        )
    scored = [case for case in scored if case.id not in unscored]
    classes = {value: named.get(value, f"class {value}") for value in sorted(set(named) | referenced)}
    unexpected = Counter(row["class"] for row in rows if row["class"] not in classes)
    rows = _complete(rows, scored, classes)
    wanted = {case.id for case in cases}
    audit = audit or checked([], gaps=[UNKNOWN])
    result = {
        "medcl_evaluation": EVALUATION_VERSION,
        "n_cases": len(scored),
        "n_subjects": len({case.subject for case in scored}),
        "tolerance_mm": tolerance_mm,
        "leakage": audit["leakage"],
        "audit": dict(audit),
        **summarise(with_absence_rule([rows], absent)[0], classes),
        "absent": _absent(rows, classes, absent),
        "missing_predictions": [case.id for case in cases if case.id not in found],
        "unscored_predictions": unscored,
        "predictions_without_reference": sorted(set(found) - wanted),
        "classes_only_predicted": {str(value): count for value, count in sorted(unexpected.items())},
        "conventions": conventions(tolerance_mm, absent),
    }
    write_text(Path(out) / "evaluation.csv", _to_csv(rows))
    write_json(Path(out) / "evaluation.json", result)
    return result


def summarise(rows: Sequence[Row], classes: Mapping[int, str]) -> dict[str, Any]:
    """Means over subjects with intervals, overall (`mean`) and for each of `classes`."""
    per_class = []
    for value, name in classes.items():
        of_class = [row for row in rows if row["class"] == value]
        outcomes = Counter(row["outcome"] for row in of_class)
        per_class.append(
            {
                "class": value,
                "name": name,
                "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
                **{metric: _interval(of_class, metric).to_dict() for metric in MEASURES},
            }
        )
    overall = mean_over_classes(rows)
    return {"mean": {metric: _interval(overall, metric).to_dict() for metric in MEASURES}, "classes": per_class}


def mean_over_classes(rows: Iterable[Row]) -> list[Row]:
    """One row per case: `case`, `subject` and the mean of each metric over classes, NaN left out."""
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row["case"], row["subject"]), []).append(row)
    means = []
    for (case, subject), group in by_case.items():
        values = {metric: [row[metric] for row in group if not math.isnan(row[metric])] for metric in MEASURES}
        averages = {metric: float(np.mean(kept)) if kept else math.nan for metric, kept in values.items()}
        means.append({"case": case, "subject": subject, **averages})
    return means


def read_result(path: Path) -> dict[str, Any]:
    """Reads an `evaluation.json`.

    Raises:
        MedclError: the file is missing or of another version.
    """
    result = read_json(path)
    if not isinstance(result, dict) or result.get("medcl_evaluation") != EVALUATION_VERSION:
        raise MedclError("is not an evaluation of this version", path, "Write it anew with `medcl evaluate`.")
    return result


def read_scores(path: Path) -> list[Row]:
    """Reads an `evaluation.csv`; a blank number becomes NaN.

    Raises:
        MedclError: the file is missing or is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
        return [{key: _PARSE.get(key, _number)(row[key]) for key in COLUMNS} for row in table]
    except FileNotFoundError:
        raise MedclError("no such file", path, "Score the run first with `medcl evaluate`.") from None
    except (KeyError, ValueError, TypeError, csv.Error, OSError) as error:
        raise MedclError(f"is not a table of scores ({error})", path, "Write it anew with `medcl evaluate`.") from None


def conventions(tolerance_mm: float, absent: str = "nothing") -> list[str]:
    """What a reader must know to compare these numbers with others."""
    return [
        "Overall: mean over foreground classes of a case, then over the cases of a subject, then over subjects.",
        f"Intervals: 95 % {statistics.METHOD}.",
        "Surfaces are the voxels with a face neighbour outside the mask; distances run between voxel centres in mm.",
        "HD95 is the larger of the two directed 95th percentiles.",
        f"NSD is the share of surface voxels of both masks within {tolerance_mm:g} mm of the other surface.",
        "A class missed scores Dice 0 and NSD 0 and has no HD95. What has no score is left out of means and counted.",
        how_absent(absent, compared=False),
    ]


def print_table(result: Mapping[str, Any]) -> None:
    """Prints the result of `score_folder` for a person."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{result['n_cases']} cases of {result['n_subjects']} subjects, mean [95 % interval]")
    table.add_column("class")
    for metric, measure in MEASURES.items():
        tolerance = f" at {result['tolerance_mm']:g} mm" if metric == "nsd" else ""
        table.add_column(f"{measure.title} ({measure.unit}){tolerance}", justify="right", no_wrap=True)
    for entry in result["classes"]:
        table.add_row(escape(f"{entry['class']} {entry['name']}"), *interval_cells(entry))
    table.add_section()
    table.add_row("mean", *interval_cells(result["mean"]), style="bold")
    console = Console()
    console.print(table)
    for line in notices(result):
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def interval_cells(entry: Mapping[str, Any]) -> list[str]:
    """The printed interval of each metric in a row of the result."""
    intervals = {metric: Interval.from_dict(entry[metric]) for metric in MEASURES}
    return [statistics.format_interval(intervals[metric], measure) for metric, measure in MEASURES.items()]


def notices(result: Mapping[str, Any]) -> list[str]:
    """Whatever should keep a reader from taking the means at face value, a sentence each."""
    lines = notes_on(result)
    if missing := result["missing_predictions"]:
        lines.append(f"no prediction, so in no mean, for {counted(len(missing), 'labelled case')}: {_listed(missing)}")
    for problem in result.get("unscored_predictions", {}).values():
        lines.append(f"left out of every mean: {problem}")
    if extra := result["predictions_without_reference"]:
        lines.append(f"no reference among the cases scored for {counted(len(extra), 'prediction')}: {_listed(extra)}")
    for value, count in result["classes_only_predicted"].items():
        lines.append(
            f"class {value} is predicted in {counted(count, 'case')} but no reference holds it: it is not scored"
        )
    lines += _describe_absent(result.get("absent", {}))
    for entry in result["classes"]:
        for outcome in ("missed", "invented"):
            if count := entry["outcomes"][outcome]:
                scored = "Dice and NSD are 0 there, HD95 is left out"
                lines.append(f"{entry['name']} is {outcome} in {counted(count, 'case')}: {scored}")
    return lines


def _absent(rows: Sequence[Row], classes: Mapping[int, str], absent: str) -> dict[str, Any]:
    """The rule for absent classes, how often it applies, and the overall means by the other rule."""
    found: dict[str, Any] = {"counts": absent, "n": absences([rows])}
    if found["n"]:
        found["otherwise"] = summarise(with_absence_rule([rows], other_rule(absent))[0], {})["mean"]
    return found


def _describe_absent(absent: Mapping[str, Any]) -> list[str]:
    if not absent.get("n"):
        return []
    dice = statistics.format_interval(Interval.from_dict(absent["otherwise"]["dice"]), MEASURES["dice"])
    return [
        f"absent from reference and prediction: {counted(absent['n'], 'time')} a class of a case, which "
        f"{COUNTS[absent['counts']]} there; {INSTEAD[other_rule(absent['counts'])]}, the mean Dice would be {dice} %"
    ]


def _score_case(
    prediction: Path, manifest: Manifest, case: Case, named: Mapping[int, str], tolerance_mm: float
) -> tuple[list[Row], set[int]]:
    """The rows of one case, for named classes and any other found in it, and the values its reference holds."""
    predicted = _as_integers(read_label_file(prediction), prediction)
    reference = _as_integers(read_label(manifest, case), case.label_files[0])
    try:
        predicted = check_grid(predicted, reference, prediction)
    except MedclError as error:
        raise MedclError(
            f"is not on the grid of its reference: {error.what.replace('its image', 'the reference')}".replace(
                "the label map", "the prediction"
            ),
            prediction,
            "Predict on the image that the reference was drawn on, with `medcl predict`.",
        ) from None
    values = values_of(reference.array)
    classes = {value: named.get(value, f"class {value}") for value in {*named, *values, *values_of(predicted.array)}}
    scores = segmentation_scores(predicted.array, reference.array, classes, reference.spacing, tolerance_mm)
    return [{"case": case.id, "subject": case.subject, **score} for score in scores], values


def _as_integers(volume: Volume, where: object) -> Volume:
    """A label map as integers."""
    check_label_values(volume.array, where)
    return Volume(whole_labels(volume.array), volume.affine)


def _complete(rows: Sequence[Row], cases: Sequence[Case], classes: Mapping[int, str]) -> list[Row]:
    """A row for every case and class; a class that neither map of a case holds is `absent` there."""
    known = {(row["case"], row["class"]): row for row in rows}
    absent = {"outcome": "absent", **dict.fromkeys(MEASURES, math.nan), "volume_pred_ml": 0.0, "volume_ref_ml": 0.0}
    return [
        known.get((case.id, value))
        or {"case": case.id, "subject": case.subject, "class": value, "name": name, **absent}
        for case in cases
        for value, name in classes.items()
    ]


def _interval(rows: Sequence[Row], metric: str) -> Interval:
    return bootstrap_mean([row[metric] for row in rows], [row["subject"] for row in rows])


def prediction_files(folder: Path) -> dict[str, Path]:
    """Case id to file, for every volume in the folder."""
    if not folder.is_dir():
        raise MedclError("no such folder", folder, "Write predictions with `medcl predict`.")
    volumes = (file for file in folder.iterdir() if volume_suffix(file.name) and not file.name.startswith("."))
    files = sorted(volumes)
    found = {file.name[: -len(volume_suffix(file.name))]: file for file in files}
    if len(found) < len(files):
        twice = next(file for file in files if file not in found.values())
        raise MedclError("the same case is predicted in two files", twice, "Keep one of them.")
    return found


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _to_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow("" if isinstance(row[key], float) and math.isnan(row[key]) else row[key] for key in COLUMNS)
    return stream.getvalue()


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
