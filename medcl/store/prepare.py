"""Cases to the store: RAS, crop to the foreground, resample, normalise. Parallel, resumable, never stale."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.checks import check_image, check_label
from medcl.dataset.labels import read_label
from medcl.dataset.roles import check_no_label
from medcl.errors import MedclError
from medcl.io.detached import volume_files
from medcl.io.geometry import Volume, to_canonical
from medcl.io.resample import resample_labels, resample_linear, resampled_affine
from medcl.io.volumes import read_volume
from medcl.runtime.dask_pool import map_by_dask
from medcl.runtime.files import file_sha256, read_json, write_json
from medcl.runtime.pool import map_safely
from medcl.store import remote
from medcl.store.plan import Plan
from medcl.store.signature import save_signature, sign, signature_path, voxel_hash
from medcl.store.volumes import store_folder, write_volume

PREPARE_VERSION = 1  # raise it when the code below changes what a prepared volume looks like
FOREGROUND_SHARE = 0.05  # of the range between the low and the high percentile
AIR = -500.0  # HU
MARGIN = 2  # voxels kept around the foreground box
POINTS_PER_LABEL = 500


@dataclass(frozen=True)
class PreparedImage:
    """A volume as the network sees it, and how to go back.

    Attributes:
        image: float32 (X, Y, Z) in RAS orientation, resampled and normalised.
        affine: of `image`, voxel to RAS+ mm.
        canonical_shape: voxels of the whole volume in RAS orientation before cropping.
        crop_start, crop_shape: the foreground box in that volume.
    """

    image: np.ndarray
    affine: np.ndarray
    canonical_shape: tuple[int, ...]
    crop_start: tuple[int, ...]
    crop_shape: tuple[int, ...]

    def restore(self, scores: np.ndarray) -> np.ndarray:
        """Class scores (K, x, y, z) on the grid of `image` to a uint8 label map on the canonical grid."""
        best = resample_linear(scores[0], self.crop_shape)
        inside = np.zeros(self.crop_shape, dtype=np.uint8)
        for value in range(1, len(scores)):  # a class at a time: the fine grid may be large
            score = resample_linear(scores[value], self.crop_shape)
            wins = score > best
            inside[wins] = value
            best = np.maximum(best, score)
        whole = np.zeros(self.canonical_shape, dtype=np.uint8)
        whole[self._box()] = inside
        return whole

    def prepare_label(self, canonical: np.ndarray) -> np.ndarray:
        """A label map on the canonical grid to the grid of `image`, uint8."""
        return resample_labels(canonical[self._box()].astype(np.uint8), self.image.shape)

    def _box(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.crop_start, self.crop_shape, strict=True))


def prepare_image(canonical: Volume, plan: Plan, clip: bool = True) -> PreparedImage:
    """Crops, resamples and normalises a volume that is in RAS orientation.

    Args:
        canonical: the volume, checked (finite, not constant).
        plan: spacing, normalisation and window.
        clip: limit intensities to the plan's range. Without, the scale is the same and what is outside stays: a bright
            spot of less than half a percent of the volume shows only then.
    """
    array = np.asarray(canonical.array, dtype=np.float32)
    if plan.n4 and plan.normalise != "ct":
        array = correct_bias(array, canonical.spacing)
    low, high = np.percentile(array, (0.5, 99.5)) if plan.normalise == "robust" else plan.window
    if high <= low:  # nearly constant: a few voxels carry all the contrast
        low, high = float(array.min()), float(array.max())
    threshold = AIR if plan.normalise == "ct" else low + FOREGROUND_SHARE * (high - low)
    start, stop = foreground_box(array > threshold)
    cropped = array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    extent = np.asarray(cropped.shape) * canonical.spacing
    shape = np.maximum(np.round(extent / plan.spacing), 1).astype(int).tolist()
    image = np.clip(resample_linear(np.clip(cropped, low, high), shape), low, high)
    shown = image if clip else resample_linear(cropped, shape)
    if plan.normalise == "ct":
        image = 2 * (shown - low) / (high - low) - 1
    else:
        body = image[image > threshold]
        body = body if body.size and body.std() > 0 else image
        image = (shown - body.mean()) / max(float(body.std()), 1e-6 * float(high - low))
    affine = np.array(canonical.affine, dtype=float)
    affine[:3, 3] += affine[:3, :3] @ np.asarray(start, float)
    return PreparedImage(
        image.astype(np.float32),
        resampled_affine(affine, cropped.shape, shape),
        tuple(array.shape),
        tuple(int(s) for s in start),
        tuple(cropped.shape),
    )


def foreground_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and past-last voxel of the planes along each axis with more than 1% foreground, and a margin."""
    start, stop = np.zeros(3, dtype=int), np.asarray(mask.shape)
    for axis in range(3):
        planes = mask.mean(axis=tuple(i for i in range(3) if i != axis)) > 0.01
        if planes.any():
            found = np.flatnonzero(planes)
            start[axis] = max(found[0] - MARGIN, 0)
            stop[axis] = min(found[-1] + 1 + MARGIN, mask.shape[axis])
    return start, stop


def correct_bias(array: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """N4 bias-field correction (Tustison et al. 2010) fitted on a four times coarser grid, as is usual."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing([float(s) for s in spacing])
    shrink = [max(1, min(4, n // 8)) for n in array.shape]
    small = sitk.Shrink(image, shrink)
    mask = sitk.OtsuThreshold(small, 0, 1, 200)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetConvergenceThreshold(0.001)
    n4.SetMaximumNumberOfIterations([50] * 4)
    # N4 works on logarithms
    lowest = float(array.min())
    n4.Execute(sitk.Cast(small, sitk.sitkFloat32) - lowest + 1.0, mask)
    field = np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T)
    return ((array - lowest) / np.maximum(field, 1e-3) + lowest).astype(np.float32)


def load_case(manifest: Manifest, case: Case) -> tuple[Volume, np.ndarray | None]:
    """Reads and checks a case: its image in RAS orientation, and its label map on that grid.

    Raises:
        MedclError: the image or the label cannot be used.
    """
    image = read_volume(manifest.image_paths(case), channel=case.channel)
    check_image(image.array, where=case.image[0])
    check_no_label(image.array, manifest.layout, case.image[0])
    if not case.is_labelled:
        return to_canonical(image), None
    label = read_label(manifest, case)
    check_label(label, image, where=case.label_files[0])
    canonical = to_canonical(label)
    return to_canonical(image), np.rint(np.asarray(canonical.array)).astype(np.uint8)


def prepare_case(manifest: Manifest, case: Case, plan: Plan, path: Path, signature: Path | None = None) -> None:
    """Prepares one case into `path` of the store, and signs its voxels, at hand here, into the file `signature`."""
    image, label = load_case(manifest, case)
    if signature is not None and not signature.exists():
        save_signature(signature, sign(image.array))
    prepared = prepare_image(image, plan)
    target = None if label is None else prepared.prepare_label(label)
    voxels = np.ascontiguousarray(image.array, dtype=np.float32)
    meta = {
        "case": case.id,
        "subject": case.subject,
        "spacing": [float(s) for s in plan.spacing],
        "affine": prepared.affine.tolist(),
        "crop_start": list(prepared.crop_start),
        "voxel_hash": voxel_hash(voxels),
        "foreground": {} if target is None else _foreground_points(target),
        "notes": list(image.notes),
    }
    write_volume(path, prepared.image, target, meta)


def _foreground_points(label: np.ndarray) -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(0)
    points = {}
    for value in np.unique(label[label > 0]):
        found = np.argwhere(label == value)
        points[str(value)] = rng.permutation(found)[:POINTS_PER_LABEL].tolist()
    return points


@dataclass(frozen=True)
class Stored:
    """A case of the manifest and the folder of the store that holds it prepared."""

    case: Case
    path: Path


class ContentKeys:
    """Content hashes of files, remembered by path, size and change times so that unchanged files are not read again."""

    def __init__(self, store: Path):
        self._file = store / "hashes.json"
        try:
            known = read_json(self._file) if self._file.exists() else {}
        except MedclError:
            known = {}
        # only a cache: a damaged one is rebuilt
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}
        self._changed = False

    def of(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal; the file is read only where it is new or has changed."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        name = str(path.resolve())
        entry = self._known.get(name)
        if entry is None or entry[0] != stamp:
            entry = [stamp, file_sha256(path)]
            self._known[name] = entry
            self._changed = True
        return str(entry[1])

    def of_volume(self, path: Path) -> str:
        """`of` a volume's file, joined by `of` the files beside it that hold its voxels, where it has any."""
        return "+".join(self.of(file) for file in volume_files(path))

    def save(self) -> None:
        """Writes the hashes to `hashes.json` in the store where any has changed."""
        if self._changed:
            write_json(self._file, self._known)


def case_key(manifest: Manifest, case: Case, plan: Plan, contents: ContentKeys) -> str:
    """Name of a case's folder in the store: of what its files hold and of how it is prepared."""
    label = manifest.label_path(case)
    parts: dict[str, Any] = {
        "version": PREPARE_VERSION,
        "plan": plan.preparation(),
        "channel": case.channel,
        "case": [case.id, case.subject],
        "image": [contents.of(path) for path in manifest.image_paths(case)],
        "label": None if label is None else contents.of_volume(label),
    }
    if case.masks:
        values = {name: value for value, name in manifest.label_names.items()}
        parts["masks"] = [[values[name], contents.of_volume(Path(manifest.root) / file)] for name, file in case.masks]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def prepare(
    manifest: Manifest,
    plan: Plan,
    *,
    store: str | Path = "",
    workers: int = 0,
    title: str | None = None,
    dask: str = "",
) -> tuple[list[Stored], Manifest]:
    """Prepares what the store does not hold yet.

    Args:
        manifest: cases to prepare.
        plan: how.
        store: folder or fsspec address; by default `default_store()`.
        workers: processes; 0 takes one a core.
        title: of a progress bar; none without.
        dask: address of a Dask scheduler, or `local`; by default a pool of processes here.

    Returns:
        The stored cases in the manifest's order, and the manifest without those that could not be prepared, which stand
        among its problems.

    Raises:
        MedclError: no case could be prepared, or the store cannot be written.
    """
    root = store_folder(store)
    there = remote.held(root)
    contents = ContentKeys(root)
    problems: list[Problem] = []
    paths: dict[str, Path] = {}
    missing: list[tuple[Case, Path, Path]] = []
    for case in manifest.cases:
        try:
            key = case_key(manifest, case, plan, contents)
        except OSError as error:
            problems.append(_problem(case, MedclError(f"cannot be read ({error.strerror})", case.image[0])))
            continue
        paths[case.id] = root / key[:2] / key
        here = (paths[case.id] / "meta.json").exists()
        if here and remote.origin_of(paths[case.id]) and key not in there:
            remote.send(paths[case.id])  # cut off before it was sent
        elif not here and key not in there:
            files = [contents.of(file) for file in manifest.image_paths(case)]
            missing.append((case, paths[case.id], signature_path(root, files, case.channel)))
    contents.save()
    bare = dataclasses.replace(manifest, cases=(), problems=())  # a worker needs the root and the names of values
    tasks = [(bare, case, plan, path, signature) for case, path, signature in missing]
    killed: list[MedclError | None] = [
        MedclError("its process was killed", case.image[0], "Use fewer workers: memory ran out.")
        for case, *_ in missing
    ]
    if dask:
        failures = map_by_dask(_attempt, tasks, killed, dask)
    else:
        failures = map_safely(_attempt, tasks, killed, workers or None, title if missing else None, fewest=8)
    for (case, *_), failure in zip(missing, failures, strict=True):
        if failure is not None:
            problems.append(_problem(case, failure))
            del paths[case.id]
    kept = tuple(case for case in manifest.cases if case.id in paths)
    if not kept:
        first = f" First: {problems[0]}" if problems else ""
        raise MedclError("no volume could be prepared", manifest.root, f"See `medcl scan`.{first}")
    order = sorted(problems, key=lambda p: p.file)
    return [Stored(case, paths[case.id]) for case in kept], manifest.with_cases(kept, tuple(order))


def _problem(case: Case, error: MedclError) -> Problem:
    return Problem(str(error.where or case.image[0]), error.what, error.remedy or "Mend or remove the file.")


def _attempt(task: tuple[Manifest, Case, Plan, Path, Path]) -> MedclError | None:
    """One case; what is wrong with it comes back as a value, so that the others go on."""
    manifest, case, plan, path, signature = task
    try:
        prepare_case(manifest, case, plan, path, signature)
        remote.send(path)
    except MedclError as error:
        if isinstance(error.__cause__, OSError) and error.what.startswith(("the disk", "cannot be written")):
            raise  # not this volume's fault: every other one would fail as well
        return error
    except MemoryError:
        return MedclError("does not fit into memory", case.image[0], "Use fewer workers or a coarser spacing.")
    except (RuntimeError, ValueError, ArithmeticError) as error:  # what SimpleITK and numpy raise on odd volumes
        what = f"cannot be prepared ({' '.join(str(error).split())[:120]})"
        return MedclError(what, case.image[0], "Look at the volume, or leave it out.")
    return None
