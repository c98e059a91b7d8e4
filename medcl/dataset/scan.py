"""A folder of anything → cases and a list of problems. One bad file never stops a scan."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medcl.dataset import checks, layouts
from medcl.dataset.body import labelled_outside
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.labels import read_label, read_label_header
from medcl.dataset.modality import Evidence, evidence_of, settled
from medcl.dataset.summary import print_summary, summary_dict
from medcl.dataset.twins import without_twins
from medcl.errors import MedclError
from medcl.io import dicom
from medcl.io.formats import SUFFIXES, volume_suffix
from medcl.io.geometry import Volume
from medcl.io.series import arrange
from medcl.io.volumes import pick_channel, read_header, read_volume
from medcl.runtime.pool import map_safely

__all__ = ["print_summary", "scan", "summary_dict"]

_LOOKED_FOR = f"Looked for {', '.join(SUFFIXES)} and DICOM files; give the folder that holds the scans."
_Read = tuple[list[dicom.Slice], list[Problem]]
_MEDIAN_FROM = 1 << 22  # voxels; of larger volumes the median is taken over every n-th voxel


def scan(
    source: str | Path,
    *,
    channel: int | None = None,
    voxels: bool = True,
    nan: str = "reject",
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """Finds the volumes below a folder, works out subjects and labels, and checks every file.

    A label map that does not fit its image is set aside and the image kept as unlabelled. Of identical volumes one is
    kept, the labelled one first.

    Args:
        source: a folder, or one volume file.
        channel: which channel or frame of 4D images to take; without it they are set aside.
        voxels: also read the voxels (intensity range, NaN, truncation, label values); without it only headers are
            read, and a few volumes to tell CT from others, which is quick but finds less.
        nan: `zero` takes voxels that are NaN or infinite as 0; `reject` sets such volumes aside.
        workers: processes that read; by default one per available core.
        progress: show a progress bar.

    Raises:
        MedclError: the folder does not exist, may not be read, or holds nothing that looks like a volume.
    """
    root, found = _find(Path(source).expanduser())
    if not found.volumes and not found.dicom and not found.problems:
        raise MedclError("no volumes found", source, _LOOKED_FOR)
    layout = layouts.detect(root, found.volumes, channel)
    series, problems = _series(root, found.dicom, workers, progress)
    cases = [*layout.cases, *series]
    if layout.refused_labels is not None:
        cases = [replace(case, label=None, masks=()) for case in cases]
        problems.append(layout.refused_labels)

    bare = Manifest(str(root), "", "", (), label_names=layout.label_names)  # what a worker needs of it
    tasks = [(bare, case, channel, voxels, nan) for case in cases]
    failed = [_Result(None, (_crashed(case),)) for case in cases]
    results = map_safely(_inspect, tasks, failed, workers, "Reading volumes" if progress else None)
    read = [(result.case, result.digest) for result in results if result.case is not None]
    kept, twins = without_twins(root, read, found.volumes)
    rule = layout.rule if layout.cases or not series else ""
    if series:
        series_rule = "DICOM: one case per series, the subject is the hashed patient number"
        rule = f"{rule}; {series_rule}" if rule else series_rule
    manifest = Manifest(
        root=str(root),
        layout=layout.name if layout.cases or not series else "dicom",
        rule=rule,
        cases=tuple(sorted(kept, key=lambda case: case.id)),
        problems=(*found.problems, *layout.problems, *problems, *(p for r in results for p in r.problems), *twins),
        label_names=layout.label_names,
    )
    return settled(manifest, {r.case.id: r.evidence for r in results if r.case and r.evidence} if voxels else None)


@dataclass
class _Found:
    """What lies below a folder: volume files with their sizes in bytes, files that may be DICOM, what went wrong."""

    volumes: dict[str, int] = field(default_factory=dict)
    dicom: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _find(source: Path) -> tuple[Path, _Found]:
    """The absolute root, and what is below it."""
    found = _Found()
    if not source.exists():
        raise MedclError("no such folder", source, "Check the path.")
    if source.is_file():
        if volume_suffix(source.name):
            found.volumes[source.name] = source.stat().st_size
        elif dicom.has_magic(source):
            found.dicom.append(source.name)
        return source.parent.resolve(), found
    root = source.resolve()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise MedclError(f"the folder cannot be read ({error.strerror})", source, "Mend its permissions.") from None
    for path, entry in _walk(root, found.problems):
        if volume_suffix(entry.name):
            found.volumes[path] = entry.stat().st_size
        elif _may_be_dicom(entry.name):
            found.dicom.append(path)
    return root, found


def _walk(root: Path, problems: list[Problem]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file with its path relative to the root. Links to folders are followed, once; hidden names are not."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        try:
            place = os.stat(root / folder)
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    try:
                        if entry.is_dir():
                            folders.append(path)
                        elif entry.is_file():
                            yield path, entry
                        elif entry.is_symlink():
                            problems.append(Problem(path, "is a link to nothing", "Restore its target or remove it."))
                    except OSError as error:
                        problems.append(Problem(path, f"cannot be read ({error.strerror})", "Mend its permissions."))
        except OSError as error:
            what = f"the folder cannot be read ({error.strerror})"
            problems.append(Problem(folder, what, "Mend its permissions; it was passed over."))


def _may_be_dicom(name: str) -> bool:
    """By name alone: `.dcm`, `.ima`, no suffix, or a number after the last dot, as in `1.2.840.113619`."""
    stem, dot, suffix = name.rpartition(".")
    return name != "DICOMDIR" and (not dot or not stem or suffix.lower() in ("dcm", "ima", "dicom") or suffix.isdigit())


def _relative(root: Path, where: object) -> str:
    """A path as the manifest writes it, without the folders above its root."""
    try:
        return Path(str(where)).relative_to(root).as_posix()
    except ValueError:
        return str(where)


def _problem(root: Path, error: MedclError, path: str) -> Problem:
    where = _relative(root, error.where) if error.where is not None else path
    return Problem(path if where == "." else where, error.what, error.remedy or "Leave it out.")


def _crashed(case: Case) -> Problem:
    return Problem(case.image[0], "reading it crashed the reader", "Copy or export it again, or leave it out.")


def _series(root: Path, files: Sequence[str], workers: int | None, progress: bool) -> tuple[list[Case], list[Problem]]:
    """The DICOM series among the files, grouped by SeriesInstanceUID wherever the files lie."""
    failed: list[_Read] = [([], [Problem(file, "reading it crashed the reader", "Leave it out.")]) for file in files]
    tasks = [(root, file) for file in files]
    read = map_safely(_read_slices, tasks, failed, workers, "Reading DICOM headers" if progress else None)
    problems = [problem for _, found in read for problem in found]
    groups: dict[str, list[dicom.Slice]] = defaultdict(list)
    for slices, _ in read:
        for one in slices:
            groups[one.series].append(one)

    cases = []
    for uid, slices in groups.items():
        # A series of which some images are captures or localisers is judged by the rest.
        usable = [one for one in slices if not one.reason]
        aside = [one for one in slices if one.reason]
        if aside:
            first, more = aside[0], f" ({len(aside)} files)" if len(aside) > 1 else ""
            problems.append(Problem(_relative(root, first.path), f"DICOM series {first.reason}{more}", "Set aside."))
        if not usable:
            continue
        first = usable[0]
        if len(usable) == 1:
            what = "DICOM series of a single slice"
            problems.append(Problem(_relative(root, first.path), what, "Export the whole series, or leave it out."))
            continue
        try:
            geometry = arrange(usable)
        except MedclError as error:
            problems.append(_problem(root, error, _relative(root, first.path)))
            continue
        id = "_".join(filter(None, (first.subject, dicom.short_hash(uid, 8), first.description)))
        ordered = dict.fromkeys(_relative(root, one.path) for stack in geometry.channels for one in stack)
        cases.append(Case(id, first.subject, tuple(ordered), format="dicom", modality=first.modality))
    return cases, problems


def _read_slices(task: tuple[Path, str]) -> _Read:
    root, file = task
    path = root / file
    named = path.suffix.lower() in (".dcm", ".ima", ".dicom")
    try:
        if path.stat().st_size and not dicom.has_magic(path):
            raise MedclError("is not a DICOM file", path, "Copy or export it again, or leave it out.")
        return (dicom.read_slices(path), []) if named or path.stat().st_size else ([], [])
    except MedclError as error:  # a file without the suffix may be anything: a README, a licence
        return [], [_problem(root, error, file)] if named or "cannot be read" in error.what else []
    except OSError as error:
        return [], [Problem(file, f"cannot be read ({error.strerror})", "Mend its permissions.")]


@dataclass
class _Result:
    """A case with its header filled in, or None; of voxels that were read a digest, and whether they are HU."""

    case: Case | None
    problems: tuple[Problem, ...] = ()
    digest: str = ""
    evidence: Evidence | None = None


def _inspect(task: tuple[Manifest, Case, int | None, bool, str]) -> _Result:
    """Reads one case and its label; whatever goes wrong becomes a problem."""
    bare, case, channel, voxels, nan = task
    root = Path(bare.root)
    paths = [root / name for name in case.image]
    try:
        header = read_header(paths)
        taken = pick_channel(header, channel, paths[0])
        notes = (*case.notes, *header.notes)
        if taken is not None:
            notes += (f"channel {taken} of {header.shape[3]}",)
        image = header.blank()
        digest, intensity, evidence = "", None, None
        if voxels:
            image = read_volume(paths, taken)
            image = checks.without_nan(image) if nan == "zero" else image
            notes += image.notes[len(header.notes) :]
            checks.check_image(image.array, paths[0])
            intensity, digest, evidence = _intensity(image.array), _digest(image), evidence_of(image.array)
        case = replace(
            case,
            channel=taken,
            shape=image.shape,
            spacing=tuple(round(mm, 6) for mm in header.spacing),
            orientation=header.orientation,
            affine=tuple(tuple(float(number) for number in row) for row in header.affine),
            dtype=header.dtype,
            intensity=intensity,
            modality=header.modality if header.modality != "unknown" else case.modality,
            notes=notes,
        )
    except Exception as error:
        return _Result(None, (_problem_of(root, error, case.image[0]),))
    if not case.is_labelled:
        return _Result(case, (), digest, evidence)
    first = case.label_files[0]
    try:
        path = root / first
        if voxels:
            found = read_label(bare, case)
            label = checks.check_label(found, image, path, bare.label_names).array
            case = replace(case, notes=(*case.notes, *found.notes) if case.masks else case.notes)
            if not label.any():
                what = "the label map holds background only"
                empty = Problem(first, what, "Check that it is meant so; it counts as labelled.", aside=False)
                return _Result(case, (empty,), digest, evidence)
            if outside := labelled_outside(image.array, label, _as_ct(case, evidence)):
                cut = checks.labelled_outside(outside, int(np.count_nonzero(label)))
                return _Result(case, (Problem(first, *cut, aside=False),), digest, evidence)
        else:
            checks.check_grid(read_label_header(path).blank(), image, path)
    except Exception as error:
        problem = _problem_of(root, error, first)
        lost = replace(problem, what=f"{problem.what}; its image {case.image[0]} is kept as unlabelled")
        return _Result(replace(case, label=None, masks=()), (lost,), digest, evidence)
    return _Result(case, (), digest, evidence)


def _problem_of(root: Path, error: Exception, path: str) -> Problem:
    if isinstance(error, MedclError):
        return _problem(root, error, path)
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return Problem(path, f"cannot be read ({reason.rstrip('.')})", "Copy or export it again, or leave it out.")


def _intensity(array: np.ndarray) -> tuple[float, float, float]:
    """Minimum, median and maximum."""
    thinned = array.reshape(-1)[:: max(1, array.size // _MEDIAN_FROM)]
    return float(array.min()), float(np.median(thinned)), float(array.max())


def _digest(image: Volume) -> str:
    digest = hashlib.sha256(str((image.array.dtype, image.shape)).encode())
    digest.update(np.ascontiguousarray(image.array).data)
    return digest.hexdigest()


def _as_ct(case: Case, evidence: Evidence | None) -> bool:
    return evidence is not None and (evidence.units == "HU" or (case.modality == "CT" and evidence.can_be_hu))
