from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from volumes import rotation

from medcl.dataset.checks import check_image, check_label, check_label_values, values_of, whole_labels
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


def test_large_labels_pass_up_to_two_bytes():
    check_label_values(np.array([0, 850, 65_535], dtype=np.uint16))
    with pytest.raises(MedclError, match="above 65,535, such as 65536"):
        check_label_values(np.array([0, 65_536], dtype=np.int32), "label.nii.gz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [0.9999, 1.0001, 1 / 255 * 255])
def test_rounded_labels_are_whole_again(dtype, factor):
    exact = label()
    read = check_label(Volume((exact.array * factor).astype(dtype), AFFINE), image())
    assert read.array.dtype == np.uint8 and np.array_equal(read.array, exact.array)
    assert values_of((exact.array * factor).astype(dtype)) == {1, 2}


@pytest.mark.parametrize("largest,dtype", [(255, np.uint8), (256, np.uint16), (65_535, np.uint16)])
@pytest.mark.parametrize("stored", [np.int32, np.uint16, np.float32])
def test_labels_take_the_smallest_type_that_holds_them(largest, dtype, stored):
    whole = whole_labels(np.array([0, 3, largest], stored))
    assert whole.dtype == dtype and whole.tolist() == [0, 3, largest]


def test_values_without_a_name_are_refused_and_named():
    names = {0: "background", 1: "liver", 2: "spleen"}
    check_label(label(), image(), "l.nii", names)
    with pytest.raises(MedclError, match=r"holds 2, 4, but the data set names 0, 1 only"):
        check_label(Volume(label().array * 2, AFFINE), image(), "l.nii", {0: "background", 1: "liver"})
    check_label_values(np.array([0, 1, 7]), names={})  # a data set that names none


CODES = ["".join(flips) for axes in itertools.permutations(("RL", "AP", "SI")) for flips in itertools.product(*axes)]


@pytest.mark.parametrize("codes", CODES)
def test_a_label_in_any_axis_order_is_brought_to_its_images(codes):
    """nibabel writes the same map with other axes; each of the 48 orders gives the same labels back."""
    marks = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)  # every voxel has a value of its own
    stored = nib.Nifti1Image(marks, AFFINE)
    turned = stored.as_reoriented(nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes)))  # fmt: skip
    assert "".join(nib.aff2axcodes(turned.affine)) == codes
    read = check_label(Volume(np.asarray(turned.dataobj), turned.affine), image())
    assert np.array_equal(read.array, marks) and np.array_equal(read.affine, AFFINE)


def test_a_turned_label_that_lies_elsewhere_is_refused_and_no_affine_is_to_be_copied():
    flip = np.diag([-1.0, 1, 1, 1])
    with pytest.raises(MedclError, match="affine differs") as caught:  # flipped, and not moved to the other end
        check_label(label(affine=AFFINE @ flip), image())
    assert "copy the image's affine" not in str(caught.value)


@pytest.mark.parametrize("degrees", [30, 45, 45.00001, 60])
def test_an_oblique_label_is_turned_by_its_image_and_not_by_the_nearest_axis(degrees):
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.diag([1.0, 2.0, 3.0])
    scan = Volume(image().array, affine)
    swapped = affine[:, [1, 0, 2, 3]]
    read = check_label(Volume(label().array.transpose(1, 0, 2), swapped), scan)
    assert np.array_equal(read.array, label().array)


def test_voxels_beyond_float32_are_refused():
    with pytest.raises(MedclError, match="beyond what float32 holds"):
        check_image(image().array * 1e300)
    with pytest.raises(MedclError, match="constant"):  # the voxels differ, but not as float32
        check_image(1e9 + np.arange(5.0))
