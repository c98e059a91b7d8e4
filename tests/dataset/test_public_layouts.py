"""How public data sets lay out their files: who is a subject, what is a label map, which image it belongs to.

Every layout says for each image its person and its label maps. Where medcl cannot know, it asks, and its guess never
has one person under two subjects.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from public_layouts import ASKED, MASKS, SIMPLE, Images, image, label, made, one, people, simple, times, write

from medcl.dataset.case import Manifest
from medcl.dataset.scan import scan
from medcl.dataset.splits import make_split


def check(manifest: Manifest, images: Images) -> None:
    """All images are found, no label map is an image, and no two people are one or one person two."""
    found = {case.image[0]: case for case in manifest.cases}
    assert set(found) == set(images)
    assert {path: set(case.label_files) for path, case in found.items()} == {
        p: set(labels) for p, (_, labels) in images.items()
    }
    persons: dict[str, set[str]] = defaultdict(set)
    for path, (person, _) in images.items():
        persons[person].add(found[path].subject)
    assert all(len(names) == 1 for names in persons.values()), persons
    assert len({name for names in persons.values() for name in names}) == len(persons), persons


@pytest.mark.parametrize("voxels", [True, False])
@pytest.mark.parametrize("name", SIMPLE)
def test_layout_is_read_right(tmp_path, name, voxels):
    made(tmp_path, SIMPLE[name])
    manifest = scan(tmp_path, voxels=voxels, workers=1)
    check(manifest, SIMPLE[name])
    assert manifest.questions == ()


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_an_image_are_merged(tmp_path, name):
    made(tmp_path, MASKS[name], masks=True)
    manifest = scan(tmp_path, workers=1)
    check(manifest, MASKS[name])
    structures = [name for value, name in manifest.label_names.items() if value]
    assert structures == sorted(structure for structure, _ in manifest.cases[0].masks) and len(structures) >= 2


@pytest.mark.parametrize("name", ASKED)
def test_where_names_allow_two_readings_scan_asks_and_takes_the_one_that_cannot_leak(tmp_path, name):
    images = ASKED[name]
    made(tmp_path, images)
    manifest = scan(tmp_path, workers=1)
    assert any("may be one person or two" in question.what for question in manifest.questions)
    assert {case.image[0]: set(case.label_files) for case in manifest.cases} == {
        p: set(labels) for p, (_, labels) in images.items()
    }
    subject_of = {case.image[0]: case.subject for case in manifest.cases}
    subjects = defaultdict(set)
    for path, (person, _) in images.items():
        subjects[person].add(subject_of[path])
    assert all(len(found) == 1 for found in subjects.values()), "one person under two subjects"


def test_two_whole_label_maps_of_one_image_are_asked(tmp_path):
    images = simple("COVID-19-CT-Seg_20cases/coronacases_{p:03}.nii.gz", "Lung_Mask/coronacases_{p:03}.nii.gz")
    made(tmp_path, images)
    for person in range(1, 6):
        write(
            tmp_path / f"Lung_and_Infection_Mask/coronacases_{person:03}.nii.gz",
            label(person, binary=False),
            1 + (person - 1) / 64,
        )
    manifest = scan(tmp_path, workers=1)
    assert len(manifest.cases) == 5 and all(case.label for case in manifest.cases)
    (question,) = manifest.questions
    assert "has 2 label maps" in question.what and "4 more images" in question.what


def test_two_masks_of_which_one_fits_no_other_image(tmp_path):
    images = people(
        ("020", "021"),
        lambda p: {
            f"train/{p}/t2.nii.gz": (p, (f"train/{p}/t2_anatomy_reader1.nii.gz",)),
            f"train/{p}/adc.nii.gz": (p, (f"train/{p}/adc_tumor_reader1.nii.gz",)),
        },
    )
    made(tmp_path, images)
    check(scan(tmp_path, workers=1), images)


AMOS = simple("imagesTr/amos_{p:04}.nii.gz", "labelsTr/amos_{p:04}.nii.gz") | simple(
    "imagesVa/amos_{p:04}.nii.gz", "labelsVa/amos_{p:04}.nii.gz", (13, 14)
)


@pytest.mark.parametrize("voxels", [True, False])
def test_validation_images_of_a_decathlon_layout_validate(tmp_path, voxels):
    made(tmp_path, AMOS)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "spleen", "2": "liver"}}')
    manifest = scan(tmp_path, voxels=voxels, workers=1)
    check(manifest, AMOS)
    assert make_split(manifest).val == ("amos_0013", "amos_0014") and manifest.problems == ()


def test_visits_of_a_person_stay_together_in_nnunets_layout(tmp_path):
    images = times(
        "imagesTr/BraTS-GLI-{p:05}-{t}_0000.nii.gz",
        ("",),
        "labelsTr/BraTS-GLI-{p:05}-{t}.nii.gz",
        {0: ("000", "001"), 2: ("000",), 3: ("000", "001"), 7: ("000",)},
    )
    made(tmp_path, images)
    (tmp_path / "dataset.json").write_text(
        '{"file_ending": ".nii.gz", "labels": {"background": 0, "edema": 1, "core": 2}}'
    )
    check(scan(tmp_path, workers=1), images)


def test_no_split_has_a_person_on_both_sides(tmp_path):
    images = SIMPLE["UPENN-GBM"]
    made(tmp_path, images)
    manifest = scan(tmp_path, workers=1)
    person_of = {path: person for path, (person, _) in images.items()}
    for seed in range(5):
        split = make_split(manifest, test_fraction=0.4, val_fraction=0.2, seed=seed)
        sides = [
            {person_of[case.image[0]] for case in manifest.cases if case.subject in part}
            for part in (split.train, split.val, split.test)
        ]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_one_label_map_under_two_subjects_is_asked(tmp_path):
    images = simple("images/p{p}.nii.gz", "labels/p{p}.nii.gz")
    made(tmp_path, images)
    write(tmp_path / "images/p4.nii.gz", image(77))
    write(tmp_path / "images/p1.nii.gz", image(78))
    write(tmp_path / "labels/p1.nii.gz", label(5, binary=False))
    write(tmp_path / "labels/p4.nii.gz", label(5, binary=False))
    (question,) = scan(tmp_path, workers=1).questions
    assert question.file == "labels/p1.nii.gz" and "equal to labels/p4.nii.gz of subject p4" in question.what


def test_maps_of_probabilities_are_neither(tmp_path):
    images = simple("images/p{p:03}.nii.gz", "labels/p{p:03}.nii.gz")
    made(tmp_path, images)
    for name in ("images/p001_prob.nii.gz", "softmax/p002_class1.nii.gz", "images/p003_pve_0.nii.gz"):
        write(tmp_path / name, (image(3) / 1000).clip(0, 1))
    manifest = scan(tmp_path, workers=1)
    check(manifest, images)
    (told,) = manifest.problems
    assert "as 3 files are" in told.what and told.aside


def test_a_label_map_is_never_an_image(tmp_path):
    made(tmp_path, people(range(4), lambda p: one(p, "scans/brain_{p}.nii.gz")))
    write(tmp_path / "scans/atlas.nii.gz", label(0, binary=False))
    for voxels in (True, False):
        manifest = scan(tmp_path, voxels=voxels, workers=1)
        assert len(manifest.cases) == 4
        assert [problem.file for problem in manifest.problems] == ["scans/atlas.nii.gz"]


def test_every_data_set_of_the_guide_is_tried_here():
    guide = (Path(__file__).parents[2] / "docs/data.md").read_text()
    table = guide[guide.index("| data set |") :].split("\n\n")[0].splitlines()[2:]
    names = {name for line in table for name in line.split("|")[1].strip().split(", ")}
    assert len(names) > 40 and names - {*SIMPLE, *MASKS, *ASKED, "AMOS"} == set()
