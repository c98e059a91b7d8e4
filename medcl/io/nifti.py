"""Writing NIfTI, and reading who made a label map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from medcl.errors import MedclError
from medcl.io.formats import volume_suffix
from medcl.runtime.files import atomic_path

MAKER = "medcl_made_by"
COMMENT = 6  # NIfTI's code of an extension that is plain text


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
        pass  # reported when it is scored
    return "", ""
