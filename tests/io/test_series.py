"""DICOM series: units, order, tilt, gaps and compression."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import REAL
from dicom_series import upright, write_series
from volumes import fails, peak, rng_array, rotation, world

from medcl.io.volumes import read_header, read_volume

CT_HEAD = REAL / "dicom_ct_head"


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


def test_copies_of_slices_are_passed_over_and_told(tmp_path):
    volume = rng_array((4, 5, 4))
    paths = write_series(tmp_path, volume, upright(4))
    copies = [path.with_name(f"copy-{path.name}") for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    read = read_volume([*copies[2:], *paths, copies[0]])
    assert np.array_equal(read.array, volume.astype(int) - 1024)
    assert read.notes == ("3 files are copies of other slices (equal SOPInstanceUID) and passed over",)


def test_one_instance_uid_on_slices_that_differ_makes_no_copies(tmp_path):
    def edit(data, index):
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.840.1"

    volume = rng_array((4, 5, 4))
    read = read_volume(write_series(tmp_path / "a", volume, upright(4), edit=edit))
    assert np.array_equal(read.array, volume.astype(int) - 1024) and read.notes == ()
    twice = [position for position in upright(4) for _ in range(2)]
    fails("repeated", *write_series(tmp_path / "b", rng_array((4, 5, 8)), twice, edit=edit))


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
    packed = [path.with_suffix(".dcm.gz") for path in paths]
    for path, other in zip(paths, packed, strict=True):
        other.write_bytes(gzip.compress(path.read_bytes()))
    assert np.array_equal(read_volume(packed).array, volume.astype(int) - 1024)


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


@pytest.mark.skipif(not CT_HEAD.exists(), reason="the real scans and slides do not lie beside this checkout")
def test_real_head_ct_with_tilt_and_two_blocks():
    paths = sorted(CT_HEAD.glob("*.dcm"))
    volume = read_volume(paths)
    assert volume.shape == read_header(paths).shape == (512, 611, 37)
    assert any("gantry tilt of 18.5 degrees" in note for note in volume.notes)
    assert any("1.08 to 7.00 mm: resampled to every 4.00 mm" in note for note in volume.notes)
    fails("slices missing .* expected one every 4 mm", *(paths[:7] + paths[8:]))
    fails("slices missing .* expected one every 7 mm", *(paths[:20] + paths[21:]))
