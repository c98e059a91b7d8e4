"""DICOM files below a folder → one case per series, and what is told of files that are no part of a volume."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medcl.dataset.case import Case, Problem
from medcl.dataset.outlines import label_maps
from medcl.errors import MedclError
from medcl.io import dicom
from medcl.io.series import arrange, without_copies
from medcl.runtime.pool import map_safely

_Read = tuple[list[dicom.Slice], list[Problem]]


@dataclass
class Series:
    """What the DICOM files of a folder hold.

    Attributes:
        cases: one for each series and patient.
        label_names: name of every label value, with those of SEG and RTSTRUCT objects.
        problems: files set aside, and warnings.
        label_kinds: which kinds of objects are label maps: `SEG`, `RTSTRUCT`.
    """

    cases: list[Case]
    label_names: dict[int, str]
    problems: list[Problem]
    label_kinds: tuple[str, ...] = ()


def find_series(
    root: Path,
    files: Sequence[str],
    label_names: Mapping[int, str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Series:
    """The DICOM series among the files, wherever these lie: slices of one SeriesInstanceUID and one patient.

    Args:
        root: the folder that paths are relative to.
        files: what may be DICOM by its name.
        label_names: what other label maps of the folder call their values.
        workers: processes that read; by default one per available core.
        progress: show a progress bar.
    """
    failed: list[_Read] = [([], [Problem(file, "reading it crashed the reader", "Leave it out.")]) for file in files]
    tasks = [(root, file) for file in files]
    read = map_safely(_read_slices, tasks, failed, workers, "Reading DICOM headers" if progress else None)
    problems = [problem for _, found in read for problem in found]
    slices = [one for found, _ in read for one in found]
    outlines = [one for one in slices if one.kind in dicom.SEGMENTATIONS]

    cases: list[Case] = []
    series_of: dict[str, list[Case]] = defaultdict(list)
    for uid, patients in _grouped(slices).items():
        if len(patients) > 1:
            first = min(one.path for own in patients.values() for one in own)
            what = f"one SeriesInstanceUID holds slices of {len(patients)} patients: they are kept apart"
            remedy = "Check that the patient numbers are right."
            problems.append(Problem(relative(root, first), what, remedy, aside=False))
        for own in patients.values():
            found, told = _case(root, uid, own)
            cases += found
            problems += told
            series_of[uid] += found
    labels, names, told = label_maps(root, outlines, series_of, label_names or {})
    labelled = [replace(case, label=labels.get(case.id)) for case in cases]
    kinds = {one.kind for one in outlines if relative(root, one.path) in labels.values()}
    return Series(labelled, names, problems + told, tuple(sorted(kinds, key=dicom.SEGMENTATIONS.index)))


def _grouped(slices: Iterable[dicom.Slice]) -> dict[str, dict[str, list[dicom.Slice]]]:
    """Slices by series and, in it, by patient."""
    groups: dict[str, dict[str, list[dicom.Slice]]] = defaultdict(lambda: defaultdict(list))
    for one in slices:
        if one.kind not in dicom.SEGMENTATIONS:
            groups[one.series][one.subject].append(one)
    return groups


def _case(root: Path, uid: str, slices: Sequence[dicom.Slice]) -> tuple[list[Case], list[Problem]]:
    """The case of one patient's slices of a series, or none, and what is wrong with some or all of them."""
    problems = []
    # A series of which some images are captures or localisers is judged by the rest.
    usable = [one for one in slices if not one.reason]
    aside = [one for one in slices if one.reason]
    if aside:
        first, more = aside[0], f" ({len(aside)} files)" if len(aside) > 1 else ""
        problems.append(Problem(relative(root, first.path), f"DICOM series {first.reason}{more}", first.remedy))
    if not usable:
        return [], problems
    usable, note = without_copies(usable)
    first = usable[0]
    if len(usable) == 1:
        what = "DICOM series of a single slice"
        problems.append(Problem(relative(root, first.path), what, "Export the whole series, or leave it out."))
        return [], problems
    try:
        geometry = arrange(usable)
    except MedclError as error:
        return [], [*problems, problem_of(root, error, relative(root, first.path))]
    id = "_".join(filter(None, (first.subject, dicom.short_hash(uid, 8), first.description)))
    ordered = dict.fromkeys(relative(root, one.path) for stack in geometry.channels for one in stack)
    notes = (note,) if note else ()
    return [Case(id, first.subject, tuple(ordered), format="dicom", modality=first.modality, notes=notes)], problems


def _read_slices(task: tuple[Path, str]) -> _Read:
    root, file = task
    path = root / file
    named = dicom.is_named(path.name)
    try:
        if path.stat().st_size and not dicom.is_dicom(path):
            raise MedclError("is not a DICOM file", path, "Copy or export it again, or leave it out.")
        return (dicom.read_slices(path), []) if named or path.stat().st_size else ([], [])
    except MedclError as error:  # a file without the suffix may be anything: a README, a licence
        return [], [problem_of(root, error, file)] if named or "cannot be read" in error.what else []
    except OSError as error:
        return [], [Problem(file, f"cannot be read ({error.strerror})", "Mend its permissions.")]


def relative(root: Path, where: object) -> str:
    """A path as the manifest writes it, without the folders above its root."""
    try:
        return Path(str(where)).relative_to(root).as_posix()
    except ValueError:
        return str(where)


def problem_of(root: Path, error: MedclError, path: str) -> Problem:
    """The problem that an error tells, under its own file or, where it names none, under `path`."""
    where = relative(root, error.where) if error.where is not None else path
    return Problem(path if where == "." else where, error.what, error.remedy or "Leave it out.")
