"""Formats that nibabel reads: NIfTI, Analyze, FreeSurfer's MGH, MINC, Philips' PAR/REC, AFNI."""

from __future__ import annotations

import bz2
import gzip
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.io.detached import PAIRS, volume_files
from medcl.io.formats import COPY_AGAIN, format_of, volume_suffix
from medcl.io.geometry import Header, farthest, orientation_of, spacing_of
from medcl.io.units import converted

_UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".mgz": gzip.open, ".bz2": bz2.open}
_NO_ORIENTATION = "left and right are a guess"
CONFLICT = 0.1  # of the smallest voxel: what sform and qform may differ by, since a qform is rounded


def open_by_nibabel(path: Path) -> tuple[Header, Any]:
    """The header of a file, and a function of the channel that reads its voxels `(X, Y, Z)`.

    Where a NIfTI header has both an sform and a qform and they disagree, the sform counts, as nibabel and the NIfTI
    standard's method 3 have it, and a note says so.

    Raises:
        MedclError: the file is truncated, lacks its file of voxels, or is another kind of file than its name says.
    """
    image = _load(path)
    shape = tuple(image.shape)
    frames_first = format_of(path) == "minc" and len(shape) == 4  # MINC counts time first
    if frames_first:
        shape = (*shape[1:], shape[0])
    affine, notes = _geometry(image, path)
    voxels = Path(image.file_map["image"].filename)
    unpack = _UNPACK.get(voxels.suffix.lower())
    if unpack is None and hasattr(image.dataobj, "offset"):
        _refuse_truncated(image, voxels)
    dtype = image.get_data_dtype()

    def load(channel: int | None) -> np.ndarray:
        proxy: Any = image.dataobj
        if channel is None and unpack and hasattr(image, "from_bytes"):  # read to its end, or checksums go unseen
            with unpack(voxels) as stream:
                proxy = type(image).from_bytes(stream.read()).dataobj
        if channel is None:
            array = np.asanyarray(proxy).reshape(shape[:3])
        elif frames_first:
            array = np.asanyarray(proxy[channel])
        else:
            rest = tuple(channel if size > 1 else 0 for size in shape[3:])
            array = np.asanyarray(proxy[(slice(None),) * 3 + rest])
        scaled = array.dtype != dtype
        return array.astype(np.float32) if scaled and array.dtype == np.float64 else array

    return Header(shape, affine, "rgb" if dtype.fields else str(dtype.newbyteorder("=")), tuple(notes)), load


def _load(path: Path) -> Any:
    import nibabel as nib

    endings = PAIRS.get(volume_suffix(path.name))
    if endings and len(volume_files(path)) < 2:
        stem = path.name[: -len(volume_suffix(path.name))]
        raise MedclError(f"has no file of voxels ({stem}{endings[0]}) beside it", path, COPY_AGAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = nib.load(path, mmap=False)
        except ImportError as error:  # MINC 2 is HDF5
            raise MedclError(f"needs the package {error.name}", path, 'Install it: pip install "medcl[mil]".') from None
    expected: Any = (nib.Nifti1Image, nib.Nifti2Image) if format_of(path) == "nifti" else nib.spatialimages.SpatialImage
    if not isinstance(image, expected):
        raise MedclError(f"is not a {'NIfTI file' if format_of(path) == 'nifti' else 'volume'}", path, COPY_AGAIN)
    return image


def _geometry(image: Any, path: Path) -> tuple[np.ndarray, list[str]]:
    """The matrix from voxel index to RAS+ mm, and what a user should know of it."""
    import nibabel as nib

    affine, notes = np.array(image.affine, np.float64), []
    if isinstance(image, nib.Nifti1Pair):
        unit = _nifti_unit(image.header)
    elif isinstance(image, nib.AnalyzeImage):
        unit = bytes(image.header["vox_units"]).split(b"\0")[0].decode("ascii", "replace").strip() or "mm"
    else:
        unit = "mm"
    scale, note = converted(unit)
    if note:
        affine[:3] *= scale
        notes.append(note)
    if isinstance(image, nib.Nifti1Pair):
        notes += _forms(image, affine, scale)
    elif isinstance(image, nib.AnalyzeImage) and not path.with_suffix(".mat").is_file():
        notes.append(f"Analyze headers hold no orientation: {_NO_ORIENTATION}")
    elif isinstance(image, nib.MGHImage) and not _is_placed(path):
        affine[:3, :3] = [[-1, 0, 0], [0, 0, 1], [0, -1, 0]]  # FreeSurfer's coronal slices; nibabel turns them over
        affine[:3, 3] = -affine[:3, :3] @ np.array(image.shape[:3]) / 2
        notes.append(f"header holds no geometry (goodRASFlag is 0): 1 mm is supposed, and {_NO_ORIENTATION}")
    elif format_of(path) == "minc" and not all(hasattr(axis, "step") for axis in image.dataobj.minc_file._dims[-3:]):
        notes.append("header holds no spacing along some axis: 1 mm is supposed")
    return affine, notes


def _nifti_unit(header: Any) -> str:
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:
        return f"code {int(header['xyzt_units']) % 8}"
    return "mm" if unit == "unknown" else unit


def _forms(image: Any, affine: np.ndarray, scale: float) -> list[str]:
    """What the header's two matrices, sform and qform, leave open."""
    header = image.header
    if not header["sform_code"] and not header["qform_code"]:
        return [f"header holds no orientation (sform and qform codes are 0): {_NO_ORIENTATION}"]
    if not header["sform_code"] or not header["qform_code"]:
        return []
    try:
        other = np.array(header.get_qform(), np.float64)
    except ValueError:  # a quaternion that is no rotation
        return ["the qform is unusable: the sform is taken"]
    other[:3] *= scale
    moved, finest = farthest(affine, other, (*image.shape, 1, 1)[:3]), min(*spacing_of(affine), *spacing_of(other))
    if not (finest > 0 and moved > CONFLICT * finest):
        return []
    axes, others = orientation_of(affine), orientation_of(other)
    turned = "" if axes == others else f" and point {axes}, not {others}"
    return [f"sform and qform disagree: voxels lie up to {moved:.3g} mm apart{turned}; the sform is taken"]


def _is_placed(path: Path) -> bool:
    """Whether an MGH header says that its geometry is valid; nibabel fills it in where it is not."""
    with _UNPACK.get(path.suffix.lower(), open)(path, "rb") as stream:
        return int.from_bytes(stream.read(30)[28:30], "big", signed=True) != 0


def _refuse_truncated(image: Any, voxels: Path) -> None:
    stored = voxels.stat().st_size - int(image.dataobj.offset)
    needed = int(np.prod(image.shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    if stored < needed:
        raise MedclError(f"is truncated ({stored} of {needed} bytes of voxels)", voxels, COPY_AGAIN)
