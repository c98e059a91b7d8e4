"""DICOM objects that outline structures of a series: which are label maps of a case, and what is told of the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medcl.dataset.case import Case, Problem
from medcl.errors import MedclError
from medcl.io.contours import CONVERT, is_structure_set, spelled_alike, structure_names
from medcl.io.dicom import SEGMENTATIONS, Slice, is_dicom
from medcl.io.formats import format_of
from medcl.io.segmentation import segment_names

_CONVERT = {
    "SEG": "Convert it to NIfTI (segimage2itkimage of dcmqi) and name it as a label map in a table.",
    "RTSTRUCT": f"Name the one that counts as `label` in a table. {CONVERT}",
}
_NAMED = 5  # structures that one line names


def label_maps(
    root: Path, objects: Sequence[Slice], cases_of: Mapping[str, Sequence[Case]], names: Mapping[int, str]
) -> tuple[dict[str, str], dict[int, str], list[Problem]]:
    """The SEG object of every case that has exactly one; of a case that has none, the one RTSTRUCT object.

    Values of SEG objects are segment numbers. Where objects give one number to different structures, none is a label
    map. Values of RTSTRUCT objects go by the names of structures.

    Args:
        root: the folder that paths are relative to.
        objects: SEG and RTSTRUCT objects.
        cases_of: the cases of every SeriesInstanceUID.
        names: what other label maps of the folder call their values.

    Returns:
        Case id to file; the names of all label values; and what is told.
    """
    candidates: dict[str, dict[str, list[Slice]]] = defaultdict(lambda: defaultdict(list))
    strangers = []
    for one in objects:
        cases = [case for uid in one.refers for case in cases_of.get(uid, ())]
        own = [case for case in cases if one.subject in ("", case.subject)]
        if len(own) == len(one.refers) == 1:
            candidates[own[0].id][one.kind].append(one)
        elif cases and not own:
            strangers.append(one)
    chosen = {id: next(found[kind] for kind in SEGMENTATIONS if found[kind]) for id, found in candidates.items()}
    alone = {id: found[0] for id, found in chosen.items() if len(found) == 1}
    told = []
    try:
        found = _with_segments([one.path for one in alone.values() if one.kind == "SEG"], names)
    except MedclError as error:
        told = [Problem(_relative(root, error.where), error.what, error.remedy or "")]
        alone = {id: one for id, one in alone.items() if one.kind != "SEG"}
        found = dict(names)
    found, more = _with_structures(root, [one.path for one in alone.values() if one.kind == "RTSTRUCT"], found)
    told += more
    labels = {id: _relative(root, one.path) for id, one in alone.items()}
    left = [one for one in objects if one not in alone.values() and one not in strangers]
    for kind in SEGMENTATIONS:
        told += _of_strangers(root, [one for one in strangers if one.kind == kind])
        told += _told(root, [one for one in left if one.kind == kind], cases_of)
    return labels, found, told


def names_of(root: Path, cases: Iterable[Case], names: Mapping[int, str]) -> tuple[dict[int, str], list[Problem]]:
    """The names of all label values of cases, with those of the DICOM objects that a table names; and what is told.

    Raises:
        MedclError: two SEG objects disagree.
    """
    files = [root / case.label for case in cases if case.label and format_of(case.label) == "dicom"]
    files = [file for file in files if is_dicom(file)]
    structures = [file for file in files if is_structure_set(file)]
    found = _with_segments([file for file in files if file not in structures], names)
    return _with_structures(root, structures, found)


def _with_segments(files: Iterable[Path], names: Mapping[int, str]) -> dict[int, str]:
    """The names of label values, with those of all segment numbers.

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


def _with_structures(
    root: Path, files: Sequence[Path], names: Mapping[int, str]
) -> tuple[dict[int, str], list[Problem]]:
    """The names of label values, with those of the structures of RTSTRUCT objects.

    ROI numbers differ between objects, so names decide: a name that has a value keeps it, and the others take the next
    values in the order of names, as binary masks do. Structures that some objects lack are told.
    """
    spelled: dict[str, str] = {}
    times: Counter[str] = Counter()
    lacking: dict[Path, set[str]] = {}
    for path in files:
        try:
            own = structure_names(path)
        except MedclError:  # told where its contours are read
            continue
        for name in own:
            times[spelled_alike(name)] += 1
            spelled.setdefault(spelled_alike(name), name)
        lacking[path] = {spelled_alike(name) for name in own}
    known = {spelled_alike(name) for value, name in names.items() if value}
    first = max(names, default=0) + 1
    new = [spelled[key] for key in sorted(spelled) if key not in known]
    partial = [f"{spelled[key]} {times[key]}" for key in sorted(spelled) if times[key] < len(lacking)]
    told = []
    if partial:
        path = next(path for path, own in lacking.items() if len(own) < len(spelled))
        more = f" and {len(partial) - _NAMED} more" if partial[_NAMED:] else ""
        what = (
            f"not all {len(lacking)} RTSTRUCT objects have all structures ({', '.join(partial[:_NAMED])}{more}): where "
            "one lacks, it counts as background"
        )
        remedy = "Where names are only spelled differently, rename the ROIs; cases can be left out by a table."
        told = [Problem(_relative(root, path), what, remedy, aside=False)]
    return {**names, **dict(enumerate(new, first))}, told


def _relative(root: Path, path: Any) -> str:
    return Path(path).relative_to(root).as_posix()


def _of_strangers(root: Path, objects: Sequence[Slice]) -> list[Problem]:
    """One problem for objects of one kind whose patients are not those of the series that they outline."""
    if not objects:
        return []
    count = f"{len(objects)} DICOM {objects[0].kind} object{'s' if objects[1:] else ''}"
    what = f"{count} with another patient number than the series outlined: not read as label maps"
    remedy = "Check the patient numbers; where they mean one person, name the object as `label` in a table."
    return [Problem(_relative(root, objects[0].path), what, remedy)]


def _told(root: Path, objects: Sequence[Slice], cases_of: Mapping[str, Sequence[Case]]) -> list[Problem]:
    """One problem for objects of one kind: how many there are, and which series they outline."""
    if not objects:
        return []
    kind = objects[0].kind
    uids = dict.fromkeys(uid for one in objects for uid in one.refers)
    here = [case.id for uid in uids for case in cases_of.get(uid, ())]
    lost = sum(not cases_of.get(uid) for uid in uids)
    of = ", ".join(here[:3]) + (f" and {len(here) - 3} more" if here[3:] else "")
    of += f"{' and ' if here else ''}{lost} series not found here" if lost else ""
    count = f"{len(objects)} DICOM {kind} object{'s' if len(objects) > 1 else ''}"
    what = f"{count} of {of or 'no series'}: not read as label maps"
    return [Problem(_relative(root, objects[0].path), what, _CONVERT[kind])]
