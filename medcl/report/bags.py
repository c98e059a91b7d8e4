"""`report.html` of `medcl mil fit` and of `medcl mil predict`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.evaluation.pairing import flat_config
from medcl.evaluation.statistics import Interval
from medcl.mil.bags import read_features
from medcl.mil.evaluation import NAMES, Table, audit_of, doubts, ends, notices, score, table_of_predictions
from medcl.report import bag_figures, sections
from medcl.report import page as html
from medcl.report.attention import read_attention
from medcl.report.instances import instance_figure, instance_rows, pictures_of
from medcl.runtime.files import read_json, write_text

MOST_BAGS = 8  # whose instances are shown
HIGHER = "Higher is better, but for the Brier score and the calibration error."


def write_bag_report(run: Path) -> Path:
    """Writes `report.html` of a run of `medcl mil fit`.

    Raises:
        MedclError: the folder holds no cross-validation.
    """
    run = Path(run)
    if not (run / "metrics.json").exists() or not (run / "predictions.csv").exists():
        raise MedclError("holds no cross-validated bags", run, "Give the --out of a finished `medcl mil fit`.")
    result, config = read_json(run / "metrics.json"), flat_config(run)
    provenance = read_json(run / "provenance.json") if (run / "provenance.json").exists() else {}
    classes = result["classes"]
    table = table_of_predictions(_rows(run / "predictions.csv"), classes)
    method = config.get("method", "plain")
    how = "INS" if method == "ins" else f"{config.get('aggregator')}{', SC-MIL' if method == 'sc' else ''}"
    how_tested = (
        f"{config.get('folds')}-fold cross-validation, no group divided: every bag is predicted by a model that has "
        "seen none of its group. Nothing is chosen on held-out bags. Intervals are over whole groups"
        f"{': ' + result['interval'] if 'interval' in result else ', by an earlier version'}."
    )
    body = [
        html.paragraph(_headline(result), "headline"),
        html.warnings(notices(result)),
        html.warnings([
            *(line for line in sections.logged_warnings(run, None) if not line.startswith("leakage: ")),
            *doubts(table, classes, result["scores"]),
        ]),
        html.section("The numbers", *_numbers(result), html.paragraph(how_tested, "small")),
        html.section("The predictions", *_figures(table, classes)),
        html.section("Every bag", html.details("From the most to the least wrong", _every_bag(table, classes))),
        html.section("What was read", *_what_was_read(table, result, classes)),
        html.section("How it was made", *sections.how_it_was_made(config, provenance)),
    ]
    write_text(run / "report.html", html.page(run.resolve().name, f"Bags · {how}", body))
    return run / "report.html"


def write_prediction_report(out: Path) -> Path:
    """Writes `report.html` beside what `medcl mil predict` has written: classes, most and least attended instances.

    Shown are the bags whose predictions are surest, of every predicted class in turn.
    """
    out = Path(out)
    rows = _rows(out / "predictions.csv")
    classes = [name[2:] for name in rows[0] if name.startswith("p_")]
    sources: dict[str, str] = read_json(out / "sources.json")
    p = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
    counted = Counter(classes[c] for c in p.argmax(1))
    each = ", ".join(f"{counted[name]} {name}" for name in classes)
    body = [html.paragraph(f"{len(rows)} bags: {each}.", "headline")]
    audit = audit_of(out, rows)
    body.append(html.warnings(audit.leakage + audit.gaps))
    seen = sum(row.get("seen") == "yes" for row in rows)
    if seen:
        body.append(html.warnings([f"{seen} of {len(rows)} bags are of groups that the classifier was fitted to."]))
    if all(row["label"] in classes for row in rows) and len({row["label"] for row in rows}) > 1:
        result = score(rows, classes, audit)
        body.append(html.section("Against the labels given", html.warnings(result["warnings"]), *_numbers(result)))
        body.append(html.section("The predictions", *_figures(table_of_predictions(rows, classes), classes)))
    shown = []
    for number in _surest(p):
        bag = rows[number]["bag_id"]
        title = f"{bag}: " + ", ".join(f"{name} {100 * v:.0f} %" for name, v in zip(classes, p[number], strict=True))
        label = f", labelled {rows[number]['label']}" if rows[number]["label"] else ""
        shown.append(html.subsection(title + label, *_instances(out, bag, sources.get(bag, ""))))
    note = "Over a picture: how many times the mean attention of the bag's instances it has."
    body.append(html.section("Most and least attended instances", *shown, html.paragraph(note, "small")))
    lines = [[row["bag_id"], row["label"], *(f"{v:.3f}" for v in line)] for row, line in zip(rows, p, strict=True)]
    listed = html.table(["bag", "label", *classes], lines, text_columns=2)
    body.append(html.section("Every bag", html.details("Probabilities", listed)))
    write_text(out / "report.html", html.page(out.resolve().name, "Predicted bags", body))
    return out / "report.html"


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _cell(interval: Interval) -> str:
    return f"{interval.estimate:.3f}" if np.isfinite(interval.estimate) else "-"


def _headline(result: Mapping[str, Any]) -> str:
    interval = Interval.from_dict(result["scores"]["auroc"])
    repeats = f", mean over {result['repeats']} repeats" if result["repeats"] > 1 else ""
    bags = f"{result['bags']} bags of {result['groups']} groups{repeats}"
    return f"AUROC {_cell(interval)} {ends(interval, ' to ')} on {bags}."


def _numbers(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, data in result["scores"].items():
        interval = Interval.from_dict(data)
        lines.append([NAMES.get(key, key), _cell(interval), ends(interval, " to ").strip("[]")])
    return [html.table(["score", "estimate", "95 % interval"], lines, strong=[0]), html.paragraph(HIGHER, "small")]


def _figures(table: Table, classes: Sequence[str]) -> list[str]:
    p, labels = table.probabilities, table.labels
    strips = bag_figures.probability_strips(p, labels, classes)
    caption = "A dot per bag, mean over repeats, in the row of its true class; the bar is the median."
    return [
        html.grid(
            html.figure(bag_figures.roc(p, labels, classes), "ROC curve of the held-out bags"),
            html.figure(bag_figures.calibration(p, labels), "Accuracy against confidence", "Area: predictions."),
            html.figure(bag_figures.confusion(p, labels, classes), "Confusion matrix"),
        ),
        html.figure(strips, "Probability of every bag by true class", caption, large=True),
    ]


def _every_bag(table: Table, classes: Sequence[str]) -> str:
    mean = table.probabilities.mean(1)
    lines = [
        [table.bags[i], table.groups[i], classes[table.labels[i]], *(f"{v:.3f}" for v in mean[i])]
        for i in np.argsort(mean[np.arange(len(mean)), table.labels], kind="stable")
    ]
    return html.table(["bag", "group", "label", *classes], lines, text_columns=3)


def _what_was_read(table: Table, result: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    each = ", ".join(f"{int((table.labels == c).sum())} {name}" for c, name in enumerate(classes))
    read = result.get("read", {})
    known = {"bags": f"{len(table.bags)} of {len(set(table.groups))} groups", "classes": each, **read}
    aside = [[bag, html.without_files(reason)] for bag, reason in result.get("aside", {}).items()]
    parts = [html.facts(known)]
    if aside:
        parts.append(html.subsection("Set aside", html.table(["bag", "why"], aside, text_columns=2)))
    return parts


def _surest(p: np.ndarray) -> list[int]:
    """Numbers of the bags to show: the surest of every predicted class in turn, from the last class on."""
    queues = [sorted(np.flatnonzero(p.argmax(1) == c).tolist(), key=lambda i: -p[i].max()) for c in range(p.shape[1])][
        ::-1
    ]
    chosen: list[int] = []
    while len(chosen) < MOST_BAGS and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return chosen[:MOST_BAGS]


def _instances(out: Path, bag: str, source: str) -> list[str]:
    """Pictures of a bag's instances, or where there are none a table of their numbers."""
    path = Path(source)
    try:
        features = read_features(path) if path.suffix.lower() in (".h5", ".hdf5") and path.exists() else None
        table = out / "attention" / f"{bag}.csv"
        count = len(features.h) if features else len(_rows(table))
        attention = read_attention(table, count)
        found = pictures_of(features) if features else None
        if found:
            alt = f"Most and least attended instances of {bag}"
            return [html.figure(instance_figure(attention, found[0]), alt, f"{found[1]} {count} in all.", large=True)]
    except MedclError as error:
        return [html.paragraph(f"Its instances are not shown: {html.without_files(error.what)}.", "small")]
    rows = instance_rows(attention, features.coordinates if features else None)
    return [html.table(["attended", "instance", "place", "times the mean"], rows, text_columns=3)]
