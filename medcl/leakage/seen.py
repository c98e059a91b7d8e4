"""What a run's weights have seen, kept beside them: hashes, coarse pictures and hashed subjects of every volume.

A run that starts from another takes over what that one had seen, so the record is whole even where the other is gone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Case, Manifest
from medcl.dataset.splits import previous_split
from medcl.errors import MedclError
from medcl.runtime.files import BROKEN_NPZ, atomic_path, read_json, write_json
from medcl.store.signature import SIGNATURE_VERSION, load_marks, load_thumbnail, subject_hash
from medcl.store.signatures import signatures

# the stage of validation volumes: nothing was trained on them, but the weights that were kept are the best on them
SELECTION = "selection"
FINE_TUNING = "fine-tuning"
_STORED = ("voxels", "values", "subject", "stage", "run")


@dataclass(frozen=True)
class SeenVolume:
    """One volume, as far as it is known.

    Attributes:
        voxels, values: its hashes (see `medcl.store.signature.Signature`), empty where unknown.
        subject: hash of the subject's name, empty where unknown.
        stage: `pretraining`, `fine-tuning` or `selection`; empty for scans.
        run: name of the folder of the run that saw it.
        picture: reads its thumbnail when it is asked for: a large set's are not held in memory.
        name: its case; only of scans at hand, never stored.
    """

    voxels: str = ""
    values: str = ""
    subject: str = ""
    stage: str = ""
    run: str = ""
    picture: Callable[[], np.ndarray] | None = None
    name: str = ""

    @property
    def thumbnail(self) -> np.ndarray | None:
        """uint8 (24, 24, 24), or None where there is none."""
        return self.picture() if self.picture else None


@dataclass(frozen=True)
class Seen:
    """Volumes, and a sentence for whatever cannot be known of them."""

    volumes: tuple[SeenVolume, ...] = ()
    gaps: tuple[str, ...] = ()

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.volumes + other.volumes, tuple(dict.fromkeys(self.gaps + other.gaps)))


def seen_in(
    manifest: Manifest, cases: Sequence[Case], stage: str = "", run: str | Path = "", store: str = "", workers: int = 0
) -> Seen:
    """The record of cases at hand; one whose volume cannot be read is known by its subject alone, and is a gap."""
    found = signatures(manifest, cases, store, workers)
    volumes = []
    for case in cases:
        path = found.get(case.id)
        marks = load_marks(path) if path else ("", "")
        picture = partial(load_thumbnail, path) if path else None
        volumes.append(SeenVolume(*marks, subject_hash(case.subject), stage, Path(run).name, picture, case.id))
    unread = [case.id for case in cases if case.id not in found]
    if not unread:
        return Seen(tuple(volumes))
    # the names of what was trained on are in no record
    whose = f"of {stage}" if stage else f"held out or given, such as {unread[0]},"
    gap = f"{len(unread)} of {len(cases)} volumes {whose} could not be read: only their subjects were compared."
    return Seen(tuple(volumes), (gap,))


def save_seen(run: Path, seen: Seen) -> None:
    """Writes `weights/seen.json` and `weights/thumbnails.npz`; without the second, hashes and subjects compare.

    The second holds an array for every volume that has a thumbnail, named by its place in the first.
    """
    path = run / "weights" / "thumbnails.npz"
    with atomic_path(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as kept:
        for place, volume in enumerate(seen.volumes):
            if (picture := volume.thumbnail) is not None:
                with kept.open(f"{place}.npy", "w") as stream:
                    np.lib.format.write_array(stream, picture, allow_pickle=False)
    write_json(run / "weights" / "seen.json", to_plain(seen))


def to_plain(seen: Seen) -> dict[str, Any]:
    """The record as JSON holds it, without pictures."""
    volumes = [{name: getattr(volume, name) for name in _STORED} for volume in seen.volumes]
    return {"medcl_seen": SIGNATURE_VERSION, SELECTION: True, "volumes": volumes, "gaps": list(seen.gaps)}


def from_plain(
    data: Mapping[str, Any], path: Path, pictures: Mapping[int, Callable[[], np.ndarray]] | None = None
) -> Seen:
    """What `to_plain` has written.

    Args:
        data: as read.
        path: the file it stands in.
        pictures: thumbnails by the place of their volume.

    Raises:
        MedclError: it is damaged, or of another version.
    """
    try:
        if data["medcl_seen"] != SIGNATURE_VERSION:
            raise MedclError("is of another version", path, "Train again with this medcl.")
        volumes = tuple(SeenVolume(**each, picture=(pictures or {}).get(i)) for i, each in enumerate(data["volumes"]))
        return Seen(volumes, tuple(data["gaps"]))
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def seen_by(run: str | Path) -> Seen:
    """What the weights of a run have seen, in it and in the runs that it started from.

    Of a run made before medcl kept such records, what its contract says, and those of the runs it names.

    Raises:
        MedclError: the record is damaged.
    """
    folder = Path(run) / "weights"
    if not (folder / "seen.json").exists():
        return _before_records(Path(run))
    data = read_json(folder / "seen.json")
    pictures = _pictures(folder / "thumbnails.npz")
    seen = from_plain(data, folder / "seen.json", pictures)
    if pictures is None:
        gap = f"The thumbnails of {Path(run).name} were left out: only hashes and subjects were compared."
        seen += Seen(gaps=(gap,))
    return seen if data.get(SELECTION) else seen + _selections(Path(run), seen)


def _pictures(path: Path) -> dict[int, Callable[[], np.ndarray]] | None:
    if not path.exists():
        return None
    try:
        data = np.load(path, allow_pickle=False)  # stays open for as long as its pictures may be asked for
        if "pictures" in data.files:  # as written until November 2026
            rows = zip(data["rows"].tolist(), data["pictures"], strict=True)
            return {place: partial(np.asarray, picture) for place, picture in rows}
        return {int(name): partial(_member, data, name, path) for name in data.files}
    except BROKEN_NPZ as error:
        raise _damaged(path, error) from None


def _member(data: Any, name: str, path: Path) -> np.ndarray:
    try:
        return data[name]
    except BROKEN_NPZ as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> MedclError:
    return MedclError(f"is damaged ({error})", path, "Copy the whole weights folder again.")


def _before_records(run: Path, followed: tuple[Path, ...] = ()) -> Seen:
    """From the contract of an older run, and whatever it started from."""
    from medcl.runtime.run import read_config

    patches = run / "weights" / "patch_encoder.json"
    if patches.exists():
        groups = [SeenVolume(subject=subject_hash(g), stage="pretraining", run=run.name)
                  for g in read_json(patches).get("groups", ())]  # fmt: skip
        gap = f"{run.name} was made before medcl kept hashes of bags: groups alone were compared."
        return Seen(tuple(groups), (gap,))
    if not (run / "weights" / "contract.json").exists():
        raise MedclError("holds no weights", run, "Give the run folder of a finished pretrain or finetune.")
    contract: dict[str, Any] = read_json(run / "weights" / "contract.json")
    stage = "pretraining" if contract.get("kind") == "pretrained" else FINE_TUNING
    volumes = [SeenVolume(voxels=each, stage=stage, run=run.name) for each in contract.get("volumes", ())]
    volumes += [
        SeenVolume(subject=subject_hash(each), stage=stage, run=run.name) for each in contract.get("subjects", ())
    ]
    gap = f"{run.name} was made before medcl kept signatures: only hashes of voxels and subjects were compared."
    seen = Seen(tuple(volumes), (gap,))
    if stage == FINE_TUNING:
        seen += _selection(run)
    init = str(read_config(run).get("init", "none")) if (run / "config.yaml").exists() else "none"
    if init in ("none", ""):
        return seen
    before = Path(init)
    if before.resolve() in followed or not (before / "weights").exists():
        return seen + Seen(gaps=(f"{before.name}, which {run.name} started from, is gone: it was not compared.",))
    if (before / "weights" / "seen.json").exists():
        return seen + seen_by(before)
    return seen + _before_records(before, (*followed, run.resolve()))


def _selections(run: Path, seen: Seen) -> Seen:
    """Whom an older run and those that it started from chose their weights by, as far as their folders are at hand."""
    from medcl.runtime.run import read_config

    found, followed, tuned, here = Seen(), set[Path](), set[str](), run
    while here.resolve() not in followed and (here / "weights" / "contract.json").exists():
        followed.add(here.resolve())
        if read_json(here / "weights" / "contract.json").get("kind") == "segmentation":
            tuned.add(here.name)
            found += _selection(here)
        here = Path(str(read_config(here).get("init", "none")) if (here / "config.yaml").exists() else "none")
    named = dict.fromkeys(volume.run for volume in seen.volumes if volume.stage == FINE_TUNING)
    if len(tuned) >= len(named):  # a folder may have been given another name
        return found
    gone = (f"{name} is gone: whom it chose its weights by is not known." for name in named if name not in tuned)
    return found + Seen(gaps=tuple(gone))


def _selection(run: Path) -> Seen:
    """The validation subjects of an older fine-tuning, by its split."""
    split = previous_split(run)
    if split is None:
        return Seen(gaps=(f"{run.name} has no split: whom it chose its weights by is not known.",))
    if not split.val:
        return Seen()
    gap = f"{run.name} was made before medcl recorded validation volumes: of those only the subjects were compared."
    volumes = (SeenVolume(subject=subject_hash(each), stage=SELECTION, run=run.name) for each in split.val)
    return Seen(tuple(volumes), (gap,))
