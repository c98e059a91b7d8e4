from __future__ import annotations

import gzip
import itertools
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import upright, write_series

from medcl.data.io import Volume, from_canonical, read_header, read_volume, to_canonical, write_nifti
from medcl.errors import MedclError

CT_HEAD = Path(__file__).parents[2] / "shared" / "data" / "dicom_ct_head"
ORIENTATIONS = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]


def rng_array(shape: tuple[int, ...] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)


def rotation(degrees: float) -> np.ndarray:
    """An oblique rotation: about z, then about x."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return x @ z


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


def world(affine: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    return (affine @ [*index, 1])[:3]


def peak(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(array.argmax(), array.shape))


def fails(match: str, *paths: Path, channel: int | None = None) -> MedclError:
    with pytest.raises(MedclError, match=match) as caught:
        read_volume(paths, channel)
    assert "\n" not in str(caught.value)
    return caught.value


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


def test_metres_become_millimetres_and_are_told(tmp_path):
    image = nib.Nifti1Image(rng_array(), np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume([tmp_path / "a.nii"])
    assert np.allclose(volume.spacing, (1, 2, 3), atol=1e-5)
    assert "converted to mm" in volume.notes[0]


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


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.dcm"])
def test_zero_byte_file(tmp_path, name):
    (tmp_path / name).touch()
    fails("empty \\(0 bytes\\)", tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.dcm"])
def test_garbage_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(random.Random(0).randbytes(5000))
    fails(name, tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_file(tmp_path, name, part):
    array = rng_array((20, 20, 20))
    if ".nii" in name:
        write_nifti(tmp_path / name, array, np.eye(4))
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
    error = fails(name, tmp_path / name)
    if ".nii" in name:
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


# --- DICOM -------------------------------------------------------------------------------------------------------


def test_dicom_series_with_shuffled_names_is_in_hounsfield_units_and_in_place(tmp_path):
    volume = rng_array((6, 5, 8))
    volume[4, 1, 6] = 3000
    names = [f"{index}.dcm" for index in random.Random(1).sample(range(100), 8)]
    paths = write_series(tmp_path, volume, upright(8), pitch=(0.5, 0.8), names=names)
    read = read_volume(random.Random(2).sample(paths, 8))
    assert np.array_equal(read.array, volume.astype(int) - 1024) and read.array.dtype == np.int16
    assert np.allclose(read.spacing, (0.8, 0.5, 3)) and read.notes == ()
    # LPS (-10 + 4*0.8, -20 + 0.5, 5 + 18), with the first two signs turned
    assert np.allclose(world(read.affine, peak(read.array)), (6.8, 19.5, 23))


def test_dicom_agrees_with_itk(tmp_path):
    axes = np.concatenate([rotation(20)[:, 0], rotation(20)[:, 1]])
    positions = [np.array([3, 4, 5]) + rotation(20)[:, 2] * 2 * index for index in range(6)]
    paths = write_series(tmp_path, rng_array((6, 5, 6)), positions, axes=axes, pitch=(0.5, 0.8))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in paths])
    sitk.WriteImage(reader.Execute(), str(tmp_path / "itk.nii.gz"))
    theirs, ours = read_volume([tmp_path / "itk.nii.gz"]), read_volume(paths)
    assert np.array_equal(theirs.array, ours.array)
    assert np.allclose(theirs.affine, ours.affine, atol=1e-4)


def test_gantry_tilt_comes_out_straight(tmp_path):
    """A pillar along the table's axis, and one voxel of known place, in slices tilted by 20 degrees."""
    tilt, count, pitch = np.radians(20), 16, 0.5
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(tilt), -np.sin(tilt)])
    normal = np.cross(row, column)
    pillar = np.array([12.0, 30.0, 0.0])  # LPS mm of a line along the slice normal
    volume = np.zeros((60, 120, count), np.int16)
    positions = [np.array([0.0, 0.0, 3.0 * index]) for index in range(count)]
    for index, position in enumerate(positions):
        on_plane = pillar + normal * ((position - pillar) @ normal)
        x, y = (on_plane - position) @ row / pitch, (on_plane - position) @ column / pitch
        xs, ys = np.mgrid[:60, :120]
        volume[..., index] = 1000 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 18)
    assert np.ptp([peak(volume[..., index])[1] for index in range(count)]) > 20  # leaning before
    paths = write_series(tmp_path, volume, positions, axes=[*row, *column], pitch=(pitch, pitch))
    read = read_volume(paths)
    assert read.notes == ("gantry tilt of 20.0 degrees: sheared slices resampled onto an upright grid",)
    tops = np.array([peak(read.array[..., index]) for index in range(count)])
    assert np.ptp(tops, axis=0).max() <= 1  # upright after
    axes = read.affine[:3, :3] / read.spacing
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    for index in range(count):  # and where it was in the world: off the pillar's line by under a voxel
        away = world(read.affine, (*tops[index], index)) * [-1, -1, 1] - pillar
        assert np.linalg.norm(away - normal * (away @ normal)) < 0.5
    assert read.array.min() == -1024 and read.array.shape[1] > 120


def test_uneven_blocks_are_resampled_linearly_and_told(tmp_path):
    heights = [0, 2, 4, 6, 8, 11, 14, 17, 20]
    volume = np.stack([np.full((4, 5), 10 * height) for height in heights], axis=2)
    paths = write_series(tmp_path, volume, [(0, 0, height) for height in heights])
    read = read_volume(paths)
    (note,) = read.notes
    assert "2.00 to 3.00 mm" in note and "resampled" in note
    for index in range(read.shape[2]):  # a ramp stays a ramp under linear interpolation
        assert abs(read.array[0, 0, index] + 1024 - 10 * world(read.affine, (0, 0, index))[2]) <= 1
    assert read_header(paths).shape == read.shape


def test_rounded_positions_are_not_called_uneven(tmp_path):
    positions = [(0, 0, round(0.625 * index, 1)) for index in range(30)]
    assert read_volume(write_series(tmp_path, rng_array((4, 5, 30)), positions)).notes == ()


@pytest.mark.parametrize("numbers", [None, [None] * 20, list(range(20, 0, -1))])
def test_missing_slice_is_refused(tmp_path, numbers):
    paths = write_series(tmp_path, rng_array((4, 5, 20)), upright(20), numbers=numbers)
    del paths[7]
    assert read_header(paths[:7]).shape == (4, 5, 7)
    error = fails("slices missing between 23.0 and 29.0 mm .*; expected one every 3 mm", *paths)
    assert "006.dcm" in error.what


def test_two_slices_missing_beside_a_lone_one_are_refused(tmp_path):
    paths = write_series(tmp_path, rng_array((4, 5, 20)), upright(20))
    fails("slices missing", *(paths[:6] + paths[7:8] + paths[9:]))


def test_a_hole_where_two_blocks_meet_is_told_by_the_numbering(tmp_path):
    heights = [0, 3, 6, 9, 12, 17, 22, 27]
    paths = write_series(tmp_path, rng_array((4, 5, 8)), [(0, 0, height) for height in heights])
    assert "resampled" in read_volume(paths).notes[0]
    fails("between 6.0 and 12.0 mm .* expected one every 3 mm", *(paths[:3] + paths[4:]))


def test_renumbered_series_with_a_hole_is_refused(tmp_path):
    positions = [position for index, position in enumerate(upright(12)) if index not in (5, 6)]
    fails("expected one every 3 mm", *write_series(tmp_path, rng_array((4, 5, 10)), positions))


def test_repeated_slice_is_refused_and_named(tmp_path):
    positions = upright(6)
    positions[4] = positions[3]
    fails("003.dcm, 004.dcm lie at one place", *write_series(tmp_path, rng_array((4, 5, 6)), positions))


def test_the_same_series_copied_twice_is_repeated(tmp_path):
    paths = write_series(tmp_path, rng_array((4, 5, 4)), upright(4))
    copies = [path.with_name(f"copy-{path.name}") for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    fails("repeated", *paths, *copies)


def test_several_images_at_every_position_are_channels(tmp_path):
    volume = rng_array((4, 5, 8))
    paths = write_series(tmp_path, volume, [position for position in upright(4) for _ in range(2)])
    assert read_header(paths).shape == (4, 5, 4, 2)
    fails("4D image with 2", *paths)
    assert np.array_equal(read_volume(paths, 1).array, volume[:, :, 1::2].astype(int) - 1024)


def test_fractional_slope(tmp_path):
    def edit(data, index):
        data.RescaleSlope = 0.5

    read = read_volume(write_series(tmp_path, rng_array((4, 5, 3)), upright(3), edit=edit))
    assert read.array.dtype == np.float32 and np.allclose(read.array, rng_array((4, 5, 3)) * 0.5 - 1024)


def test_compressed_dicom(tmp_path):
    def edit(data, index):
        data.compress(pydicom.uid.RLELossless)

    volume = rng_array((8, 9, 4))
    read = read_volume(write_series(tmp_path, volume, upright(4), edit=edit))
    assert np.array_equal(read.array, volume.astype(int) - 1024)


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEGLS", "JPEG"])
def test_jpeg_compressed_dicom(tmp_path, compressor):
    """Where pydicom has no decoder, ITK's must step in, and must not rescale twice."""
    volume = rng_array((16, 17, 4))

    def edit(data, index):
        image = sitk.GetImageFromArray(volume[None, :, :, index].transpose(0, 2, 1))
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "one.dcm"))
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.Execute(image)
        compressed = pydicom.dcmread(tmp_path / "one.dcm")
        data.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
        for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"):
            setattr(data, name, compressed[name].value)
        data["PixelData"].is_undefined_length = True

    paths = write_series(tmp_path / "series", volume, upright(4), edit=edit)
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(read_volume(paths).array, volume.astype(int) - 1024)


def test_truncated_dicom(tmp_path):
    paths = write_series(tmp_path, rng_array((30, 30, 4)), upright(4))
    paths[2].write_bytes(paths[2].read_bytes()[:-500])
    assert fails("truncated", *paths).where == paths[2]


def test_slices_of_different_size_or_direction(tmp_path):
    paths = write_series(tmp_path / "a", rng_array((4, 5, 3)), upright(3), uid="1.2.9")
    more = write_series(tmp_path / "b", rng_array((6, 5, 3)), upright(6)[3:], uid="1.2.9")
    fails("differ in size", *paths, *more)
    turned = write_series(tmp_path / "c", rng_array((4, 5, 3)), upright(6)[3:], uid="1.2.9", axes=(0, 1, 0, 0, 0, 1))
    fails("different directions", *paths, *turned)


@pytest.mark.skipif(not CT_HEAD.exists(), reason="no shared data")
def test_real_head_ct_with_tilt_and_two_blocks():
    paths = sorted(CT_HEAD.glob("*.dcm"))
    volume = read_volume(paths)
    assert volume.shape == read_header(paths).shape == (512, 611, 37)
    assert any("gantry tilt of 18.5 degrees" in note for note in volume.notes)
    assert any("1.08 to 7.00 mm: resampled to every 4.00 mm" in note for note in volume.notes)
    fails("slices missing .* expected one every 4 mm", *(paths[:7] + paths[8:]))
    fails("slices missing .* expected one every 7 mm", *(paths[:20] + paths[21:]))
