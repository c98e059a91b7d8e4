"""What a run's weights have seen, kept beside them: hashes, coarse pictures and hashed subjects of every volume.

A run that starts from another takes over what that one had seen, so the record is whole even where the other is gone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.data.case import Case, Manifest
from medcl.data.signature import SIGNATURE_VERSION, subject_hash
from medcl.data.signatures import signatures
from medcl.errors import MedclError
from medcl.files import atomic_path, read_json, write_json


@dataclass(frozen=True)
class SeenVolume:
    """One volume, as far as it is known.

    Attributes:
        voxels, values: its hashes (see `medcl.data.signature.Signature`), empty where unknown.
        subject: hash of the subject's name, empty where unknown.
        stage: `pretraining` or `fine-tuning`; empty for scans.
        run: name of the folder of the run that saw it.
        thumbnail: uint8 (24, 24, 24) or None.
        name: its case; only of scans at hand, never stored.
    """

    voxels: str = ""
    values: str = ""
    subject: str = ""
    stage: str = ""
    run: str = ""
    thumbnail: np.ndarray | None = None
    name: str = ""


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
    """The record of cases at hand; one whose volume cannot be read is known by its subject only."""
    found = signatures(manifest, cases, store, workers)
    volumes = []
    for case in cases:
        one = found.get(case.id)
        marks = (one.voxels, one.values) if one else ("", "")
        picture = one.thumbnail if one else None
        volumes.append(SeenVolume(*marks, subject_hash(case.subject), stage, Path(run).name, picture, case.id))
    return Seen(tuple(volumes))


def save_seen(run: Path, seen: Seen) -> None:
    """Writes `weights/seen.json` and `weights/thumbnails.npz`; without the second, hashes and subjects compare."""
    rows = [i for i, volume in enumerate(seen.volumes) if volume.thumbnail is not None]
    with atomic_path(run / "weights" / "thumbnails.npz") as part, open(part, "wb") as stream:
        pictures = np.stack([np.asarray(seen.volumes[i].thumbnail) for i in rows]) if rows else np.zeros(0, np.uint8)
        np.savez_compressed(stream, rows=np.asarray(rows, np.int64), pictures=pictures)
    kept = ("voxels", "values", "subject", "stage", "run")
    volumes = [{name: getattr(volume, name) for name in kept} for volume in seen.volumes]
    write_json(
        run / "weights" / "seen.json", {"medcl_seen": SIGNATURE_VERSION, "volumes": volumes, "gaps": list(seen.gaps)}
    )


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
    try:
        if data["medcl_seen"] != SIGNATURE_VERSION:
            raise MedclError("is of another version", folder / "seen.json", "Train again with this medcl.")
        pictures, gaps = _pictures(folder / "thumbnails.npz"), list(data["gaps"])
        if pictures is None:
            gaps.append(f"The thumbnails of {Path(run).name} were left out: only hashes and subjects were compared.")
        volumes = tuple(
            SeenVolume(**fields, thumbnail=(pictures or {}).get(i)) for i, fields in enumerate(data["volumes"])
        )
    except (KeyError, TypeError) as error:
        raise MedclError(
            f"is damaged ({error!r})", folder / "seen.json", "Copy the whole weights folder again."
        ) from None
    return Seen(volumes, tuple(gaps))


def _pictures(path: Path) -> dict[int, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            return dict(zip(data["rows"].tolist(), data["pictures"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MedclError(f"is damaged ({error})", path, "Copy the whole weights folder again.") from None


def _before_records(run: Path, followed: tuple[Path, ...] = ()) -> Seen:
    """From the contract of an older run, and whatever it started from."""
    from medcl.run import read_config

    if not (run / "weights" / "contract.json").exists():
        raise MedclError("holds no weights", run, "Give the run folder of a finished pretrain or finetune.")
    contract: dict[str, Any] = read_json(run / "weights" / "contract.json")
    stage = "pretraining" if contract.get("kind") == "pretrained" else "fine-tuning"
    volumes = [SeenVolume(voxels=each, stage=stage, run=run.name) for each in contract.get("volumes", ())]
    volumes += [
        SeenVolume(subject=subject_hash(each), stage=stage, run=run.name) for each in contract.get("subjects", ())
    ]
    gap = f"{run.name} was made before medcl kept signatures: only hashes of voxels and subjects were compared."
    seen = Seen(tuple(volumes), (gap,))
    init = str(read_config(run).get("init", "none")) if (run / "config.yaml").exists() else "none"
    if init in ("none", ""):
        return seen
    before = Path(init)
    if before.resolve() in followed or not (before / "weights").exists():
        return seen + Seen(gaps=(f"{before.name}, which {run.name} started from, is gone: it was not compared.",))
    if (before / "weights" / "seen.json").exists():
        return seen + seen_by(before)
    return seen + _before_records(before, (*followed, run.resolve()))
