"""Scoring a folder, and comparing arms of scored runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runs import AFFINE, SHAPE, labels, make_data, make_run

from medcl.dataset.scan import scan
from medcl.errors import MedclError
from medcl.evaluation.compare import compare, print_comparison
from medcl.evaluation.evaluate import mean_over_classes, notices, print_table, read_result, read_scores, score_folder
from medcl.evaluation.metrics import segmentation_scores
from medcl.io.nifti import write_nifti


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def predict(folder: Path, manifest, **changes) -> Path:
    """Predicts every case perfectly, but for the cases named."""
    for case in manifest.cases:
        array = changes.get(case.id, labels())
        if array is not None:
            write_nifti(folder / f"{case.id}.nii.gz", array, AFFINE)
    return folder


def refused(call, *arguments, **options) -> str:
    with pytest.raises(MedclError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scores_are_those_of_the_metrics_with_the_files_spacing(tmp_path, data):
    predicted = labels(3.0, shift=1)
    result = score_folder(predict(tmp_path / "p", data, a_0=predicted), data, tmp_path / "out")
    rows = read_scores(tmp_path / "out" / "evaluation.csv")
    expected = segmentation_scores(predicted, labels(), {1: "front", 2: "back"}, (1, 1, 3))
    assert [row for row in rows if row["case"] == "a_0"] == [{"case": "a_0", "subject": "a", **row} for row in expected]
    mean_of_a = np.mean([row["dice"] for row in expected])
    assert result["mean"]["dice"]["estimate"] == pytest.approx((mean_of_a + 1 + 1) / 3)
    assert read_result(tmp_path / "out" / "evaluation.json") == result
    assert (result["n_cases"], result["n_subjects"]) == (3, 3)


def test_overall_figure_weighs_subjects_equally_whatever_their_number_of_frames(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b"], frames=3)
    data = data.with_cases(tuple(case for case in data.cases if case.id not in ("b_1", "b_2")))
    empty = np.zeros(SHAPE, np.uint8)
    result = score_folder(predict(tmp_path / "p", data, b_0=empty), data, tmp_path / "out")
    assert result["mean"]["dice"]["estimate"] == pytest.approx(0.5)  # over cases it would be 0.75
    assert result["mean"]["dice"]["n_subjects"] == 2


def test_missing_and_surplus_predictions_are_named(tmp_path, data, capsys):
    folder = predict(tmp_path / "p", data, b_0=None)
    write_nifti(folder / "stranger.nii.gz", labels(), AFFINE)
    (folder / "notes.txt").write_text("not a volume")
    result = score_folder(folder, data, tmp_path / "out")
    assert result["missing_predictions"] == ["b_0"]
    assert result["predictions_without_reference"] == ["stranger"]
    assert result["n_cases"] == 2
    print_table(result)
    shown = capsys.readouterr().out
    assert "no prediction, so in no mean, for 1 labelled case: b_0" in shown and "front" in shown


def test_subjects_restrict_what_is_scored(tmp_path, data):
    result = score_folder(predict(tmp_path / "p", data), data, tmp_path / "out", subjects=["c"])
    assert result["n_cases"] == 1 and result["missing_predictions"] == []
    assert {row["case"] for row in read_scores(tmp_path / "out" / "evaluation.csv")} == {"c_0"}


def test_a_missed_class_scores_zero_has_no_distance_and_is_counted(tmp_path, data, capsys):
    result = score_folder(predict(tmp_path / "p", data, a_0=labels() * (labels() == 1)), data, tmp_path / "out")
    front, back = result["classes"]
    assert front["outcomes"]["missed"] == 0 and back["outcomes"] == {
        "present": 2,
        "missed": 1,
        "invented": 0,
        "absent": 0,
    }
    assert back["dice"]["estimate"] == pytest.approx(2 / 3)
    assert back["hd95"]["n_subjects"] == 2 and back["hd95"]["n_excluded"] == 1
    print_table(result)
    assert "back is missed in 1 case:" in capsys.readouterr().out


def test_classes_come_from_names_and_references_and_strangers_are_reported(tmp_path):
    data = make_data(tmp_path / "data", names={0: "background", 2: "back", 5: "never drawn"})
    odd = labels()
    odd[0, 0, 0] = 9
    result = score_folder(predict(tmp_path / "p", data, a_0=odd), data, tmp_path / "out")
    assert [(entry["class"], entry["name"]) for entry in result["classes"]] == [
        (1, "class 1"),
        (2, "back"),
        (5, "never drawn"),
    ]
    assert result["classes"][2]["outcomes"]["absent"] == 3 and result["classes"][2]["dice"]["estimate"] is None
    assert result["classes_only_predicted"] == {"9": 1}
    assert len(read_scores(tmp_path / "out" / "evaluation.csv")) == 9  # every case and class, scored or not
    assert result["mean"]["dice"]["estimate"] == 1.0


def test_a_prediction_stored_with_flipped_axes_still_lines_up(tmp_path, data):
    folder = predict(tmp_path / "p", data, a_0=None)
    flipped = AFFINE.copy()
    flipped[0, 0], flipped[0, 3] = -1.0, SHAPE[0] - 1
    write_nifti(folder / "a_0.nii.gz", labels()[::-1], flipped)
    assert score_folder(folder, data, tmp_path / "out")["mean"]["dice"]["estimate"] == 1.0


def test_float_labels_are_read_as_whole_numbers(tmp_path, data):
    result = score_folder(predict(tmp_path / "p", data, a_0=labels().astype(np.float32)), data, tmp_path / "out")
    assert result["mean"]["dice"]["estimate"] == 1.0


def test_one_bad_prediction_is_listed_and_the_others_are_scored(tmp_path, data):
    folder = predict(tmp_path / "p", data)
    moved = AFFINE.copy()
    moved[0, 3] = 5
    bad = (
        (labels()[:-1], AFFINE, "a_0.nii.gz: is not on the grid of its reference"),
        (labels(), moved, "voxels lie up to 5 mm apart"),
        (labels().astype(np.float32) * 0.5, AFFINE, "not integers"),
    )
    for array, affine, told in bad:
        write_nifti(folder / "a_0.nii.gz", array, affine)
        result = score_folder(folder, data, tmp_path / "out")
        assert told in result["unscored_predictions"]["a_0"]
        assert result["n_subjects"] == len(data.subjects) - 1 and result["mean"]["dice"]["estimate"] == 1.0
        assert any(told in line for line in notices(result))
        assert "a_0" not in {row["case"] for row in read_scores(tmp_path / "out" / "evaluation.csv")}


def test_predictions_that_are_all_bad_are_refused_in_one_line(tmp_path, data):
    folder = predict(tmp_path / "p", data, **{case.id: labels()[:-1] for case in data.cases})
    assert "is not on the grid of its reference" in refused(score_folder, folder, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_score_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "empty").mkdir()
    assert "named after the case, such as a_0.nii.gz" in refused(score_folder, tmp_path / "empty", data, tmp_path)
    assert "no such folder" in refused(score_folder, tmp_path / "nowhere", data, tmp_path)
    assert "no subject chosen" in refused(score_folder, tmp_path / "empty", data, tmp_path, subjects=["z"])
    bare = data.with_cases(tuple(replace(case, label=None) for case in data.cases))
    assert "no case has a label map" in refused(score_folder, tmp_path / "empty", bare, tmp_path)
    assert "--tolerance" in refused(score_folder, tmp_path / "empty", data, tmp_path, tolerance_mm=math.nan)
    folder = predict(tmp_path / "p", data)
    write_nifti(folder / "a_0.nii", labels(), AFFINE)
    assert "the same case is predicted in two files" in refused(score_folder, folder, data, tmp_path)


def test_damaged_tables_are_refused_in_one_line(tmp_path):
    (tmp_path / "evaluation.csv").write_text("case,dice\na,0.5\n")
    (tmp_path / "evaluation.json").write_text("{}")
    assert "not a table of scores" in refused(read_scores, tmp_path / "evaluation.csv")
    assert "medcl evaluate" in refused(read_scores, tmp_path / "none.csv")
    assert "not an evaluation of this version" in refused(read_result, tmp_path / "evaluation.json")


def test_subject_names_that_look_like_numbers_or_blanks_survive_the_table(tmp_path):
    data = make_data(tmp_path / "data", ["001", "NA", "nan"])
    score_folder(predict(tmp_path / "p", data), data, tmp_path / "out")
    assert {row["subject"] for row in read_scores(tmp_path / "out" / "evaluation.csv")} == {"001", "NA", "nan"}


def test_mean_over_classes_leaves_out_what_has_no_score():
    rows = [
        {"case": "a", "subject": "s", "dice": 0.5, "nsd": 0.2, "hd95": math.nan},
        {"case": "a", "subject": "s", "dice": math.nan, "nsd": 0.4, "hd95": math.nan},
    ]
    (mean,) = mean_over_classes(rows)
    assert (mean["dice"], mean["nsd"]) == (0.5, pytest.approx(0.3)) and math.isnan(mean["hd95"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight test subjects, three draws, a good arm and a poor one."""
    root = tmp_path_factory.mktemp("study")
    data = make_data(root / "data", list("abcdefgh"))
    good = [make_run(root / f"good{d}", data, draw=d, init="runs/voco", good=0.9, seed=1) for d in range(3)]
    poor = [make_run(root / f"poor{d}", data, draw=d, good=0.1, seed=2) for d in range(3)]
    return data, good, poor


def test_comparison_finds_the_better_arm_and_writes_its_files(study, tmp_path, capsys):
    _, good, poor = study
    result = compare(good, poor[::-1], tmp_path)  # the order of runs means nothing
    assert result["sentence"].startswith("pretrained is ahead of scratch by +") and result["verdict"] == "ahead"
    assert (
        result["sentence"].endswith("3 draws x 8 subjects") and result["draws"] == [0, 1, 2] and result["labels"] == "2"
    )
    assert result["warnings"] == []
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    assert len((tmp_path / "compare.csv").read_text().splitlines()) == 1 + 3 * 8 * 2
    mean = result["metrics"]["dice"]["mean"]
    assert mean["first"]["estimate"] - mean["second"]["estimate"] == pytest.approx(mean["estimate"])
    assert np.mean([row["difference"] for row in result["subjects"]]) == pytest.approx(mean["estimate"])
    assert result["metrics"]["hd95"]["mean"]["estimate"] < 0
    for entry in result["metrics"]["dice"]["classes"]:
        assert entry["p_holm"] >= entry["p"]
    print_comparison(result)
    assert result["sentence"] in capsys.readouterr().out


def test_swapped_arms_give_the_mirrored_comparison(study, tmp_path):
    _, good, poor = study
    forth, back = compare(good, poor, tmp_path / "a"), compare(poor, good, tmp_path / "b", ("scratch", "pretrained"))
    for metric in ("dice", "nsd", "hd95"):
        one, other = forth["metrics"][metric]["mean"], back["metrics"][metric]["mean"]
        assert (one["low"], one["estimate"]) == pytest.approx((-other["high"], -other["estimate"]))
        assert one["p"] == other["p"]
    assert back["sentence"].startswith("scratch is behind pretrained by -")


def test_an_arm_against_itself_cannot_be_told_apart(study, tmp_path):
    _, good, _ = study
    result = compare(good, good, tmp_path)
    assert result["verdict"] == "undecided" and result["metrics"]["dice"]["mean"]["p"] == 1.0
    assert result["warnings"] == ["both arms name the same initialisation"]


@pytest.mark.parametrize("draws", [1, 2])
def test_few_draws_are_said_to_be_too_few(draws, study, tmp_path):
    _, good, poor = study
    assert compare(good[:draws], poor[:draws], tmp_path)["sentence"].startswith("too few draws of labelled subjects")


def edit(run: Path, name: str, **changes) -> None:
    data = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("config.yaml", {"draw": 7}, "draw 0, 7 is in one arm only"),
        ("config.yaml", {"labels": "4"}, "another number of labels"),
        ("split.json", {"labelled": ["x", "z"]}, "other labelled subjects"),
        ("split.json", {"test": ["a"]}, "other test subjects"),
        ("split.json", {"test": None}, "lists no `test` subjects"),
    ],
)
def test_what_is_not_a_paired_comparison_is_refused(tmp_path, name, changes, told):
    data = make_data(tmp_path / "data", ["a", "b"])
    arms = [make_run(tmp_path / arm, data) for arm in ("first", "second")]
    edit(arms[1], name, **changes)
    assert told in refused(compare, arms[:1], arms[1:], tmp_path / "out")


def test_draws_tested_on_other_subjects_are_refused(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b"])
    arms = [[make_run(tmp_path / f"{arm}{d}", data, draw=d) for d in range(2)] for arm in "pq"]
    for runs in arms:
        edit(runs[1], "split.json", test=["a"])
    assert "other test subjects" in refused(compare, *arms, tmp_path / "out")


def test_runs_that_cannot_be_compared_are_refused(study, tmp_path):
    data, good, poor = study
    assert "is draw 0, and so is" in refused(compare, [good[0], good[0]], poor, tmp_path)
    assert "at least one run" in refused(compare, [], poor, tmp_path)
    other = make_run(tmp_path / "other", data.with_cases(data.cases[:-1]))
    edit(other, "split.json", test=list(data.subjects))
    assert "other test cases or classes" in refused(compare, [other], poor[:1], tmp_path)
    (other / "test" / "evaluation.csv").unlink()
    assert "medcl evaluate" in refused(compare, [other], poor[:1], tmp_path)
    (other / "config.yaml").unlink()
    assert "config.yaml" in refused(compare, [other], poor[:1], tmp_path)


def test_arms_that_differ_in_more_than_init_are_stamped(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b"])
    first = make_run(tmp_path / "first", data, init="runs/voco", backbone="", plan="runs/voco")
    second = make_run(tmp_path / "second", data, backbone="unet", steps=200, options={"mixup": True})
    (warning,) = compare([first], [second], tmp_path / "out")["warnings"]
    assert warning.startswith("draw 0: the arms differ in more") and warning.endswith(
        ": backbone, options.mixup, steps"
    )
    for run, width in ((first, 16), (second, 32)):  # what was trained counts, not how it was asked for
        (run / "weights").mkdir()
        (run / "weights" / "contract.json").write_text(json.dumps({"backbone": {"name": "unet", "width": width}}))
        (run / "plan.json").write_text(json.dumps({"spacing": [1, 1, width]}))
    edit(second, "split.json", val=["w"])
    warnings = compare([first], [second], tmp_path / "out")["warnings"]
    assert [warning.split(": ", 1)[1] for warning in warnings] == [
        "the arms differ in more than their initialisation: options.mixup, steps",
        "the arms are different networks: width",
        "the arms were prepared by different plans: spacing",
        "the arms were selected on different validation subjects",
    ]


@pytest.mark.parametrize("spacing,told", [((0.5, 0.5, 3.0), 0.5), ((1.0, 1.0, 1.0), 1.0), ((12.0, 1.5, 1.6), 1.5)])
def test_by_default_nsd_forgives_one_voxel_and_says_so(tmp_path, spacing, told):
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:9, 3:9, 3:9] = 1
    moved = np.roll(label, 1, axis=int(np.argmin(spacing)))
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    for name, array in (("d/s1", image), ("d/s1_seg", label), ("p/s1", moved)):
        write_nifti(tmp_path / f"{name}.nii.gz", array, np.diag([*spacing, 1]))
    result = score_folder(tmp_path / "p", scan(tmp_path / "d"), tmp_path / "out")
    assert result["tolerance_mm"] == told and result["mean"]["nsd"]["estimate"] == 1.0
    assert any(f"within {told:g} mm" in line for line in result["conventions"])
    strict = score_folder(tmp_path / "p", scan(tmp_path / "d"), tmp_path / "out", tolerance_mm=0.9 * told)
    assert strict["mean"]["nsd"]["estimate"] < 1.0
