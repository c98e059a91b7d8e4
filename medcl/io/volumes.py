"""One reader per format behind one function.

Whatever the format, a volume is an array in the file's own axis order and a 4x4 matrix from voxel index to RAS+ world
coordinates in mm (nibabel's convention). Nothing is resampled here, save DICOM series whose slices do not lie on a
rectangular grid (`medcl.io.series`), and then `notes` says so.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.formats import COPY_AGAIN, format_of, one_line_errors
from medcl.io.geometry import LPS_TO_RAS, Header, Volume, spacing_of
from medcl.io.series import open_series

_UNITS_IN_MM = {"meter": 1000.0, "micron": 0.001}


def read_header(paths: Sequence[str | Path]) -> Header:
    """Reads everything but the voxels of one image: a single file, or the files of one DICOM series in any order.

    Raises:
        MedclError: the file is empty or damaged, is not 3D or 4D, or its geometry is unusable.
    """
    return _open(paths)[0]


def read_volume(paths: Sequence[str | Path], channel: int | None = None) -> Volume:
    """Reads one 3D image: a single file, or the files of one DICOM series in any order.

    Args:
        paths: the file, or the series' files.
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
    first, kind = files[0], format_of(files[0])
    with one_line_errors(first):
        for file in files:
            if file.stat().st_size == 0:
                raise MedclError("the file is empty (0 bytes)", file, COPY_AGAIN)
        if kind == "dicom":
            header, load = open_series(files)
        elif kind == "nifti":
            header, load = _open_nifti(first)
        else:
            header, load = _open_itk(first)
    return replace(header, shape=_check(header, first)), load


def _check(header: Header, where: Path) -> tuple[int, ...]:
    """The usable shape, `(X, Y, Z)` or `(X, Y, Z, channels)`."""
    shape = tuple(int(size) for size in header.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
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


def _open_nifti(path: Path) -> tuple[Header, Any]:
    import nibabel as nib

    image: Any = nib.load(path, mmap=False)
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise MedclError("is not a NIfTI file", path, COPY_AGAIN)
    affine, notes = np.array(image.affine, np.float64), []
    unit = image.header.get_xyzt_units()[0]
    if unit in _UNITS_IN_MM:
        affine[:3] *= _UNITS_IN_MM[unit]
        notes.append(f"header is in {unit}s: converted to mm")
    if not image.header["sform_code"] and not image.header["qform_code"]:
        notes.append("header holds no orientation (sform and qform codes are 0): left and right are a guess")
    if path.suffix.lower() != ".gz":
        proxy: Any = image.dataobj
        stored = path.stat().st_size - int(proxy.offset)
        needed = int(np.prod(image.shape, dtype=np.int64)) * image.get_data_dtype().itemsize
        if stored < needed:
            raise MedclError(f"is truncated ({stored} of {needed} bytes of voxels)", path, COPY_AGAIN)

    def load(channel: int | None) -> np.ndarray:
        proxy: Any = image.dataobj
        if channel is None and path.suffix.lower() == ".gz":  # read to its end, or gzip's checksum goes unseen
            with gzip.open(path) as stream:
                proxy = type(image).from_bytes(stream.read()).dataobj
        array = np.asanyarray(proxy).reshape(image.shape[:3]) if channel is None else np.asanyarray(proxy[..., channel])
        scaled = array.dtype != image.get_data_dtype()
        return array.astype(np.float32) if scaled and array.dtype == np.float64 else array

    dtype = image.get_data_dtype()
    return Header(image.shape, affine, "rgb" if dtype.fields else str(dtype.newbyteorder("=")), tuple(notes)), load


def _open_itk(path: Path) -> tuple[Header, Any]:
    """NRRD and MetaImage; ITK has turned whatever space the file names into LPS."""
    import SimpleITK as sitk

    sitk.ProcessObject_SetGlobalWarningDisplay(False)  # one line for the user, and it is ours
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, n, components = reader.GetSize(), reader.GetDimension(), reader.GetNumberOfComponents()
    dtype = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in dtype:
        name = "complex"
    elif components == 3 and "8-bit unsigned" in dtype:
        name = "rgb"
    else:
        name = dtype.removeprefix("vector of ").replace("-bit ", " ")
        bits, _, kind = name.partition(" ")
        name = {"unsigned integer": "uint", "signed integer": "int", "float": "float"}.get(kind, "rgb") + bits
    affine = np.eye(4)
    if n >= 3:
        direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
        affine[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
        affine[:3, 3] = reader.GetOrigin()[:3]
    shape = (*size, components) if components > 1 else tuple(size)

    def load(channel: int | None) -> np.ndarray:
        array = sitk.GetArrayFromImage(reader.Execute())
        if channel is not None:  # numpy sees (..., Z, Y, X), and the components of a vector image last
            array = array[..., channel] if components > 1 else array[channel]
        return array.reshape(array.shape[-3:]).transpose(2, 1, 0)

    return Header(shape, LPS_TO_RAS @ affine, name), load
