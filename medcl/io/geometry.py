"""A volume or its header in memory, and the way to canonical axes and back.

Whatever the file's format, geometry is a 4x4 matrix from voxel index to RAS+ world coordinates in mm (nibabel's
convention), and arrays keep the file's own axis order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Placed:
    """What lies in the world by a 4x4 matrix, `affine`, from voxel index to RAS+ mm."""

    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm between voxels along each array axis."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """nibabel's axis codes, such as `RAS`."""
        return orientation_of(self.affine)


@dataclass
class Volume(Placed):
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
    def shape(self) -> tuple[int, ...]:
        """Voxels along each array axis."""
        return tuple(self.array.shape)


@dataclass
class Header(Placed):
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

    def blank(self) -> Volume:
        """A volume of this grid that takes no memory."""
        return Volume(np.broadcast_to(np.uint8(0), self.shape[:3]), self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """mm between voxels along each array axis: the lengths of the matrix's columns."""
    return tuple(float(length) for length in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0))


def orientation_of(affine: np.ndarray) -> str:
    """nibabel's axis codes, such as `RAS`, of a matrix from voxel index to RAS+ mm."""
    import nibabel as nib

    return "".join(nib.aff2axcodes(affine))


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
