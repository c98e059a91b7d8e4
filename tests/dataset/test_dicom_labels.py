"""DICOM SEG objects as the label maps of their series."""

from __future__ import annotations

import numpy as np
import pytest
from dicom_seg import write_seg
from dicom_series import upright, write_series

from medcl.dataset.labels import read_label
from medcl.dataset.scan import scan
from medcl.io.volumes import read_volume
from medcl.store.plan import derive_plan
from medcl.store.prepare import load_case

SHAPE = (5, 6, 7)
POSITIONS = upright(7)


def masks(seed: int = 0) -> dict[int, np.ndarray]:
    """Two structures that share no voxel; the first and the last slice are empty."""
    values = np.random.default_rng(seed).integers(0, 3, SHAPE)
    values[..., [0, -1]] = 0
    return {number: values == number for number in (1, 2)}


def truth(seed: int = 0) -> np.ndarray:
    return masks(seed)[1] + 2 * masks(seed)[2]


def ct(folder, uid: str = "1.2.5", seed: int = 9, positions=POSITIONS):
    return write_series(folder, np.random.default_rng(seed).integers(0, 999, SHAPE), positions, uid=uid)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("voxels", [True, False])
def test_a_seg_object_is_the_label_map_of_its_series(tmp_path, kind, voxels):
    ct(tmp_path / "ct")
    ct(tmp_path / "other", "1.2.6", 8)
    write_seg(tmp_path / "seg.dcm", masks(), POSITIONS, "1.2.5", names={1: "liver", 2: "tumour"}, kind=kind)
    manifest = scan(tmp_path, voxels=voxels)
    assert manifest.problems == () and len(manifest.cases) == 2
    (case,) = manifest.labelled
    assert case.label == "seg.dcm" and case.image[0].startswith("ct/") and "labels are SEG objects" in manifest.rule
    assert manifest.label_names == {1: "liver", 2: "tumour"}
    label, image = read_label(manifest, case), read_volume(manifest.image_paths(case))
    assert np.array_equal(label.array, truth()) and np.array_equal(label.affine, image.affine)
    assert np.array_equal(np.unique(load_case(manifest, case)[1]), [0, 1, 2])
    assert derive_plan(manifest).labels == {1: "liver", 2: "tumour"}


def test_several_objects_of_one_series_are_told_and_none_is_taken(tmp_path):
    ct(tmp_path / "ct")
    for seed in range(2):
        write_seg(tmp_path / f"seg{seed}.dcm", masks(seed), POSITIONS, "1.2.5")
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert not manifest.labelled and problem.what.startswith(f"2 DICOM SEG objects of {manifest.cases[0].id}")


def test_one_number_for_two_structures_is_told_and_none_is_taken(tmp_path):
    for index, name in enumerate(("liver", "spleen")):
        ct(tmp_path / name, f"1.2.{index + 5}", seed=index)
        write_seg(tmp_path / f"{name}.dcm", masks(), POSITIONS, f"1.2.{index + 5}", names={1: name})
    manifest = scan(tmp_path)
    assert not manifest.labelled and len(manifest.cases) == 2 and manifest.label_names == {}
    assert "segment 1 is 'spleen' here and 'liver' in liver.dcm" in manifest.problems[0].what
    assert manifest.problems[1].what.startswith("2 DICOM SEG objects of")


def overlap(data):
    data.PixelData = b"\xff" * len(data.PixelData)


def fraction(data):
    data.SegmentationType = "FRACTIONAL"


def larger(data):
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [2.0, 1.0]


def moved(data):
    for frame in data.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence[0].ImagePositionPatient[0] += 0.5


def turned(data):
    data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def unplaced(data):
    del data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


def cut(data):
    data.PixelData = data.PixelData[:4]


@pytest.mark.parametrize(
    ("edit", "words"),
    [(overlap, "segments overlap"), (fraction, "of type FRACTIONAL"), (larger, "another grid"), (moved, "another grid"),
     (turned, "another grid"), (unplaced, "another grid"), (cut, "truncated")],
)  # fmt: skip
def test_what_cannot_be_placed_is_told_and_the_image_kept(tmp_path, edit, words):
    ct(tmp_path / "ct")
    write_seg(tmp_path / "seg.dcm", masks(), POSITIONS, "1.2.5", edit=edit)
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert problem.file == "seg.dcm" and words in problem.what and "kept as unlabelled" in problem.what
    assert len(manifest.cases) == 1 and not manifest.labelled


def test_a_series_that_is_resampled_takes_no_seg(tmp_path):
    uneven = [(0.0, 0.0, float(height)) for height in (0, 2, 4, 6, 9, 12, 15)]
    ct(tmp_path / "ct", positions=uneven)
    write_seg(tmp_path / "seg.dcm", masks(), uneven, "1.2.5")
    (problem,) = scan(tmp_path).problems
    assert "brought onto another grid" in problem.what


def test_a_seg_of_a_series_that_is_not_here(tmp_path):
    write_seg(tmp_path / "seg.dcm", masks(), POSITIONS, "1.2.5")
    (problem,) = scan(tmp_path).problems
    assert problem.what == "1 DICOM SEG object of 1 series not found here: not read as label maps"


def test_a_table_names_seg_objects_as_label_maps(tmp_path):
    ct(tmp_path / "ct")
    for seed in range(2):  # two readers: only a table can say which counts
        write_seg(tmp_path / f"seg{seed}.dcm", masks(seed), POSITIONS, "1.2.5", names={1: "liver", 2: f"tumour {seed}"})
    (tmp_path / "cases.csv").write_text("image,label\nct,seg1.dcm\n")
    manifest = scan(tmp_path / "cases.csv")
    assert manifest.problems == () and manifest.label_names == {1: "liver", 2: "tumour 1"}
    assert np.array_equal(read_label(manifest, manifest.cases[0]).array, truth(1))
