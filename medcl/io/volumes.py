"""One reader per format behind one function.

Whatever the format, a volume is an array in the file's own axis order and a 4x4 matrix from voxel index to RAS+ world
coordinates in mm (nibabel's convention). Nothing is resampled here, save DICOM series whose slices do not lie on a
rectangular grid (`medcl.io.series`), and then `notes` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.by_itk import open_by_itk
from medcl.io.by_nibabel import open_by_nibabel
from medcl.io.detached import header_file
from medcl.io.formats import COPY_AGAIN, format_of, one_line_errors
from medcl.io.geometry import Header, Volume, spacing_of
from medcl.io.segmentation import is_segmentation, open_segmentation
from medcl.io.series import open_series
from medcl.io.tiff import open_tiff


def read_header(paths: Sequence[str | Path]) -> Header:
    """Reads everything but the voxels of one image.

    Args:
        paths: the file; of a volume in two files, the header or both, header first; the files of one DICOM series in
            any order; or a DICOM SEG, followed by the files of the series that it outlines.

    Raises:
        MedclError: the file is empty or damaged, is not 3D or 4D, or its geometry is unusable.
    """
    return _open(paths)[0]


def read_volume(paths: Sequence[str | Path], channel: int | None = None) -> Volume:
    """Reads one 3D image.

    Args:
        paths: as of `read_header`.
        channel: which channel or frame of a 4D image; 3D images ignore it.

    Raises:
        MedclError: as `read_header`; or the image is 4D and `channel` does not choose from it.
    """
    header, load = _open(paths)
    where = Path(paths[0])
    if pick_channel(header, channel, where) is None:
        channel = None
    with one_line_errors(where):
        array = load(channel)
    if array.dtype.itemsize > 8:  # long double: nothing downstream takes it
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Volume(array, header.affine, header.notes)


def pick_channel(header: Header, channel: int | None, where: object) -> int | None:
    """The channel to read of an image: None for a 3D one.

    Raises:
        MedclError: the image is 4D and `channel` is None or out of range.
    """
    if len(header.shape) == 3:
        return None
    channels = header.shape[3]
    if channel is None:
        raise MedclError(
            f"4D image with {channels} channels or frames", where, "--channel 0 takes the first; or split the file."
        )
    if not 0 <= channel < channels:
        raise MedclError(f"has no channel {channel}", where, f"Choose --channel 0 to {channels - 1}.")
    return channel


def _open(paths: Sequence[str | Path]) -> tuple[Header, Any]:
    """The checked header, and a function of the channel that reads the voxels."""
    files = [Path(path) for path in paths]
    if not files:
        raise MedclError("no file given to read")
    first = files[0] = header_file(files[0])
    kind = format_of(first)
    with one_line_errors(first):
        for file in files:
            if file.stat().st_size == 0:
                raise MedclError("the file is empty (0 bytes)", file, COPY_AGAIN)
        if kind == "dicom" and is_segmentation(first):
            header, load = open_segmentation(first, files[1:])
        elif kind == "dicom":
            header, load = open_series(files)
        elif kind in ("nrrd", "meta"):
            header, load = open_by_itk(first)
        elif kind == "tiff":
            header, load = open_tiff(first)
        else:
            header, load = open_by_nibabel(first)
    return replace(header, shape=_check(header, first)), load


def _check(header: Header, where: Path) -> tuple[int, ...]:
    """The usable shape, `(X, Y, Z)` or `(X, Y, Z, channels)`."""
    shape = tuple(int(size) for size in header.shape)
    shape = (*shape[:3], *(size for size in shape[3:] if size > 1))  # a NIfTI vector is (X, Y, Z, 1, channels)
    try:
        kind = np.dtype(header.dtype).kind
    except TypeError:
        kind = "V"
    if kind not in "biuf":
        name = "colour (RGB)" if kind == "V" else f"{header.dtype}"
        raise MedclError(f"holds {name} voxels", where, "Convert it to one number per voxel, or leave it out.")
    if len(shape) > 4:
        raise MedclError(f"has {len(shape)} dimensions", where, "Split it into 3D volumes.")
    if len(shape) < 3 or min(shape[:3]) < 2:
        size = " x ".join(map(str, shape))
        raise MedclError(f"is a 2D image ({size})", where, "medcl reads volumes: join the slices, or leave it out.")
    affine, remedy = header.affine, "Mend the header's affine (sform/qform, direction) from the original scan."
    if not np.isfinite(affine).all():
        raise MedclError("the affine holds NaN or infinite numbers", where, remedy)
    spacing = np.array(spacing_of(affine))
    if (spacing <= 0).any():
        raise MedclError("the voxel spacing is zero along an axis", where, remedy)
    # Divided by the spacing, the determinant is the volume of the cell spanned by unit axes: 0 where two coincide.
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise MedclError("the affine is singular: it flattens the volume", where, remedy)
    return shape
