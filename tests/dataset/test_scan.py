from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import REAL
from dicom_series import upright, write_series

from medcl.dataset.case import Manifest, Problem
from medcl.dataset.scan import scan
from medcl.errors import MedclError
from medcl.io.nifti import write_nifti
from medcl.runtime import pool


def image(
    path: Path, seed: int = 0, shape: tuple[int, ...] = (6, 7, 8), affine: np.ndarray | None = None
) -> np.ndarray:
    array = np.random.default_rng(seed).integers(0, 400, shape).astype(np.int16)
    write_nifti(path, array, np.diag([1, 1, 2.5, 1]) if affine is None else affine)
    return array


def label(
    path: Path, shape: tuple[int, ...] = (6, 7, 8), affine: np.ndarray | None = None, dtype: str = "uint8"
) -> None:
    array = (np.arange(np.prod(shape)) % 3).reshape(shape).astype(dtype)
    write_nifti(path, array, np.diag([1, 1, 2.5, 1]) if affine is None else affine)


def problem(manifest: Manifest, file: str) -> Problem:
    (found,) = [problem for problem in manifest.problems if problem.file == file]
    assert "\n" not in str(found) and found.remedy
    return found


def test_a_good_folder(tmp_path):
    array = image(tmp_path / "images/s1.nii.gz")
    label(tmp_path / "labels/s1.nii.gz")
    image(tmp_path / "images/s2.nii.gz", 1)
    manifest = scan(tmp_path)
    assert manifest.problems == () and [case.id for case in manifest.cases] == ["s1", "s2"]
    first = manifest.cases[0]
    assert first.label == "labels/s1.nii.gz" and first.shape == (6, 7, 8) and first.spacing == (1, 1, 2.5)
    assert first.orientation == "RAS" and first.dtype == "int16" and first.format == "nifti"
    assert first.intensity == (array.min(), np.median(array), array.max())
    assert np.array_equal(first.affine, np.diag([1, 1, 2.5, 1]))
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest


def test_headers_alone_give_the_same_geometry(tmp_path):
    image(tmp_path / "s1.nii.gz")
    quick, full = scan(tmp_path, voxels=False).cases[0], scan(tmp_path).cases[0]
    assert quick.intensity is None and full.intensity is not None
    assert (quick.shape, quick.affine, quick.dtype) == (full.shape, full.affine, full.dtype)


def test_all_formats_are_found_at_any_depth(tmp_path):
    image(tmp_path / "a/b/c/s1.nii")
    for number, suffix in enumerate((".nrrd", ".mha", ".mhd", ".nhdr"), 2):
        array = np.random.default_rng(number).integers(0, 99, (4, 5, 6)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"s{number}{suffix}"))
    write_series(tmp_path / "d", np.random.default_rng(9).integers(0, 99, (4, 5, 6)), upright(6))
    (tmp_path / ".hidden.nii").write_bytes(b"junk")
    (tmp_path / "README").write_text("no DICOM")
    (tmp_path / "notes.txt").write_text("nothing")
    manifest = scan(tmp_path)
    assert sorted(case.format for case in manifest.cases) == ["dicom", "meta", "meta", "nifti", "nrrd", "nrrd"]
    assert manifest.problems == ()


def test_every_bad_file_is_set_aside_and_the_good_one_stays(tmp_path):
    image(tmp_path / "good1.nii.gz")
    (tmp_path / "empty.nii.gz").touch()
    image(tmp_path / "cut.nii.gz", 1, (30, 30, 30))
    raw = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(raw[: len(raw) // 2])
    holed = np.random.default_rng(2).random((6, 7, 8)).astype(np.float32)
    holed[1, 2, 3] = np.nan
    write_nifti(tmp_path / "nan.nii", holed, np.eye(4))
    write_nifti(tmp_path / "flat.nii", np.full((6, 7, 8), 5, np.int16), np.eye(4))
    image(tmp_path / "series4d.nii", 3, (6, 7, 8, 4))
    image(tmp_path / "slice2d.nii", 4, (6, 7))
    image(tmp_path / "singular.nii", 5)
    raw = bytearray((tmp_path / "singular.nii").read_bytes())
    raw[280:328] = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], "<f4").tobytes()
    (tmp_path / "singular.nii").write_bytes(raw)
    (tmp_path / "junk.nrrd").write_bytes(os.urandom(300))
    manifest = scan(tmp_path)
    assert [case.image[0] for case in manifest.cases] == ["good1.nii.gz"]
    expected = {
        "empty.nii.gz": "empty",
        "cut.nii.gz": "truncated",
        "nan.nii": "1 voxel is NaN",
        "flat.nii": "constant",
        "series4d.nii": "4D image with 4",
        "slice2d.nii": "2D image",
        "singular.nii": "singular",
        "junk.nrrd": "cannot be read",
    }
    assert {problem.file for problem in manifest.problems} == set(expected)
    for file, words in expected.items():
        assert words in problem(manifest, file).what and problem(manifest, file).aside


def test_libraries_print_nothing_about_bad_files(tmp_path, capfd):
    test_every_bad_file_is_set_aside_and_the_good_one_stays(tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_channel_makes_a_4d_file_usable(tmp_path):
    array = image(tmp_path / "s1.nii", 3, (6, 7, 8, 4))
    case = scan(tmp_path, channel=2).cases[0]
    assert case.channel == 2 and case.shape == (6, 7, 8) and case.intensity[2] == array[..., 2].max()
    assert "channel 2 of 4" in case.notes


@pytest.mark.parametrize("voxels", [True, False])
def test_a_label_on_another_grid_is_set_aside_and_its_image_kept_unlabelled(tmp_path, voxels):
    image(tmp_path / "s1.nii")
    label(tmp_path / "s1_seg.nii", (6, 7, 9))
    image(tmp_path / "s2.nii", 1)
    label(tmp_path / "s2_seg.nii", affine=np.diag([1, 1, 3, 1]))
    image(tmp_path / "s3.nii", 2)
    label(tmp_path / "s3_seg.nii")
    manifest = scan(tmp_path, voxels=voxels)
    assert [case.label for case in manifest.cases] == [None, None, "s3_seg.nii"]
    assert "6 x 7 x 9" in problem(manifest, "s1_seg.nii").what
    assert "affine differs" in problem(manifest, "s2_seg.nii").what
    assert "s2.nii is kept as unlabelled" in problem(manifest, "s2_seg.nii").what


def test_labels_that_are_not_integers_and_damaged_labels(tmp_path):
    for number in (1, 2):
        image(tmp_path / f"s{number}.nii", number)
    write_nifti(tmp_path / "s1_seg.nii", np.full((6, 7, 8), 0.5, np.float32), np.diag([1, 1, 2.5, 1]))
    (tmp_path / "s2_seg.nii").touch()
    manifest = scan(tmp_path)
    assert len(manifest.cases) == 2 and not manifest.labelled
    assert "not integers" in problem(manifest, "s1_seg.nii").what
    assert "empty" in problem(manifest, "s2_seg.nii").what


@pytest.mark.parametrize("voxels", [True, False])
def test_identical_volumes_cannot_sit_in_two_splits(tmp_path, voxels):
    image(tmp_path / "a1.nii")
    shutil.copy(tmp_path / "a1.nii", tmp_path / "b2.nii")
    label(tmp_path / "b2_seg.nii")
    image(tmp_path / "c3.nii", 7)  # same size, other voxels
    manifest = scan(tmp_path, voxels=voxels)
    assert [case.id for case in manifest.cases] == ["b2", "c3"]  # the labelled copy stays
    told = problem(manifest, "a1.nii")
    assert told.aside and "same image as b2.nii" in told.what and "b2" in told.what and "a1" in told.what


def test_the_same_voxels_in_another_file_format_are_found(tmp_path):
    image(tmp_path / "a1.nii")
    (tmp_path / "b2.nii.gz").write_bytes(gzip.compress((tmp_path / "a1.nii").read_bytes()))
    assert len(scan(tmp_path).cases) == 1


def test_a_missing_label_is_told_and_its_image_kept(tmp_path):
    image(tmp_path / "imagesTr/a.nii.gz")
    listed = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": listed, "labels": {"0": "background"}}))
    manifest = scan(tmp_path)
    assert len(manifest.cases) == 1 and not problem(manifest, "labelsTr/a.nii.gz").aside


def test_bad_folders(tmp_path):
    with pytest.raises(MedclError, match="no such folder"):
        scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedclError, match=r"no volumes found\. Looked for \.nii, .*DICOM"):
        scan(tmp_path / "empty")


def test_an_unreadable_folder_is_told_and_passed_over(tmp_path, monkeypatch):
    image(tmp_path / "s1.nii")
    image(tmp_path / "locked/s2.nii", 1)
    real = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    manifest = scan(tmp_path)
    assert len(manifest.cases) == 1 and "Permission denied" in problem(manifest, "locked").what
    with pytest.raises(MedclError, match=r"cannot be read \(Permission denied\)"):
        scan(tmp_path / "locked")


def test_links_are_followed_once_and_dangling_ones_told(tmp_path):
    image(tmp_path / "real/s1.nii")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/lost.nii").symlink_to(tmp_path / "gone.nii")
    manifest = scan(tmp_path / "data")
    assert [case.image[0] for case in manifest.cases] == ["link/s1.nii"]
    assert "link to nothing" in problem(manifest, "lost.nii").what


def test_a_single_file(tmp_path):
    image(tmp_path / "s1.nii")
    image(tmp_path / "s2.nii", 1)
    manifest = scan(tmp_path / "s2.nii")
    assert [case.image[0] for case in manifest.cases] == ["s2.nii"] and manifest.root == str(tmp_path)


def test_ct_is_guessed_from_air_and_from_names(tmp_path):
    array = np.random.default_rng(0).integers(-1024, 1500, (6, 7, 8)).astype(np.int16)
    write_nifti(tmp_path / "s1.nii", array, np.eye(4))
    image(tmp_path / "s2_T1w.nii")
    image(tmp_path / "s3.nii", 3)
    assert [case.modality for case in scan(tmp_path).cases] == ["CT", "MR", "unknown"]


# --- DICOM -------------------------------------------------------------------------------------------------------


def voxels(seed: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 999, (4, 5, count))


def test_series_are_grouped_by_uid_not_by_folder(tmp_path):
    write_series(tmp_path / "mixed", voxels(0), upright(6), names=[f"a{i}" for i in range(6)], uid="1.2.5")
    write_series(tmp_path / "mixed", voxels(1, 4), upright(4), names=[f"b{i}.dcm" for i in range(4)], uid="1.2.6")
    late = voxels(2, 8)
    write_series(tmp_path / "x", late[..., :4], upright(8)[:4], uid="1.2.7", numbers=range(1, 5))
    write_series(tmp_path / "y", late[..., 4:], upright(8)[4:], uid="1.2.7", numbers=range(5, 9))
    manifest = scan(tmp_path)
    assert manifest.problems == () and sorted(case.shape[2] for case in manifest.cases) == [4, 6, 8]
    assert len(manifest.subjects) == 1 and {case.modality for case in manifest.cases} == {"CT"}
    (long,) = [case for case in manifest.cases if case.shape[2] == 8]
    assert long.image[0] == "x/000.dcm" and long.image[-1] == "y/003.dcm"


def test_no_name_or_number_of_a_patient_reaches_the_manifest(tmp_path):
    write_series(tmp_path / "d", voxels(0), upright(6))
    scan(tmp_path).save(tmp_path / "manifest.json")
    text = (tmp_path / "manifest.json").read_text().lower()
    assert not any(word in text for word in ("doe", "jane", "4711")) and "thorax" in text
    assert scan(tmp_path).cases[0].subject.startswith("sub-") and len(scan(tmp_path).cases[0].subject) == 14


def test_localisers_captures_single_slices_and_bad_series_are_set_aside(tmp_path):
    def localiser(data, index):
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def capture(data, index):
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"

    write_series(tmp_path / "good", voxels(0), upright(6))
    write_series(tmp_path / "local", voxels(1, 3), upright(3), edit=localiser)
    write_series(tmp_path / "capture", voxels(2, 2), upright(2), edit=capture)
    write_series(tmp_path / "single", voxels(3, 1), upright(1))
    write_series(tmp_path / "hole", voxels(4, 12), upright(12))[6].unlink()
    write_series(tmp_path / "twice", voxels(5, 4), [*upright(3), upright(3)[2]])
    (tmp_path / "broken.dcm").write_bytes(b"not DICOM at all")
    (tmp_path / "empty.dcm").touch()
    manifest = scan(tmp_path)
    assert [Path(case.image[0]).parent.name for case in manifest.cases] == ["good"]
    told = {Path(problem.file).parts[0]: problem.what for problem in manifest.problems}
    assert "localiser (3 files)" in told["local"] and "secondary capture" in told["capture"]
    assert "single slice" in told["single"] and "slices missing" in told["hole"]
    assert "repeated" in told["twice"] and "not a DICOM" in told["broken.dcm"] and "0 bytes" in told["empty.dcm"]
    assert all(problem.aside for problem in manifest.problems) and manifest.layout == "dicom"


def test_dicom_found_by_content_with_uid_like_names(tmp_path):
    write_series(tmp_path, voxels(0), upright(6), names=[f"1.2.840.{i}" for i in range(6)])
    assert len(scan(tmp_path).cases) == 1


# --- the pool ----------------------------------------------------------------------------------------------------


def double_or_die(number: int) -> int:
    if number == 33:
        os._exit(9)
    return 2 * number


def test_a_worker_that_dies_loses_only_its_own_task(monkeypatch):
    monkeypatch.setattr(pool, "FEWEST", 2)
    done = pool.map_safely(double_or_die, list(range(60)), [-1] * 60, workers=2)
    assert done == [-1 if number == 33 else 2 * number for number in range(60)]


def test_processes_and_one_process_agree(tmp_path, monkeypatch):
    for number in range(6):
        image(tmp_path / f"s{number}.nii", number)
    (tmp_path / "empty.nii").touch()
    serial = scan(tmp_path, workers=1)
    monkeypatch.setattr(pool, "FEWEST", 2)
    assert scan(tmp_path, workers=2) == serial


# --- real data ---------------------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not REAL.exists(), reason="the real scans and slides do not lie beside this checkout")


@needs_data
def test_real_hippocampus():
    manifest = scan(REAL / "Task04_Hippocampus")
    assert len(manifest.cases) == len(manifest.subjects) == len(manifest.labelled) == 200 and manifest.problems == ()
    assert manifest.layout == "msd" and manifest.label_names == {0: "background", 1: "Anterior", 2: "Posterior"}
    assert max(case.intensity[2] for case in manifest.cases) > 1e6


@needs_data
def test_real_acdc_whose_patients_074_and_076_are_the_same_images():
    manifest = scan(REAL / "ACDC", voxels=False)
    assert len(manifest.cases) == len(manifest.labelled) == 138 and len(manifest.subjects) == 69
    assert all(nib.aff2axcodes(np.array(case.affine)) for case in manifest.cases)
    assert len(manifest.problems) == 2
    assert all("patient076" in problem.file and "patient074" in problem.what for problem in manifest.problems)


@needs_data
def test_real_head_ct():
    (case,) = scan(REAL / "dicom_ct_head").cases
    assert case.modality == "CT" and case.shape == (512, 611, 37) and len(case.image) == 28
    assert any("tilt of 18.5" in note for note in case.notes) and any(
        "resampled to every" in note for note in case.notes
    )


def test_a_label_map_of_background_only_is_warned_of(tmp_path):
    image(tmp_path / "a1.nii")
    label(tmp_path / "a1_seg.nii")
    image(tmp_path / "b2.nii", 7)
    label(tmp_path / "b2_seg.nii")
    seg = nib.load(tmp_path / "b2_seg.nii")
    nib.save(nib.Nifti1Image(np.zeros(seg.shape, np.uint8), seg.affine), tmp_path / "b2_seg.nii")
    manifest = scan(tmp_path)
    assert len(manifest.labelled) == 2 and len(manifest.problems) == 1
    told = problem(manifest, "b2_seg.nii")
    assert not told.aside and "background only" in told.what
