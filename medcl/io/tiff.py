"""TIFF stacks, as microscopes and ImageJ write them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from medcl.errors import MedclError
from medcl.io.formats import COPY_AGAIN
from medcl.io.geometry import LPS_TO_RAS, Header
from medcl.io.units import converted, in_mm

_DEPTH = "ZIQ"  # tifffile's axes that may be the third: slices, or pages of no known meaning
_GUESS = "TIFF holds no orientation: left and right are a guess"


def open_tiff(path: Path) -> tuple[Header, Any]:
    """The header of a file's first image series, and a function of the channel that reads its voxels `(X, Y, Z)`.

    Spacing is taken from OME or ImageJ metadata; along an axis where neither says it, it is 1 mm, and a note says so.
    A TIFF has no orientation: x is taken to run to the left and y to the back, as ITK does.

    Raises:
        MedclError: tifffile is missing, or the file holds no volume.
    """
    try:
        import tifffile
    except ImportError:
        raise MedclError("needs the package tifffile", path, "Install it: pip install tifffile.") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # one line for the user, and it is ours
    with tifffile.TiffFile(path) as file:
        if not file.series:
            raise MedclError("holds no image", path, COPY_AGAIN)
        series = file.series[0]
        notes = [_GUESS]
        if len(file.series) > 1:
            notes.append(f"holds {len(file.series)} image series: the first is taken")
        if "S" in series.axes:
            raise MedclError("holds colour voxels", path, "Convert it to one number per voxel, or leave it out.")
        order = _order(series.axes, path)
        shape = tuple(int(series.shape[index]) for index in order)
        spacing, told = _spacing(file)
        dtype = str(series.dtype)
    affine = LPS_TO_RAS @ np.diag([*spacing, 1.0])

    def load(channel: int | None) -> np.ndarray:
        with tifffile.TiffFile(path) as file:
            array = file.series[0].asarray().transpose(order)
        return array.reshape(*shape[:3], -1)[..., channel or 0]

    return Header(shape, affine, dtype, (*notes, *told)), load


def _order(axes: str, path: Path) -> list[int]:
    """The order in which tifffile's axes are X, Y, Z and all others."""
    depth = next((axis for axis in _DEPTH if axis in axes), None)
    if depth is None:
        named = f"axes {', '.join(axes)}"
        raise MedclError(f"holds 2D images ({named})", path, "Save its slices as Z (ImageJ: Image > Properties).")
    first = [axes.index(axis) for axis in ("X", "Y", depth)]
    return first + [index for index in range(len(axes)) if index not in first]


def _spacing(file: Any) -> tuple[list[float], list[str]]:
    """mm along X, Y and Z, and what was supposed or converted."""
    found = _ome(file.ome_metadata) if file.is_ome else _imagej(file) if file.is_imagej else {}
    spacing, notes = [], []
    for axis in "XYZ":
        value, unit = found.get(axis, (0.0, "mm"))
        scale, note = converted(unit)
        known = value > 0 and np.isfinite(value)
        spacing.append(value * scale if known else 1.0)
        notes += [note] if known and note and note not in notes else []
    missing = "".join(axis for axis in "XYZ" if not found.get(axis, (0.0, ""))[0] > 0)
    if missing:
        notes.append(f"holds no spacing along {', '.join(missing)}: 1 mm is supposed")
    return spacing, notes


def _ome(xml: str) -> dict[str, tuple[float, str]]:
    """`PhysicalSizeX` and its unit, which is the micrometre where none is named (OME schema)."""
    pixels = next(node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("Pixels"))
    return {
        axis: (float(pixels.attrib[f"PhysicalSize{axis}"]), pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XYZ"
        if f"PhysicalSize{axis}" in pixels.attrib
    }


def _imagej(file: Any) -> dict[str, tuple[float, str]]:
    """ImageJ's unit, the slice distance in it, and pixels a unit in the resolution tags."""
    said: Mapping[str, Any] = file.imagej_metadata or {}
    unit = str(said.get("unit", "")).replace("\\u00B5", "µ")
    if in_mm(unit) is None:  # `pixel`, or nothing
        return {}
    found = {}
    for axis in "XY":
        tag = file.pages[0].tags.get(f"{axis}Resolution")
        if tag is not None and tag.value[0]:
            found[axis] = (tag.value[1] / tag.value[0], unit)
    return {**found, "Z": (float(said.get("spacing", 1.0)), unit)}  # ImageJ leaves a distance of 1 out
