"""Formats beside plain NIfTI, NRRD and MetaImage: planted voxels, and the affine of an independent reader."""

from __future__ import annotations

import bz2
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from volumes import fails, rng_array, rotation

from medcl.io.nifti import write_nifti
from medcl.io.volumes import read_header, read_volume

NIBABEL_DATA = Path(nib.__file__).parent / "tests" / "data"  # nibabel's own samples of what it cannot write


def oblique() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation(12) @ np.diag([-1, 1.5, 2.5])
    affine[:3, 3] = 7, -30, 12
    return affine


def sample(name: str, folder: Path) -> Path:
    """A copy of a sample that nibabel brings along, with the file of its voxels."""
    if not (NIBABEL_DATA / name).is_file():
        pytest.skip("nibabel is installed without its samples")
    for file in NIBABEL_DATA.glob(f"{name.rpartition('.')[0]}.*"):
        shutil.copy(file, folder)
    return folder / name


# --- nibabel's formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz", "a.hdr", "A.HDR", "a.hdr.gz", "a.nii.bz2"])
def test_formats_that_keep_an_affine(tmp_path, name):
    array, kind = rng_array(), nib.MGHImage if ".mg" in name else nib.Nifti1Pair
    if name.endswith("bz2"):
        write_nifti(tmp_path / "a.nii", array, oblique())
        (tmp_path / name).write_bytes(bz2.compress((tmp_path / "a.nii").read_bytes()))
    else:
        nib.save(kind(array, oblique()), tmp_path / name)
    volume, header = read_volume([tmp_path / name]), read_header([tmp_path / name])
    assert np.array_equal(volume.array, array) and volume.array.dtype == np.int16 and volume.array.dtype.isnative
    assert np.allclose(volume.affine, oblique(), atol=1e-5) and volume.notes == header.notes == ()
    assert (header.shape, header.dtype) == ((5, 6, 7), "int16")


def test_the_file_of_voxels_stands_for_its_header(tmp_path):
    nib.save(nib.Nifti1Pair(rng_array(), oblique()), tmp_path / "a.hdr")
    assert np.array_equal(read_volume([tmp_path / "a.img"]).array, rng_array())
    assert np.array_equal(read_volume([tmp_path / "a.hdr", tmp_path / "a.img"]).array, rng_array())


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage])
def test_analyze_without_orientation_is_told(tmp_path, kind):
    image = kind(rng_array(), None)
    image.header.set_zooms((1, 1.5, 2.5))
    nib.save(image, tmp_path / "a.img")
    (tmp_path / "a.mat").unlink(missing_ok=True)
    volume = read_volume([tmp_path / "a.hdr"])
    assert np.array_equal(volume.array, rng_array()) and np.allclose(volume.spacing, (1, 1.5, 2.5))
    assert np.array_equal(volume.affine, nib.load(tmp_path / "a.img").affine)
    assert volume.notes == ("Analyze headers hold no orientation: left and right are a guess",)


def test_the_matrix_beside_an_analyze_file_is_its_orientation(tmp_path):
    nib.save(nib.Spm99AnalyzeImage(rng_array(), oblique()), tmp_path / "a.img")
    assert (tmp_path / "a.mat").exists()
    volume = read_volume([tmp_path / "a.hdr"])
    assert np.allclose(volume.affine, oblique()) and volume.notes == ()


def test_mgh_without_geometry_is_told(tmp_path):
    nib.save(nib.MGHImage(rng_array(), oblique()), tmp_path / "a.mgh")
    raw = bytearray((tmp_path / "a.mgh").read_bytes())
    raw[28:30] = b"\0\0"
    (tmp_path / "a.mgh").write_bytes(raw)
    volume = read_volume([tmp_path / "a.mgh"])
    assert "goodRASFlag" in volume.notes[0] and volume.orientation == "LIA" and volume.spacing == (1, 1, 1)
    assert np.allclose(volume.affine @ [2.5, 3, 3.5, 1], [0, 0, 0, 1])  # FreeSurfer centres it


def test_mgh_frames_are_channels(tmp_path):
    array = rng_array((4, 5, 6, 3))
    nib.save(nib.MGHImage(array, oblique()), tmp_path / "a.mgz")
    fails("4D image with 3", tmp_path / "a.mgz")
    assert np.array_equal(read_volume([tmp_path / "a.mgz"], 2).array, array[..., 2])


def test_minc_2_beside_itk(tmp_path):
    pytest.importorskip("h5py")
    path = sample("small.mnc", tmp_path)
    volume, theirs = read_volume([path]), sitk.ReadImage(str(path))
    assert volume.spacing == (9, 8, 7) and volume.orientation == "SAR"
    for index in np.random.default_rng(0).integers(0, volume.shape, (50, 3)):
        point = volume.affine[:3] @ [*index, 1]  # ITK leaves MINC's axes as they are, and those are R, A, S
        assert abs(volume.array[tuple(index)] - theirs[theirs.TransformPhysicalPointToIndex(point.tolist())]) < 1e-3


def test_minc_counts_time_first(tmp_path):
    path = sample("minc1_4d.mnc", tmp_path)
    assert read_header([path]).shape == (10, 20, 20, 2)
    theirs = nib.load(path)
    for channel in range(2):
        volume = read_volume([path], channel)
        assert np.array_equal(volume.array, theirs.get_fdata(dtype=np.float32)[channel])
        assert np.array_equal(volume.affine, theirs.affine)


@pytest.mark.parametrize("name", ["minc1-no-att.mnc", "minc2-no-att.mnc"])
def test_minc_without_spacing_is_told(tmp_path, name):
    pytest.importorskip("h5py")
    volume = read_volume([sample(name, tmp_path)])
    assert volume.spacing == (1, 1, 1) and volume.notes == (
        "header holds no spacing along some axis: 1 mm is supposed",
    )
    assert read_volume([sample("tiny.mnc", tmp_path)]).notes == ()


@pytest.mark.parametrize("name", ["phantom_EPI_asc_CLEAR_2_1.PAR", "example4d+orig.HEAD"])
def test_philips_and_afni(tmp_path, name):
    path = sample(name, tmp_path)
    theirs = nib.load(path)
    volume = read_volume([path], 1)
    assert np.array_equal(volume.array, theirs.get_fdata(dtype=np.float32)[..., 1])
    assert np.array_equal(volume.affine, theirs.affine)


@pytest.mark.parametrize("name", ["a.hdr", "a.par", "a.HEAD"])
def test_a_header_without_its_voxels(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 400)
    fails(r"has no file of voxels \(a\.(img|rec|brik)\)", tmp_path / name)


def test_truncated_voxels_of_a_pair(tmp_path):
    nib.save(nib.Nifti1Pair(rng_array((20, 20, 20)), oblique()), tmp_path / "a.hdr")
    (tmp_path / "a.img").write_bytes((tmp_path / "a.img").read_bytes()[:9000])
    assert fails("truncated", tmp_path / "a.hdr").where == tmp_path / "a.img"


# --- more than three dimensions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5, 6, 1, 3), (4, 5, 6, 3, 1), (4, 5, 6, 1, 3, 1)])
def test_vectors_of_nifti_are_channels(tmp_path, shape):
    array = rng_array(shape)
    write_nifti(tmp_path / "a.nii.gz", array, np.eye(4))
    assert read_header([tmp_path / "a.nii.gz"]).shape == (4, 5, 6, 3)
    for channel in range(3):
        read = read_volume([tmp_path / "a.nii.gz"], channel)
        assert np.array_equal(read.array, array.reshape(4, 5, 6, 3)[..., channel])


def test_two_axes_beyond_space_are_refused(tmp_path):
    write_nifti(tmp_path / "a.nii", rng_array((4, 5, 6, 2, 3)), np.eye(4))
    fails("has 5 dimensions", tmp_path / "a.nii", channel=0)


# --- sform and qform -----------------------------------------------------------------------------------------------


def two_forms(path: Path, sform: np.ndarray, qform: np.ndarray, codes: tuple[int, int]) -> Path:
    image = nib.Nifti1Image(rng_array(), np.eye(4))
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    nib.save(image, path)
    return path


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1)])
def test_a_conflict_is_told_in_mm_and_the_sform_taken(tmp_path, codes):
    moved = oblique()
    moved[0, 3] += 5
    volume = read_volume([two_forms(tmp_path / "a.nii", oblique(), moved, codes)])
    assert np.allclose(volume.affine, oblique(), atol=1e-5)
    assert volume.notes == ("sform and qform disagree: voxels lie up to 5 mm apart; the sform is taken",)


def test_a_conflict_of_left_and_right_is_told(tmp_path):
    volume = read_volume([two_forms(tmp_path / "a.nii", np.diag([2.0, 2, 2, 1]), np.diag([-2.0, 2, 2, 1]), (1, 1))])
    assert volume.orientation == "RAS" and "up to 16 mm apart and point RAS, not LAS" in volume.notes[0]


@pytest.mark.parametrize(("codes", "taken"), [((0, 1), "qform"), ((1, 0), "sform")])
def test_a_form_with_code_0_is_no_conflict(tmp_path, codes, taken):
    forms = {"sform": oblique(), "qform": np.diag([2.0, 2, 2, 1])}
    volume = read_volume([two_forms(tmp_path / "a.nii", forms["sform"], forms["qform"], codes)])
    assert np.allclose(volume.affine, forms[taken], atol=1e-5) and volume.notes == ()


def test_a_rounded_qform_and_a_small_voxel_are_told_apart(tmp_path):
    fine, moved = (np.diag([0.001, 0.001, 0.001, 1.0]) for _ in range(2))
    moved[0, 3] = 0.0005  # half a voxel
    assert "0.0005 mm apart" in read_volume([two_forms(tmp_path / "a.nii", fine, moved, (1, 1))]).notes[0]
    assert read_volume([two_forms(tmp_path / "b.nii", oblique(), oblique(), (1, 1))]).notes == ()


def test_a_qform_that_is_no_rotation(tmp_path):
    path = two_forms(tmp_path / "a.nii", oblique(), oblique(), (1, 1))
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([3, 3, 3], "<f4").tobytes()
    path.write_bytes(raw)
    volume = read_volume([path])
    assert np.allclose(volume.affine, oblique(), atol=1e-5) and volume.notes == (
        "the qform is unusable: the sform is taken",
    )
