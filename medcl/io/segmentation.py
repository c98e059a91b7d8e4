"""DICOM SEG objects as label maps on the grid of the series that they outline (DICOM PS3.3, C.8.20)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.dicom import SEGMENTATIONS, read_dataset, read_slices
from medcl.io.formats import format_of, one_line_errors
from medcl.io.geometry import Header
from medcl.io.series import Geometry, arrange, header_of, without_copies

NEAR = 0.1  # of a voxel: how far a frame may lie from its slice
_CONVERT = "Convert it to NIfTI (segimage2itkimage of dcmqi) and name it as a label map in a table."


def is_segmentation(path: str | Path) -> bool:
    """Whether a DICOM file is a SEG or an RTSTRUCT and no scan."""
    return read_slices(path)[0].kind in SEGMENTATIONS


def segment_names(path: str | Path) -> dict[int, str]:
    """Number and name of every segment of a SEG object.

    Raises:
        MedclError: the object is damaged.
    """
    with one_line_errors(Path(path)):
        data = read_dataset(path, stop_before_pixels=True, specific_tags=["SegmentSequence"])
        numbered = {int(each.SegmentNumber): each for each in data.get("SegmentSequence") or ()}
        return {number: str(each.get("SegmentLabel") or f"segment {number}") for number, each in numbered.items()}


def open_segmentation(path: Path, series: Sequence[Path]) -> tuple[Header, Any]:
    """The header of a SEG object's label map, and a function that reads it; values are segment numbers, 0 elsewhere.

    Args:
        path: the SEG object; binary, or a label map.
        series: the files of the series that it outlines.

    Raises:
        MedclError: the object is none of these, or its frames do not lie on slices of the series.
    """
    data = read_dataset(path, stop_before_pixels=True)
    kind = str(data.get("SegmentationType", ""))
    if not series or data.get("Modality") != "SEG":
        raise MedclError(f"is a {data.get('Modality')} object, not a scan", path, "Leave it out.")
    if kind not in ("BINARY", "LABELMAP"):
        raise MedclError(f"is a DICOM SEG of type {kind or 'unknown'}, not BINARY", path, _CONVERT)
    geometry = outlined_grid(series, path, _CONVERT)
    places = _places(data, geometry, path)
    header = header_of(geometry)
    largest = max((number for number, _ in places), default=0)
    dtype = np.dtype("uint8" if largest < 256 and kind == "BINARY" else "uint16")

    def load(channel: int | None) -> np.ndarray:
        frames = read_dataset(path).pixel_array.reshape(-1, geometry.shape[1], geometry.shape[0])
        label = np.zeros(geometry.shape, dtype)
        shared = 0
        for frame, (number, index) in zip(frames, places, strict=True):
            inside = frame.T > 0
            shared += int((label[..., index][inside] > 0).sum())
            label[..., index][inside] = number if kind == "BINARY" else frame.T[inside]
        if shared:
            raise MedclError(f"its segments overlap in {shared} voxels", path, _CONVERT)
        return label

    return Header(geometry.shape, header.affine, str(dtype)), load


def outlined_grid(series: Sequence[Path], path: Path, remedy: str) -> Geometry:
    """The grid of a series on which an object's outlines can be placed slice by slice.

    Args:
        series: the files of the series.
        path: the object that outlines it, and `remedy` what to do about the object, for the message.

    Raises:
        MedclError: the image is no DICOM series, or its slices form no grid or are resampled onto one.
    """
    if any(format_of(file) != "dicom" for file in series):
        raise MedclError(f"outlines a DICOM series, and {series[0].name} is none", path, remedy)
    slices, _ = without_copies([one for file in series for one in read_slices(file)])
    geometry = arrange(slices)
    if geometry.offsets.any() or not np.array_equal(geometry.heights, np.arange(geometry.shape[2])):
        what = "outlines a series that is brought onto another grid (tilt, uneven distances)"
        raise MedclError(what, path, remedy)
    return geometry


def _places(data: Any, geometry: Geometry, path: Path) -> list[tuple[int, int]]:
    """Segment number (0 in a label map) and slice of every frame."""
    stack = geometry.channels[0]
    first, positions = stack[0], np.array([one.position for one in stack])
    gap = float(np.linalg.norm(np.diff(positions, axis=0), axis=1).min())
    places = []
    for number, position, axes, pitch in _frames(data):
        distances = np.linalg.norm(positions - position, axis=1)
        index = int(distances.argmin())
        same = (
            (int(data.Columns), int(data.Rows)) == first.size
            and np.allclose(axes, first.axes, atol=1e-3)
            and np.allclose(pitch, first.pitch, rtol=1e-3, atol=0)
            and distances[index] <= NEAR * min(*first.pitch, gap)
        )
        if not same:
            raise MedclError("lies on another grid than the series it outlines", path, _CONVERT)
        places.append((number, index))
    return places


def _frames(data: Any) -> list[tuple[int, np.ndarray, np.ndarray, tuple[float, float]]]:
    """Segment number, position, axes and pitch (LPS mm, as of `dicom.Slice`) of every frame."""
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]

    def of(frame: Any, group: str) -> Any:
        found = next((place[group][0] for place in (frame, shared) if place is not None and group in place), None)
        return found if found is not None else {}

    frames = []
    for frame in data.get("PerFrameFunctionalGroupsSequence") or ():
        spacing = of(frame, "PixelMeasuresSequence").get("PixelSpacing", (0, 0))
        frames.append(
            (
                int(of(frame, "SegmentIdentificationSequence").get("ReferencedSegmentNumber", 0)),
                np.array(of(frame, "PlanePositionSequence").get("ImagePositionPatient", [np.inf] * 3), float),
                np.array(of(frame, "PlaneOrientationSequence").get("ImageOrientationPatient", [0] * 6), float),
                (float(spacing[1]), float(spacing[0])),
            )
        )
    return frames
