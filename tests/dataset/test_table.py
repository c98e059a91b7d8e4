from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import REAL
from public_layouts import image, label, made, people, simple, write

from medcl.config import ScanConfig
from medcl.dataset.case import Manifest
from medcl.dataset.labels import read_label
from medcl.dataset.scan import scan
from medcl.dataset.splits import make_split
from medcl.dataset.table import write_table
from medcl.errors import MedclError
from medcl.store.stage import load_source
from medcl.store.stage import scan as scan_stage


def table(root: Path, *lines: str, name: str = "cases.csv") -> Path:
    path = root / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / f"a/x{number}.nii.gz", image(number))
        write(tmp_path / f"b/y{number}.nii.gz", label(number, binary=False))
    return tmp_path


def test_a_table_beats_every_guess(scans):
    """Names say four subjects and no labels; the table says two, with labels, a split and targets."""
    lines = ["image,label,subject,session,site,modality,split,age,grade"]
    lines += [
        f"a/x{n}.nii.gz,b/y{n}.nii.gz,{'ab'[n // 2]},{n % 2},Bern,CT,{('train', 'test')[n // 2]},{40 + n},"
        for n in range(4)
    ]
    for source in (scans, table(scans, *lines)):
        manifest = scan(source, table=scans / "cases.csv", workers=1) if source == scans else load_source(str(source))
        assert [(case.image[0], case.label) for case in manifest.cases] == [
            (f"a/x{n}.nii.gz", f"b/y{n}.nii.gz") for n in range(4)
        ]
        assert [case.subject for case in manifest.cases] == ["a", "a", "b", "b"] and manifest.layout == "table"
        assert {case.modality for case in manifest.cases} == {"CT"} and manifest.cases[1].session == "1"
        assert manifest.cases[3].targets == (("age", "43"),) and manifest.cases[0].site == "Bern"
        assert make_split(manifest).test == ("b",) and manifest.problems == ()
        manifest.save(scans / "manifest.json")
        assert Manifest.load(scans / "manifest.json") == manifest


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_only_the_image_is_required(scans, separator):
    table(scans, f"Image{separator}", *(f"a/x{n}.nii.gz{separator}" for n in (2, 0)))
    manifest = load_source(str(scans / "cases.csv"))
    assert [case.subject for case in manifest.cases] == ["x0", "x2"] and manifest.labelled == ()


def test_paths_start_at_the_table_or_at_the_folder(scans, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    table(elsewhere, "image,subject", "a/x1.nii.gz,p")
    assert scan(scans, table=elsewhere / "cases.csv", workers=1).cases[0].subject == "p"
    table(elsewhere, "image,subject", f"{scans}/a/x1.nii.gz,p")
    manifest = load_source(str(elsewhere / "cases.csv"))
    assert manifest.image_paths(manifest.cases[0])[0].resolve() == scans / "a/x1.nii.gz"


def test_channels_are_volumes_of_one_subject_with_one_label(scans):
    table(scans, "image:T1,image:FLAIR,label,subject", "a/x0.nii.gz,a/x1.nii.gz,b/y0.nii.gz,p")
    manifest = load_source(str(scans / "cases.csv"))
    assert [(case.subject, case.label, case.notes) for case in manifest.cases] == [
        ("p", "b/y0.nii.gz", ("channel T1",)),
        ("p", "b/y0.nii.gz", ("channel FLAIR",)),
    ]


def test_masks_become_one_label_map_and_overlaps_are_told(scans):
    liver, spleen = np.zeros((12, 10, 8), np.uint8), np.zeros((12, 10, 8), np.uint8)
    liver[2:6, 2:6, 2:6], spleen[5:9, 5:9, 5:7] = 1, 255
    write(scans / "m/liver.nii.gz", liver)
    write(scans / "m/spleen.nii.gz", spleen)
    expected = np.where(spleen > 0, 2, liver)
    for lines in (
        ("image,label:spleen,label:liver", "a/x0.nii.gz,m/spleen.nii.gz,m/liver.nii.gz", "a/x1.nii.gz,,m/liver.nii.gz"),
        ("image,label", "a/x0.nii.gz,m", "a/x1.nii.gz,"),
    ):
        table(scans, *lines)
        manifest = scan(scans / "cases.csv", workers=1)
        assert manifest.label_names == {0: "background", 1: "liver", 2: "spleen"}
        merged = read_label(manifest, manifest.cases[0])
        if "label:liver" in lines[0]:
            assert manifest.cases[1].masks == (("liver", "m/liver.nii.gz"),)
            assert set(np.unique(merged.array)) == {0, 1, 2} and (merged.array > 0).sum() == (expected > 0).sum()
        else:
            assert np.array_equal(merged.array, expected)
        assert any("overlap in 1 voxels" in note for note in manifest.cases[0].notes)


@pytest.mark.parametrize(
    "lines, words",
    [
        ((), "is empty"),
        (("file,subject", "a/x0.nii.gz,p"), "no column `image`"),
        (("image,label,label:liver", "a/x0.nii.gz,,"), "both `label`"),
        (("image,image", "a/x0.nii.gz,"), "column image twice"),
        (("image,subject", "a/x0.nii.gz,p", "a/x0.nii.gz,q"), "twice"),
        (("image,subject", "a/x0.nii.gz,"), "line 2: has no subject"),
        (("image,modality", "a/x0.nii.gz,ultrasound"), "'ultrasound'.*MR, CT"),
        (("image,split", "a/x0.nii.gz,fold1"), "'fold1'.*train, val or test"),
        (("image,subject,split", "a/x0.nii.gz,p,train", "a/x1.nii.gz,p,test"), "subject p in test and train"),
        (("image,subject", "a/x0.nii.gz,p,q"), "line 2 has 3 cells"),
        (("image,Subject ID", "a/x0.nii.gz,p"), "column 'subject id' and no column 'subject'"),
        (("image,patient", "a/x0.nii.gz,p"), "no column 'subject'"),
        (("image,seg", "a/x0.nii.gz,b/y0.nii.gz"), "no column 'label'"),
        (("image,subject", "a/x0.nii.gz,Meier", "a/x1.nii.gz,meier"), "'Meier' and 'meier', which may be one"),
        (("image,subject", "a/x0.nii.gz,01", "a/x1.nii.gz,1.0"), "which may be one"),
        (("image,subject", "a/x0.nii.gz,M H", "a/x1.nii.gz,M-H"), "which may be one"),
        (("image", "a/none.nii.gz"), "no image that can be used"),
    ],
)
def test_what_a_table_cannot_mean_is_one_line(scans, lines, words):
    table(scans, *lines)
    with pytest.raises(MedclError, match=words) as error:
        load_source(str(scans / "cases.csv"))
    assert "\n" not in str(error.value)


def test_a_missing_file_does_not_stop_the_others(scans):
    table(scans, "image,label", "a/x0.nii.gz,b/none.nii.gz", "a/none.nii.gz,", "a/x1.nii.gz,b/y1.nii.gz", "cases.csv,")
    manifest = load_source(str(scans / "cases.csv"))
    assert [case.label for case in manifest.cases] == [None, "b/y1.nii.gz"]
    assert [problem.file for problem in manifest.problems] == ["b/none.nii.gz", "a/none.nii.gz", "cases.csv"]
    assert "line 2" in manifest.problems[0].what and "line 3" in manifest.problems[1].what


def test_an_image_that_looks_like_a_label_map_is_taken_at_the_tables_word(scans):
    table(scans, "image", "b/y0.nii.gz")
    assert len(scan(scans / "cases.csv", workers=1).cases) == 1


def test_a_written_table_says_what_was_found(tmp_path):
    images = simple("case_{p:03}/imaging.nii.gz", "case_{p:03}/segmentation.nii.gz", range(3), (7,))
    made(tmp_path, images)
    found = scan(tmp_path, workers=1)
    for where in (tmp_path / "cases.csv", tmp_path / "deep/er/cases.csv"):
        write_table(found, where)
        again = scan(where, workers=1)
        assert [(c.subject, c.shape, c.split, c.modality) for c in again.cases] == [
            (c.subject, c.shape, c.split, c.modality) for c in found.cases]  # fmt: skip
        assert [again.image_paths(c)[0].resolve() for c in again.cases] == [
            found.image_paths(c)[0] for c in found.cases
        ]
        assert [bool(c.label) for c in again.cases] == [bool(c.label) for c in found.cases]


def test_names_of_label_values_go_with_the_table(tmp_path):
    scans = tmp_path / "scans"
    made(scans, simple("imagesTr/s{p:03}.nii.gz", "labelsTr/s{p:03}.nii.gz", range(3)))
    (scans / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver", "2": "spleen"}}')
    found = scan(scans, workers=1)
    write_table(found, tmp_path / "elsewhere/cases.csv")
    again = scan(tmp_path / "elsewhere/cases.csv", workers=1)
    assert again.label_names == found.label_names == {0: "background", 1: "liver", 2: "spleen"}
    (tmp_path / "elsewhere/cases.labels.json").write_text('{"1": "liver"}')
    assert "holds 2, but" in scan(tmp_path / "elsewhere/cases.csv", workers=1).problems[0].what


def test_a_written_table_of_masks(tmp_path):
    made(
        tmp_path,
        people(
            range(3),
            lambda p: {
                f"s{p}/ct.nii.gz": (str(p), (f"s{p}/segmentations/liver.nii.gz", f"s{p}/segmentations/spleen.nii.gz"))
            },
        ),
        masks=True,
    )
    found = scan(tmp_path, workers=1)
    write_table(found, tmp_path / "cases.csv")
    assert "label:liver,label:spleen" in (tmp_path / "cases.csv").read_text()
    again = scan(tmp_path / "cases.csv", workers=1)
    assert again.label_names == found.label_names and [c.masks for c in again.cases] == [c.masks for c in found.cases]


def test_a_line_of_excel_and_backslashes(scans):
    table(scans, "sep=;", "image;subject", "a/x0.nii.gz;p", "a\\x1.nii.gz;q")
    manifest = load_source(str(scans / "cases.csv"))
    assert len(manifest.cases) == 1 and "slashes" in manifest.problems[0].remedy


def test_a_written_table_is_never_overwritten(scans):
    for _ in range(2):
        scan_stage(
            ScanConfig(
                str(scans), out=str(scans / "m.json"), write_table=str(scans / "mine.csv"), quick=True, workers=1
            )
        )
        (scans / "mine.csv").write_text("mended by hand")
    assert (scans / "mine.1.csv").read_text() == "mended by hand"


def test_scan_keeps_a_manifest_that_differs(scans):
    out = scans / "manifest.json"
    out.write_text('{"mine": 1}')
    for _ in range(2):
        scan_stage(ScanConfig(str(scans), out=str(out), quick=True, workers=1, json=True))
    assert (scans / "manifest.1.json").read_text() == '{"mine": 1}' and not (scans / "manifest.2.json").exists()
    scan_stage(ScanConfig(str(scans), out=str(out), exclude=["b"], workers=1, json=True))
    assert (scans / "manifest.2.json").exists()


def test_patterns_choose_files_and_say_so(scans):
    manifest = scan(scans, include=["x*.nii.gz"], exclude=["*3.nii.gz"], workers=1)
    assert [case.image[0] for case in manifest.cases] == [f"a/x{n}.nii.gz" for n in range(3)]
    (told,) = manifest.problems
    assert "5 files" in told.what and not told.aside
    assert len(scan(scans, exclude=["b"], workers=1).cases) == 4


@pytest.mark.skipif(
    not (REAL / "dicom_ct_head").exists(), reason="the real scans and slides do not lie beside this checkout"
)
def test_a_series_is_named_by_its_folder_or_a_file(tmp_path):
    found = scan(REAL / "dicom_ct_head", voxels=False, workers=1)
    write_table(found, tmp_path / "cases.csv")
    folder = table(tmp_path, "image,subject", f"{REAL / 'dicom_ct_head'},head", name="folder.csv")
    for source in (tmp_path / "cases.csv", folder):
        (case,) = scan(source, voxels=False, workers=1).cases
        assert (case.shape, case.modality, len(case.image)) == (found.cases[0].shape, "CT", len(found.cases[0].image))
