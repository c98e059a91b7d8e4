"""`cases.csv` beside label maps: which input each was predicted from.

Cases of DICOM series are named after hashes, so a label map alone does not say whose it is. The table holds paths and
SeriesInstanceUIDs, by which the archive finds a series, and no name or number of a patient; it is to stay where it is.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from medcl.dataset.case import Case, Manifest
from medcl.errors import MedclError
from medcl.io.dicom import read_slices
from medcl.runtime.files import write_rows

INPUTS = "cases.csv"
COLUMNS = ["prediction", "input", "series"]
Row = dict[str, str]


def read_inputs(out: Path) -> list[Row]:
    """The rows of a table from an earlier prediction into the folder; none where there is no table.

    Raises:
        MedclError: the folder holds another table of that name, which would be lost.
    """
    path = out / INPUTS
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != COLUMNS:
            raise MedclError("is not a table of predictions and would be overwritten", path, "Choose another folder.")
        return [{name: row[name] or "" for name in COLUMNS} for row in reader]


def input_row(manifest: Manifest, case: Case, prediction: str) -> Row:
    """A case's row: its label map's file name, the file or the folder of the series, and its SeriesInstanceUID."""
    first = manifest.image_paths(case)[0]
    if case.format != "dicom":
        return {"prediction": prediction, "input": str(first), "series": ""}
    uid = read_slices(first)[0].series
    return {"prediction": prediction, "input": str(first.parent), "series": "" if uid == str(first) else uid}


def write_inputs(out: Path, rows: Sequence[Row], known: Sequence[Row]) -> None:
    """Writes the rows, and those `known` of label maps that are still there and were not predicted anew."""
    anew = {row["prediction"] for row in rows}
    kept = [row for row in known if row["prediction"] not in anew and (out / row["prediction"]).exists()]
    if rows or kept:
        write_rows(out / INPUTS, sorted([*kept, *rows], key=lambda row: row["prediction"]))
