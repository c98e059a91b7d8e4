"""Reports of a run and of a comparison: one self-contained HTML file each.

A report shows whatever the run folder holds, leaves out the rest, and names cases, never files: paths can hold names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Manifest
from medcl.errors import MedclError
from medcl.evaluation.absence import with_absence_rule
from medcl.evaluation.compare import comparison_cells
from medcl.evaluation.evaluate import Row, mean_over_classes, notices, read_result, read_scores
from medcl.evaluation.metrics import MEASURES
from medcl.evaluation.pairing import flat_config, paired_means
from medcl.report import figures, sections
from medcl.report import page as html
from medcl.report.overlays import draw_overlay, load_overlay
from medcl.runtime.files import read_json, write_text

_OUTLINES = (
    "Planes cut where the reference is largest, in radiological display (the patient's right is on the left); "
    "voxels in true proportion, grey levels from the 1st to the 99.5th percentile (of CT, without air). Each class is "
    "outlined."
)


def write_run_report(run: Path) -> Path:
    """Writes `report.html` of a run from whatever its folder holds.

    Args:
        run: a run folder: any of `config.yaml`, `plan.json`, `manifest.json`, `provenance.json`, `split.json`,
            `metrics.csv`, `log.txt`, and `evaluation.json`, `evaluation.csv` and predictions under `test/`.

    Returns:
        The report's path.

    Raises:
        MedclError: there is no such folder, or one of those files is damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise MedclError("no such run folder", run, "Name the folder given as --out when it was run.")
    config = flat_config(run) if (run / "config.yaml").exists() else {}
    plan = _if_there(run / "plan.json", read_json) or {}
    manifest = _if_there(run / "manifest.json", Manifest.load)
    split = _if_there(run / "split.json", read_json) or {}
    scores = _if_there(run / "test" / "evaluation.json", read_result)
    # scores without the result that says how they were checked are not shown
    rows = (_if_there(run / "test" / "evaluation.csv", read_scores) if scores else None) or []
    provenance = _if_there(run / "provenance.json", read_json) or {}
    series = figures.read_series(run)
    kind = {"finetune": "Fine-tuning", "pretrain": "Pretraining"}.get(str(config.get("stage")), "Run")
    body = [
        html.paragraph(sections.headline(config, scores, series), "headline"),
        html.warnings([*sections.logged_warnings(run, manifest), *(notices(scores) if scores else [])]),
        html.section("The numbers", *sections.numbers(scores, rows)) if scores else "",
        html.section("Best, median and worst", *_extremes(run, manifest, with_absence_rule([rows], _rule(scores))[0])),
        html.section("Training", *sections.curves(series)),
        html.section("What was read", *sections.what_was_read(manifest, split)),
        html.section("The plan", html.facts({key: html.readable(plan[key]) for key in _meaningful_keys(plan)})),
        html.section("How it was made", *sections.how_it_was_made(config, provenance)),
    ]
    about = " · ".join(str(each) for each in (kind, config.get("task"), config.get("backbone")) if each)
    path = run / "report.html"
    write_text(path, html.page(run.resolve().name, about, body))
    return path


def write_comparison_report(
    out: Path, result: Mapping[str, Any], runs: Sequence[Path], baseline: Sequence[Path]
) -> Path:
    """Writes `report.html` of a comparison into `out`.

    Args:
        out: folder of the comparison.
        result: what `compare` returned.
        runs: run folders of the first arm, as given to `compare`.
        baseline: run folders of the second arm.

    Returns:
        The report's path.
    """
    first, second = result["names"]
    sentence = str(result["sentence"])
    how = [*result["how"], f"Draws: {', '.join(map(str, result['draws']))}. Test subjects: {result['n_subjects']}."]
    schedule = {key: sections.safe(value) for key, value in result["schedule"].items() if value not in (None, "", {})}
    gap = f"{first} minus {second}"
    body = [
        html.paragraph(f"{sentence[:1].upper()}{sentence[1:]}.", "headline"),
        html.warnings(map(html.without_files, [*result["unchecked"], *result["warnings"]])),
        html.section(
            "The difference",
            html.figure(
                figures.difference_plot(result), f"{gap}: {sentence}", f"Dice, {gap}, with 95 % intervals.", large=True
            ),
            html.grid(
                html.figure(figures.subject_scatter(result), f"Dice of each subject, {first} against {second}"),
                html.figure(figures.subject_differences(result), f"Differences of the subjects, {gap}, by size"),
            ),
        ),
        html.section("The numbers", *_comparison_tables(result), *map(html.paragraph, result.get("sensitivity", ()))),
        html.section("Largest, median and smallest difference", *_compared_cases(result, runs, baseline)),
        html.section(
            "How it was measured", html.bullets(how), html.details("Schedule of both arms", html.facts(schedule))
        ),
    ]
    about = f"Comparison at {result['labels']} labelled subjects"
    path = Path(out) / "report.html"
    write_text(path, html.page(f"{first} against {second}", about, body))
    return path


def _meaningful_keys(plan: Mapping[str, Any]) -> list[str]:
    """The keys of a plan that say something: an HU window does where it is used."""
    silent = {"medcl_plan"} | (set() if plan.get("normalise") == "ct" else {"window"})
    return [key for key in plan if key not in silent]


def _extremes(run: Path, manifest: Manifest | None, rows: Sequence[Row]) -> list[str]:
    """Overlays of the best, median and worst test case by mean Dice over classes."""
    ranked = sorted((row for row in mean_over_classes(rows) if np.isfinite(row["dice"])), key=lambda row: -row["dice"])
    if manifest is None or not ranked:
        return []
    parts = []
    for index, place in _places(len(ranked), "Best", "Median", "Worst").items():
        case, dice = ranked[index]["case"], ranked[index]["dice"]
        title = f"{place}: {case}, Dice {100 * dice:.1f} %"
        parts.append(_overlay(manifest, case, {"": run / "test"}, {"": title}, place))
    return [*parts, html.paragraph(_OUTLINES, "small")]


def _overlay(manifest: Manifest, case_id: str, folders: Mapping[str, Path], titles: Mapping[str, str], alt: str) -> str:
    """An overlay figure, or a sentence saying why there is none: a moved image must not cost the report."""
    case = next((case for case in manifest.cases if case.id == case_id), None)
    try:
        if case is None:
            raise MedclError("is not in the manifest", case_id)
        files = {name: next(iter(sorted(folder.glob(f"{case_id}.*")))) for name, folder in folders.items()}
        uri = draw_overlay(load_overlay(manifest, case, files), titles)
    except StopIteration:
        return html.paragraph(f"{case_id} is not shown: its prediction is no longer there.", "small")
    except MedclError as error:
        return html.paragraph(f"{case_id} is not shown: {html.without_files(error.what)}.", "small")
    return html.figure(uri, f"{alt} case {case_id}: outlines of prediction and reference on three planes", large=True)


def _comparison_tables(result: Mapping[str, Any]) -> list[str]:
    first, second = result["names"]
    lines: list[list[str]] = []
    strong = []
    for metric, measure in MEASURES.items():
        block = result["metrics"][metric]
        strong.append(len(lines))
        lines.append([f"{measure.title} ({measure.unit}), mean", *comparison_cells(block["mean"], metric)])
        lines += [[entry["name"], *comparison_cells(entry, metric)] for entry in block["classes"]]
    head = ["", first, second, "difference [95 %]", "p", "d_z"]
    note = "HD95 is a distance: there a negative difference is the better one. p per class is corrected by Holm's rule."
    return [html.table(head, lines, strong=strong), html.paragraph(note, "small")]


def _compared_cases(result: Mapping[str, Any], runs: Sequence[Path], baseline: Sequence[Path]) -> list[str]:
    """Both arms' first draw on the cases with the largest, median and smallest difference."""
    first, second = result["names"]
    arms = {first: Path(runs[0]), second: next(r for r in map(Path, baseline) if _draw(r) == _draw(Path(runs[0])))}
    manifest = _if_there(arms[first] / "manifest.json", Manifest.load)
    of_all = [Path(run) for run in (arms[first], arms[second], *runs, *baseline)]
    found = [read_scores(run / "test" / "evaluation.csv") for run in of_all]
    pairs = paired_means(*with_absence_rule(found, str(result.get("absent", "nothing")))[:2])
    scores = {first: {r["case"]: r["dice"] for r in pairs}, second: {r["case"]: r["dice_baseline"] for r in pairs}}
    gains = {case: dice - scores[second][case] for case, dice in scores[first].items()}
    ranked = sorted((case for case in gains if np.isfinite(gains[case])), key=lambda case: -gains[case])
    if manifest is None or not ranked:
        return []
    parts = []
    for index, place in _places(len(ranked), "Largest difference", "Median", "Smallest difference").items():
        case = ranked[index]
        titles = {name: f"{name}: Dice {100 * scores[name][case]:.1f} %" for name in arms}
        folders = {name: run / "test" for name, run in arms.items()}
        title = f"{place}: {case}, {100 * gains[case]:+.1f} Dice points"
        parts.append(html.subsection(title, _overlay(manifest, case, folders, titles, place)))
    draw = html.readable(_draw(arms[first]))
    return [*parts, html.paragraph(f"Draw {draw}. {_OUTLINES}", "small")]


def _places(n: int, first: str, middle: str, last: str) -> dict[int, str]:
    """Which of `n` ranked cases to show, none twice."""
    return dict(sorted({n // 2: middle, n - 1: last, 0: first}.items()))


def _rule(scores: Mapping[str, Any] | None) -> str:
    """What absent classes count in a result; one of an earlier version does not say."""
    return str(((scores or {}).get("absent") or {}).get("counts", "nothing"))


def _draw(run: Path) -> Any:
    return flat_config(run).get("draw")


def _if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if path.exists() else None
