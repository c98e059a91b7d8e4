"""Units of length in headers, spacings far below a millimetre, and TIFF stacks."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import fails, rng_array

from medcl.io.nifti import write_nifti
from medcl.io.units import in_mm, rounded, shown
from medcl.io.volumes import read_header, read_volume

NO_ORIENTATION = "TIFF holds no orientation: left and right are a guess"


# --- units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit, mm", [("micron", 1e-3), ("meter", 1e3)])
def test_units_of_nifti(tmp_path, unit, mm):
    image = nib.Nifti1Image(rng_array(), np.diag([0.65, 0.65, 2, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume([tmp_path / "a.nii"])
    assert np.allclose(volume.spacing, np.array((0.65, 0.65, 2)) * mm, rtol=1e-6)
    assert volume.notes == (f"header is in {unit}s: converted to mm",)


@pytest.mark.parametrize(
    ("unit", "mm", "note"),
    [
        ("mm", 1, None),
        ("um", 1e-3, "header is in um: converted to mm"),
        ("µm", 1e-3, "header is in µm: converted to mm"),
        ("micrometers", 1e-3, "header is in micrometers: converted to mm"),
        ("nm", 1e-6, "header is in nm: converted to mm"),
        ("cm", 10, "header is in cm: converted to mm"),
        ("furlong", 1, "the header's unit of length, 'furlong', is not known: mm is supposed"),
    ],
)
@pytest.mark.parametrize("field", ["space units", "units"])
def test_units_of_nrrd(tmp_path, unit, mm, note, field):
    array = rng_array((2, 3, 4))
    quoted = " ".join([f'"{unit}"'] * 3)
    space = (
        f"space: RAS\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\nspace units: {quoted}\n"
        if field == "space units"
        else f"spacings: 2 3 4\nunits: {quoted}\n"
    )
    head = f"NRRD0004\ntype: short\ndimension: 3\n{space}sizes: 2 3 4\nendian: little\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + array.tobytes(order="F"))
    volume = read_volume([tmp_path / "a.nrrd"])
    assert np.array_equal(volume.array, array) and np.allclose(volume.spacing, np.array([2, 3, 4]) * mm, rtol=1e-9)
    no_space = "header holds no orientation (no anatomical space): left and right are a guess"
    assert volume.notes == tuple(filter(None, [note, None if field == "space units" else no_space]))
    if field == "space units":
        assert np.allclose(volume.affine[:3, 3], np.array([10, 20, 30]) * mm, rtol=1e-9)


def test_units_of_nrrd_that_differ_by_axis(tmp_path):
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 3 4\nendian: little\n"
        "encoding: raw\nspace directions: (0,0,2) (0,3,0) (4,0,0)\nspace origin: (0,0,0)\n"
        'space units: "um" "um" "mm"\n\n'
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + rng_array((2, 3, 4)).tobytes(order="F"))
    assert np.allclose(read_volume([tmp_path / "a.nrrd"]).spacing, (2, 0.003, 0.004), rtol=1e-9)


@pytest.mark.parametrize(("unit", "mm"), [("um", 1e-3), ("mm", 1), ("cm", 10)])
def test_units_of_metaimage(tmp_path, unit, mm):
    array = rng_array((2, 3, 4))
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 10 20 30\nDistanceUnits = {unit}\nElementSpacing = 2 3 4\n"
        "DimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = a.raw\n"
    )
    (tmp_path / "a.mhd").write_text(head)
    (tmp_path / "a.raw").write_bytes(array.tobytes(order="F"))
    volume = read_volume([tmp_path / "a.mhd"])
    assert np.array_equal(volume.array, array) and np.allclose(volume.spacing, np.array([2, 3, 4]) * mm)
    assert np.allclose(volume.affine[:3, 3], np.array([-10, -20, 30]) * mm)
    assert volume.notes == (() if mm == 1 else (f"header is in {unit}: converted to mm",))


def test_a_header_without_spacing_is_told(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 2 3 4\nendian: little\nencoding: raw\n\n"
        + rng_array((2, 3, 4)).tobytes(order="F")
    )
    (tmp_path / "a.mhd").write_text("NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = a.raw\n")
    (tmp_path / "a.raw").write_bytes(rng_array((2, 3, 4)).tobytes(order="F"))
    for name in ("a.nrrd", "a.mhd"):
        volume = read_volume([tmp_path / name])
        assert volume.spacing == (1, 1, 1) and "header holds no spacing: 1 mm is supposed" in volume.notes


# --- small voxels -------------------------------------------------------------------------------------------------


def test_rounding_keeps_the_digits_of_small_lengths_and_changes_no_others():
    assert rounded(0.00065, 6) == 0.00065 and rounded(float(np.float32(0.00065)), 6) == 0.00065
    assert rounded(0.000004, 4) == 4e-6 and rounded(2.9999999999999997e-05, 6) == 3e-5 and rounded(0, 4) == 0
    assert shown(0.00065, 2) == "0.00065" and shown(3, 1) == "3.0"


@settings(deadline=None, max_examples=200)
@given(st.floats(0.1, 1e4), st.integers(2, 6))
def test_rounding_of_lengths_from_a_tenth_of_a_mm_is_by_decimals(mm, decimals):
    assert rounded(mm, decimals) == round(mm, decimals)


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-9, 0.1, exclude_max=True))
def test_rounding_of_small_lengths_is_off_by_a_ten_thousandth_at_most(mm):
    assert abs(rounded(mm, 4) / mm - 1) < 1e-3 and abs(rounded(mm, 6) / mm - 1) < 1e-5


def test_units_in_mm():
    assert [in_mm(unit) for unit in ("m", "Meters", "mm", "micron", "μm", "nm", "pixel")] == [
        1000, 1000, 1, 1e-3, 1e-3, 1e-6, None,
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1, 0.001, 4e-6])
def test_dicom_slices_of_any_size_are_told_apart(tmp_path, scale):
    """Holes, uneven distances and order are the same question at 0.65 mm, 0.65 µm and 2.6 nm."""
    volume = rng_array((4, 5, 9))
    heights = np.array([0, 2, 4, 6, 8, 11, 14, 17, 20]) * scale

    def positions(heights):
        return [(0, 0, float(f"{height:.9g}")) for height in heights]

    pitch = (0.65 * scale, 0.65 * scale)
    even = write_series(tmp_path / "even", volume, positions(np.arange(9) * scale), pitch=pitch)
    read = read_volume(even)
    assert np.array_equal(read.array, volume.astype(int) - 1024) and read.notes == ()
    assert np.allclose(read.spacing, np.array([0.65, 0.65, 1]) * scale, rtol=1e-6)
    uneven = read_volume(write_series(tmp_path / "uneven", volume, positions(heights), pitch=pitch))
    (note,) = uneven.notes
    assert f"{shown(2 * scale, 2)} to {shown(3 * scale, 2)} mm" in note
    fails("slices missing", *(even[:4] + even[5:]))
    other = write_series(
        tmp_path / "other", volume[..., :4], positions(np.arange(9, 13) * scale), pitch=(0.8 * scale, 0.65 * scale),
        uid="1.2.3", numbers=range(10, 14),
    )  # fmt: skip
    same = write_series(tmp_path / "same", volume, positions(np.arange(9) * scale), pitch=pitch, uid="1.2.3")
    fails("differ in size or pixel spacing", *same, *other)


def test_nanometres_survive_writing(tmp_path):
    affine = np.diag([4e-6, 4e-6, 3e-5, 1])
    write_nifti(tmp_path / "a.nii.gz", rng_array(), affine)
    assert np.allclose(read_volume([tmp_path / "a.nii.gz"]).affine, affine, rtol=1e-6)


# --- TIFF --------------------------------------------------------------------------------------------------------

tifffile = pytest.importorskip("tifffile")


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m", "nm", "mm"])
def test_imagej_stack(tmp_path, unit):
    array = rng_array((5, 6, 7))
    said = {"axes": "ZYX", "unit": unit, "spacing": 2.0}
    tifffile.imwrite(tmp_path / "a.tif", array.T, imagej=True, resolution=(1 / 0.65, 1 / 0.5), metadata=said)
    volume = read_volume([tmp_path / "a.tif"])
    scale = {"nm": 1e-6, "mm": 1}.get(unit, 1e-3)
    assert np.array_equal(volume.array, array) and volume.array.dtype == np.int16
    assert np.allclose(volume.spacing, np.array([0.65, 0.5, 2]) * scale, rtol=1e-5) and volume.orientation == "LPS"
    assert volume.notes[0] == NO_ORIENTATION and len(volume.notes) == (1 if unit == "mm" else 2)


@pytest.mark.parametrize(("unit", "scale"), [("µm", 1e-3), ("nm", 1e-6), (None, 1e-3)])
def test_ome_stack(tmp_path, unit, scale):
    array, said = rng_array((5, 6, 7)), {"axes": "ZYX"}
    for axis, size in zip("XYZ", (4, 4, 30), strict=True):
        said |= {f"PhysicalSize{axis}": size} | ({f"PhysicalSize{axis}Unit": unit} if unit else {})
    tifffile.imwrite(tmp_path / "a.ome.tif", array.T, metadata=said)
    volume = read_volume([tmp_path / "a.ome.tif"])
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.spacing, np.array([4, 4, 30]) * scale, rtol=1e-9)


def test_a_stack_without_spacing_lies_where_itk_puts_it(tmp_path):
    array = rng_array((5, 6, 7))
    sitk.WriteImage(sitk.GetImageFromArray(array.T), str(tmp_path / "a.tiff"))
    volume = read_volume([tmp_path / "a.tiff"])
    assert np.array_equal(volume.array, array)
    assert np.array_equal(volume.affine, np.diag([-1, -1, 1, 1]))  # ITK's identity, from LPS to RAS
    assert volume.notes == (NO_ORIENTATION, "holds no spacing along X, Y, Z: 1 mm is supposed")


def test_channels_of_a_stack(tmp_path):
    array = rng_array((5, 6, 7, 2))
    tifffile.imwrite(tmp_path / "a.tif", array.transpose(2, 3, 1, 0), imagej=True, metadata={"axes": "ZCYX"})
    assert read_header([tmp_path / "a.tif"]).shape == (5, 6, 7, 2)
    fails("4D image with 2", tmp_path / "a.tif")
    for channel in range(2):
        assert np.array_equal(read_volume([tmp_path / "a.tif"], channel).array, array[..., channel])


def test_films_pictures_and_colour_are_no_volumes(tmp_path):
    tifffile.imwrite(tmp_path / "film.tif", rng_array((7, 6, 5)), imagej=True, metadata={"axes": "TYX"})
    fails("holds 2D images .axes T, Y, X", tmp_path / "film.tif")
    tifffile.imwrite(tmp_path / "one.tif", rng_array((6, 5)))
    fails("holds 2D images", tmp_path / "one.tif")
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((7, 6, 5, 3), np.uint8), photometric="rgb")
    fails("colour", tmp_path / "rgb.tif")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["imagej", "plain", "packed"])
def test_truncated_stack(tmp_path, form, share, capfd):
    how = {"imagej": {"imagej": True}, "packed": {"compression": "zlib"}, "plain": {}}[form]
    tifffile.imwrite(tmp_path / "a.tif", rng_array((20, 20, 20)), **how)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: int(len(whole) * share)])
    if (form, share) == ("plain", 0.9):  # tags of later pages are lost, which nobody needs; no voxel is
        assert np.array_equal(read_volume([tmp_path / "a.tif"]).array, rng_array((20, 20, 20)).T)
    else:
        fails("a.tif", tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")
