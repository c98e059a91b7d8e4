"""Checks that need voxels, shared by `scan` and `prepare`. Each raises a MedclError that names what and remedy."""

from __future__ import annotations

import numpy as np

from medcl.errors import MedclError
from medcl.io.geometry import Volume, farthest

AFFINE_TOLERANCE = 0.01  # of a voxel, at the corner that moves most
INTEGER_TOLERANCE = 1e-3
LARGEST_LABEL = 255  # label maps are kept in a byte


def check_image(array: np.ndarray, where: object = None) -> None:
    """Checks an image's voxels.

    Args:
        array: the image, of any shape.
        where: the file, for the message.

    Raises:
        MedclError: a voxel is NaN or infinite, or all voxels are equal.
    """
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            voxels = "voxel is" if bad == 1 else "voxels are"
            raise MedclError(
                f"{bad} {voxels} NaN or infinite", where, "Replace them (numpy.nan_to_num) or leave the volume out."
            )
    if array.size == 0 or array.min() == array.max():
        value = f": every voxel is {array.flat[0]:g}" if array.size else ""
        raise MedclError(f"the volume is constant{value}", where, "Export it again, or leave it out.")


def check_grid(label: Volume, image: Volume, where: object = None) -> None:
    """Checks that a label map lies on its image's grid.

    Raises:
        MedclError: the shapes differ, or a corner of the grid lies more than 1 % of a voxel elsewhere.
    """
    resample = "Resample the label map onto the image (nearest neighbour)"
    if label.shape != image.shape:
        sizes = [" x ".join(map(str, shape)) for shape in (label.shape, image.shape)]
        raise MedclError(f"the label map is {sizes[0]}, its image {sizes[1]} voxels", where, f"{resample}.")
    moved = farthest(label.affine, image.affine, image.shape)
    if not moved <= AFFINE_TOLERANCE * min(image.spacing):
        raise MedclError(
            f"the label map's affine differs from its image's: voxels lie up to {moved:.3g} mm apart",
            where,
            f"{resample}, or copy the image's affine into it where only the header is wrong.",
        )


def check_label_values(array: np.ndarray, where: object = None) -> None:
    """Checks that a label map holds whole numbers from 0 up.

    Raises:
        MedclError: a value is further than 0.001 from a whole number, is not finite, is negative, or is above 255.
    """
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise MedclError("the label map holds NaN or infinite values", where, "Write it again as whole numbers.")
        off = np.abs(array - np.rint(array))
        if off.size and off.max() > INTEGER_TOLERANCE:
            value = array.flat[int(off.argmax())]
            remedy = "Resample labels by nearest neighbour, or threshold a probability map."
            raise MedclError(f"the label map holds values that are not integers, such as {value:.4g}", where, remedy)
    if array.size and array.max() > LARGEST_LABEL:
        raise MedclError(
            f"the label map holds values above {LARGEST_LABEL}, such as {array.max():g}", where,
            "Renumber the classes from 1.",
        )  # fmt: skip
    if array.size and array.min() < -INTEGER_TOLERANCE:
        raise MedclError(
            f"the label map holds negative values, such as {array.min():g}", where, "Number the classes from 0."
        )


def check_label(label: Volume, image: Volume, where: object = None) -> None:
    """Checks a label map against its image: its grid, then its values.

    Raises:
        MedclError: as `check_grid` and `check_label_values`.
    """
    check_grid(label, image, where)
    check_label_values(label.array, where)
