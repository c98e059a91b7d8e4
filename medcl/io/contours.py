"""DICOM RTSTRUCT objects: closed contours, drawn on the grid of the series that they outline (DICOM PS3.3, C.8.8.6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.dicom import read_dataset, read_slices
from medcl.io.formats import one_line_errors
from medcl.io.geometry import Header, Volume
from medcl.io.segmentation import outlined_grid
from medcl.io.series import Geometry, header_of
from medcl.io.units import shown

CONVERT = "Convert it to NIfTI masks (plastimatch convert) and name those that count as `label:NAME` in a table."
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_TAGS = ["StructureSetROISequence", "RTROIObservationsSequence", "ROIContourSequence"]
_FLAT = 0.2  # of a slice distance: how far the points of a slice's contours may lie apart along the normal
_NEAREST = 0.49  # of a slice distance: a contour farther from its slice is as near to the next one
_TOLD = 0.1  # of a slice distance: a contour farther from its slice is told


def is_structure_set(path: str | Path) -> bool:
    """Whether a DICOM file is an RTSTRUCT object.

    Raises:
        MedclError: the file is not there, is empty or is not DICOM.
    """
    with one_line_errors(Path(path)):
        return read_slices(path)[0].kind == "RTSTRUCT"


def spelled_alike(name: str) -> str:
    """A structure's name by which it is found in other objects: upper and lower case are one."""
    return name.strip().casefold()


def structure_names(path: str | Path) -> list[str]:
    """Names of the structures that have closed contours, each once, in the order in which they are drawn.

    Raises:
        MedclError: the object is damaged.
    """
    with one_line_errors(Path(path)):
        rois, _ = _rois(read_dataset(path, stop_before_pixels=True, specific_tags=list(_TAGS)))
    found: dict[str, str] = {}
    for name, _ in rois:
        found.setdefault(spelled_alike(name), name)
    return list(found.values())


@dataclass
class Structures:
    """The contours of an RTSTRUCT object on the slices of its series.

    Attributes:
        path: the object.
        header: of the series' grid.
        rois: name of every ROI, and its polygons by slice, `(points, 2)` in pixels, centres at whole numbers.
    """

    path: Path
    header: Header
    rois: list[tuple[str, dict[int, list[np.ndarray]]]]

    def draw(self, values: Mapping[str, int]) -> Volume:
        """The label map: a voxel belongs to an ROI whose contours on its slice enclose the voxel's centre.

        Where contours of one ROI lie inside each other, the even-odd rule holds: an inner contour is a hole. A centre
        on a contour belongs to one side only, so that structures that touch share no voxel. A voxel of several
        structures takes the last by name; body outlines (type EXTERNAL) lie below all others. `notes` counts these.

        Args:
            values: the label value of every structure's name.

        Raises:
            MedclError: a name has no value, or a structure lies wholly below others.
        """
        value_of = {spelled_alike(name): value for name, value in values.items()}
        strange = [name for name, _ in self.rois if spelled_alike(name) not in value_of]
        if strange:
            raise MedclError(f"structure {strange[0]!r} has no label value", self.path, "Scan the folder again.")
        label = np.zeros(self.header.shape, np.uint8 if max(value_of.values()) < 256 else np.uint16, order="F")
        left = np.zeros(max(value_of.values()) + 1, int)  # voxels that a value has after all that was drawn
        drawn, shared = left.copy(), 0
        for name, slices in self.rois:
            value = value_of[spelled_alike(name)]
            for index, polygons in slices.items():
                plane = label[..., index]
                inside = enclosed(polygons, plane.shape) & (plane != value)
                below = plane[inside]
                shared += np.count_nonzero(below)
                left -= np.bincount(below, minlength=len(left))
                left[value] += len(below)
                drawn[value] += len(below)
                plane[inside] = value
        names = {value_of[spelled_alike(name)]: name for name, _ in self.rois}
        covered = [name for value, name in names.items() if drawn[value] and not left[value]]
        if covered:
            what = f"structures lie wholly below others, which come after them by name: {', '.join(covered)}"
            raise MedclError(what, self.path, CONVERT)
        notes, small = [], [name for value, name in names.items() if not drawn[value]]
        if shared:
            notes.append(f"structures overlap in {shared} voxels: each takes the last by name (EXTERNAL gives way)")
        if small:
            notes.append(f"structures that enclose no voxel's centre: {', '.join(small)}")
        return Volume(label, self.header.affine, (*self.header.notes, *notes))


def open_structures(path: Path, series: Sequence[Path]) -> Structures:
    """Reads the contours of an RTSTRUCT object and places them on the slices of a series.

    Args:
        path: the RTSTRUCT object.
        series: the files of the series that it outlines.

    Raises:
        MedclError: the object is damaged or holds no closed contours; its contours do not lie on slices of the
            series; or the series is no rectangular grid of slices.
    """
    with one_line_errors(path):
        geometry = outlined_grid(series, path, CONVERT)
        data = read_dataset(path, stop_before_pixels=True)
        found, open_ones = _rois(data)
        if not found:
            raise MedclError("holds no closed contours", path, "Leave it out.")
        rois, notes = _placed(found, geometry, path)
        if open_ones:
            notes.append(f"contours that are not closed are left out: {', '.join(open_ones)}")
        if geometry.channels[0][0].series not in read_slices(path)[0].refers:
            notes.append("the RTSTRUCT object names another series than the one that it is drawn on")
        return Structures(path, Header(geometry.shape, header_of(geometry).affine, "uint16", tuple(notes)), rois)


def _rois(data: Any) -> tuple[list[tuple[str, list[Any]]], list[str]]:
    """Name and closed contours of every ROI that has any, in drawing order; and the ROIs with contours of other types.

    Drawn first are body outlines, which hold all others, then ROIs by name.
    """
    names = {int(roi.ROINumber): str(roi.get("ROIName") or "").strip() for roi in data.get(_TAGS[0]) or ()}
    observed = {int(one.ReferencedROINumber): one.get("RTROIInterpretedType") for one in data.get(_TAGS[1]) or ()}
    rois, others = [], []
    for roi in data.get(_TAGS[2]) or ():
        number = int(roi.ReferencedROINumber)
        name = names.get(number) or f"ROI {number}"
        contours = list(roi.get("ContourSequence") or ())
        closed = [one for one in contours if one.get("ContourGeometricType") in _CLOSED]
        types = {str(one.get("ContourGeometricType") or "no type") for one in contours} - set(_CLOSED)
        if closed:
            rois.append((observed.get(number) != "EXTERNAL", spelled_alike(name), name, closed))
        if types:
            others.append(f"{name} ({', '.join(sorted(types))})")
    rois.sort(key=lambda roi: roi[:2])
    return [(name, closed) for _, _, name, closed in rois], others


def _placed(
    rois: Sequence[tuple[str, list[Any]]], geometry: Geometry, path: Path
) -> tuple[list[tuple[str, dict[int, list[np.ndarray]]]], list[str]]:
    """The polygons of every ROI by slice, and notes.

    Raises:
        MedclError: a contour does not lie on a slice.
    """
    to_voxels = np.linalg.inv(geometry.affine)
    last = np.array(geometry.shape) - 1
    placed, farthest, outside = [], 0.0, []
    for name, contours in rois:
        slices: dict[int, list[np.ndarray]] = defaultdict(list)
        planes: dict[int, float] = {}
        for contour in contours:
            points = _points(contour) @ to_voxels[:3, :3].T + to_voxels[:3, 3]
            heights = points[:, 2]
            if np.ptp(heights) > _FLAT:
                raise MedclError(f"contours of {name!r} are not parallel to the slices", path, CONVERT)
            index = int(np.floor(heights.mean() + 0.5))
            if not 0 <= index <= last[2] or abs(heights.mean() - index) > _NEAREST:
                raise MedclError(f"contours of {name!r} do not lie on slices of the series", path, CONVERT)
            if abs(planes.setdefault(index, heights.mean()) - heights.mean()) > _FLAT:
                raise MedclError(f"contours of {name!r} lie closer together than the slices", path, CONVERT)
            farthest = max(farthest, abs(heights.mean() - index))
            if (points[:, :2] < -0.5).any() or (points[:, :2] > last[:2] + 0.5).any():
                outside.append(name)
            slices[index].append(points[:, :2].round(4))  # so that rounding in the matrix moves no voxel
        placed.append((name, dict(slices)))
    notes = []
    if farthest > _TOLD:
        step = float(np.linalg.norm(geometry.affine[:3, 2]))
        notes.append(f"contours lie up to {shown(farthest * step, 2)} mm off their slices: drawn on the nearest")
    if outside:
        notes.append(f"contours leave the image and are cut off there: {', '.join(dict.fromkeys(outside))}")
    return placed, notes


def _points(contour: Any) -> np.ndarray:
    """The points `(points, 3)` of a contour, LPS mm."""
    numbers = contour.get_item("ContourData").value
    if isinstance(numbers, bytes):  # pydicom takes twenty times as long to convert them
        numbers = [float(number) for number in numbers.strip(b" \0").split(b"\\")]
    return np.array(numbers, float).reshape(-1, 3)


def enclosed(polygons: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels whose centres lie inside an odd number of polygons (even-odd rule).

    The crossings of every row of centres with the edges are marked; between an odd crossing and the next is inside.
    Unlike `skimage.draw.polygon`, the time does not grow with area times points (minutes for a body in CT).

    Args:
        polygons: each `(points, 2)` in pixels, centres at whole numbers; closed by an edge from the last to the first.
        shape: `(X, Y)` of the image.
    """
    crossings = np.zeros((shape[0] + 1, shape[1]), int)
    for polygon in polygons:
        (x, y), (next_x, next_y) = polygon.T, np.roll(polygon, -1, axis=0).T
        first = np.clip(np.ceil(np.minimum(y, next_y)), 0, shape[1]).astype(int)
        count = np.clip(np.ceil(np.maximum(y, next_y)), 0, shape[1]).astype(int) - first
        edge = np.repeat(np.arange(len(polygon)), count)  # one entry for every row that an edge crosses
        row = first[edge] + np.arange(len(edge)) - (np.cumsum(count) - count)[edge]
        crossing = x[edge] + (row - y[edge]) * (next_x - x)[edge] / (next_y - y)[edge]
        np.add.at(crossings, (np.clip(np.ceil(crossing), 0, shape[0]).astype(int), row), 1)
    return np.cumsum(crossings[:-1], axis=0) % 2 == 1
