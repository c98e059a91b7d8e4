from __future__ import annotations

import gzip
import itertools
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from volumes import fails, peak, rng_array, rotation, world

from medcl.errors import MedclError
from medcl.io.geometry import Volume, from_canonical, to_canonical
from medcl.io.nifti import write_nifti
from medcl.io.volumes import read_header, read_volume

ORIENTATIONS = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]
SINGLE = (".nii", ".nii.gz", ".nii.bz2", ".mgh", ".mgz", ".nrrd", ".mha")  # suffixes of volumes in one file


def oblique(codes: str = "RAS", degrees: float = 12) -> np.ndarray:
    """An affine with these axis codes, spacing 1 x 1.5 x 2.5 mm, rotated by some degrees."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, code in enumerate(codes):
        axis, sign = next(
            (axis, 1 - 2 * pair.index(code)) for axis, pair in enumerate(("RL", "AP", "SI")) if code in pair
        )
        affine[axis, column] = sign * (1, 1.5, 2.5)[column]
    affine[:3, :3] = rotation(degrees) @ affine[:3, :3]
    affine[:3, 3] = 7, -30, 12
    return affine


# --- canonical orientation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_canonical_keeps_world_coordinates_and_is_undone_exactly(codes):
    array = rng_array()
    array[1, 4, 2] = 9999
    volume = Volume(array, oblique(codes))
    assert volume.orientation == codes
    canonical = to_canonical(volume)
    assert canonical.orientation == "RAS"
    assert np.allclose(world(canonical.affine, peak(canonical.array)), world(volume.affine, (1, 4, 2)))
    assert np.array_equal(from_canonical(canonical.array, volume.affine), array)


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIL", "SPR"])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nhdr"])
def test_itk_formats_agree_with_nifti(tmp_path, suffix, codes):
    array = rng_array()
    write_nifti(tmp_path / "a.nii.gz", array, oblique(codes))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"a{suffix}"))
    theirs, ours = read_volume([tmp_path / "a.nii.gz"]), read_volume([tmp_path / f"a{suffix}"])
    assert np.array_equal(theirs.array, ours.array) and np.array_equal(ours.array, array)
    assert theirs.array.dtype == ours.array.dtype == np.int16
    assert np.allclose(theirs.affine, ours.affine, atol=1e-4)
    header = read_header([tmp_path / f"a{suffix}"])
    assert (header.shape, header.dtype, header.orientation) == ((5, 6, 7), "int16", codes)


def test_a_nrrd_in_ras_space_written_by_hand(tmp_path):
    array = rng_array((2, 3, 4))
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\nendian: little\n"
        "encoding: raw\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + array.tobytes(order="F"))
    volume = read_volume([tmp_path / "a.nrrd"])
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.affine, [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_native_voxel_type_is_kept(tmp_path, dtype):
    array = np.abs(rng_array()).astype(dtype) % 200
    write_nifti(tmp_path / "a.nii", array, np.eye(4))
    volume = read_volume([tmp_path / "a.nii"])
    assert volume.array.dtype == dtype and np.array_equal(volume.array, array)


def test_stored_slope_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(2.5, -7)
    nib.save(image, tmp_path / "a.nii")
    # nibabel rescales on saving, so the slope is written into the file by hand
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([2.5, -7], "<f4").tobytes()
    raw[352:] = np.arange(24, dtype="<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    expected = np.arange(24).reshape((2, 3, 4), order="F") * 2.5 - 7
    assert np.allclose(read_volume([tmp_path / "a.nii"]).array, expected)


def test_big_endian_comes_out_native(tmp_path):
    array = rng_array()
    nib.save(nib.Nifti1Image(array, np.eye(4), nib.Nifti1Header(endianness=">")), tmp_path / "a.nii")
    volume = read_volume([tmp_path / "a.nii"])
    assert volume.array.dtype.isnative and np.array_equal(volume.array, array)


def test_write_keeps_shear_in_the_sform_and_sets_both_codes(tmp_path):
    affine = oblique("LPS")
    affine[0, 2] += 0.7  # shear
    write_nifti(tmp_path / "a.nii.gz", rng_array(), affine)
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.affine, affine, atol=1e-5)
    assert image.header["sform_code"] == 1 and image.header["qform_code"] == 1
    assert image.header.get_xyzt_units()[0] == "mm"


def test_write_refuses_another_suffix_and_leaves_nothing(tmp_path):
    with pytest.raises(MedclError, match=r"\.nii\.gz"):
        write_nifti(tmp_path / "a.mha", rng_array(), np.eye(4))
    assert not list(tmp_path.iterdir())


# --- channels ----------------------------------------------------------------------------------------------------


def test_nifti_4d_needs_a_channel_and_takes_it(tmp_path):
    array = rng_array((4, 5, 6, 3))
    write_nifti(tmp_path / "a.nii.gz", array, np.eye(4))
    assert "--channel 0" in str(fails("4D image with 3", tmp_path / "a.nii.gz"))
    fails("no channel 3", tmp_path / "a.nii.gz", channel=3)
    for channel in range(3):
        assert np.array_equal(read_volume([tmp_path / "a.nii.gz"], channel).array, array[..., channel])


def test_a_last_axis_of_one_is_no_fourth_dimension(tmp_path):
    array = rng_array((4, 5, 6, 1))
    write_nifti(tmp_path / "a.nii.gz", array, np.eye(4))
    assert np.array_equal(read_volume([tmp_path / "a.nii.gz"]).array, array[..., 0])


@pytest.mark.parametrize("vector", [True, False])
def test_itk_4d_and_vector_images_give_the_same_channels(tmp_path, vector):
    arrays = [rng_array(seed=seed) for seed in range(3)]
    images = [sitk.GetImageFromArray(array.transpose(2, 1, 0)) for array in arrays]
    sitk.WriteImage(sitk.Compose(images) if vector else sitk.JoinSeries(images), str(tmp_path / "a.nrrd"))
    fails("4D image with 3", tmp_path / "a.nrrd")
    for channel, array in enumerate(arrays):
        assert np.array_equal(read_volume([tmp_path / "a.nrrd"], channel).array, array)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in (*SINGLE, ".mnc", ".tif", ".dcm")])
def test_zero_byte_file(tmp_path, name):
    (tmp_path / name).touch()
    fails("empty \\(0 bytes\\)", tmp_path / name)


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in (*SINGLE, ".mnc", ".tif", ".dcm")])
def test_garbage_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(random.Random(0).randbytes(5000))
    fails(name, tmp_path / name)


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in SINGLE])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_file(tmp_path, name, part):
    array = rng_array((20, 20, 20))
    if ".nii" in name or ".mg" in name:
        nib.save((nib.Nifti1Image if ".nii" in name else nib.MGHImage)(array, np.eye(4)), tmp_path / name)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
    error = fails(name, tmp_path / name)
    if ".nii" in name or ".mg" in name:
        assert "truncated" in error.what


def test_damaged_gzip(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", rng_array((30, 30, 30)), np.eye(4))
    raw = bytearray((tmp_path / "a.nii.gz").read_bytes())
    raw[len(raw) // 2] ^= 255  # one byte of a stored block: only the checksum can tell
    (tmp_path / "a.nii.gz").write_bytes(raw)
    fails("gzip compression is damaged", tmp_path / "a.nii.gz")


def with_sform(path: Path, rows: np.ndarray) -> Path:
    """Puts a matrix into a NIfTI header that no library would write."""
    write_nifti(path, rng_array(), np.eye(4))
    raw = bytearray(path.read_bytes())
    raw[280:328] = np.asarray(rows, "<f4").tobytes()
    path.write_bytes(raw)
    return path


def test_singular_affine(tmp_path):
    rows = np.eye(4)[:3]
    rows[:, 1] = rows[:, 0]
    fails("singular", with_sform(tmp_path / "a.nii", rows))


def test_zero_spacing(tmp_path):
    fails("spacing is zero", with_sform(tmp_path / "a.nii", np.diag([1.0, 0, 1, 1])[:3]))


def test_affine_with_nan(tmp_path):
    rows = np.eye(4)[:3]
    rows[0, 3] = np.nan
    fails("NaN", with_sform(tmp_path / "a.nii", rows))


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (1, 6, 7)])
def test_2d_image(tmp_path, shape):
    write_nifti(tmp_path / "a.nii", rng_array(shape), np.eye(4))
    fails("2D image", tmp_path / "a.nii")


def test_colour_and_complex_voxels(tmp_path):
    rgb = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    fails("colour", tmp_path / "rgb.nii")
    nib.save(nib.Nifti1Image(rng_array().astype(np.complex64), np.eye(4)), tmp_path / "c.nii")
    fails("complex64", tmp_path / "c.nii")


def test_missing_file_and_missing_raw_data(tmp_path):
    fails("no such file", tmp_path / "a.nii")
    sitk.WriteImage(sitk.GetImageFromArray(rng_array()), str(tmp_path / "a.mhd"))
    (tmp_path / "a.raw").unlink()
    fails("a.mhd", tmp_path / "a.mhd")


def test_not_gzip_despite_its_name(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"hello" * 200))
    fails("a.nii.gz", tmp_path / "a.nii.gz")
