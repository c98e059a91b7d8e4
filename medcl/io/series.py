"""DICOM series: slices put in order, checked for gaps, and brought onto a rectangular grid where they form none.

Distances between slices are always measured along the slice normal, in mm.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.dicom import EXPORT_AGAIN, Slice, read_dataset, read_slices
from medcl.io.formats import one_line_errors
from medcl.io.geometry import LPS_TO_RAS, Header
from medcl.io.units import shown


@dataclass
class Geometry:
    """How a series' slices lie, one list of slices per channel.

    Attributes:
        channels: slices in order along the normal; several lists where every position was measured several times.
        affine: voxel to LPS mm of the grid that `read` fills.
        shape: `(X, Y, Z)` of that grid.
        offsets: `(slices, 2)` each slice's in-plane shift on the grid, in voxels; all 0 unless sheared.
        heights: `(slices,)` each slice's place along the grid's third axis, in voxels; 0, 1, 2, … unless uneven.
    """

    channels: list[list[Slice]]
    affine: np.ndarray
    shape: tuple[int, int, int]
    offsets: np.ndarray
    heights: np.ndarray
    notes: tuple[str, ...]


def arrange(slices: Sequence[Slice]) -> Geometry:
    """Orders the slices of one series and works out its grid.

    Raises:
        MedclError: slices are missing or repeated, or do not belong together.
    """
    first = slices[0]
    folder = first.path.parent
    for one in slices:
        if one.reason:
            raise MedclError(f"the series {one.reason}", one.path, "Leave it out.")
    if len(slices) < 2:
        raise MedclError("is a 2D image (a series with a single slice)", first.path, EXPORT_AGAIN)
    axes = np.array([one.axes for one in slices])
    # Tolerances in mm are for what scanners round; they are tighter where voxels are finer than 0.1 mm.
    pitches = np.array([one.pitch for one in slices])
    if len({one.size for one in slices}) > 1 or np.ptp(pitches, axis=0).max() > min(1e-3, 0.01 * pitches.min()):
        raise MedclError("the slices differ in size or pixel spacing", folder, "Split the series by size.")
    if np.ptp(axes, axis=0).max() > 1e-2:
        raise MedclError("the slices point in different directions", folder, "Split the series by orientation.")
    row, column = axes[0, :3], axes[0, 3:]
    normal = np.cross(row, column)
    if not np.isfinite(axes).all() or abs(np.linalg.norm(normal) - 1) > 1e-2 or min(first.pitch) <= 0:
        raise MedclError("the slice orientation or pixel spacing is unusable", first.path, EXPORT_AGAIN)

    channels = _by_position(slices, normal, folder)
    stack = channels[0]
    positions = np.array([one.position for one in stack])
    along = (positions - positions[0]) @ normal
    _refuse_missing(stack, positions @ normal, folder)

    notes = []
    count, gaps = len(stack), np.diff(along)
    direction = (positions[-1] - positions[0]) / (count - 1)
    heights = np.arange(count, dtype=float)
    step, start = np.polyfit(heights, along, 1)
    rounding = 0.06 if step > 0.1 else 0.0  # positions are often rounded to 0.1 mm
    if np.abs(along - start - step * heights).max() > max(0.1 * step, rounding):
        step = float(np.median(gaps))
        least, most, every = (shown(mm, 2) for mm in (gaps.min(), gaps.max(), step))
        notes.append(f"slice distances {least} to {most} mm: resampled to every {every} mm")
        heights = along / step
        direction = (positions[-1] - positions[0]) / heights[-1]

    shift = positions - positions[0]
    offsets = np.stack([shift @ row / first.pitch[0], shift @ column / first.pitch[1]], axis=1)
    columns, rows = first.size
    origin = positions[0]
    if np.abs(offsets).max() > 0.5:
        angle = np.degrees(np.arccos(min(1.0, abs(direction @ normal) / np.linalg.norm(direction))))
        cause = "gantry tilt" if first.modality == "CT" else "slice stack slanted"
        notes.append(f"{cause} of {angle:.1f} degrees: sheared slices resampled onto an upright grid")
        low = np.floor(offsets.min(axis=0) + 1e-6)
        columns, rows = (np.array(first.size) + np.ceil(offsets.max(axis=0) - 1e-6) - low).astype(int)
        origin = origin + row * low[0] * first.pitch[0] + column * low[1] * first.pitch[1]
        offsets, direction = offsets - low, normal * step
    else:  # under half a voxel over the whole stack: the affine holds it exactly
        offsets = np.zeros_like(offsets)

    affine = np.eye(4)
    affine[:3] = np.stack([row * first.pitch[0], column * first.pitch[1], direction, origin], axis=1)
    depth = int(np.floor(heights[-1] + 1e-3)) + 1
    return Geometry(channels, affine, (int(columns), int(rows), depth), offsets, heights, tuple(notes))


def _by_position(slices: Sequence[Slice], normal: np.ndarray, folder: Path) -> list[list[Slice]]:
    """Slices in order along the normal: one list, or one per channel where every position occurs equally often."""
    twice = [uid for uid, times in Counter((one.instance, one.frame) for one in slices).items() if times > 1 and uid[0]]
    ordered = sorted(slices, key=lambda one: (float(np.dot(one.position, normal)), one.number or 0, str(one.path)))
    groups: list[list[Slice]] = []
    near = min(0.01, 0.1 * min(ordered[0].pitch))  # mm
    for one in ordered:
        if groups and np.dot(np.subtract(one.position, groups[-1][0].position), normal) < near:
            groups[-1].append(one)
        else:
            groups.append([one])
    repeated = [group for group in groups if len(group) > 1]
    if not repeated:
        return [ordered]
    if len(groups) > 1 and not twice and len({len(group) for group in groups}) == 1:
        return [list(channel) for channel in zip(*groups, strict=True)]
    names = ", ".join(one.path.name for one in repeated[0][:4])
    more = f" (and at {len(repeated) - 1} more positions)" if len(repeated) > 1 else ""
    raise MedclError(f"slices are repeated: {names} lie at one place{more}", folder, "Keep one file of each slice.")


def _refuse_missing(stack: Sequence[Slice], heights: np.ndarray, folder: Path) -> None:
    """Refuses a stack with a hole.

    A hole is a gap of k normal steps where the numbering also jumps by k, or a lone gap of a whole number of steps
    amid regular ones. Blocks of different slice distance, which scanners do produce, are neither.
    """
    gaps = np.diff(heights)
    jumps = np.ones(len(gaps))
    numbers = [one.number for one in stack]
    if None not in numbers:
        steps = np.diff(np.array(numbers, float))
        stride = np.median(steps)
        if stride and (steps / stride > 0).all() and np.allclose(steps / stride, np.rint(steps / stride)):
            jumps = steps / stride
    for index, gap in enumerate(gaps):
        beside = [other for other in (index - 1, index + 1) if 0 <= other < len(gaps)]
        local = [gaps[other] / jumps[other] for other in beside]
        numbered = jumps[index] > 1 and any(abs(gap / jumps[index] / one - 1) < 0.1 for one in local)
        ratio = gap / max(local, default=gap)
        alone = ratio > 1.5 and abs(ratio - round(ratio)) < 0.1
        if numbered or alone:
            ends = f"between {shown(heights[index], 1)} and {shown(heights[index + 1], 1)} mm"
            step = gap / (jumps[index] if numbered else round(ratio))
            what = f"slices missing {ends} (after {stack[index].path.name}); expected one every {step:.3g} mm"
            raise MedclError(what, folder, EXPORT_AGAIN)


def open_series(paths: Sequence[Path]) -> tuple[Header, Any]:
    """The header of a series, and a function of the channel that reads its voxels `(X, Y, Z)`.

    Raises:
        MedclError: as `read_slices` and `arrange`.
    """
    slices, note = without_copies([one for path in paths for one in read_slices(path)])
    if len({one.series for one in slices}) > 1:
        raise MedclError("the files belong to several DICOM series", Path(paths[0]).parent, "Read one at a time.")
    geometry = arrange(slices)
    geometry.notes += (note,) if note else ()
    return header_of(geometry), lambda channel: _read(geometry, channel or 0)


def without_copies(slices: Sequence[Slice]) -> tuple[list[Slice], str]:
    """Each slice once, and the note to tell of files that are passed over.

    A copy has the SOPInstanceUID of another slice and every other tag that counts as well, whatever its file's name.
    """
    kept: dict[object, Slice] = {}
    for one in slices:
        kept.setdefault(replace(one, path=Path()) if one.instance else one.path, one)
    copies = {one.path for one in slices} - {one.path for one in kept.values()}
    files = "file is a copy" if len(copies) == 1 else "files are copies"
    note = f"{len(copies)} {files} of other slices (equal SOPInstanceUID) and passed over" if copies else ""
    return list(kept.values()), note


def header_of(geometry: Geometry) -> Header:
    """The header of the grid that the slices of a series are read onto."""
    first, count = geometry.channels[0][0], len(geometry.channels)
    shape = (*geometry.shape, count) if count > 1 else geometry.shape
    return Header(shape, LPS_TO_RAS @ geometry.affine, first.dtype, geometry.notes, first.modality)


def _read(geometry: Geometry, channel: int) -> np.ndarray:
    """Reads the slices of one channel onto the geometry's grid."""
    stack = geometry.channels[channel]
    frames: dict[Path, np.ndarray] = {}
    planes = []
    for one in stack:
        if one.path not in frames:
            with one_line_errors(one.path):
                frames = {one.path: _pixels(one)}  # only the file at hand: a series may have thousands
        planes.append(frames[one.path][one.frame].T)
    array = np.stack(planes, axis=2)
    whole = array.dtype.kind in "iu"
    sheared, uneven = (
        geometry.offsets.any(),
        array.shape[2] != geometry.shape[2] or (np.abs(geometry.heights - np.arange(len(stack))).max() > 0.1),
    )
    if not sheared and not uneven:
        return array
    lowest = float(array.min())  # air in CT, background in MR
    canvas = np.full((*geometry.shape[:2], len(stack)), lowest, np.float32)
    for index, offset in enumerate(geometry.offsets):
        canvas[..., index] = _shift(array[..., index], offset, geometry.shape[:2], lowest)
    if uneven:
        grid = np.clip(np.arange(geometry.shape[2]), 0, geometry.heights[-1])
        upper = np.clip(np.searchsorted(geometry.heights, grid, side="right"), 1, len(stack) - 1)
        below, above = geometry.heights[upper - 1], geometry.heights[upper]
        weight = ((grid - below) / (above - below)).astype(np.float32)
        canvas = canvas[..., upper - 1] * (1 - weight) + canvas[..., upper] * weight
    return np.rint(canvas).astype(array.dtype) if whole else canvas


def _shift(plane: np.ndarray, offset: np.ndarray, size: tuple[int, ...], outside: float) -> np.ndarray:
    """The plane placed at a fractional offset (voxels) on a larger one, linearly interpolated along each axis."""
    result = plane.astype(np.float32) - outside
    for axis in (0, 1):
        start = int(np.floor(offset[axis]))
        rest = offset[axis] - start
        room = [(0, 0), (0, 0)]
        room[axis] = (start, max(0, size[axis] - start - result.shape[axis]))
        placed = np.pad(result, room)
        result = placed if not rest else placed * (1 - rest) + np.roll(placed, 1, axis) * rest
        result = result[: size[0]] if axis == 0 else result[:, : size[1]]
    return result + outside


def _pixels(one: Slice) -> np.ndarray:
    """The frames `(frames, rows, columns)` of one file in HU or the modality's own units."""
    slope, intercept = one.slope, one.intercept
    data = read_dataset(one.path)
    try:
        pixels = data.pixel_array
    except Exception:  # pydicom raises a kind for every missing decoder; ITK brings decoders of its own
        if not data.file_meta.TransferSyntaxUID.is_compressed:
            raise
        pixels = _decoded_by_itk(one.path, data)  # which applies the rescale itself
        slope, intercept = 1.0, 0.0
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    if slope == int(slope) and intercept == int(intercept) and pixels.dtype.kind in "iu":
        whole = pixels.astype(np.int32) * int(slope) + int(intercept)
        fits = np.iinfo(np.int16).min <= whole.min() and whole.max() <= np.iinfo(np.int16).max
        return whole.astype(np.int16) if fits else whole
    return (pixels * slope + intercept).astype(np.float32)


def _decoded_by_itk(path: Path, data: Any) -> np.ndarray:
    import SimpleITK as sitk

    if path.suffix.lower() != ".gz":
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    with tempfile.TemporaryDirectory() as folder:  # ITK reads no packed file
        data.save_as(Path(folder) / "one.dcm", enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(Path(folder) / "one.dcm")))
