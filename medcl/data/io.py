"""One reader per format behind one function.

Whatever the format, a volume is an array in the file's own axis order and a 4x4 matrix from voxel index to RAS+ world
coordinates in mm (nibabel's convention). Nothing is resampled here, save DICOM series whose slices do not lie on a
rectangular grid (`medcl.data.dicom`), and then `notes` says so.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.files import atomic_path

SUFFIXES = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "meta",
    ".mhd": "meta",
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAKER = "medcl_made_by"
COMMENT = 6  # NIfTI's code of an extension that is plain text
_FORMAT_NAMES = {"nifti": "NIfTI", "nrrd": "NRRD", "meta": "MetaImage", "dicom": "DICOM"}
_UNITS_IN_MM = {"meter": 1000.0, "micron": 0.001}
_COPY_AGAIN = "Copy or export it again from its source, or leave it out."


@dataclass
class Volume:
    """A 3D image in memory.

    Attributes:
        array: `(X, Y, Z)` in the file's own axis order and voxel type.
        affine: 4x4 float64 matrix from voxel index to RAS+ world coordinates in mm.
        notes: what was done to read it that a user should know.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm between voxels along each array axis."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """nibabel's axis codes, such as `RAS`."""
        return orientation_of(self.affine)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


@dataclass
class Header:
    """What is known of an image without its voxels.

    Attributes:
        shape: `(X, Y, Z)`, or `(X, Y, Z, channels)`.
        affine: as in `Volume`.
        dtype: numpy's name of the stored voxel type.
        notes: as in `Volume`.
        modality: `MR` or `CT` where the file says so, else `unknown`.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: str
    notes: tuple[str, ...] = ()
    modality: str = "unknown"

    @property
    def spacing(self) -> tuple[float, ...]:
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        return orientation_of(self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """mm between voxels along each array axis: the lengths of the matrix's columns."""
    return tuple(float(length) for length in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0))


def orientation_of(affine: np.ndarray) -> str:
    import nibabel as nib

    return "".join(nib.aff2axcodes(affine))


def volume_suffix(name: str) -> str:
    """The suffix that marks a volume file (`.nii.gz` counts as one), in lower case; empty where there is none."""
    lower = name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(suffix)), "")


def format_of(path: str | Path) -> str:
    """`nifti`, `nrrd` or `meta` by suffix; anything else can only be DICOM."""
    return SUFFIXES.get(volume_suffix(Path(path).name), "dicom")


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
    with told(where):
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
    with told(first):
        for file in files:
            if file.stat().st_size == 0:
                raise MedclError("the file is empty (0 bytes)", file, _COPY_AGAIN)
        if kind == "dicom":
            from medcl.data import series

            header, load = series.open_series(files)
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
        raise MedclError("is not a NIfTI file", path, _COPY_AGAIN)
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
            raise MedclError(f"is truncated ({stored} of {needed} bytes of voxels)", path, _COPY_AGAIN)

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


class told:
    """Turns whatever a reading library raises about a file into one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, MedclError) or not isinstance(error, Exception):
            return
        name, text = _FORMAT_NAMES[format_of(self.path)], str(error)
        if isinstance(error, FileNotFoundError) and not self.path.exists():
            raise MedclError("no such file", self.path) from None
        if isinstance(error, PermissionError):
            raise MedclError("may not be read (permission denied)", self.path, "Mend its permissions.") from None
        if isinstance(error, MemoryError):
            raise MedclError("does not fit in memory", self.path, "Crop or resample it first.") from None
        if isinstance(error, EOFError) or ("Expected" in text and "bytes" in text) or "less than expected" in text:
            raise MedclError("is truncated: the file ends before its voxels do", self.path, _COPY_AGAIN) from None
        if isinstance(error, (zlib.error, gzip.BadGzipFile)):
            raise MedclError("the gzip compression is damaged", self.path, _COPY_AGAIN) from None
        reason = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
        reason = re.sub(r"^ITK ERROR: |\(0x[0-9a-f]+\)", "", reason)
        raise MedclError(f"cannot be read as {name} ({reason[:160].rstrip('.')})", self.path, _COPY_AGAIN) from None


def to_canonical(volume: Volume) -> Volume:
    """The same voxels with axes flipped and permuted to lie closest to R, A, S. Exact: nothing is resampled."""
    from nibabel import orientations as ornt

    to_ras = ornt.io_orientation(volume.affine)
    array = ornt.apply_orientation(volume.array, to_ras)
    return Volume(array, volume.affine @ ornt.inv_ornt_aff(to_ras, volume.array.shape[:3]), volume.notes)


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Undoes `to_canonical` for an array on the canonical grid, such as a predicted label map.

    Args:
        array: `(X, Y, Z)` or `(X, Y, Z, …)` on the canonical grid.
        affine: the *original* volume's affine.

    Returns:
        The array in the original volume's axis order.
    """
    from nibabel import orientations as ornt

    identity = ornt.axcodes2ornt("RAS")
    return ornt.apply_orientation(array, ornt.ornt_transform(identity, ornt.io_orientation(affine)))


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray, maker: tuple[str, str] = ("", "")) -> None:
    """Writes a volume as NIfTI, whole or not at all.

    Both sform and qform are set; where the affine holds shear, which a qform cannot, the sform keeps it.

    Args:
        path: ends in `.nii` or `.nii.gz`.
        array: `(X, Y, Z)`; voxel types that NIfTI or its readers lack are widened (bool to uint8, float16 to float32)
            or, for 64-bit integers, narrowed to int32.
        affine: 4x4 voxel to RAS+ mm.
        maker: run folder that predicted it, and the SHA-256 of its weights; kept as a comment after the header.

    Raises:
        MedclError: the suffix is another one, or the file cannot be written.
    """
    import nibabel as nib

    if volume_suffix(Path(path).name) not in (".nii", ".nii.gz"):
        raise MedclError("is not a NIfTI file name", path, "End it in .nii or .nii.gz.")
    substitute = {"bool": "uint8", "int64": "int32", "uint64": "uint32", "float16": "float32"}.get(str(array.dtype))
    image = nib.Nifti1Image(np.asarray(array, dtype=substitute), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    if maker[0]:
        comment = json.dumps({MAKER: maker}).encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, comment))
    with atomic_path(path) as part:
        nib.save(image, part)


def read_maker(path: str | Path) -> tuple[str, str]:
    """The run folder that predicted a label map and the SHA-256 of its weights: `maker` of `write_nifti`, or empty."""
    import nibabel as nib

    if volume_suffix(Path(path).name) not in (".nii", ".nii.gz"):
        return "", ""
    try:
        for extension in getattr(nib.load(path).header, "extensions", ()):
            text = extension.get_content()
            text = text.decode() if isinstance(text, bytes) else text
            if extension.get_code() == COMMENT and MAKER in text:
                run, weights = json.loads(text.rstrip("\0"))[MAKER]
                return str(run), str(weights)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, nib.filebasedimages.ImageFileError):
        pass  # told when it is scored
    return "", ""
