from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REAL

from medcl.dataset import layouts, naming
from medcl.errors import MedclError

NOWHERE = Path("/nowhere")


def told(*files: str, root: Path = NOWHERE, channel: int | None = None) -> layouts.Layout:
    return layouts.detect(root, files, channel)


def pairs(layout: layouts.Layout) -> dict[str, str | None]:
    return {case.image[0]: case.label for case in layout.cases}


def subjects(layout: layouts.Layout) -> dict[str, str]:
    return {case.image[0]: case.subject for case in layout.cases}


def write(root: Path, data: object) -> Path:
    (root / "dataset.json").write_text(json.dumps(data))
    return root


# --- Decathlon and nnU-Net -----------------------------------------------------------------------------------------


def msd(**more: object) -> dict[str, object]:
    names = [f"heart_{number:02}.nii.gz" for number in (1, 2)]
    return {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "left atrium"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/heart_03.nii.gz"],
        **more,
    }


def test_decathlon(tmp_path):
    files = [
        "imagesTr/heart_01.nii.gz",
        "imagesTr/heart_02.nii.gz",
        "imagesTs/heart_03.nii.gz",
        "labelsTr/heart_01.nii.gz",
        "labelsTr/heart_02.nii.gz",
    ]
    layout = told(*files, root=write(tmp_path, msd()))
    assert layout.name == "msd" and layout.label_names == {0: "background", 1: "left atrium"}
    assert [case.id for case in layout.cases] == ["heart_01", "heart_02", "heart_03"]
    assert [case.split for case in layout.cases] == ["train", "train", "test"]
    assert [case.label for case in layout.cases] == ["labelsTr/heart_01.nii.gz", "labelsTr/heart_02.nii.gz", None]
    assert {case.modality for case in layout.cases} == {"CT"} and len({c.subject for c in layout.cases}) == 3
    assert layout.problems == () and "names no people" in layout.rule


def test_decathlon_tells_what_is_missing_and_what_is_left_over(tmp_path):
    files = ["imagesTr/heart_01.nii.gz", "labelsTr/heart_09.nii.gz"]
    layout = told(*files, root=write(tmp_path, msd(test=[])))
    assert pairs(layout) == {"imagesTr/heart_01.nii.gz": None}
    by_file = {problem.file: problem for problem in layout.problems}
    assert "label map is missing" in by_file["labelsTr/heart_01.nii.gz"].what
    assert not by_file["labelsTr/heart_01.nii.gz"].aside
    assert "missing" in by_file["imagesTr/heart_02.nii.gz"].what
    assert "no image matches" in by_file["labelsTr/heart_09.nii.gz"].what


def test_decathlon_one_folder_down(tmp_path):
    (tmp_path / "Task02").mkdir()
    write(tmp_path / "Task02", msd())
    layout = told("Task02/imagesTr/heart_01.nii.gz", "Task02/labelsTr/heart_01.nii.gz", root=tmp_path)
    assert layout.name == "msd"
    assert pairs(layout) == {"Task02/imagesTr/heart_01.nii.gz": "Task02/labelsTr/heart_01.nii.gz"}


def test_damaged_dataset_json_is_one_line(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(MedclError, match=r"dataset\.json"):
        told("imagesTr/a.nii.gz", root=tmp_path)


@pytest.mark.parametrize("channel", [None, 1])
def test_nnunet(tmp_path, channel):
    data = {
        "file_ending": ".nii.gz",
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "tumour": 1, "whole": [1, 2]},
    }
    files = [f"imagesTr/{case}_000{c}.nii.gz" for case in ("brain_001", "brain_002") for c in (0, 1)]
    layout = told(*files, "labelsTr/brain_001.nii.gz", root=write(tmp_path, data), channel=channel)
    assert layout.label_names == {0: "background", 1: "tumour"}
    number = channel or 0
    assert pairs(layout) == {
        f"imagesTr/brain_001_000{number}.nii.gz": "labelsTr/brain_001.nii.gz",
        f"imagesTr/brain_002_000{number}.nii.gz": None,
    }
    assert [case.id for case in layout.cases] == ["brain_001", "brain_002"]
    assert layout.cases[0].modality == "MR" and f"channel file {number} of 2" in layout.cases[0].notes[0]
    assert [problem.file for problem in layout.problems] == ["labelsTr/brain_002.nii.gz"]


def test_nnunet_frames_of_a_patient_stay_together(tmp_path):
    data = {"file_ending": ".nii.gz", "channel_names": {"0": "cine"}, "labels": {"background": 0}}
    files = [f"imagesTr/patient00{p}_frame0{f}_0000.nii.gz" for p in (1, 2) for f in (1, 9)]
    layout = told(*files, root=write(tmp_path, data))
    assert sorted(set(subjects(layout).values())) == ["patient001", "patient002"] and len(layout.cases) == 4


# --- ACDC and BIDS -------------------------------------------------------------------------------------------------


def test_acdc():
    files = [f"training/patient00{p}/patient00{p}_{rest}.nii.gz" for p in (1, 2)
             for rest in ("4d", "frame01", "frame01_gt", "frame12", "frame12_gt")]  # fmt: skip
    layout = told(*files)
    assert layout.name == "acdc" and layout.label_names[2] == "myocardium"
    assert len(layout.cases) == 4 and not any("4d" in case.image[0] for case in layout.cases)
    for case in layout.cases:
        assert case.label == case.image[0].replace(".nii", "_gt.nii") and case.split == "train"
        assert case.subject == case.image[0].split("/")[1]


def test_acdc_missing_label_is_told():
    layout = told(*(f"training/patient001/patient001_{rest}.nii.gz" for rest in ("frame01", "frame01_gt", "frame12")))
    (problem,) = layout.problems
    assert problem.file == "training/patient001/patient001_frame12_gt.nii.gz" and not problem.aside


def test_bids_sessions_stay_together_and_derivatives_give_labels(tmp_path):
    (tmp_path / "derivatives/manual").mkdir(parents=True)
    (tmp_path / "derivatives/manual/dseg.tsv").write_text("index\tname\n0\tbackground\n1\tlesion\n")
    files = [
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
        "derivatives/manual/sub-02/anat/sub-02_label-lesion_mask.nii.gz",
        "derivatives/manual/sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
    ]
    layout = told(*files, root=tmp_path)
    assert layout.name == "bids" and layout.label_names == {0: "background", 1: "lesion"}
    assert pairs(layout) == {files[0]: files[5], files[1]: None, files[2]: None, files[3]: files[6]}
    assert sorted(set(subjects(layout).values())) == ["sub-01", "sub-02"]
    assert "1 files outside anat" in layout.rule


def test_bids_second_label_and_orphan_are_told():
    files = ["sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_dseg.nii.gz", "sub-1/anat/sub-1_label-x_mask.nii.gz"]
    layout = told(*files, "sub-2/anat/sub-2_dseg.nii.gz")
    assert pairs(layout) == {files[0]: files[1]}
    assert {problem.file for problem in layout.problems} == {files[2], "sub-2/anat/sub-2_dseg.nii.gz"}


# --- by names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, label",
    [
        ("images/a1.nii", "labels/a1.nii"),
        ("imagesTr/a1.nii.gz", "labelsTr/a1.nii.gz"),
        ("imagesTr/a1_0000.nii.gz", "labelsTr/a1.nii.gz"),
        ("set/img/img0001.nii", "set/label/label0001.nii"),
        ("a1.nii", "masks/a1_mask.nii"),
        ("scans/a1.mha", "segmentations/a1.nrrd"),
        ("a1.nii.gz", "a1_seg.nii.gz"),
        ("a1.nii.gz", "a1_labels.nii.gz"),
        ("a1.nii.gz", "a1-label.nii.gz"),
        ("a1.nii.gz", "a1_gt.nii.gz"),
        ("a1.nrrd", "a1.seg.nrrd"),
        ("a1_image.nii", "a1_mask.nii"),
        ("volume-12.nii", "segmentation-12.nii"),
        ("p1/T1.nii", "p1/mask.nii"),
    ],
)
def test_labels_by_folder_or_name(image, label):
    other = {"images": "images/b2.nii"}.get(image.split("/")[0], image.replace("1", "7"))
    layout = told(image, label, other)
    assert layout.name == "names" and pairs(layout) == {image: label, other: None} and layout.problems == ()


def test_one_label_serves_every_modality_of_its_subject():
    layout = told("x1/x1_t1.nii", "x1/x1_flair.nii", "x1/x1_seg.nii", "x2/x2_t1.nii")
    assert pairs(layout) == {"x1/x1_t1.nii": "x1/x1_seg.nii", "x1/x1_flair.nii": "x1/x1_seg.nii", "x2/x2_t1.nii": None}
    assert sorted(set(subjects(layout).values())) == ["x1", "x2"]


def test_a_label_never_fits_another_number():
    layout = told(
        "imagesTr/case_0001.nii", "imagesTr/case_0002.nii", "labelsTr/case_0003.nii", "labelsTr/case_0001.nii"
    )
    assert pairs(layout) == {"imagesTr/case_0001.nii": "labelsTr/case_0001.nii", "imagesTr/case_0002.nii": None}
    assert [problem.file for problem in layout.problems] == ["labelsTr/case_0003.nii"]


def test_train_labels_do_not_fit_test_images_of_the_same_name():
    layout = told("imagesTr/1.nii", "imagesTs/1.nii", "labelsTr/1.nii")
    assert pairs(layout) == {"imagesTr/1.nii": "labelsTr/1.nii", "imagesTs/1.nii": None}
    assert {case.image[0]: case.split for case in layout.cases} == {"imagesTr/1.nii": "train", "imagesTs/1.nii": "test"}


@pytest.mark.parametrize(
    "files, expected",
    [
        (["hippocampus_001.nii", "hippocampus_002.nii"], 2),
        (["case_0001.nii", "case_0002.nii", "case_0010.nii"], 3),
        (["p7_frame01.nii", "p7_frame12.nii", "p8_frame01.nii"], 2),
        (["IXI002-Guys-T1.nii", "IXI002-Guys-T2.nii", "IXI012-HH-T1.nii"], 2),
        (["k1_left.nii", "k1_right.nii"], 1),
        (["k1_ses-1.nii", "k1_ses-2.nii", "k1_baseline.nii"], 1),
        (["a/brain.nii", "b/brain.nii"], 2),
        (["a/ses1/T1.nii", "a/ses2/T1.nii", "b/ses1/T1.nii"], 2),
        (["sub-01/x.nii", "sub-01/y.nii", "sub-02/x.nii"], 2),
        (["imagesTr/x1_0000.nii", "imagesTr/x1_0001.nii", "imagesTr/x2_0000.nii"], 2),
        (["patient07/ct.nii", "patient07/late/ct.nii", "patient08/ct.nii"], 2),
    ],
)
def test_subjects_by_name(files, expected):
    assert len(set(subjects(told(*files)).values())) == expected


def test_when_in_doubt_every_file_is_its_own_subject_and_the_rule_says_so():
    assert "every file is its own subject" in told("qx81.nii", "zz92.nii").rule
    assert "every file is its own subject" not in told("qx81_t1.nii", "qx81_t2.nii").rule


def test_ids_are_unique_and_safe():
    layout = told("a/scan 1.nii", "b/scan 1.nii", "b/scan 1.nrrd", "c/é?.nii")
    ids = [case.id for case in layout.cases]
    assert len(set(ids)) == 4 and all(id == naming.safe(id) and "/" not in id and " " not in id for id in ids)


def test_modality_by_name():
    assert [naming.modality(name) for name in ("x/s1_ct.nii", "a_T1w.nii", "b_flair.nii", "action.nii")] == [
        "CT", "MR", "MR", "unknown"]  # fmt: skip


@pytest.mark.skipif(not (REAL / "ACDC").exists(), reason="the real scans and slides do not lie beside this checkout")
def test_real_acdc_paths():
    files = [path.relative_to(REAL / "ACDC").as_posix() for path in (REAL / "ACDC").rglob("*.nii.gz")]
    layout = told(*files, root=REAL / "ACDC")
    assert layout.name == "acdc" and layout.problems == ()
    assert len(layout.cases) == 140 and len(set(subjects(layout).values())) == 70
    assert all(case.label for case in layout.cases)


def test_bids_functional_masks_do_not_change_the_layout():
    files = ["sub-1/anat/sub-1_T1w.nii.gz", "derivatives/fmriprep/sub-1/func/sub-1_task-rest_desc-brain_mask.nii.gz"]
    assert told(*files).name == "bids"
    assert told(*files, "derivatives/lesions/sub-1/sub-1_msk.nii.gz").name == "names"
