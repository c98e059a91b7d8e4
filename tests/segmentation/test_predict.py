"""Prediction: on the grid of the input, by windows, never over a scan."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_series import upright, write_series

import medcl
import medcl.store.stage
from medcl import EvaluateConfig, PredictConfig
from medcl.errors import MedclError
from medcl.io.geometry import to_canonical
from medcl.segmentation.module import class_scores
from medcl.segmentation.predict import Predictor, predict_cases
from medcl.store.stage import load_source


class ThresholdPredictor(Predictor):
    """Labels what is bright, so that the truth is known and only the geometry is on trial."""

    def __call__(self, volume):
        from medcl.io.geometry import from_canonical
        from medcl.store.prepare import prepare_image

        plan = dataclasses.replace(self.contract.plan, spacing=(1.2, 1.7, 2.1))
        prepared = prepare_image(to_canonical(volume), plan)
        bright = prepared.image > 0.5 * (prepared.image.max() + np.median(prepared.image))
        scores = np.stack([~bright, bright]).astype(np.float32)
        return from_canonical(prepared.restore(scores), volume.affine)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("oblique", [False, True])
def test_a_prediction_lies_on_the_inputs_own_grid(runs, tmp_path, codes, oblique):
    rng = np.random.default_rng(0)
    shape = (40, 28, 22)
    label = np.zeros(shape, dtype=np.uint8)
    label[8:20, 6:16, 5:14] = 1
    image = (rng.normal(100, 3, shape) + 300.0 * label).astype(np.float32)
    affine = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)),
        shape,
    )
    affine = np.diag([1.5, 2.0, 2.5, 1.0]) @ affine
    if oblique:
        a = np.deg2rad(20)
        turn = np.array([[np.cos(a), -np.sin(a), 0, 5], [np.sin(a), np.cos(a), 0, -8], [0, 0, 1, 3], [0, 0, 0, 1]])
        affine = turn @ affine
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "in.nii.gz")
    manifest = load_source(str(tmp_path))
    out = predict_cases(ThresholdPredictor(runs / "fine"), manifest, manifest.cases, tmp_path / "out")
    found = nib.load(out / f"{manifest.cases[0].id}.nii.gz")
    assert found.shape == shape
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    voxels = np.asarray(found.dataobj)
    assert 2 * (voxels * label).sum() / (voxels.sum() + label.sum()) > 0.9


def test_a_real_predictor_writes_labels_of_the_data_set(runs, phantoms, tmp_path):
    out = medcl.predict(PredictConfig(str(runs / "fine"), str(phantoms), str(tmp_path / "out"), subjects="test"))
    files = sorted(out.glob("*.nii.gz"))
    split = json.loads((runs / "fine" / "split.json").read_text())
    assert [f.name.removesuffix(".nii.gz") for f in files] == sorted(split["test"])
    image = nib.load(phantoms / "imagesTr" / files[0].name)
    found = nib.load(files[0])
    assert found.shape == image.shape and np.allclose(found.affine, image.affine, atol=1e-4)
    assert set(np.unique(np.asarray(found.dataobj))) <= set(range(7))


def test_sliding_window_scores_are_probabilities_and_pad_small_volumes():
    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([x * 0, x * self.weight * 5], dim=1)

    rng = np.random.default_rng(0)
    for shape in ((20, 9, 14), (5, 6, 7)):
        image = rng.normal(size=shape).astype(np.float32)
        for mirror in (False, True):
            scores = class_scores(Identity(), image, (8, 8, 8), precision="32-true", accelerator="cpu", mirror=mirror)
            assert scores.shape == (2, *shape)
            np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)
            np.testing.assert_allclose(scores[1], 1 / (1 + np.exp(-5 * image)), atol=1e-4)


def test_evaluating_a_run_predicts_its_test_subjects(runs):
    result = medcl.evaluate(EvaluateConfig(str(runs / "fine")))
    split = json.loads((runs / "fine" / "split.json").read_text())
    assert len(list((runs / "fine" / "test").glob("*.nii.gz"))) == len(split["test"])
    assert result and (runs / "fine" / "test" / "evaluation.csv").exists()


def test_an_encoder_alone_cannot_predict(runs, phantoms, tmp_path):
    with pytest.raises(MedclError, match="not a segmentation network"):
        medcl.predict(PredictConfig(str(runs / "pre"), str(phantoms), str(tmp_path)))


def test_one_volume_in_one_label_map_out(runs, phantoms, tmp_path):
    path = sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0]
    out = medcl.predict(PredictConfig(str(runs / "fine"), str(path), str(tmp_path / "one")))
    assert sorted(f.name for f in out.iterdir()) == ["cases.csv", path.name]
    assert inputs(out) == [[path.name, str(path), ""]]


def inputs(out):
    header, *rows = csv.reader((out / "cases.csv").open())
    assert header == ["prediction", "input", "series"]
    return rows


def bright_block(seed=0):
    volume = np.random.default_rng(seed).normal(100, 3, (24, 20, 12)).astype(np.int16)
    volume[6:14, 4:12, 3:9] += 400
    return volume


def test_hashed_names_of_dicom_are_mapped_to_their_series_without_a_patients_name(runs, tmp_path):
    for name in ("x", "y"):
        write_series(tmp_path / "scans" / name, bright_block(), upright(12), uid="1.2.5" if name == "x" else "1.2.6",
                     edit=None if name == "x" else another_patient)  # fmt: skip
    nib.save(nib.Nifti1Image(bright_block(1), np.eye(4)), tmp_path / "scans" / "z.nii.gz")
    manifest = load_source(str(tmp_path / "scans"))
    out = predict_cases(ThresholdPredictor(runs / "fine"), manifest, manifest.cases, tmp_path / "out")
    scans = tmp_path.resolve() / "scans"
    assert sorted(row[1:] for row in inputs(out)) == [
        [str(scans / "x"), "1.2.5"], [str(scans / "y"), "1.2.6"], [str(scans / "z.nii.gz"), ""],
    ]  # fmt: skip
    assert {row[0] for row in inputs(out)} == {path.name for path in out.glob("*.nii.gz")}
    assert not re.search("doe|jane|4711|4712", (out / "cases.csv").read_text().lower())


def another_patient(data, index):
    data.PatientID = "MRN-4712"


def test_a_second_prediction_adds_its_inputs_and_another_table_is_kept(runs, tmp_path):
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(bright_block(ord(name)), np.eye(4)), tmp_path / f"{name}.nii.gz")
    predictor, out = ThresholdPredictor(runs / "fine"), tmp_path / "out"
    for name in ("a", "b", "b"):
        manifest = load_source(str(tmp_path / f"{name}.nii.gz"))
        predict_cases(predictor, manifest, manifest.cases, out)
    assert [row[0] for row in inputs(out)] == ["a.nii.gz", "b.nii.gz"]
    (out / "a.nii.gz").unlink()
    predict_cases(predictor, manifest, manifest.cases, out)
    assert [row[0] for row in inputs(out)] == ["b.nii.gz"]
    (out / "cases.csv").write_text("subject,age\nb,40\n")
    with pytest.raises(MedclError, match="would be overwritten"):
        predict_cases(predictor, manifest, manifest.cases, out)
    assert (out / "cases.csv").read_text() == "subject,age\nb,40\n"


def test_scans_are_never_overwritten_by_predictions(runs, phantoms):
    images = phantoms / "imagesTr"
    before = {path: path.read_bytes() for path in images.iterdir()}
    with pytest.raises(MedclError, match="holds the scans themselves"):
        medcl.predict(PredictConfig(str(runs / "fine"), str(images), str(images)))
    assert before == {path: path.read_bytes() for path in images.iterdir()}
