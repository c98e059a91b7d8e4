"""Pages of bags: numbers as scikit-learn gives them, pictures of the instances that were attended, no file names."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

pytest.importorskip("h5py", reason="the extra `mil` is not installed")
metrics = pytest.importorskip("sklearn.metrics", reason="the extra `mil` is not installed")

from pages import Page  # noqa: E402
from PIL import Image  # noqa: E402
from small_bags import (  # noqa: E402
    config,
    picture,
    write_set,
)

from medcl.config import ReportConfig  # noqa: E402
from medcl.config.mil import MILPredictConfig, MILPrepareConfig  # noqa: E402
from medcl.errors import MedclError  # noqa: E402
from medcl.io.nifti import write_nifti  # noqa: E402
from medcl.io.volumes import read_volume  # noqa: E402
from medcl.mil.bags import Features, read_features, write_features  # noqa: E402
from medcl.mil.prepare import prepare_bags  # noqa: E402
from medcl.mil.stage import fit, predict_bags  # noqa: E402
from medcl.report.attention import volume_map  # noqa: E402
from medcl.report.bag_figures import confusion_table, reliability, roc_points  # noqa: E402
from medcl.report.bags import write_bag_report, write_prediction_report  # noqa: E402
from medcl.report.instances import chosen_instances, instance_rows, pictures_of  # noqa: E402
from medcl.report.stage import write_report  # noqa: E402
from medcl.runtime.files import write_rows  # noqa: E402
from medcl.store.plan import Plan  # noqa: E402


def test_the_roc_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, positive = rng.random(50).round(1), rng.random(50) < 0.4  # with ties
    false, true, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
    ours = roc_points(scores, positive)
    np.testing.assert_allclose(ours[0], false)
    np.testing.assert_allclose(ours[1], true)


def test_the_confusion_counts_bags_and_the_calibration_bins_them():
    p = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.3, 0.7]], [[0.55, 0.45]] * 2])
    labels = np.array([0, 1, 1])
    assert confusion_table(p, labels).tolist() == [[0.5, 0.5], [1, 1]]
    each = reliability(p[:, 0], labels)
    np.testing.assert_allclose(each, [(0.55, 0, 1), (0.8, 1, 1), (0.9, 1, 1)])


def test_the_page_of_a_run_says_what_metrics_json_says(tmp_path):
    folder = write_set(tmp_path / "bags", 24, 12)
    (folder / "features" / "bag03.h5").unlink()
    run = fit(config(folder, tmp_path / "run", epochs=3, repeats=2, final=False))
    page = Page(write_report(ReportConfig(str(run))))  # `medcl report` knows such a run
    assert "AUROC" in page.text and "23 bags of 12 groups, mean over 2 repeats" in page.text
    assert page.sections() == [
        "The numbers", "The predictions", "Every bag", "What was read", "How it was made",
    ]  # fmt: skip
    assert len(page.images) == 4 and all(image["src"].startswith("data:") and image["alt"] for image in page.images)
    assert "bag03" in page.text and str(tmp_path) not in page.without_images()
    with pytest.raises(MedclError, match="no cross-validated bags"):
        write_bag_report(tmp_path)


def test_the_most_and_least_attended_are_the_extremes():
    attention = np.array([0.1, 0.4, 0.0, 0.3, 0.2])
    assert chosen_instances(attention, 2) == ([1, 3], [2, 0])
    assert chosen_instances(attention) == ([1, 3, 4], [2, 0])
    assert chosen_instances(np.array([1.0])) == ([0], [])
    assert instance_rows(attention, None)[0] == ("most", "1", "", "2.0x")


def test_the_page_of_predictions_shows_the_tiles_that_were_attended(tmp_path):
    rows = []
    for number in range(8):
        path = picture(tmp_path / f"{number}.png", (230, 120, 170), (215, 130, 180))
        pixels = np.array(Image.open(path))
        if number % 2:
            pixels[32:64, 192:224] = (60, 20, 140)
        Image.fromarray(pixels).save(path)
        rows.append({"bag_id": f"i{number}", "path": path.name, "label": ("benign", "malignant")[number % 2]})
    write_rows(tmp_path / "bags.csv", rows)
    folder = prepare_bags(MILPrepareConfig(str(tmp_path / "bags.csv"), str(tmp_path / "out"), tile=32, mpp=0.0))
    run = fit(config(folder, tmp_path / "run", folds=2, epochs=20))
    write_rows(folder / "bags.csv", list(csv.DictReader((folder / "bags.csv").open()))[:4])
    told = predict_bags(MILPredictConfig(str(run), str(folder), str(tmp_path / "told")))
    page = Page(write_prediction_report(told))
    assert "4 bags: 2 benign, 2 malignant" in page.text and len(page.images) == 4 + 4
    assert str(tmp_path) not in page.without_images()
    # of the first bag shown, a malignant one, the first picture is the spot
    first = re.findall(r"data:image/png;base64,([^\"]+)", page.source)[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))).convert("RGB")).astype(int)
    spot = (np.abs(shown - (60, 20, 140)).sum(2) < 30).nonzero()
    assert len(spot[0]) > 5000 and spot[0].max() < shown.shape[0] / 2 and spot[1].max() < shown.shape[1] / 6 + 40


def test_bags_without_pictures_are_shown_as_numbers(tmp_path):
    folder = write_set(tmp_path / "bags", 12, 6)
    run = fit(config(folder, tmp_path / "run", folds=2, epochs=2))
    with open(folder / "bags.csv") as stream:
        rows = [{**row, "label": ""} for row in csv.DictReader(stream)]
    write_rows(folder / "bags.csv", rows)
    told = predict_bags(MILPredictConfig(str(run), str(folder), str(tmp_path / "told")))
    page = Page(write_prediction_report(told))
    assert not page.images and "times the mean" in page.text and "Against the labels" not in page.text


def test_a_sub_volume_is_shown_in_its_slice_with_the_front_up_and_the_right_on_the_left(tmp_path):
    image = np.zeros((20, 16, 8), np.float32)
    image[2:18, 2:14, 1:7] = 40.0
    image[14:18, 10:14, 3:6] = 100.0  # to the patient's right and front
    image += np.random.default_rng(0).random(image.shape).astype(np.float32)
    write_nifti(tmp_path / "a.nii.gz", image, np.eye(4))
    plan = Plan(spacing=(1.0, 1.0, 1.0), patch_size=(8, 8, 8), normalise="robust")
    meta = {"source": str(tmp_path / "a.nii.gz"), "size": [6, 6, 4], "plan": json.dumps(dataclasses.asdict(plan))}
    where = np.array([[13, 9, 2], [0, 0, 0]])
    write_features(tmp_path / "a.h5", Features(np.ones((2, 3), np.float32), where, "e", meta))
    found = pictures_of(read_features(tmp_path / "a.h5"))
    assert found is not None
    shown = found[0](0).astype(int)
    bright = np.argwhere(shown.min(2) > 200)
    orange = np.argwhere(np.abs(shown - (230, 159, 0)).sum(2) < 5)
    centre = bright.mean(0) / shown.shape[:2]
    assert centre[0] < 0.3 and centre[1] < 0.3  # front is up, high x on the left
    assert (orange.min(0) <= bright.min(0)).all() and (orange.max(0) >= bright.max(0)).all()
    assert (np.abs(found[0](1).astype(int) - (230, 159, 0)).sum(2) < 5).any()


def test_a_volume_s_map_peaks_at_the_most_attended_of_overlapping_cells_on_the_scan_s_own_grid(tmp_path):
    image = np.random.default_rng(0).random((16, 12, 8)).astype(np.float32) + 1
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])  # the file counts x to the patient's left, the cells to the right
    write_nifti(tmp_path / "a.nii.gz", image, affine)
    plan = Plan(spacing=(1.0, 1.0, 1.0), patch_size=(8, 8, 8), normalise="robust")
    meta = {"source": str(tmp_path / "a.nii.gz"), "size": [4, 4, 4], "plan": json.dumps(dataclasses.asdict(plan))}
    corners, attention = np.array([[0, 0, 0], [2, 0, 0], [4, 0, 0]]), np.array([0.2, 0.5, 0.3])
    volume_map(tmp_path / "map.nii.gz", corners, attention, meta)
    found = read_volume([tmp_path / "map.nii.gz"])
    assert np.allclose(found.affine, affine)
    wanted = np.zeros(image.shape)
    for x, value in ((0, 0.2), (4, 0.3), (2, 0.5)):  # the greatest last
        wanted[12 - x : 16 - x, :4, :4] = 3 * value
    assert np.allclose(found.array, wanted, atol=1e-5)


def test_the_page_says_when_groups_are_too_few_and_opens_runs_of_an_earlier_version(tmp_path):
    folder = write_set(tmp_path / "bags", 12, 4)
    run = fit(config(folder, tmp_path / "run", epochs=1, final=False))
    result = json.loads((run / "metrics.json").read_text())
    assert any(line.startswith("too few groups") for line in result["warnings"])
    assert "too few groups to conclude" in Page(write_bag_report(run)).text
    del result["warnings"], result["interval"]
    result["scores"]["auroc"].update(estimate=1.0, low=1.0, high=1.0)
    (run / "metrics.json").write_text(json.dumps(result))
    text = Page(write_bag_report(run)).text
    assert "the interval of AUROC is a point, of an earlier version" in text and "too few groups to conclude" in text
