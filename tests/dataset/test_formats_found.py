"""Scanning folders of every format: what is read, what is listed, and volumes in two files."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from volumes import rng_array

from medcl.dataset.scan import scan
from medcl.io.nifti import write_nifti
from medcl.store.plan import derive_plan
from medcl.store.prepare import ContentKeys, case_key

AFFINE = np.diag([1, 1.5, 2.5, 1])


def test_every_format_that_is_read_is_a_case(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for index, kind in enumerate((nib.MGHImage, nib.Nifti1Pair, nib.AnalyzeImage)):
        nib.save(kind(rng_array(seed=index), AFFINE), tmp_path / ("s1.mgz", "s2.hdr", "s3.hdr")[index])
    nib.save(nib.Nifti1Image(rng_array(seed=3), AFFINE), tmp_path / "s4.nii.bz2")
    tifffile.imwrite(tmp_path / "s5.tif", rng_array(seed=4))
    for index, name in enumerate(("s6.mhd", "s7.nhdr")):
        sitk.WriteImage(sitk.GetImageFromArray(rng_array(seed=5 + index)), str(tmp_path / name))
    manifest = scan(tmp_path)
    assert {case.id: case.format for case in manifest.cases} == {
        "s1": "mgh", "s2": "analyze", "s3": "analyze", "s4": "nifti", "s5": "tiff", "s6": "meta", "s7": "nrrd",
    }  # fmt: skip
    assert manifest.problems == ()  # neither .img nor .raw is listed beside its header
    files = {case.id: len(case.image) for case in manifest.cases}
    assert files == {"s1": 1, "s2": 2, "s3": 2, "s4": 1, "s5": 1, "s6": 2, "s7": 2}


def test_what_is_passed_over_is_one_line_for_each_ending(tmp_path):
    write_nifti(tmp_path / "s1.nii", rng_array(), AFFINE)
    for index in range(12):
        np.save(tmp_path / f"a{index}.npy", rng_array())
    passed = ["b.NPZ", "c.jpg", "d.zip", "e.tar.gz", "f.v", "g.ecat", "h.vtk", "i.gipl.gz", "k.img", "l.rec", "m.raw"]
    passed += ["n.nii.xz", "o.czi", "p.mif"]
    for name in (*passed, "slice1.png", "slice2.png", "notes.txt", "README.md", "q.json"):
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "r.hdr").write_bytes(b"x" * 348)
    manifest = scan(tmp_path)
    assert [case.id for case in manifest.cases] == ["s1"]
    told = {problem.file: problem.what for problem in manifest.problems}
    assert told.pop("r.hdr") == "has no file of voxels (r.img) beside it"
    assert told["a0.npy"] == "12 .npy files are passed over (NumPy arrays hold no spacing or orientation)"
    assert told["slice1.png"].startswith("2 .png files are") and told["b.NPZ"].startswith("1 .npz file is passed over")
    assert set(told) == {"a0.npy", "slice1.png", *passed}
    assert all(problem.remedy and problem.aside for problem in manifest.problems)


def test_a_folder_or_a_file_of_a_format_that_is_not_read_says_so(tmp_path):
    np.save(tmp_path / "a.npy", rng_array())
    for source in (tmp_path, tmp_path / "a.npy"):
        manifest = scan(source)
        assert manifest.cases == () and "1 .npy file is passed over" in manifest.problems[0].what


def test_a_single_volume_in_two_files_by_either_name(tmp_path):
    nib.save(nib.Nifti1Pair(rng_array(), AFFINE), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        manifest = scan(tmp_path / name)
        assert [case.image for case in manifest.cases] == [("a.hdr", "a.img")] and manifest.problems == ()


@pytest.mark.parametrize("suffix", [".hdr", ".mhd", ".nhdr"])
def test_equal_headers_make_no_twins_and_equal_volumes_do(tmp_path, suffix):
    for index, name in enumerate(("p1", "p2", "p3")):
        (tmp_path / name).mkdir()
        array = rng_array(seed=index)
        if suffix == ".hdr":
            nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / name / "scan.hdr")
        else:
            sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name / f"scan{suffix}"))
    shutil.copytree(tmp_path / "p3", tmp_path / "p4")
    headers = {path.read_bytes() for path in tmp_path.glob(f"*/scan{suffix}")}
    assert len(headers) == 1
    manifest = scan(tmp_path, voxels=False)
    assert [case.subject for case in manifest.cases] == ["p1", "p2", "p3"]
    (twin,) = manifest.problems
    assert twin.file == f"p4/scan{suffix}" and "same image as p3" in twin.what


def test_a_prepared_volume_is_keyed_by_the_file_of_voxels(tmp_path):
    for name, array in (("images/a", rng_array()), ("labels/a", np.abs(rng_array()) % 3)):
        (tmp_path / name).parent.mkdir()
        nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / f"{name}.hdr")
    manifest = scan(tmp_path)
    (case,) = manifest.labelled
    plan = derive_plan(manifest)
    keys = [case_key(manifest, case, plan, ContentKeys(tmp_path / "store"))]
    for name in ("images/a.img", "labels/a.img"):
        raw = bytearray((tmp_path / name).read_bytes())
        raw[-1] ^= 1
        (tmp_path / name).write_bytes(raw)
        keys.append(case_key(manifest, case, plan, ContentKeys(tmp_path / "store")))
    assert len(set(keys)) == 3


def test_spacings_of_nanometres_reach_case_and_plan(tmp_path):
    for index in range(2):
        image = nib.Nifti1Image(rng_array(seed=index), np.diag([4, 4, 30, 1]))
        image.header.set_xyzt_units("micron")
        image.set_sform(np.diag([0.004, 0.004, 0.03, 1]), 1)
        nib.save(image, tmp_path / f"s{index}.nii")
    manifest = scan(tmp_path)
    assert {case.spacing for case in manifest.cases} == {(4e-6, 4e-6, 3e-5)}
    assert derive_plan(manifest).spacing == (4e-6, 4e-6, 3e-5)


def test_data_files_that_lie_elsewhere_are_found(tmp_path):
    for index, place in enumerate((tmp_path / "scans/raw", tmp_path / "away")):
        place.mkdir(parents=True)
        rng_array(seed=index).tofile(place / "v.bin")
    head = "NDims = 3\nDimSize = 7 6 5\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = "
    (tmp_path / "scans/inside.mhd").write_text(f"{head}raw/v.bin\n")
    (tmp_path / "scans/outside.mhd").write_text(f"{head}{tmp_path / 'away/v.bin'}\n")
    inside, outside = scan(tmp_path / "scans").cases
    assert inside.image == ("inside.mhd", "raw/v.bin") and outside.image == (
        "outside.mhd",
        str(tmp_path / "away/v.bin"),
    )


def test_a_table_may_name_the_file_of_voxels(tmp_path):
    for name, array in (("a", rng_array()), ("b", np.abs(rng_array()) % 3)):
        nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / f"{name}.hdr")
    (tmp_path / "table.csv").write_text("image,label\na.img,b.img\n")
    (case,) = scan(tmp_path / "table.csv").labelled
    assert case.image == ("a.hdr", "a.img") and case.label == "b.hdr" and case.format == "analyze"
