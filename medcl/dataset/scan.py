"""A folder of anything → cases and a list of problems. One bad file never stops a scan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medcl.dataset import checks, layouts
from medcl.dataset.body import labelled_outside
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.find import Found, choose, find
from medcl.dataset.labels import read_label, read_label_header
from medcl.dataset.layouts import Layout
from medcl.dataset.modality import Evidence, evidence_of, settled
from medcl.dataset.outlines import names_of
from medcl.dataset.passed_over import passed_over
from medcl.dataset.roles import check_no_label
from medcl.dataset.series import Series, find_series, problem_of, relative
from medcl.dataset.summary import print_summary, summary_dict
from medcl.dataset.table import is_table, read_table
from medcl.dataset.twins import shared_labels, without_twins
from medcl.errors import MedclError
from medcl.io.detached import volume_files
from medcl.io.formats import SUFFIXES, format_of
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
    table: str | Path = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
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
        source: a folder, one volume file, or a table of cases (`medcl.dataset.table`).
        table: a table of cases; nothing is guessed that it says. Its paths start at its own folder, or at `source`.
        include, exclude: patterns of paths (`*_t1.nii.gz`, `derivatives/*`): which alone to take, which to leave out.
        channel: which channel or frame of 4D images to take; without it they are set aside.
        voxels: also read the voxels (intensity range, NaN, truncation, label values); without it only headers are
            read, and a few volumes to tell CT from others, which is quick but finds less.
        nan: `zero` takes voxels that are NaN or infinite as 0; `reject` sets such volumes aside.
        workers: processes that read; by default one per available core.
        progress: show a progress bar.

    Raises:
        MedclError: the folder does not exist, may not be read, or holds nothing that looks like a volume.
    """
    if is_table(source):
        source, table = Path(source).parent, source
    root, found = find(Path(source).expanduser()) if not table else (Path(source).expanduser().resolve(), Found())
    if table:
        rows = read_table(Path(table).resolve(), root, lambda files: find_series(root, files, workers=workers))
        layout = layouts.with_unique_ids(Layout("table", rows.rule, rows.cases, rows.label_names, rows.problems))
        found.volumes = {case.image[0]: (root / case.image[0]).stat().st_size for case in layout.cases}
        series = Series([], *names_of(root, layout.cases, layout.label_names))
    else:
        choose(found, include, exclude)
        found.problems += passed_over(root, found.volumes, found.others)
        if not found.volumes and not found.dicom and not found.problems:
            raise MedclError("no volumes found", source, _LOOKED_FOR)
        layout = layouts.detect(root, found.volumes, channel)
        series = find_series(root, found.dicom, layout.label_names, workers, progress)
    cases = [*layout.cases, *series.cases]
    if layout.refused_labels is not None:
        cases = [replace(case, label=None, masks=()) for case in cases]
        series.problems.append(layout.refused_labels)

    bare = Manifest(str(root), layout.name, "", (), label_names=series.label_names)  # what a worker needs of it
    tasks = [(bare, case, channel, voxels, nan) for case in cases]
    failed = [_Result(None, (_crashed(case),)) for case in cases]
    results = map_safely(_inspect, tasks, failed, workers, "Reading volumes" if progress else None)
    read = [(result.case, result.digest) for result in results if result.case is not None]
    kept, twins = without_twins(root, read, found.volumes)
    used = {case.id for case in kept}
    twins += shared_labels([(r.case, r.label_digest) for r in results if r.case is not None and r.case.id in used])
    rule = layout.rule if layout.cases or not series.cases else ""
    if series.cases:
        series_rule = "DICOM: one case per series, the subject is the hashed patient number"
        series_rule += f", labels are {' and '.join(series.label_kinds)} objects" if series.label_kinds else ""
        rule = f"{rule}; {series_rule}" if rule else series_rule
    manifest = Manifest(
        root=str(root),
        layout=layout.name if layout.cases or not series.cases else "dicom",
        rule=rule,
        cases=tuple(sorted(kept, key=lambda case: case.id)),
        problems=(
            *found.problems,
            *layout.problems,
            *series.problems,
            *(p for r in results for p in r.problems),
            *twins,
        ),
        label_names=series.label_names,
    )
    return settled(manifest, {r.case.id: r.evidence for r in results if r.case and r.evidence} if voxels else None)


def _crashed(case: Case) -> Problem:
    return Problem(case.image[0], "reading it crashed the reader", "Copy or export it again, or leave it out.")


@dataclass
class _Result:
    """A case with its header filled in, or None; of voxels that were read a digest, and whether they are HU."""

    case: Case | None
    problems: tuple[Problem, ...] = ()
    digest: str = ""
    label_digest: str = ""
    evidence: Evidence | None = None


def _inspect(task: tuple[Manifest, Case, int | None, bool, str]) -> _Result:
    """Reads one case and its label; whatever goes wrong becomes a problem."""
    bare, case, channel, voxels, nan = task
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
        digest, intensity, evidence = "", None, None
        if voxels:
            image = read_volume(paths, taken)
            image = checks.without_nan(image) if nan == "zero" else image
            notes += image.notes[len(header.notes) :]
            checks.check_image(image.array, paths[0])
            check_no_label(image.array, bare.layout, paths[0])
            intensity, digest, evidence = _intensity(image.array), _digest(image), evidence_of(image.array)
        case = replace(
            case,
            channel=taken,
            shape=image.shape,
            spacing=tuple(rounded(mm, 6) for mm in header.spacing),
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
        return _Result(case, (), digest, evidence=evidence)
    first = case.label_files[0]
    try:
        path = root / first
        if voxels:
            found = read_label(bare, case)
            label = checks.check_label(found, image, path, bare.label_names).array
            merged = case.masks or format_of(first) == "dicom"
            case = replace(case, notes=(*case.notes, *found.notes) if merged else case.notes)
            if not label.any():
                what = "the label map holds background only"
                empty = Problem(first, what, "Check that it is meant so; it counts as labelled.", aside=False)
                return _Result(case, (empty,), digest, evidence=evidence)
            if outside := labelled_outside(image.array, label, _as_ct(case, evidence)):
                cut = checks.labelled_outside(outside, int(np.count_nonzero(label)))
                return _Result(case, (Problem(first, *cut, aside=False),), digest, _digest(found), evidence)
            return _Result(case, (), digest, _digest(found), evidence)
        else:
            checks.check_grid(read_label_header(*(bare.label_paths(case) or [path])).blank(), image, path)
    except Exception as error:
        problem = _problem_of(root, error, first)
        lost = replace(problem, what=f"{problem.what}; its image {case.image[0]} is kept as unlabelled")
        return _Result(replace(case, label=None, masks=()), (lost,), digest, evidence=evidence)
    return _Result(case, (), digest, evidence=evidence)


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


def _as_ct(case: Case, evidence: Evidence | None) -> bool:
    return evidence is not None and (evidence.units == "HU" or (case.modality == "CT" and evidence.can_be_hu))
