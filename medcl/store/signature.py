"""What tells a volume from another whatever file it sits in: hashes of its voxels, and a coarse picture of it.

The hashes are equal for equal voxels, whatever the header, the voxel type and the compression. The picture is equal
enough (`medcl.leakage.matching`) where intensities were rescaled, the volume resampled, its margins cropped, its axes
flipped or permuted. Both are of the voxels as they were read, not as a plan prepares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medcl.errors import MedclError
from medcl.runtime.files import BROKEN_NPZ, atomic_path

SIGNATURE_VERSION = 1  # raise it when the code below gives other numbers
SIDE = 24  # voxels along an axis of a thumbnail, whatever the volume's shape
LEVELS = 256
CLIP = 4.0  # times the even share


@dataclass(frozen=True)
class Signature:
    """A volume's own marks.

    Attributes:
        voxels: hash of the voxel values in RAS order.
        values: hash of the voxel values in no order: equal however axes are flipped or permuted.
        thumbnail: uint8 (24, 24, 24).
    """

    voxels: str
    values: str
    thumbnail: np.ndarray


def sign(canonical: np.ndarray) -> Signature:
    """The signature of a volume (X, Y, Z) in RAS orientation."""
    array = np.ascontiguousarray(canonical, dtype=np.float32)
    ordered = np.sort(array, axis=None)
    values = hashlib.sha256(repr(tuple(sorted(array.shape))).encode() + (ordered + 0.0).tobytes()).hexdigest()
    return Signature(voxel_hash(array), values, thumbnail(array))


def voxel_hash(voxels: np.ndarray) -> str:
    """Hash of float32 voxel values in RAS order: the same whatever the header, the type or the compression."""
    return hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()


def subject_hash(subject: str) -> str:
    """What a checkpoint says of whom it has seen: enough to find a known name, no name."""
    if subject.startswith("sha256:"):
        return subject
    return "sha256:" + hashlib.sha256(subject.encode()).hexdigest()[:16]


def signature_path(store: Path, files: Sequence[str], channel: int | None) -> Path:
    """Where the store keeps the signature of an image, given the hashes of its files."""
    key = hashlib.sha256(repr((SIGNATURE_VERSION, list(files), channel)).encode()).hexdigest()[:32]
    return store / "signatures" / key[:2] / f"{key}.npz"


def save_signature(path: Path, signature: Signature) -> None:
    """Writes a signature as `.npz`, whole or not at all."""
    with atomic_path(path) as part, open(part, "wb") as stream:
        np.savez_compressed(stream, voxels=signature.voxels, values=signature.values, thumbnail=signature.thumbnail)


def load_marks(path: Path) -> tuple[str, str]:
    """The hashes `voxels` and `values` that `save_signature` wrote.

    Raises:
        MedclError: the file is damaged.
    """
    return str(_load(path, "voxels")), str(_load(path, "values"))


def load_thumbnail(path: Path) -> np.ndarray:
    """The thumbnail that `save_signature` wrote; raises as `load_marks`."""
    return _load(path, "thumbnail")


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as data:
            return data[name]
    except BROKEN_NPZ as error:
        raise MedclError(f"is damaged ({error})", path, "Delete it; it is made again.") from None


def thumbnail(array: np.ndarray) -> np.ndarray:
    """A coarse picture of a whole volume, uint8 (24, 24, 24), its box stretched to a cube.

    Grey levels are equalised, so that scale and offset of the intensities leave no trace and a gamma little. No level
    takes more than its share (the clip limit of Pizer et al. 1987): else the noise of the air around a body would fill
    the picture.
    """
    coarse = through(array.astype(np.float32, copy=False), [window(n, 0.0, 1.0, SIDE) for n in array.shape])
    low, high = np.percentile(coarse, (0.1, 99.9))
    if high <= low:
        low, high = float(coarse.min()), float(coarse.max())
    place = np.clip((coarse - low) / max(high - low, 1e-30), 0, 1)
    counts, edges = np.histogram(place, LEVELS, (0, 1))
    rise = np.minimum(counts, CLIP * place.size / LEVELS) + 1e-3 * place.size / LEVELS
    level = np.concatenate([[0.0], np.cumsum(rise)]) / rise.sum()
    return np.rint(255 * np.interp(place, edges, level)).astype(np.uint8)


def window(n: int, low: float, high: float, cells: int) -> np.ndarray:
    """Matrix (cells, n) that averages n samples, linearly interpolated, over equal cells from `low` to `high`.

    Both are shares of the axis, whose ends are the outer faces of its first and last voxel; beyond them the edge value
    goes on.
    """
    fine = max(4, int(np.ceil(2 * n * (high - low) / cells)))
    places = ((np.arange(cells * fine) + 0.5) / (cells * fine) * (high - low) + low) * n - 0.5
    places = places.clip(0, n - 1)
    below = np.minimum(places.astype(int), max(n - 2, 0))
    share = (places - below).astype(np.float32)
    weights, rows = np.zeros((cells * fine, n), np.float32), np.arange(cells * fine)
    weights[rows, below] = 1 - share
    if n > 1:
        weights[rows, below + 1] = share
    return weights.reshape(cells, fine, n).mean(1)


def through(array: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Applies a matrix along each axis of a volume."""
    for axis, matrix in enumerate(matrices):
        array = along(matrix, array, axis)
    return array


def along(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    """Applies a matrix along one axis."""
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
