"""Checks that need voxels, shared by every stage that reads them. Each raises a MedclError with what and remedy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medcl.errors import MedclError
from medcl.io.geometry import Volume, farthest

AFFINE_TOLERANCE = 0.01  # of a voxel, at the corner that moves most
INTEGER_TOLERANCE = 1e-3
LARGEST_LABEL = 65_535  # label maps are kept in one byte a voxel, or in two
LARGEST_VOXEL = float(np.finfo(np.float32).max)


def check_image(array: np.ndarray, where: object = None) -> None:
    """Checks an image's voxels.

    Args:
        array: the image, of any shape.
        where: the file, for the message.

    Raises:
        MedclError: a voxel is NaN, infinite or beyond float32, or all voxels are equal as float32.
    """
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            voxels = "voxel is" if bad == 1 else "voxels are"
            raise MedclError(
                f"{bad} {voxels} NaN or infinite", where,
                "Leave the volume out, replace them (numpy.nan_to_num), or take them as 0 by --nan zero.",
            )
    if array.size == 0:
        raise MedclError("the volume is constant", where, "Export it again, or leave it out.")
    low, high = array.min(), array.max()
    if max(abs(float(low)), abs(float(high))) > LARGEST_VOXEL:
        what = f"voxels from {low:.3g} to {high:.3g} are beyond what float32 holds ({LARGEST_VOXEL:.2g})"
        raise MedclError(what, where, "Divide them by a constant, or leave the volume out.")
    if np.float32(low) == np.float32(high):
        raise MedclError(
            f"the volume is constant: every voxel is {array.flat[0]:g}", where, "Export it again, or leave it out."
        )


def without_nan(volume: Volume) -> Volume:
    """The volume with 0 where voxels are NaN or infinite, and a note of how many there are; itself where none is."""
    finite = np.isfinite(volume.array) if volume.array.dtype.kind == "f" else np.True_
    if finite.all():
        return volume
    note = f"{volume.array.size - np.count_nonzero(finite)} voxels that are NaN or infinite were taken as 0"
    return Volume(np.where(finite, volume.array, 0).astype(volume.array.dtype), volume.affine, (*volume.notes, note))


def check_grid(label: Volume, image: Volume, where: object = None) -> Volume:
    """A label map in its image's axis order.

    Where both lie on one grid but store its axes in another order or direction (an LPS label map of an RAS image), axes
    are permuted and flipped. Nothing is resampled.

    Raises:
        MedclError: the shapes differ, or a corner of the grid lies more than 1 % of a voxel elsewhere.
    """
    resample = "Resample the label map onto the image (nearest neighbour)"
    turned = _turned(label, image)
    if turned.shape != image.shape:
        sizes = [" x ".join(map(str, shape)) for shape in (label.shape, image.shape)]
        raise MedclError(f"the label map is {sizes[0]}, its image {sizes[1]} voxels", where, f"{resample}.")
    moved = farthest(turned.affine, image.affine, image.shape)
    if not moved <= AFFINE_TOLERANCE * min(image.spacing):
        # the image's affine in a map with other axes would mirror or turn it
        copy = ", or copy the image's affine into it where only the header is wrong" if turned is label else ""
        raise MedclError(
            f"the label map's affine differs from its image's: voxels lie up to {moved:.3g} mm apart",
            where,
            f"{resample}{copy}.",
        )
    return Volume(turned.array, image.affine, label.notes)


def _turned(label: Volume, image: Volume) -> Volume:
    """The label map with its axes permuted and flipped to run along the image's; itself where they do, or cannot."""
    from nibabel import orientations as ornt

    if not np.isfinite(label.affine).all():
        return label
    axes = np.linalg.solve(image.affine, label.affine)[:3, :3]  # steps along the label's axes, in voxels of the image
    whole = np.rint(axes)
    permutes = (np.abs(whole).sum(0) == 1).all() and (np.abs(whole).sum(1) == 1).all()
    if not permutes or np.array_equal(whole, np.eye(3)) or np.abs(axes - whole).max() > AFFINE_TOLERANCE:
        return label
    order = ornt.io_orientation(np.block([[whole, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]))
    array = ornt.apply_orientation(label.array, order)
    if array.shape != image.shape:
        return label
    return Volume(array, label.affine @ ornt.inv_ornt_aff(order, label.shape), label.notes)


def check_label_values(array: np.ndarray, where: object = None, names: Mapping[int, str] | None = None) -> None:
    """Checks that a label map holds whole numbers from 0 up, and only those that the data set names.

    Args:
        array: the label map, of any shape.
        where: the file, for the message.
        names: name of every label value; where there are any, other values than these and 0 are refused.

    Raises:
        MedclError: a value is further than 0.001 from a whole number, is not finite, is negative, is above 65,535, or
            has no name.
    """
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise MedclError("the label map holds NaN or infinite values", where, "Write it again as whole numbers.")
        off = np.abs(array - np.rint(array))
        if off.size and off.max() > INTEGER_TOLERANCE:
            value = array.flat[int(off.argmax())]
            remedy = "Resample labels by nearest neighbour, or threshold a probability map."
            raise MedclError(f"the label map holds values that are not integers, such as {value:.4g}", where, remedy)
    if array.size and array.max() > LARGEST_LABEL + INTEGER_TOLERANCE:
        raise MedclError(
            f"the label map holds values above {LARGEST_LABEL:,}, such as {array.max():.0f}", where,
            "Renumber the classes from 1.",
        )  # fmt: skip
    if array.size and array.min() < -INTEGER_TOLERANCE:
        raise MedclError(
            f"the label map holds negative values, such as {array.min():g}", where, "Number the classes from 0."
        )
    strange = sorted(values_of(array) - set(names)) if names else []
    if names and strange:
        shown, more = ", ".join(map(str, strange[:5])), ", ..." if strange[5:] else ""
        known = ", ".join(map(str, sorted(names)[:8])) + (", ..." if len(names) > 8 else "")
        raise MedclError(
            f"the label map holds {shown}{more}, but the data set names {known} only", where,
            "Name every value where the data set names its labels (dataset.json), or correct the label map.",
        )  # fmt: skip


def values_of(array: np.ndarray) -> set[int]:
    """The label values in a checked label map, without 0."""
    return {int(value) for value in np.unique(np.rint(array) if array.dtype.kind == "f" else array)} - {0}


def whole_labels(array: np.ndarray) -> np.ndarray:
    """A checked label map in uint8, or in uint16 where a value needs it; what a writer rounded is exact again."""
    array = np.rint(array) if array.dtype.kind == "f" else array
    return array.astype(np.uint8 if array.max(initial=0) <= np.iinfo(np.uint8).max else np.uint16)


def check_label(
    label: Volume, image: Volume, where: object = None, names: Mapping[int, str] | None = None
) -> Volume:  # fmt: skip
    """Checks a label map against its image: its grid, then its values.

    Returns:
        The label map in its image's axis order, uint8 or uint16.

    Raises:
        MedclError: as `check_grid` and `check_label_values`.
    """
    label = check_grid(label, image, where)
    check_label_values(label.array, where, names)
    return Volume(whole_labels(label.array), label.affine, label.notes)


def labelled_outside(outside: int, labelled: int) -> tuple[str, str]:
    """What to say, and the remedy, where labelled voxels lie outside the body that cropping keeps."""
    return (
        f"{outside} of {labelled} labelled voxels lie outside the body, which volumes are cropped to: training keeps "
        "them, but prediction will not look there",
        "Check that the label map belongs to the image; where it does, crop images around the body yourself.",
    )
