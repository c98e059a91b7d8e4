"""The instances of a bag, from whatever a person has: a slide, an image, a folder of patches, or a volume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.formats import volume_suffix
from medcl.mil.bags import FEATURE_SUFFIXES, Bag
from medcl.mil.slides import IMAGES, Slide, Tiling, side_of, tiles
from medcl.runtime.files import file_sha256, sha256

READERS = 4  # threads that decode tiles: the libraries release the interpreter while they do


@dataclass(frozen=True)
class Instances:
    """What a bag holds, before any encoder has seen it.

    Attributes:
        coordinates: (K, 2) pixels of the finest level, or (K, 3) voxels of the prepared volume; None where unknown.
        meta: facts that belong into the feature file.
        read: blocks of instances, (n, 3, H, W) uint8 for patches and slices, (n, 1, D, H, W) float32 for sub-volumes.
    """

    coordinates: np.ndarray | None
    meta: dict[str, Any]
    read: Any


def kind_of(bag: Bag) -> str:
    """`features`, `patches` (a folder), `volume` or `slide` (an image too).

    Raises:
        MedclError: there is no such file.
    """
    path = bag.path
    if not path.exists():
        raise MedclError("no such file", path, "Check the path column of the table.")
    if path.suffix.lower() in FEATURE_SUFFIXES:
        return "features"
    if path.is_dir():
        return "patches" if any(p.suffix.lower() in IMAGES for p in path.iterdir()) else "volume"
    is_volume = volume_suffix(path.name) or path.name.lower().endswith((".dcm", ".dcm.gz"))
    return "volume" if is_volume and path.suffix.lower() not in IMAGES else "slide"  # a TIFF of a bag is an image


def content_of(bag: Bag) -> str:
    """Hash of a slide's or image's bytes, or of those of a folder's images whatever their names.

    Raises:
        MedclError: a file cannot be read.
    """
    files = [p for p in bag.path.iterdir() if p.suffix.lower() in IMAGES] if bag.path.is_dir() else [bag.path]
    try:
        each = sorted(file_sha256(path) for path in files)
    except OSError as error:
        raise MedclError(f"cannot be read ({error.strerror})", bag.path, "Copy it again.") from None
    return each[0] if len(each) == 1 else sha256("".join(each).encode())


def patches_of(bag: Bag, tiling: Tiling, slide_mpp: float = 0.0, block: int = 64) -> Instances:
    """Tiles of a slide or image, or the images of a folder.

    Args:
        bag: whose path is one of these.
        tiling: how a slide is cut; images of a folder are resized to its tile.
        slide_mpp: microns per pixel where a file does not say.
        block: patches a block.

    Raises:
        MedclError: it cannot be read, or holds no tissue.
    """
    if bag.path.is_dir():
        files = sorted(p for p in bag.path.iterdir() if p.suffix.lower() in IMAGES)

        def read_files() -> Iterator[np.ndarray]:
            for some in _blocks(files, block):
                yield np.stack([_square(Slide(path), tiling.pixels) for path in some]).transpose(0, 3, 1, 2)

        return Instances(None, {"patches": len(files)}, read_files)
    slide = Slide(bag.path)
    side = side_of(slide, tiling, slide_mpp)
    corners = tiles(slide, tiling, side)
    if not len(corners):
        raise MedclError("holds no tissue", bag.path, "Lower --tissue, or leave the bag out.")

    def read_tiles() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(READERS) as pool:
            ahead = None  # the next block is decoded while the encoder works on this one
            for some in _blocks(corners.tolist(), block):
                found = pool.map(lambda c: slide.read(c[0], c[1], side, tiling.pixels), some)
                if ahead is not None:
                    yield np.stack(list(ahead)).transpose(0, 3, 1, 2)
                ahead = found
            assert ahead is not None
            yield np.stack(list(ahead)).transpose(0, 3, 1, 2)

    meta = {"patch_size_level0": float(side), "mpp": float(slide.mpp or slide_mpp or 0), **asdict(tiling)}
    return Instances(corners, meta, read_tiles)


def _square(slide: Slide, pixels: int) -> np.ndarray:
    return slide.read(0, 0, float(max(slide.size)), pixels)


def _blocks(items: Any, size: int) -> Iterator[Any]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def sub_volumes(image: np.ndarray, size: tuple[int, int, int], block: int = 8) -> Instances:
    """A grid of sub-volumes over a prepared volume (X, Y, Z), half overlapping; empty ones are left out.

    Args:
        image: prepared intensities.
        size: voxels of a sub-volume.
        block: sub-volumes a block.
    """
    starts, steps = [], []
    for extent, n in zip(image.shape, size, strict=True):
        last = max(0, extent - n)
        count = -(-last // max(1, n // 2)) + 1
        starts.append([round(i * last / max(1, count - 1)) for i in range(count)])
        steps.append(last / (count - 1) if count > 1 else float(n))
    corners = np.array(list(itertools.product(*starts)), dtype=np.int64)
    spread = [np.ptp(_cut(image, corner, size)) for corner in corners]
    corners = corners[np.array(spread) > 0] if max(spread) > 0 else corners[:1]

    def read() -> Iterator[np.ndarray]:
        for some in _blocks(corners, block):
            yield np.stack([_cut(image, corner, size)[None] for corner in some])

    return Instances(corners, {"size": list(size), "step": steps}, read)


def slices(array: np.ndarray, pixels: int, block: int = 64) -> Instances:
    """The axial slices of a volume (X, Y, Z) in RAS orientation, as grey patches of (pixels, pixels), front up.

    Intensities run from the volume's 0.5th to its 99.5th percentile. A slice without any contrast is left out.
    """
    from PIL import Image

    low, high = np.percentile(array, (0.5, 99.5))
    grey = (np.clip((array - low) / max(float(high - low), 1e-12), 0, 1) * 255).astype(np.uint8)
    shown = [z for z in range(grey.shape[2]) if np.ptp(grey[:, :, z]) > 0] or [grey.shape[2] // 2]

    def picture(z: int) -> np.ndarray:
        plane = Image.fromarray(np.ascontiguousarray(grey[::-1, ::-1, z].T))
        return np.asarray(plane.resize((pixels, pixels), Image.Resampling.BILINEAR))[None].repeat(3, axis=0)

    def read() -> Iterator[np.ndarray]:
        for some in _blocks(shown, block):
            yield np.stack([picture(z) for z in some])

    corners = np.array([[0, 0, z] for z in shown], dtype=np.int64)
    return Instances(corners, {"slices": grey.shape[2], "step": [1.0, 1.0, 1.0]}, read)


def _cut(image: np.ndarray, corner: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    piece = image[tuple(slice(int(c), int(c) + n) for c, n in zip(corner, size, strict=True))]
    pad = [(0, n - got) for n, got in zip(size, piece.shape, strict=True)]
    return np.pad(piece, pad, mode="edge").astype(np.float32)


def table_of(bags: list[tuple[Bag, Path]]) -> list[dict[str, str]]:
    """Rows of a `bags.csv` whose paths are these files."""
    return [{"bag_id": b.id, "path": path.as_posix(), "label": b.label or "", "group": b.group} for b, path in bags]
