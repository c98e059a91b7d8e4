"""DICOM objects that outline structures of a series: which are label maps of a case, and what is told of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medcl.dataset.case import Case, Problem
from medcl.errors import MedclError
from medcl.io.dicom import Slice, is_dicom
from medcl.io.formats import format_of
from medcl.io.segmentation import segment_names

_CONVERT = {
    "SEG": "Convert it to NIfTI (segimage2itkimage of dcmqi) and name it as a label map in a table.",
    "RTSTRUCT": "Convert it to NIfTI (plastimatch convert, or rt-utils) and name it as a label map in a table.",
}


def label_maps(
    root: Path, objects: Sequence[Slice], cases_of: Mapping[str, Sequence[str]], names: Mapping[int, str]
) -> tuple[dict[str, str], dict[int, str], list[Problem]]:
    """The SEG object of every case that has exactly one.

    Label values are segment numbers. Where objects give one number to different structures, none is a label map.

    Args:
        root: the folder that paths are relative to.
        objects: SEG and RTSTRUCT objects.
        cases_of: ids of the cases of every SeriesInstanceUID.
        names: what other label maps of the folder call their values.

    Returns:
        Case id to SEG file; the names of all label values; and what is told.
    """
    candidates: dict[str, list[Slice]] = defaultdict(list)
    for one in objects:
        cases = [id for uid in one.refers for id in cases_of.get(uid, ())]
        if one.kind == "SEG" and len(cases) == len(one.refers) == 1:
            candidates[cases[0]].append(one)
    labels = {id: found[0].path for id, found in candidates.items() if len(found) == 1}
    told = []
    try:
        found = _names(labels.values(), names)
    except MedclError as error:
        told = [Problem(_relative(root, error.where), error.what, error.remedy or "")]
        labels, found = {}, dict(names)
    left = [one for one in objects if one.path not in labels.values()]
    for kind in _CONVERT:
        told += _told(root, [one for one in left if one.kind == kind], cases_of)
    return {id: _relative(root, path) for id, path in labels.items()}, found, told


def names_of(root: Path, cases: Iterable[Case], names: Mapping[int, str]) -> dict[int, str]:
    """The names of all label values of cases, with those of the SEG objects that a table names as label maps.

    Raises:
        MedclError: two objects disagree.
    """
    files = [root / case.label for case in cases if case.label and format_of(case.label) == "dicom"]
    return _names([file for file in files if is_dicom(file)], names)


def _names(files: Iterable[Path], names: Mapping[int, str]) -> dict[int, str]:
    """The names of all segment numbers.

    Raises:
        MedclError: two objects disagree.
    """
    found, said_by = dict(names), dict.fromkeys(names, "other label maps")
    for path in files:
        for number, name in segment_names(path).items():
            if found.setdefault(number, name).lower() != name.lower():
                what = f"segment {number} is {name!r} here and {found[number]!r} in {said_by[number]}"
                raise MedclError(what, path, _CONVERT["SEG"])
            said_by.setdefault(number, path.name)
    return found


def _relative(root: Path, path: Any) -> str:
    return Path(path).relative_to(root).as_posix()


def _told(root: Path, objects: Sequence[Slice], cases_of: Mapping[str, Sequence[str]]) -> list[Problem]:
    """One problem for objects of one kind: how many there are, and which series they outline."""
    if not objects:
        return []
    kind = objects[0].kind
    uids = dict.fromkeys(uid for one in objects for uid in one.refers)
    here = [id for uid in uids for id in cases_of.get(uid, ())]
    lost = sum(not cases_of.get(uid) for uid in uids)
    of = ", ".join(here[:3]) + (f" and {len(here) - 3} more" if here[3:] else "")
    of += f"{' and ' if here else ''}{lost} series not found here" if lost else ""
    count = f"{len(objects)} DICOM {kind} object{'s' if len(objects) > 1 else ''}"
    what = f"{count} of {of or 'no series'}: not read as label maps"
    return [Problem(_relative(root, objects[0].path), what, _CONVERT[kind])]
