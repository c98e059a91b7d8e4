from __future__ import annotations

import numpy as np
import pytest

from medcl.dataset.checks import check_image, check_label, check_label_values
from medcl.errors import MedclError
from medcl.io.geometry import Volume

SHAPE = (6, 7, 8)
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1]])


def image() -> Volume:
    return Volume(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), AFFINE)


def label(dtype: type = np.uint8, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Volume:
    return Volume((np.arange(np.prod(shape)) % 3).astype(dtype).reshape(shape), affine)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_ordinary_volumes_pass(dtype):
    check_image(image().array.astype(dtype))
    check_label(label(dtype), image())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_voxel_is_enough(value):
    array = image().array.astype(np.float32)
    array[1, 2, 3] = value
    with pytest.raises(MedclError, match=r"^scan\.nii: 1 voxel is NaN or infinite\. .*nan_to_num"):
        check_image(array, "scan.nii")


def test_constant_volume():
    with pytest.raises(MedclError, match="constant: every voxel is 7"):
        check_image(np.full(SHAPE, 7, np.int16))


def test_label_of_another_shape():
    with pytest.raises(MedclError, match="6 x 7 x 9, its image 6 x 7 x 8"):
        check_label(label(shape=(6, 7, 9)), image())


def test_a_transposed_label_of_equal_size_is_caught_by_its_affine():
    with pytest.raises(MedclError, match="affine differs"):
        check_label(label(affine=AFFINE[:, [1, 0, 2, 3]]), image())


@pytest.mark.parametrize("shift", [0.1, 1.5, -40])
def test_shifted_label_is_told_in_millimetres(shift):
    moved = AFFINE.copy()
    moved[1, 3] += shift
    with pytest.raises(MedclError, match=f"up to {abs(shift):.3g} mm apart"):
        check_label(label(affine=moved), image())


def test_rotation_is_seen_at_the_far_corner():
    moved = AFFINE.copy()
    moved[0, 2] += 0.01  # 7 slices away: 0.07 mm
    with pytest.raises(MedclError, match=r"0\.07 mm"):
        check_label(label(affine=moved), image())


def test_rounding_of_headers_is_let_pass():
    check_label(label(affine=AFFINE.astype(np.float32).astype(float) * (1 + 1e-6)), image())


def test_label_with_nan_affine_is_refused():
    moved = AFFINE.copy()
    moved[0, 0] = np.nan
    with pytest.raises(MedclError, match="affine differs"):
        check_label(label(affine=moved), image())


def test_labels_that_are_not_integers():
    with pytest.raises(MedclError, match=r"not integers, such as 0\.5.*nearest"):
        check_label_values(np.array([0, 1, 0.5, 2]))


def test_labels_rounded_by_a_writer_pass():
    check_label_values(np.array([0, 1.0002, 1.9999], np.float32))


def test_negative_and_nan_labels():
    with pytest.raises(MedclError, match="negative values, such as -1"):
        check_label_values(np.array([0, -1, 2], np.int16))
    with pytest.raises(MedclError, match="NaN"):
        check_label_values(np.array([0, np.nan, 2]))


def test_labels_that_do_not_fit_a_byte_are_refused():
    with pytest.raises(MedclError, match="above 255, such as 500"):
        check_label_values(np.array([0, 500], dtype=np.int16), "label.nii.gz")
