"""The store: prepared volumes in compressed chunks, from which a crop is read without reading the volume."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.runtime.files import disk_error, read_json, write_json
from medcl.store import remote

CHUNK = 64  # voxels along an axis of a chunk: the usual crop touches at most eight
BLOCK = 16  # of a block, the least that is decompressed; a quarter less time for a 64³ crop than by 32, 1.5% more disk
OPEN = 64  # volumes kept open; opening one costs a quarter of a millisecond


def default_store() -> Path:
    """`$MEDCL_STORE`, or medcl's folder in the user's cache."""
    return store_folder(os.environ.get("MEDCL_STORE") or str(_cache()))


def store_folder(store: str | Path) -> Path:
    """The local folder of a store: itself, or the mirror of one at an fsspec address such as `s3://bucket/store`."""
    if not store:
        return default_store()
    return remote.mirror_of(str(store), _cache()) if remote.is_remote(str(store)) else Path(store)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medcl"


class StoredVolume:
    """One prepared case on disk: `image`, `label` if any, and `meta`.

    Attributes:
        path: its folder.
        meta: `shape`, `spacing` (mm), `affine`, `crop_start`, `voxel_hash`, `foreground` (voxels of each label).
    """

    def __init__(self, path: Path):
        import blosc2

        blosc2.set_nthreads(1)  # readers are many; each asking for all cores makes all of them slower
        self.path = path
        self.meta: dict[str, Any] = read_meta(path)
        self.shape: tuple[int, int, int] = tuple(self.meta["shape"])
        try:
            # not mapped into memory: pages of every volume ever read would count as this process's
            self._image = blosc2.open(str(path / "image.b2nd"), mode="r")
            self._label = None
            if self.meta["labelled"]:
                self._label = blosc2.open(str(path / "label.b2nd"), mode="r")
        except (RuntimeError, OSError) as error:
            raise MedclError(f"is damaged ({error})", path, "Delete this folder; it is prepared again.") from None

    def image(self, start: Sequence[int] = (0, 0, 0), size: Sequence[int] | None = None) -> np.ndarray:
        """Crop of the image, float32 (X, Y, Z). Beyond the volume the edge voxels go on."""
        return _crop(self._image, self.shape, start, size or self.shape, np.float32, True)

    def half(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """As `image`, in the float16 that is stored: torch widens it many times faster than numpy."""
        return _crop(self._image, self.shape, start, size, np.float16, True)

    def label(self, start: Sequence[int] = (0, 0, 0), size: Sequence[int] | None = None) -> np.ndarray:
        """Crop of the label map (X, Y, Z), uint8 or uint16. Beyond the volume it is background."""
        if self._label is None:
            raise MedclError("has no label", self.meta["case"], "Use a labelled case.")
        return _crop(self._label, self.shape, start, size or self.shape, self._label.dtype, False)

    @functools.cached_property
    def foreground(self) -> dict[int, np.ndarray]:
        """Some voxels of each label, (n, 3) each: where a crop may be centred."""
        return {int(value): np.asarray(voxels) for value, voxels in self.meta["foreground"].items()}


def _crop(
    array: Any, shape: Sequence[int], start: Sequence[int], size: Sequence[int], dtype: Any, repeat_edge: bool
) -> np.ndarray:
    wanted = [np.arange(s, s + n) for s, n in zip(start, size, strict=True)]
    nearest = [w.clip(0, extent - 1) for w, extent in zip(wanted, shape, strict=True)]
    out = np.asarray(array[tuple(slice(n[0], n[-1] + 1) for n in nearest)]).astype(dtype, copy=False)
    outside = [n != w for n, w in zip(nearest, wanted, strict=True)]
    if any(o.any() for o in outside):
        out = out[np.ix_(*(n - n[0] for n in nearest))]
        if not repeat_edge:
            for axis, beyond in enumerate(outside):
                out[(slice(None),) * axis + (beyond,)] = 0
    return out


def read_meta(path: Path) -> dict[str, Any]:
    """What is known of a stored volume, without opening its voxels."""
    remote.fetch(path)
    meta: dict[str, Any] = read_json(path / "meta.json")
    return meta


def open_volume(path: Path) -> StoredVolume:
    """Opens a stored volume; recently used ones stay open in this thread."""
    return _opened(path, threading.get_ident())


@functools.lru_cache(maxsize=OPEN)
def _opened(path: Path, thread: int) -> StoredVolume:
    return StoredVolume(path)  # one a thread: decompression contexts are not to be shared


def write_volume(path: Path, image: np.ndarray, label: np.ndarray | None, meta: dict[str, Any]) -> None:
    """Writes one case as a whole: it appears under `path` complete, or not at all.

    Args:
        path: folder to appear.
        image: float (X, Y, Z); kept as float16, finer than the noise of a normalised scan.
        label: uint8 or uint16 (X, Y, Z), or None.
        meta: JSON of what is known of it.

    Raises:
        MedclError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        _write_array(part / "image.b2nd", image.astype(np.float16))
        if label is not None:
            _write_array(part / "label.b2nd", label)
        write_json(part / "meta.json", {**meta, "shape": list(image.shape), "labelled": label is not None})
        if not (path / "meta.json").exists():  # another process may have been faster
            shutil.rmtree(path, ignore_errors=True)  # only ever a damaged one
            os.replace(part, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_array(path: Path, array: np.ndarray) -> None:
    import blosc2

    chunks = tuple(min(CHUNK, n) for n in array.shape)
    blocks = tuple(min(BLOCK, n) for n in chunks)
    # compressed in memory first: a full disk then fails in `write`, with an errno, not inside the library
    packed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=blocks,
        cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, nthreads=1),
    )
    with open(path, "wb") as stream:
        stream.write(packed.to_cframe())
        stream.flush()
        os.fsync(stream.fileno())
