"""Whole-slide images and plain images behind one face, where their tissue is, and how they are cut into tiles.

Slides are read by OpenSlide where it is installed, else by tiffslide. Coordinates are pixels of the finest level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError

SLIDES = (".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".bif", ".qptiff")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
GLASS, PALE = 0.07, 0.15  # saturation: below the one nothing is tissue, above the other everything
THUMBNAIL = 1024  # pixels of the longer side of the image that tissue is looked for on


class Slide:
    """An image of any size that is read piece by piece.

    Attributes:
        path: the file.
        size: width and height of the finest level, pixels.
        mpp: microns per pixel there; None where the file does not say.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise MedclError("no such file", self.path, "Check the path column of the table.")
        try:
            self._open()
        except MedclError:
            raise
        except Exception as error:  # every library raises kinds of its own
            raise MedclError(f"cannot be read ({type(error).__name__})", self.path, "Copy or scan it again.") from None

    def _open(self) -> None:
        self._pixels: np.ndarray | None = None
        self._slide: Any = None
        suffix = self.path.suffix.lower()
        if suffix in IMAGES and not self._is_pyramid():
            from PIL import Image

            Image.MAX_IMAGE_PIXELS = None
            with Image.open(self.path) as image:
                self._pixels = np.asarray(image.convert("RGB"))
            self.size, self.mpp = (self._pixels.shape[1], self._pixels.shape[0]), None
            return
        if suffix not in (*SLIDES, *IMAGES):
            raise MedclError(
                f"is no slide or image ({suffix or 'no ending'})", self.path, "Known: " + ", ".join(SLIDES)
            )
        self._slide = _slide_library()(str(self.path))
        width, height = self._slide.dimensions
        self.size = (int(width), int(height))
        properties = self._slide.properties
        found = next((properties.get(f"{name}.mpp-x") for name in ("openslide", "tiffslide")
                      if properties.get(f"{name}.mpp-x")), None)  # fmt: skip
        self.mpp = float(found) if found else None

    def _is_pyramid(self) -> bool:
        """Whether a TIFF has levels, and so is a slide."""
        if self.path.suffix.lower() not in (".tif", ".tiff"):
            return False
        from tifffile import TiffFile

        with TiffFile(self.path) as file:
            return len(file.series[0].levels) > 1 or file.pages[0].is_tiled  # type: ignore[union-attr]

    def read(self, x: int, y: int, side: float, pixels: int) -> np.ndarray:
        """A square (pixels, pixels, 3) uint8 whose corner is (x, y) and whose side is `side` finest-level pixels.

        What lies outside is white.
        """
        if self._pixels is not None:
            n = round(side)
            piece = np.full((n, n, 3), 255, dtype=np.uint8)
            part = self._pixels[max(0, y) : y + n, max(0, x) : x + n]
            piece[max(0, -y) : max(0, -y) + part.shape[0], max(0, -x) : max(0, -x) + part.shape[1]] = part
            return _resized(piece, pixels)
        level = self._slide.get_best_level_for_downsample(max(1.0, side / pixels))
        n = max(1, round(side / self._slide.level_downsamples[level]))
        piece = np.asarray(self._slide.read_region((x, y), level, (n, n)).convert("RGB"))
        return _resized(piece, pixels)

    def thumbnail(self, longest: int = THUMBNAIL) -> np.ndarray:
        """The whole image, its longer side at most `longest` pixels, (h, w, 3) uint8."""
        if self._pixels is not None:
            from PIL import Image

            image = Image.fromarray(self._pixels)
            image.thumbnail((longest, longest))
            return np.asarray(image)
        return np.asarray(self._slide.get_thumbnail((longest, longest)).convert("RGB"))


def _slide_library() -> Any:
    try:
        from openslide import OpenSlide

        return OpenSlide
    except ImportError:
        pass
    try:
        from tiffslide import TiffSlide

        return TiffSlide
    except ImportError:
        raise MedclError("slides need OpenSlide or tiffslide", remedy="pip install 'medcl[mil]'.") from None


def _resized(piece: np.ndarray, pixels: int) -> np.ndarray:
    if piece.shape[:2] == (pixels, pixels):
        return piece
    from PIL import Image

    return np.asarray(Image.fromarray(piece).resize((pixels, pixels), Image.Resampling.BILINEAR, reducing_gap=2.0))


def tissue_mask(thumbnail: np.ndarray) -> np.ndarray:
    """Where tissue is: saturation above Otsu's threshold, within bounds; small specks and holes removed.

    A picture full of tissue has no background to tell it from; where the threshold divides less than a clear
    background would, everything counts as tissue.

    Args:
        thumbnail: (h, w, 3) uint8.

    Returns:
        (h, w) bool.
    """
    from skimage.color import rgb2hsv
    from skimage.filters import gaussian, threshold_otsu
    from skimage.morphology import remove_small_holes, remove_small_objects

    saturation = gaussian(rgb2hsv(thumbnail)[..., 1], 1.0)
    if float(saturation.max() - saturation.min()) < 1e-3:
        return np.zeros(saturation.shape, dtype=bool)
    threshold = threshold_otsu(saturation)
    background = saturation[saturation <= threshold]
    # white glass has next to no colour; if what lies below is coloured itself, it is tissue too
    if float(np.median(background)) > GLASS:
        return np.ones(saturation.shape, dtype=bool)
    least = max(4, saturation.size // 5000)
    mask = remove_small_objects(saturation > np.clip(threshold, GLASS, PALE), max_size=least)
    return remove_small_holes(mask, max_size=least)


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Attributes:
        pixels: of a tile's side, as the encoder sees it.
        mpp: microns per pixel of a tile; 0 takes the pixels as they are.
        overlap: share of a tile that it shares with the next.
        tissue: least share of a tile that must be tissue.
    """

    pixels: int = 256
    mpp: float = 0.5
    overlap: float = 0.0
    tissue: float = 0.25


def side_of(slide: Slide, tiling: Tiling, known_mpp: float = 0.0) -> float:
    """Side of a tile in pixels of the finest level.

    Args:
        slide: the image.
        tiling: how to cut it.
        known_mpp: of images that do not say it themselves.

    Raises:
        MedclError: a slide without resolution.
    """
    own = slide.mpp or known_mpp
    if tiling.mpp and own:
        return tiling.pixels * tiling.mpp / own
    if tiling.mpp and slide.path.suffix.lower() in SLIDES:
        raise MedclError(
            "does not say its resolution", slide.path, "Give --slide_mpp, or --mpp 0 to take pixels as they are."
        )
    return float(tiling.pixels)


def tiles(slide: Slide, tiling: Tiling, side: float) -> np.ndarray:
    """Corners (K, 2) of the tiles with enough tissue, in rows from the top, as x and y of the finest level.

    The grid is laid evenly over the image; an image smaller than a tile gives one.
    """
    thumbnail = slide.thumbnail()
    mask = tissue_mask(thumbnail).astype(np.float64)
    ratio = slide.size[0] / thumbnail.shape[1]
    sums = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    step = side * (1 - tiling.overlap)
    corners = []
    for y in _starts(slide.size[1], side, step):
        for x in _starts(slide.size[0], side, step):
            a, b = (min(int(v / ratio), n - 1) for v, n in ((y, mask.shape[0]), (x, mask.shape[1])))
            c, d = (
                min(max(math.ceil((v + side) / ratio), low + 1), n)
                for v, low, n in ((y, a, mask.shape[0]), (x, b, mask.shape[1]))
            )
            share = (sums[c, d] - sums[a, d] - sums[c, b] + sums[a, b]) / ((c - a) * (d - b))
            if share >= tiling.tissue:
                corners.append((x, y))
    return np.array(corners, dtype=np.int64).reshape(-1, 2)


def _starts(extent: int, side: float, step: float) -> Sequence[int]:
    if extent <= side:
        return [round((extent - side) / 2)]
    count = int((extent - side) // step) + 1
    rest = extent - side - (count - 1) * step
    return [round(rest / 2 + i * step) for i in range(count)]
