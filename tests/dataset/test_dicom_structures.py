"""DICOM RTSTRUCT objects as the label maps of their series."""

from __future__ import annotations

from copy import deepcopy

import nibabel as nib
import numpy as np
import pytest
from dicom_rtstruct import write_rtstruct
from dicom_seg import write_seg
from dicom_series import upright, write_series
from scipy.spatial.transform import Rotation

from medcl.dataset.labels import read_label
from medcl.dataset.scan import scan
from medcl.io.volumes import read_volume
from medcl.store.plan import canonical_axes, derive_plan
from medcl.store.prepare import prepare
from medcl.store.volumes import open_volume

SHAPE = (16, 14, 7)
PITCH = (0.7, 0.9)  # mm between rows, between columns
OBLIQUE = Rotation.from_euler("zyx", [25, -15, 40], degrees=True).as_matrix()[:2].ravel().round(6)
AXES = {"axial": (1, 0, 0, 0, 1, 0), "sagittal": (0, 1, 0, 0, 0, -1), "oblique": OBLIQUE}


def places(axes=AXES["axial"], step: float = 3.0, count: int = SHAPE[2]) -> np.ndarray:
    """The position of every slice, upwards along the normal."""
    return (np.array([-10.0, -20.0, 5.0]) + np.outer(step * np.arange(count), np.cross(axes[:3], axes[3:]))).round(6)


def series(folder, uid: str = "1.2.5", axes=AXES["axial"], positions=None, patient: str = "MRN-4711", seed: int = 0):
    def edit(data, index):
        data.PatientID, data.Modality = patient, "MR"

    volume = np.random.default_rng([seed, *map(int, uid.split("."))]).integers(0, 999, SHAPE)
    positions = places(axes) if positions is None else positions
    return write_series(folder, volume, positions, axes=axes, pitch=PITCH, uid=uid, edit=edit)


def at(z: float, polygon, axes=AXES["axial"]) -> np.ndarray:
    """A polygon in pixels of a slice, in mm."""
    x, y = np.array(polygon, float).T
    row, column, normal = np.array(axes[:3]), np.array(axes[3:]), np.cross(axes[:3], axes[3:])
    steps = np.outer(x * PITCH[1], row) + np.outer(y * PITCH[0], column) + 3.0 * z * normal
    return places(axes)[0] + steps


def box(x0, x1, y0, y1) -> list[tuple[float, float]]:
    """Around the pixels from x0 to x1 and from y0 to y1, both included."""
    return [(x0 - 0.5, y0 - 0.5), (x1 + 0.5, y0 - 0.5), (x1 + 0.5, y1 + 0.5), (x0 - 0.5, y1 + 0.5)]


def disc(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in angles]


def solid(polygon, slices=(2, 3, 4)) -> list[np.ndarray]:
    return [at(z, polygon) for z in slices]


LIVER = ("Liver", solid(box(2, 5, 3, 6)))
SPLEEN = ("Spleen", solid(box(8, 11, 3, 6)))


def label_of(manifest, index: int = 0) -> np.ndarray:
    return read_label(manifest, manifest.labelled[index]).array


@pytest.mark.parametrize("voxels", [True, False])
@pytest.mark.parametrize("name", AXES)
def test_an_rtstruct_is_the_label_map_of_its_series(tmp_path, name, voxels):
    axes = AXES[name]
    series(tmp_path / "mr", axes=axes)
    series(tmp_path / "other", "1.2.6")
    hole, outer = disc(10.2, 6.1, 1.7), disc(10.2, 6.1, 4.3)
    rois = [("ring", [at(z, each, axes) for z in (1, 4) for each in (outer, hole)]),
            ("box", [at(z, box(1, 4, 2, 11), axes) for z in (2, 3, 6)])]  # fmt: skip
    write_rtstruct(tmp_path / "rt.dcm", rois, "1.2.5", first_number=7)
    manifest = scan(tmp_path, voxels=voxels)
    assert manifest.problems == () and len(manifest.cases) == 2
    (case,) = manifest.labelled
    assert case.label == "rt.dcm" and case.image[0].startswith("mr/") and "labels are RTSTRUCT objects" in manifest.rule
    assert manifest.label_names == {1: "box", 2: "ring"}

    truth = np.zeros(SHAPE, int)
    truth[1:5, 2:12, [2, 3, 6]] = 1
    for x, y in np.ndindex(SHAPE[:2]):  # no centre lies between these polygons and their circles
        if 1.7 < np.hypot(x - 10.2, y - 6.1) < 4.3:
            truth[x, y, [1, 4]] = 2
    label, image = read_label(manifest, case), read_volume(manifest.image_paths(case))
    assert np.array_equal(label.array, truth) and label.array.dtype == np.uint8 and label.notes == ()
    assert np.array_equal(label.affine, image.affine)
    plan = derive_plan(manifest, spacing=list(canonical_axes(case)[1]))
    assert plan.labels == {1: "box", 2: "ring"}
    if voxels:
        stored, left = prepare(manifest.with_cases((case,)), plan, store=tmp_path / "store")
        prepared = open_volume(stored[0].path).label()
        assert left.problems == ()
        assert np.bincount(prepared.ravel())[1:].tolist() == [120, (truth == 2).sum()]


def test_holes_by_even_odd_and_by_a_channel_are_equal(tmp_path):
    outer, inner = box(2, 11, 2, 11), box(5, 8, 4, 9)
    keyhole = [*outer, outer[0], *inner[::-1], inner[-1], outer[0]]
    truth = np.zeros(SHAPE, int)
    truth[2:12, 2:12, 3] = 1
    truth[5:9, 4:10, 3] = 0
    ways = {"CLOSED_PLANAR": [outer, inner], "CLOSEDPLANAR_XOR": [inner, outer], "keyhole": [keyhole]}
    for index, (kind, polygons) in enumerate(ways.items()):
        uid = f"1.2.5{index}"
        series(tmp_path / kind / "mr", uid)
        kinds = {"wall": kind} if kind != "keyhole" else {}
        write_rtstruct(tmp_path / kind / "rt", [("wall", [at(3, each) for each in polygons])], uid, kinds=kinds)
        assert np.array_equal(label_of(scan(tmp_path / kind)), truth)


def test_names_decide_values_whatever_the_numbers_of_rois(tmp_path):
    sets = {"a": [SPLEEN, LIVER], "b": [("LIVER ", LIVER[1]), ("Kidney", solid(box(8, 9, 9, 10)))], "c": [SPLEEN]}
    for index, (name, rois) in enumerate(sets.items()):
        series(tmp_path / name, f"1.2.{index}", patient=name, seed=index)
        write_rtstruct(tmp_path / f"{name}.dcm", rois, f"1.2.{index}", patient=name, first_number=5 * index)
    manifest = scan(tmp_path)
    assert manifest.label_names == {1: "Kidney", 2: "Liver", 3: "Spleen"}
    found = {case.label: set(np.unique(read_label(manifest, case).array)) - {0} for case in manifest.labelled}
    assert found == {"a.dcm": {2, 3}, "b.dcm": {1, 2}, "c.dcm": {3}}
    (told,) = manifest.problems
    assert (
        "not all 3 RTSTRUCT objects have all structures (Kidney 1, Liver 2, Spleen 2)" in told.what and not told.aside
    )


def test_a_new_structure_shifts_values_and_nothing_stale_is_read(tmp_path):
    series(tmp_path / "a", "1.2.1", patient="a")
    write_rtstruct(tmp_path / "a.dcm", [SPLEEN], "1.2.1", patient="a")
    before = scan(tmp_path)
    series(tmp_path / "b", "1.2.22", patient="b")
    write_rtstruct(tmp_path / "b.dcm", [LIVER], "1.2.22", patient="b")
    after = scan(tmp_path)
    case = before.cases[0]
    values = []
    for manifest in (before, after):
        (stored,) = prepare(manifest.with_cases((case,)), derive_plan(before), store=tmp_path / "store")[0]
        values.append(open_volume(stored.path).label().max())
    assert values == [1, 2]


def test_overlaps_take_the_last_by_name_above_the_body(tmp_path):
    series(tmp_path / "mr")
    rois = [("target", solid(box(4, 8, 4, 8))), ("skin", solid(box(0, 15, 0, 13))), ("organ", solid(box(2, 5, 3, 6)))]
    write_rtstruct(tmp_path / "rt", rois, "1.2.5", external={"skin"})
    manifest = scan(tmp_path)
    truth = np.zeros(SHAPE, int)
    truth[..., 2:5] = 2
    truth[2:6, 3:7, 2:5] = 1
    truth[4:9, 4:9, 2:5] = 3
    assert manifest.label_names == {1: "organ", 2: "skin", 3: "target"} and np.array_equal(label_of(manifest), truth)
    note = f"structures overlap in {3 * (16 + 25)} voxels: each takes the last by name (EXTERNAL gives way)"
    assert manifest.cases[0].notes == (note,)


def test_two_rois_of_one_name_are_one_structure(tmp_path):
    series(tmp_path / "mr")
    write_rtstruct(tmp_path / "rt", [LIVER, ("liver", solid(box(4, 8, 3, 6))), SPLEEN], "1.2.5")
    manifest = scan(tmp_path)
    assert manifest.label_names == {1: "Liver", 2: "Spleen"}
    assert np.bincount(label_of(manifest).ravel())[1:].tolist() == [3 * 6 * 4, 3 * 4 * 4]
    assert manifest.cases[0].notes == (
        f"structures overlap in {3 * 4} voxels: each takes the last by name (EXTERNAL gives way)",
    )


def test_structures_that_touch_on_voxel_centres_share_none(tmp_path):
    series(tmp_path / "mr")
    squares = [
        (x, y, [(x, y), (x + 3, y), (x + 3, y + 3), (x, y + 3)]) for x in range(0, 15, 3) for y in range(0, 12, 3)
    ]
    write_rtstruct(tmp_path / "rt", [(f"{x:02} {y:02}", solid(square)) for x, y, square in squares], "1.2.5")
    manifest = scan(tmp_path)
    truth = np.zeros(SHAPE, int)
    for value, (x, y, _) in enumerate(squares, 1):
        truth[x : x + 3, y : y + 3, 2:5] = value
    assert np.array_equal(label_of(manifest), truth) and manifest.cases[0].notes == ()


def test_a_structure_that_others_cover_is_refused(tmp_path):
    series(tmp_path / "mr")
    write_rtstruct(tmp_path / "rt", [("ptv", solid(box(2, 9, 2, 9))), ("gtv", solid(box(4, 5, 4, 5)))], "1.2.5")
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert "lie wholly below others, which come after them by name: gtv" in problem.what and not manifest.labelled


def test_what_is_left_out_or_cut_is_noted(tmp_path):
    series(tmp_path / "mr")
    rois = [LIVER, ("table", solid(box(-4, 3, 10, 12))), ("dot", [at(3, disc(9.5, 9.5, 0.2))]),
            ("isocentre", [at(3, [(3, 3)])]), ("wire", [at(3, [(3, 3), (4, 9)])]),
            ("high", [at(5.25, box(8, 9, 3, 4))])]  # fmt: skip
    write_rtstruct(tmp_path / "rt", rois, "1.2.5", kinds={"isocentre": "POINT", "wire": "OPEN_PLANAR"})
    manifest = scan(tmp_path)
    assert list(manifest.label_names.values()) == ["dot", "high", "Liver", "table"] and manifest.problems == ()
    label = label_of(manifest)
    assert [(label == value).sum() for value in (1, 2, 3, 4)] == [0, 4, 48, 36] and (label[8:10, 3:5, 5] == 2).all()
    assert manifest.cases[0].notes == (
        "contours lie up to 0.75 mm off their slices: drawn on the nearest",
        "contours leave the image and are cut off there: table",
        "contours that are not closed are left out: isocentre (POINT), wire (OPEN_PLANAR)",
        "structures that enclose no voxel's centre: dot",
    )


def first_contours(data):
    return data.ROIContourSequence[0].ContourSequence


def moved(mm):
    def edit(data):
        for contour in first_contours(data):
            heights = np.tile([0.0, 0.0, mm], len(contour.ContourData) // 3)
            contour.ContourData = list(np.array(contour.ContourData, float) + heights)

    return edit


def tilted(data):
    first_contours(data)[0].ContourData[2] += 2


def denser(data):
    own = deepcopy(list(first_contours(data)))
    moved(1)(data)
    first_contours(data).extend(own)


def points(data):
    for contour in first_contours(data):
        contour.ContourGeometricType = "POINT"


def short(data):
    first_contours(data)[0].ContourData = first_contours(data)[0].ContourData[:-1]


@pytest.mark.parametrize("voxels", [True, False])
@pytest.mark.parametrize(
    ("edit", "words"),
    [(moved(30), "do not lie on slices"), (moved(-1.5), "do not lie on slices"), (tilted, "not parallel"),
     (denser, "closer together than the slices"), (points, "no closed contours"), (short, "cannot be read")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_and_the_image_kept(tmp_path, edit, words, voxels):
    series(tmp_path / "mr")
    write_rtstruct(tmp_path / "rt.dcm", [LIVER], "1.2.5", edit=edit)
    manifest = scan(tmp_path, voxels=voxels)
    (problem,) = manifest.problems
    assert problem.file == "rt.dcm" and words in problem.what and "kept as unlabelled" in problem.what
    assert len(manifest.cases) == 1 and not manifest.labelled


@pytest.mark.parametrize("kind", ["uneven", "tilted"])
def test_a_series_that_is_resampled_takes_no_rtstruct(tmp_path, kind):
    positions = places()
    if kind == "uneven":
        positions[:, 2] = [0, 2, 4, 6, 9, 12, 15]
    else:
        positions[:, 1] += np.arange(7)
    series(tmp_path / "mr", positions=positions)
    write_rtstruct(tmp_path / "rt.dcm", [LIVER], "1.2.5")
    (problem,) = scan(tmp_path).problems
    assert "brought onto another grid" in problem.what


def test_an_image_that_is_no_series_takes_no_rtstruct(tmp_path):
    volume = np.random.default_rng(0).integers(0, 999, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "mr.nii.gz")
    write_rtstruct(tmp_path / "rt.dcm", [LIVER], "1.2.5")
    (tmp_path / "cases.csv").write_text("image,label\nmr.nii.gz,rt.dcm\n")
    (problem,) = scan(tmp_path / "cases.csv").problems
    assert problem.file == "rt.dcm" and "outlines a DICOM series, and mr.nii.gz is none" in problem.what


def test_objects_of_other_series_and_other_patients_are_told(tmp_path):
    series(tmp_path / "mr")
    write_rtstruct(tmp_path / "gone.dcm", [LIVER], "1.2.9")
    write_rtstruct(tmp_path / "stranger.dcm", [LIVER], "1.2.5", patient="MRN-1")
    manifest = scan(tmp_path)
    assert not manifest.labelled and manifest.label_names == {}
    stranger, gone = manifest.problems
    assert stranger.file == "stranger.dcm" and "another patient number than the series" in stranger.what
    assert gone.what == "1 DICOM RTSTRUCT object of 1 series not found here: not read as label maps"
    write_rtstruct(tmp_path / "gone.dcm", [LIVER], "1.2.5", patient="")  # names nobody: the series decides
    assert scan(tmp_path).labelled[0].label == "gone.dcm"
    (tmp_path / "cases.csv").write_text("image,label\nmr,stranger.dcm\n")  # a table stands over the patient number
    assert np.count_nonzero(label_of(scan(tmp_path / "cases.csv"))) == 48


def test_patients_that_share_a_series_number_keep_their_own_objects(tmp_path):
    for index, (name, roi) in enumerate({"a": LIVER, "b": SPLEEN}.items()):
        series(tmp_path / name, patient=name, seed=index)
        write_rtstruct(tmp_path / f"{name}.dcm", [("organ", roi[1])], "1.2.5", patient=name)
    manifest = scan(tmp_path)
    assert {case.image[0][0]: case.label for case in manifest.cases} == {"a": "a.dcm", "b": "b.dcm"}


def test_several_objects_are_told_and_a_table_names_one(tmp_path):
    series(tmp_path / "mr")
    series(tmp_path / "other", "1.2.6")
    for name, roi in (("one", LIVER), ("two", SPLEEN)):
        write_rtstruct(tmp_path / f"{name}.dcm", [roi], "1.2.5")
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert not manifest.labelled and problem.what.startswith("2 DICOM RTSTRUCT objects of")
    assert "as `label` in a table" in problem.remedy
    (tmp_path / "cases.csv").write_text("image,label\nmr,two.dcm\nother,one.dcm\n")
    manifest = scan(tmp_path / "cases.csv")
    assert manifest.label_names == {1: "Liver", 2: "Spleen"}
    notes = {case.label: case.notes for case in manifest.labelled}
    other = ("the RTSTRUCT object names another series than the one that it is drawn on",)
    assert notes == {"two.dcm": (), "one.dcm": other}


def test_a_seg_object_counts_before_an_rtstruct_and_names_are_shared(tmp_path):
    series(tmp_path / "a", "1.2.1", patient="MRN-4711")
    mask = np.zeros(SHAPE, bool)
    mask[3:5, 3:5, 2:4] = True
    write_seg(tmp_path / "a.dcm", {4: mask}, places(), "1.2.1", names={4: "spleen"}, pitch=PITCH)
    write_rtstruct(tmp_path / "a_rt.dcm", [LIVER], "1.2.1")
    series(tmp_path / "b", "1.2.22", patient="b")
    write_rtstruct(tmp_path / "b.dcm", [LIVER, SPLEEN], "1.2.22", patient="b")
    manifest = scan(tmp_path)
    assert manifest.label_names == {4: "spleen", 5: "Liver"} and "SEG and RTSTRUCT objects" in manifest.rule
    found = {case.label: np.unique(read_label(manifest, case).array).tolist() for case in manifest.labelled}
    assert found == {"a.dcm": [0, 4], "b.dcm": [0, 4, 5]}
    (problem,) = manifest.problems
    assert problem.file == "a_rt.dcm" and "1 DICOM RTSTRUCT object of" in problem.what


def test_slices_of_a_series_stay_where_upright_puts_them(tmp_path):
    """Against the helper's own geometry: contours written straight in mm."""
    volume = np.random.default_rng(3).integers(0, 999, (8, 9, 5))
    write_series(tmp_path / "ct", volume, upright(5), uid="1.2.5")
    square = np.array([[-8.4, -17.4, 11], [-5.6, -17.4, 11], [-5.6, -15.6, 11], [-8.4, -15.6, 11]])
    write_rtstruct(tmp_path / "rt", [("square", [square])], "1.2.5")
    assert np.argwhere(label_of(scan(tmp_path))).tolist() == [[x, y, 2] for x in (2, 3, 4) for y in (3, 4)]
