"""A table of cases (CSV): what a person says of a folder, which stands over every guess.

    image,label,subject,session,site,modality,split
    a/scan1.nii.gz,a/seg1.nii.gz,anna,1,Utrecht,MR,train

Only `image` is required. Several channels are `image:T1`, `image:FLAIR`; several binary masks `label:liver`,
`label:spleen`, or one folder of masks as `label`. Further columns are kept as targets.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medcl.dataset import naming
from medcl.dataset.by_names import doubts, named_subjects
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.labels import label_names
from medcl.dataset.series import Series
from medcl.dataset.structure import read_subjects
from medcl.errors import MedclError
from medcl.io.detached import header_file
from medcl.io.dicom import is_dicom, may_be_dicom
from medcl.io.formats import format_of, volume_suffix
from medcl.runtime.files import atomic_path, read_json, write_json

COLUMNS = ("image", "label", "subject", "session", "site", "modality", "split")
MODALITIES = {"": "unknown", "unknown": "unknown", "mr": "MR", "mri": "MR", "ct": "CT", "pet": "PET", "pt": "PET"}
# what is a target by its place, and nearly surely meant otherwise
_MEANT = {
    **dict.fromkeys(
        ("patient", "patientid", "subjectid", "participant", "participantid", "person", "personid"), "subject"
    ),
    **dict.fromkeys(("labels", "seg", "segmentation", "mask", "masks", "annotation", "labelmap", "gt"), "label"),
}
SPLITS = {"": None, "train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
Read = Callable[[list[str]], Series]


@dataclass(frozen=True)
class Table:
    """The cases of a table, headers not read yet; names of label values where masks are merged; problems."""

    cases: tuple[Case, ...]
    label_names: dict[int, str]
    problems: tuple[Problem, ...]
    rule: str


def is_table(source: str | Path) -> bool:
    """Whether a source is a table of cases, by its ending."""
    return str(source).lower().endswith((".csv", ".tsv"))


def read_table(path: Path, root: Path, series: Read) -> Table:
    """Reads a table of cases.

    Args:
        path: the CSV file; comma, semicolon or tab between columns.
        root: folder that paths are looked for in, after the table's own.
        series: makes cases of the DICOM files of one folder, relative to the root.

    Raises:
        MedclError: a column is missing or contradicts another, an image is named twice, or a subject is in two parts.
    """
    header, rows = _rows(path)
    images = [name for name in header if name == "image" or name.startswith("image:")]
    labels = [name for name in header if name.startswith("label:")]
    further = [name for name in header if name and name.split(":")[0] not in COLUMNS]
    for name in further:
        meant = _MEANT.get(re.sub(r"[\W_]", "", name.lower()))
        if meant and not any(column.split(":")[0] == meant for column in header):
            remedy = f"Rename it `{meant}` if it is that, or add a column `{meant}`."
            raise MedclError(f"has a column {name!r} and no column {meant!r}", path, remedy)
    if not images:
        shown = ", ".join(name[:40] for name in header[:8])
        raise MedclError("has no column `image`", path, f"Its first line must name the columns; it is: {shown}.")
    if labels and "label" in header:
        raise MedclError("has both `label` and `label:NAME` columns", path, "Keep one kind.")
    places = _Places(path, root, series)
    cases: list[Case] = []
    for number, row in rows:
        known = _known(row, f"{path}, line {number}")
        label, masks = places.label(row.get("label", ""), number)
        masks += tuple((name[6:], file) for name in labels if (file := places.file(row[name], number)))
        targets = tuple((name, row[name]) for name in further if row[name])
        for column in images:
            case = places.image(row[column], number)
            if case is not None:
                case = replace(case, label=label, masks=masks, targets=targets, **_kept(case, known))
                notes = (f"channel {column[6:]}",) if column != "image" else ()
                cases.append(replace(case, notes=(*case.notes, *notes)))
    twice = _first_twice(case.image[0] for case in cases)
    if twice:
        raise MedclError(f"names {twice} twice", path, "Keep one line of each image.")
    problems = places.problems
    if "subject" not in header:
        cases, more = _with_guessed_subjects(cases)
        problems += more
    if not cases:
        first = f" First: {problems[0]}" if problems else ""
        raise MedclError(f"names no image that can be used.{first}", path, "Write one line for each image.")
    _check_parts(cases, path)
    _check_spellings([row["subject"] for _, row in rows if "subject" in row], path)
    structures = sorted({name for case in cases for name, _ in case.masks})
    names = {0: "background", **dict(enumerate(structures, 1))} if structures else _label_names(path)
    said = [name for name in header if name in COLUMNS]
    rule = f"{path.name} says {', '.join([*said, *images[1:], *labels])}"
    return Table(tuple(cases), names, tuple(problems), rule + ("" if "subject" in header else "; subjects by names"))


def names_file(table: Path) -> Path:
    """Where the names of label values stand, `{"1": "liver"}`: a table has no place for them."""
    return table.with_suffix(".labels.json")


def _label_names(table: Path) -> dict[int, str]:
    path = names_file(table)
    return label_names(read_json(path)) if path.exists() else {}


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MedclError("no such table", path, "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MedclError(f"cannot be read as a table ({error})", path, "Save it as CSV in UTF-8.") from None
    if re.match(r"sep=.\r?\n", text):  # a line of Excel's
        text = text.split("\n", 1)[1]
    first = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    lines = [(number, line) for number, line in lines if any(line)]
    if not lines:
        raise MedclError("is empty", path, "Its first line names the columns; only `image` is required.")
    header = [name.strip() if ":" in name else name.strip().lower() for name in lines[0][1]]
    if _first_twice(filter(None, header)):
        raise MedclError(f"has the column {_first_twice(header)} twice", path, "Rename one.")
    for number, line in lines[1:]:
        if len(line) > len(header):
            raise MedclError(f"line {number} has {len(line)} cells, the first line {len(header)}", path,
                             "Put cells that hold a comma in double quotes.")  # fmt: skip
    return header, [(n, dict(itertools.zip_longest(header, line, fillvalue=""))) for n, line in lines[1:]]


def _first_twice(values: Iterable[str]) -> str:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return ""


def _known(row: dict[str, str], where: str) -> dict[str, Any]:
    modality, split = row.get("modality", "").lower(), row.get("split", "").lower()
    if modality not in MODALITIES:
        raise MedclError(f"modality {row['modality']!r} is not known", where, "Give MR, CT, PET or unknown.")
    if split not in SPLITS:
        raise MedclError(f"split {row['split']!r} is not known", where, "Give train, val or test, or leave it empty.")
    if "subject" in row and not row["subject"]:
        raise MedclError("has no subject", where, "Name the person, or leave out the whole column.")
    known: dict[str, Any] = {"modality": MODALITIES[modality], "split": SPLITS[split]}
    known |= {name: row[name] for name in ("session", "site") if row.get(name)}
    return known | ({"subject": naming.safe(row["subject"])} if "subject" in row else {})


def _kept(case: Case, known: dict[str, Any]) -> dict[str, Any]:
    """What the table says, and of a DICOM series its own modality where the table says none."""
    return known if known["modality"] != "unknown" else {**known, "modality": case.modality}


class _Places:
    """Finds what the cells of a table name."""

    def __init__(self, table: Path, root: Path, series: Read):
        self.table, self.root, self.series = table, root, series
        self.problems: list[Problem] = []

    def file(self, cell: str, number: int) -> str:
        """A cell's path relative to the root; empty, with a problem, where nothing is there."""
        if not cell:
            return ""
        for base in (self.table.parent, self.root):
            path = base / Path(cell).expanduser()
            if path.exists():
                path = header_file(path)
                return Path(os.path.relpath(path.resolve(), self.root)).as_posix()
        what = f"is named in line {number} of {self.table.name}, and is not there"
        remedy = f"Paths start at the folder of the table, or at {self.root}."
        if "\\" in cell:
            remedy = "Write folders with slashes (a/b.nii.gz), not backslashes."
        self.problems.append(Problem(cell, what, remedy))
        return ""

    def label(self, cell: str, number: int) -> tuple[str | None, tuple[tuple[str, str], ...]]:
        """A label map's file, or the masks of a folder."""
        name = self.file(cell, number)
        if not name or not (self.root / name).is_dir():
            return name or None, ()
        inside = sorted(path.name for path in (self.root / name).iterdir() if volume_suffix(path.name))
        if not inside:
            self.problems.append(Problem(name, "holds no masks", "Name a label map, or a folder of masks."))
        return None, tuple((naming.stem(each), f"{name}/{each}") for each in inside)

    def image(self, cell: str, number: int) -> Case | None:
        """A case of a volume file, or of the DICOM series of a folder or of a file."""
        name = self.file(cell, number)
        path = self.root / name
        if not name:
            return None
        if path.is_file() and volume_suffix(path.name):
            return Case(naming.stem(name), naming.stem(name), (name,), format=format_of(path))
        folder = path if path.is_dir() else path.parent
        named = [each for each in sorted(folder.iterdir()) if each.is_file() and may_be_dicom(each.name)]
        files = [each for each in named if is_dicom(each)]
        found = self.series([Path(os.path.relpath(each, self.root)).as_posix() for each in files])
        cases = found.cases
        if path.is_file():
            cases = [case for case in cases if name in case.image]
        if len(cases) == 1:
            return cases[0]
        what = f"holds {len(cases)} DICOM series" if files else "is no volume that medcl reads"
        remedy = "Name a file of the series that is meant." if len(cases) > 1 else "See `medcl scan` of its folder."
        self.problems += found.problems or [Problem(name, what, remedy)]
        return None


def _with_guessed_subjects(cases: list[Case]) -> tuple[list[Case], list[Problem]]:
    """Subjects by the structure of the images' names, as `medcl scan` of a folder guesses them."""
    files = {case.image[0]: case for case in cases if case.format != "dicom"}
    reading = read_subjects(list(files))
    subjects = named_subjects(list(files), reading, naming.subjects(list(files)))
    guessed = [replace(case, subject=subjects.get(case.image[0], case.subject)) for case in cases]
    return guessed, doubts(list(files), reading, subjects)


def _check_parts(cases: Iterable[Case], path: Path) -> None:
    parts: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.split:
            parts[case.subject].add(case.split)
    for subject, found in parts.items():
        if len(found) > 1:
            raise MedclError(f"has subject {subject} in {' and '.join(sorted(found))}", path, "Give each one part.")


def _check_spellings(subjects: Iterable[str], path: Path) -> None:
    """Refuses subjects that differ as text and may be one person, or become one name."""
    by_form: dict[str, str] = {}
    for subject in subjects:
        form = re.sub(r"\.0$", "", naming.safe(subject).casefold())
        form = (form.lstrip("0") or "0") if form.isdigit() else form
        other = by_form.setdefault(form, subject)
        if other != subject:
            remedy = "Write one person alike, and two by names that differ in more than spaces, case or zeros."
            raise MedclError(f"has subjects {other!r} and {subject!r}, which may be one", path, remedy)


def write_table(manifest: Manifest, path: str | Path) -> None:
    """Writes the cases of a manifest as a table that `read_table` reads, and names of label values beside it.

    Paths are relative where they lie below the table's folder, else absolute.
    """
    path = Path(path)
    if any(manifest.label_names.values()) and not any(case.masks for case in manifest.cases):
        write_json(names_file(path), {str(value): name for value, name in manifest.label_names.items()})
    structures = sorted({name for case in manifest.cases for name, _ in case.masks})
    targets = sorted({name for case in manifest.cases for name, _ in case.targets})
    labels = [f"label:{name}" for name in structures] or ["label"]
    header = ["image", *labels, *COLUMNS[2:], *targets]

    def place(name: str | None) -> str:
        whole, folder = (Path(manifest.root) / (name or "")).resolve(), path.resolve().parent
        return "" if not name else (whole.relative_to(folder) if whole.is_relative_to(folder) else whole).as_posix()

    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, restval="", lineterminator="\n")
    writer.writeheader()
    for case in manifest.cases:
        if case.label and structures:
            raise MedclError("has a label map, and other images have masks", case.id, "Scan them as two folders.")
        said = {"image": place(case.image[0]), "subject": case.subject, "session": case.session, "site": case.site,
                "modality": case.modality, "split": case.split or ""}  # fmt: skip
        said |= {f"label:{name}": place(file) for name, file in case.masks} if structures else {
            "label": place(case.label)}  # fmt: skip
        writer.writerow({**said, **dict(case.targets)})
    with atomic_path(path) as part:
        Path(part).write_text(stream.getvalue(), encoding="utf-8")
