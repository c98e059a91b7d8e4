"""Cases to the store: read, checked, brought to RAS and prepared. Parallel, resumable, never stale."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.checks import check_image, check_label, without_nan
from medcl.dataset.labels import read_label, structure_values
from medcl.dataset.modality import check_hounsfield
from medcl.dataset.roles import check_no_label
from medcl.errors import MedclError
from medcl.io.detached import volume_files
from medcl.io.geometry import Volume, to_canonical
from medcl.io.volumes import read_volume
from medcl.runtime.dask_pool import map_by_dask
from medcl.runtime.files import file_sha256, read_json, write_json
from medcl.runtime.pool import map_safely
from medcl.store import remote
from medcl.store.image import correct_bias, prepare_image
from medcl.store.plan import Plan
from medcl.store.signature import save_signature, sign, signature_path, voxel_hash
from medcl.store.volumes import store_folder, write_volume

# code outside of medcl imports both from here
__all__ = ["ContentKeys", "Stored", "case_key", "correct_bias", "load_case", "prepare", "prepare_case", "prepare_image"]

PREPARE_VERSION = 1  # raise it when other code changes what a prepared volume looks like
POINTS_PER_LABEL = 500


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
    check_no_label(image.array, manifest.layout, case.image[0])
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
    if structures := structure_values(manifest, case):
        parts["structures"] = structures
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
        except MedclError as error:
            problems.append(_problem(case, error))
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
