"""A folder of anything → cases and a list of problems. One bad file never stops a scan."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medcl.dataset import checks, layouts
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.labels import read_label
from medcl.dataset.passed_over import passed_over
from medcl.dataset.series import find_series, may_be_dicom, problem_of, relative
from medcl.dataset.summary import print_summary, summary_dict
from medcl.dataset.twins import without_twins
from medcl.errors import MedclError
from medcl.io.detached import header_file, volume_files
from medcl.io.dicom import is_dicom
from medcl.io.formats import SUFFIXES, volume_suffix
from medcl.io.geometry import Volume
from medcl.io.units import rounded
from medcl.io.volumes import pick_channel, read_header, read_volume
from medcl.runtime.pool import map_safely

__all__ = ["print_summary", "scan", "summary_dict"]

_LOOKED_FOR = f"Looked for {', '.join(SUFFIXES)} and DICOM files; give the folder that holds the scans."
_MEDIAN_FROM = 1 << 22  # voxels; of larger volumes the median is taken over every n-th voxel


def scan(
    source: str | Path,
    *,
    channel: int | None = None,
    voxels: bool = True,
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
            read, which is quick but finds less.
        workers: processes that read; by default one per available core.
        progress: show a progress bar.

    Raises:
        MedclError: the folder does not exist, may not be read, or holds nothing that looks like a volume.
    """
    root, found = _find(Path(source).expanduser())
    if not found.volumes and not found.dicom and not found.problems:
        raise MedclError("no volumes found", source, _LOOKED_FOR)
    layout = layouts.detect(root, found.volumes, channel)
    series = find_series(root, found.dicom, layout.label_names, workers, progress)
    cases = [*layout.cases, *series.cases]

    bare = Manifest(str(root), "", "", (), label_names=series.label_names)  # what a worker needs of it
    tasks = [(bare, case, channel, voxels) for case in cases]
    failed = [_Result(None, (_crashed(case),)) for case in cases]
    results = map_safely(_inspect, tasks, failed, workers, "Reading volumes" if progress else None)
    read = [(result.case, result.digest) for result in results if result.case is not None]
    kept, twins = without_twins(root, read, found.volumes)
    rule = layout.rule if layout.cases or not series.cases else ""
    if series.cases:
        series_rule = "DICOM: one case per series, the subject is the hashed patient number"
        series_rule += ", labels are SEG objects" if any(case.is_labelled for case in series.cases) else ""
        rule = f"{rule}; {series_rule}" if rule else series_rule
    return Manifest(
        root=str(root),
        layout=layout.name if layout.cases or not series.cases else "dicom",
        rule=rule,
        cases=tuple(sorted(kept, key=lambda case: case.id)),
        problems=(
            *found.problems, *layout.problems, *series.problems, *(p for r in results for p in r.problems), *twins
        ),
        label_names=series.label_names,
    )


@dataclass
class _Found:
    """What lies below a folder: volume files with their sizes in bytes, files that may be DICOM, what went wrong."""

    volumes: dict[str, int] = field(default_factory=dict)
    dicom: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _find(source: Path) -> tuple[Path, _Found]:
    """The absolute root, and what is below it."""
    found = _Found()
    if not source.exists():
        raise MedclError("no such folder", source, "Check the path.")
    if source.is_file():
        source = header_file(source)
        if volume_suffix(source.name):
            found.volumes[source.name] = source.stat().st_size
        elif is_dicom(source):
            found.dicom.append(source.name)
        found.problems += passed_over(source.parent, found.volumes, [source.name])
        return source.parent.resolve(), found
    root = source.resolve()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise MedclError(f"the folder cannot be read ({error.strerror})", source, "Mend its permissions.") from None
    for path, entry in _walk(root, found.problems):
        if volume_suffix(entry.name):
            found.volumes[path] = entry.stat().st_size
        elif may_be_dicom(entry.name):
            found.dicom.append(path)
        else:
            found.others.append(path)
    found.problems += passed_over(root, found.volumes, found.others)
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


def _crashed(case: Case) -> Problem:
    return Problem(case.image[0], "reading it crashed the reader", "Copy or export it again, or leave it out.")


@dataclass
class _Result:
    """A case with its header filled in, or None; and a digest of its voxels where they were read."""

    case: Case | None
    problems: tuple[Problem, ...] = ()
    digest: str = ""


def _inspect(task: tuple[Manifest, Case, int | None, bool]) -> _Result:
    """Reads one case and its label; whatever goes wrong becomes a problem."""
    bare, case, channel, voxels = task
    root = Path(bare.root)
    if case.format != "dicom":
        files = volume_files(root / case.image[0])
        case = replace(case, image=tuple(relative(root, file) for file in files))
    paths = [root / name for name in case.image]
    try:
        header = read_header(paths)
        taken = pick_channel(header, channel, paths[0])
        notes = (*case.notes, *header.notes)
        if taken is not None:
            notes += (f"channel {taken} of {header.shape[3]}",)
        image = header.blank()
        digest, intensity = "", None
        if voxels:
            image = read_volume(paths, taken)
            checks.check_image(image.array, paths[0])
            intensity, digest = _intensity(image.array), _digest(image)
        case = replace(
            case,
            channel=taken,
            shape=image.shape,
            spacing=tuple(rounded(mm, 6) for mm in header.spacing),
            orientation=header.orientation,
            affine=tuple(tuple(float(number) for number in row) for row in header.affine),
            dtype=header.dtype,
            intensity=intensity,
            modality=_modality(header.modality, case, intensity),
            notes=notes,
        )
    except Exception as error:
        return _Result(None, (_problem_of(root, error, case.image[0]),))
    if not case.is_labelled:
        return _Result(case, (), digest)
    first = case.label_files[0]
    try:
        path = root / first
        if voxels:
            found = read_label(bare, case)
            checks.check_label(found, image, path)
            if not found.array.any():
                what = "the label map holds background only"
                empty = Problem(first, what, "Check that it is meant so; it counts as labelled.", aside=False)
                return _Result(case, (empty,), digest)
            case = replace(case, notes=(*case.notes, *found.notes) if case.masks else case.notes)
        else:
            label = read_header(bare.label_paths(case) or [path])
            pick_channel(label, None, path)
            checks.check_grid(label.blank(), image, path)
    except Exception as error:
        problem = _problem_of(root, error, first)
        lost = replace(problem, what=f"{problem.what}; its image {case.image[0]} is kept as unlabelled")
        return _Result(replace(case, label=None, masks=()), (lost,), digest)
    return _Result(case, (), digest)


def _problem_of(root: Path, error: Exception, path: str) -> Problem:
    if isinstance(error, MedclError):
        return problem_of(root, error, path)
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


def _modality(header: str, case: Case, intensity: Sequence[float] | None) -> str:
    """The file's own word, else the layout's, else CT where there is air at -1000 HU.

    DICOM says its modality: what is neither MR, CT nor PET there is none of them, whatever its intensities.
    """
    if header != "unknown":
        return header
    if case.modality != "unknown" or case.format == "dicom":
        return case.modality
    return "CT" if intensity is not None and intensity[0] <= -500 else "unknown"
