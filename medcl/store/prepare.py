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

from medcl.dataset.body import SATURATED, Body, body_of, box_of, foreground_box, outside_box, slices_of, widened
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.checks import check_image, check_label, labelled_outside, whole_labels, without_nan
from medcl.dataset.labels import read_label
from medcl.dataset.modality import check_hounsfield
from medcl.errors import MedclError
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
LARGEST = float(np.finfo(np.float16).max)
LUNG = -900.0  # HU; a CT's voxels above it within the body's box are tissue
POINTS_PER_LABEL = 500


@dataclass(frozen=True)
class PreparedImage:
    """A volume as the network sees it, and how to go back.

    Attributes:
        image: float32 (X, Y, Z) in RAS orientation, resampled and normalised.
        affine: of `image`, voxel to RAS+ mm.
        canonical_shape: voxels of the whole volume in RAS orientation before cropping.
        crop_start, crop_shape: the foreground box in that volume.
        told: what a user should know of it, and what can be done.
    """

    image: np.ndarray
    affine: np.ndarray
    canonical_shape: tuple[int, ...]
    crop_start: tuple[int, ...]
    crop_shape: tuple[int, ...]
    told: tuple[tuple[str, str], ...] = ()

    def restore(self, scores: np.ndarray) -> np.ndarray:
        """Class scores (K, x, y, z) on the grid of `image` to a map of class numbers on the canonical grid.

        It is uint8, or uint16 where there are more than 256 classes.
        """
        best = resample_linear(scores[0], self.crop_shape)
        inside = np.zeros(self.crop_shape, dtype=np.uint8 if len(scores) <= 256 else np.uint16)
        for value in range(1, len(scores)):  # a class at a time: the fine grid may be large
            score = resample_linear(scores[value], self.crop_shape)
            wins = score > best
            inside[wins] = value
            best = np.maximum(best, score)
        whole = np.zeros(self.canonical_shape, dtype=inside.dtype)
        whole[self._box()] = inside
        return whole

    def prepare_label(self, canonical: np.ndarray) -> np.ndarray:
        """A label map on the canonical grid to the grid of `image`: uint8, or uint16 where a value needs it."""
        return resample_labels(whole_labels(canonical[self._box()]), self.image.shape)

    def _box(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.crop_start, self.crop_shape, strict=True))


def prepare_image(
    canonical: Volume, plan: Plan, clip: bool = True, label: np.ndarray | None = None
) -> PreparedImage:  # fmt: skip
    """Crops, resamples and normalises a volume that is in RAS orientation.

    Args:
        canonical: the volume, checked (finite, not constant).
        plan: spacing, normalisation and window.
        clip: limit intensities to the plan's range. Without, the scale is the same and what is outside stays: a bright
            spot of less than half a percent of the volume shows only then.
        label: label map on the same grid, of a volume to train on: what it labels stays in the crop. Without it, as in
            prediction, the image alone decides.

    Raises:
        MedclError: the body is nearly constant, so that scaled intensities do not fit the float16 of the store.
    """
    array = np.asarray(canonical.array, dtype=np.float32)
    if plan.n4 and plan.normalise != "ct":
        array = correct_bias(array, canonical.spacing)
    body = body_of(array, plan.window if plan.normalise == "ct" else None)
    low, high = body.low, body.high
    mask = array > body.threshold
    box = foreground_box(mask)
    seen = slices_of(box)
    tissue = array[seen] > LUNG if plan.normalise == "ct" else mask[seen]
    told = _saturation(body, array[seen], tissue, plan, "the body")
    if label is not None:
        told += _saturation(body, array, label > 0, plan, "what is labelled")
    if label is not None and (outside := outside_box(label > 0, box)):
        told.append(labelled_outside(outside, int(np.count_nonzero(label))))
        labelled = box_of(label > 0)
        assert labelled is not None
        box = widened(box, labelled, array.shape)
    cropped = array[slices_of(box)]
    extent = np.asarray(cropped.shape) * canonical.spacing
    shape = np.maximum(np.round(extent / plan.spacing), 1).astype(int).tolist()
    image = np.clip(resample_linear(np.clip(cropped, low, high), shape), low, high)
    shown = image if clip else resample_linear(cropped, shape)
    if plan.normalise == "ct":
        image = 2 * (shown - low) / (high - low) - 1
    else:
        scale = image[image > body.tissue]
        scale = scale if scale.size and scale.std() > 0 else image
        image = (shown - scale.mean()) / max(float(scale.std()), 1e-6 * float(high - low))
    if not np.abs(image).max() <= (LARGEST if clip else np.inf):
        raise MedclError(
            f"voxels from {array.min():g} to {array.max():g} cannot be scaled: the body is as good as constant", None,
            "Check that it is a scan and not a mask, or leave it out.",
        )  # fmt: skip
    affine = np.array(canonical.affine, dtype=float)
    affine[:3, 3] += affine[:3, :3] @ np.asarray(box[0], float)
    return PreparedImage(
        image.astype(np.float32),
        resampled_affine(affine, cropped.shape, shape),
        tuple(array.shape),
        tuple(int(s) for s in box[0]),
        tuple(cropped.shape),
        tuple(told),
    )


def _saturation(body: Body, array: np.ndarray, mask: np.ndarray, plan: Plan, whose: str) -> list[tuple[str, str]]:
    """Says where more than a few percent of the voxels of `mask` lie outside the range of intensities."""
    share = body.saturated(array, mask)
    if share <= SATURATED:
        return []
    if plan.normalise == "ct":
        what = f"the plan's window of {body.low:g} to {body.high:g} HU"
        return [(f"{share:.0%} of {whose} lies outside {what}",
                 "Where contrast is needed there, edit `window` in the plan and pass it with --plan.")]  # fmt: skip
    what = f"the volume's range of {body.low:.5g} to {body.high:.5g}"
    return [(f"{share:.0%} of {whose} lies outside {what}", "Look at it: prepared, those voxels are all equal.")]


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


def load_case(manifest: Manifest, case: Case, nan: str = "reject") -> tuple[Volume, np.ndarray | None]:
    """Reads and checks a case: its image in RAS orientation, and its label map on that grid.

    Args:
        manifest: says where the case lies, and names label values.
        case: one of its cases.
        nan: as in `Plan`.

    Raises:
        MedclError: the image or the label cannot be used.
    """
    image = read_volume(manifest.image_paths(case), channel=case.channel)
    image = without_nan(image) if nan == "zero" else image
    check_image(image.array, where=case.image[0])
    if not case.is_labelled:
        return to_canonical(image), None
    label = check_label(read_label(manifest, case), image, case.label_files[0], manifest.label_names)
    return to_canonical(image), np.asarray(to_canonical(label).array)


def prepare_case(manifest: Manifest, case: Case, plan: Plan, path: Path, signature: Path | None = None) -> None:
    """Prepares one case into `path` of the store, and signs its voxels, at hand here, into the file `signature`."""
    image, label = load_case(manifest, case, plan.nan)
    if plan.normalise == "ct":
        check_hounsfield(image.array, case.image[0])
    if signature is not None and not signature.exists():
        save_signature(signature, sign(image.array))
    prepared = prepare_image(image, plan, label=label)
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
        **({"told": [list(each) for each in prepared.told]} if prepared.told else {}),
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
        "label": None if label is None else contents.of(label),
    }
    if case.masks:
        values = {name: value for value, name in manifest.label_names.items()}
        parts["masks"] = [[values[name], contents.of(Path(manifest.root) / file)] for name, file in case.masks]
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
