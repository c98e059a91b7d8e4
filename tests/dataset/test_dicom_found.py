"""DICOM as hospitals have it: without preamble, packed, copied, patients in one series, mosaics, segmentations."""

from __future__ import annotations

import gzip
import re
import shutil

import numpy as np
import pydicom
import pytest
from dicom_series import upright, write_series
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from medcl.dataset.case import Manifest
from medcl.dataset.scan import scan
from medcl.io.volumes import read_volume


def voxels(seed: int = 0, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 999, (4, 5, count))


def read(manifest: Manifest, index: int = 0) -> np.ndarray:
    return read_volume(manifest.image_paths(manifest.cases[index])).array


def strip(path, syntax, header: bool) -> None:
    """Writes a file again without its preamble, and with or without the header that names its transfer syntax."""
    data = pydicom.dcmread(path)
    if syntax == ExplicitVRBigEndian:
        data["PixelData"].value = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
    data.file_meta.TransferSyntaxUID = syntax
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    bare = path.with_suffix(".bare")
    if header:
        pydicom.dcmwrite(bare, data, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
        path.write_bytes(bare.read_bytes()[132:])
    else:
        plain = Dataset(data)
        pydicom.dcmwrite(bare, plain, implicit_vr=implicit, little_endian=little)
        assert bare.read_bytes()[:2] == (b"\x08\0" if little else b"\0\x08")
        path.write_bytes(bare.read_bytes())
    bare.unlink()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_preamble(tmp_path, syntax, header, named):
    names = [f"{index}.dcm" if named else f"IM{index}" for index in range(6)]
    for path in write_series(tmp_path, voxels(), upright(6), names=names):
        strip(path, syntax, header)
    manifest = scan(tmp_path)
    assert manifest.problems == () and len(manifest.cases) == 1
    assert np.array_equal(read(manifest), voxels() - 1024) and manifest.cases[0].modality == "CT"


def test_files_that_only_begin_like_dicom(tmp_path):
    write_series(tmp_path / "good", voxels(), upright(6))
    (tmp_path / "README").write_text("About these scans")
    (tmp_path / "counts").write_bytes(np.arange(2, 300, dtype="<u2").tobytes())
    (tmp_path / "LICENSE").write_bytes(b"\x08\0\0\0")
    (tmp_path / "a.dcm").write_bytes(b"\x08\0\x05\0CS\x02\0AB" + b"x" * 50)
    manifest = scan(tmp_path)
    assert len(manifest.cases) == 1 and [problem.file for problem in manifest.problems] == ["a.dcm"]


def test_packed_files(tmp_path):
    for path in write_series(tmp_path, voxels(), upright(6)):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert np.array_equal(read(scan(tmp_path)), voxels() - 1024)
    first = tmp_path / "000.dcm.gz"
    first.write_bytes(first.read_bytes()[:200])
    (problem,) = [problem for problem in scan(tmp_path).problems if problem.file == first.name]
    assert problem.aside


def test_copies_in_another_folder_are_noted_and_the_series_kept(tmp_path):
    write_series(tmp_path / "a", voxels(), upright(6))
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    manifest = scan(tmp_path)
    (case,) = manifest.cases
    assert manifest.problems == () and len(case.image) == 6
    assert case.notes == ("6 files are copies of other slices (equal SOPInstanceUID) and passed over",)
    assert np.array_equal(read(manifest), voxels() - 1024)


def test_patients_under_one_series_uid_are_kept_apart(tmp_path):
    def second(data, index):
        data.PatientID, data.PatientName = "MRN-4712", "Roe^Richard"

    write_series(tmp_path / "mixed", voxels(0), upright(6), uid="1.2.9")
    write_series(tmp_path / "mixed", voxels(1), upright(6), uid="1.2.9", edit=second,
                 names=[f"b{index}.dcm" for index in range(6)])  # fmt: skip
    manifest = scan(tmp_path)
    assert len(manifest.cases) == len(manifest.subjects) == len({case.id for case in manifest.cases}) == 2
    found = sorted(read(manifest, index).tobytes() for index in range(2))
    assert found == sorted((voxels(seed) - 1024).astype(np.int16).tobytes() for seed in range(2))
    (problem,) = manifest.problems
    assert "holds slices of 2 patients" in problem.what and not problem.aside


def test_mosaics_are_named_as_such(tmp_path):
    def mosaic(data, index):
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]

    write_series(tmp_path, voxels(), upright(6), edit=mosaic)
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert manifest.cases == () and "Siemens mosaic" in problem.what and "6 files" in problem.what
    assert "dcm2niix" in problem.remedy


@pytest.mark.parametrize(("modality", "found"), [("PT", "PET"), ("NM", "unknown"), ("XA", "unknown"), ("MR", "MR")])
def test_only_ct_takes_the_hu_window(tmp_path, modality, found):
    def edit(data, index):
        data.Modality = modality

    write_series(tmp_path, voxels(), upright(6), edit=edit)
    (case,) = scan(tmp_path).cases
    assert case.modality == found and case.intensity[0] <= -500  # where a guess by air would say CT


def outline(path, kind: str, series: str) -> None:
    data, referred = Dataset(), Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID = generate_uid(), "1.2.3"
    data.PatientID, data.Modality = "MRN-4711", kind
    referred.SeriesInstanceUID = series
    if kind == "SEG":
        data.Rows = data.Columns = 4
        data.ReferencedSeriesSequence = [referred]
    else:
        study, frame = Dataset(), Dataset()
        study.RTReferencedSeriesSequence = [referred]
        frame.RTReferencedStudySequence = [study]
        data.ReferencedFrameOfReferenceSequence = [frame]
    data.ensure_file_meta()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)


def test_segmentation_objects_are_one_line_a_kind_with_what_they_outline(tmp_path):
    write_series(tmp_path / "ct", voxels(), upright(6), uid="1.2.9")
    for index in range(3):
        outline(tmp_path / f"seg{index}.dcm", "SEG", "1.2.9")
    outline(tmp_path / "plan.dcm", "RTSTRUCT", "1.2.9")
    outline(tmp_path / "other.dcm", "RTSTRUCT", "1.2.10")
    manifest = scan(tmp_path)
    (case,) = manifest.cases
    seg, struct = manifest.problems
    assert seg.what == f"3 DICOM SEG objects of {case.id}: not read as label maps" and "dcmqi" in seg.remedy
    assert struct.what == f"2 DICOM RTSTRUCT objects of {case.id} and 1 series not found here: not read as label maps"
    assert not re.search("doe|jane|4711", str(manifest.problems).lower())
