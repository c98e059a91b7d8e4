"""Label maps as strangers write them: read exactly, or refused by name; the same by scan and by prepare."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medcl.dataset.scan import scan
from medcl.segmentation.module import channel_table
from medcl.segmentation.planning import label_values
from medcl.store.image import PreparedImage
from medcl.store.plan import Plan
from medcl.store.prepare import prepare
from medcl.store.stage import load_source
from medcl.store.volumes import open_volume

SHAPE = (24, 20, 16)
PLAN = Plan(spacing=(1.0, 1.0, 1.0))
NAMES = {"0": "background", "1": "a", "2": "b", "3": "c", "4": "d"}


def planted(values=(1, 2, 3, 4)) -> np.ndarray:
    label = np.zeros(SHAPE, np.int32)
    for place, value in enumerate(values):
        label[4 + 4 * place : 7 + 4 * place, 5:12, 4 + place : 9 + place] = value
    return label


def folder(root: Path, labels: dict[str, object], names: dict | None = None, affine=None) -> Path:
    """A Decathlon folder with an RAS image for each label: an array, or a NIfTI image."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1, 1, 1]) if affine is None else affine
    for name, label in labels.items():
        for part in ("imagesTr", "labelsTr"):
            (root / part).mkdir(parents=True, exist_ok=True)
        image = rng.uniform(50, 100, SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), root / f"imagesTr/{name}.nii.gz")
        label = nib.Nifti1Image(label, affine) if isinstance(label, np.ndarray) else label
        nib.save(label, root / f"labelsTr/{name}.nii.gz")
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "MRI"}, "labels": NAMES if names is None else names})
    )
    return root


def prepared_label(root: Path, store: Path) -> np.ndarray:
    """The label map of the only case, as it is stored."""
    manifest = load_source(str(root))
    (item,), left = prepare(manifest, PLAN, store=store, workers=1)
    assert not left.problems
    return open_volume(item.path).label()


def scaled(slope: float) -> nib.Nifti1Image:
    image = nib.Nifti1Image((planted() > 0).astype(np.uint8) * 255, np.eye(4))
    image.header.set_slope_inter(slope, 0)
    return image


def lps(label: np.ndarray, affine=None) -> nib.Nifti1Image:
    stored = nib.Nifti1Image(label.astype(np.uint8), np.eye(4) if affine is None else affine)
    return stored.as_reoriented(nib.orientations.axcodes2ornt("LPS"))


@pytest.mark.parametrize(
    "label,want",
    [
        ((planted() * 0.9999).astype(np.float32), planted()),
        ((planted() * 1.0001).astype(np.float64), planted()),
        (scaled(1 / 255), (planted() > 0).astype(int)),
        (lps(planted()), planted()),
        (planted((205, 500, 550, 850)).astype(np.int16), planted((205, 500, 550, 850))),
        (planted((205, 500, 550, 850)).astype(np.float32), planted((205, 500, 550, 850))),
        (planted((2, 1035, 5002, 65_535)), planted((2, 1035, 5002, 65_535))),
    ],
    ids=["0.9999", "1.0001", "slope", "LPS", "MM-WHS", "MM-WHS float", "FreeSurfer"],
)
def test_labels_are_exact_from_the_file_to_the_store_and_the_classes(tmp_path, label, want):
    values = tuple(int(v) for v in np.unique(want) if v)
    root = folder(tmp_path / "d", {"s1": label}, {"background": 0, **{f"c{v}": v for v in values}})
    manifest = scan(root)
    assert manifest.problems == () and manifest.cases[0].label
    stored = prepared_label(root, tmp_path / "store")
    assert np.array_equal(stored, want) and stored.dtype == (np.uint8 if max(values) < 256 else np.uint16)
    unnamed = dataclasses.replace(manifest, label_names={})
    assert label_values(unnamed, PLAN) == values
    channels = channel_table(values).numpy()[stored]  # what the network learns: a channel each, however large the value
    assert channels.max() == len(values)
    assert np.array_equal(np.array([0, *values])[channels], want)


def test_a_label_whose_shape_agrees_only_in_other_axes(tmp_path):
    stored = nib.Nifti1Image(planted().astype(np.uint8), np.eye(4))
    turned = stored.as_reoriented(nib.orientations.axcodes2ornt("SPL"))
    assert turned.shape != SHAPE
    assert np.array_equal(prepared_label(folder(tmp_path / "d", {"s1": turned}), tmp_path / "store"), planted())


@pytest.mark.parametrize("voxels", [True, False])
def test_a_value_that_dataset_json_does_not_name_is_refused_by_scan_and_by_prepare(tmp_path, voxels):
    root = folder(tmp_path / "d", {"s1": planted((1, 2, 3, 5)).astype(np.uint8), "s2": planted().astype(np.uint8)})
    manifest = scan(root, voxels=voxels)
    _, left = prepare(manifest, PLAN, store=tmp_path / "store", workers=1)
    (problem,) = left.problems
    assert problem.file == "labelsTr/s1.nii.gz" and problem.aside
    assert "holds 5, but the data set names 0, 1, 2, 3, 4 only" in problem.what


@pytest.mark.parametrize(
    "names,told",
    [
        ({"background": 0, "whole": [1, 2, 3], "core": [2]}, "label 'whole' is a region of several values, [1, 2, 3]"),
        ({"background": 0, "a": 1, "ignore": 2}, "label 'ignore': 2 is nnU-Net's ignored label"),
        ({"0": "background", "1": "a", "2": "Ignore"}, "label '2': 'Ignore' is nnU-Net's ignored label"),
    ],
)
def test_regions_and_ignored_labels_are_refused_by_name_and_images_stay(tmp_path, names, told):
    manifest = load_source(str(folder(tmp_path / "d", {"s1": planted().astype(np.uint8)}, names)))
    (problem,) = manifest.problems
    assert problem.file == "dataset.json" and problem.what.startswith(told) and problem.aside
    assert [case.label for case in manifest.cases] == [None] and not manifest.labelled


def test_names_as_nnunet_and_as_the_decathlon_writes_them(tmp_path):
    for number, names in enumerate(({"background": 0, "a": 1, "b": "2"}, {"0": "background", "1": "a", "2": "b"})):
        root = folder(tmp_path / str(number), {"s1": planted((1, 2)).astype(np.uint8)}, names)
        assert scan(root).label_names == {0: "background", 1: "a", 2: "b"}


@pytest.mark.parametrize("voxels", [True, False])
def test_a_one_hot_label_map_is_refused_by_name(tmp_path, voxels):
    hot = np.stack([planted() == value for value in range(5)], axis=-1).astype(np.uint8)
    manifest = scan(folder(tmp_path / "d", {"s1": hot}), voxels=voxels)
    (problem,) = manifest.problems
    assert "label map of 5 channels (one for each class?)" in problem.what and "argmax" in problem.remedy
    assert "--channel" not in str(problem) and manifest.cases[0].label is None


@pytest.mark.parametrize("classes,dtype", [(3, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_more_classes_than_a_byte_holds_are_restored(classes, dtype):
    shape = (4, 4, 4)
    prepared = PreparedImage(np.zeros(shape, np.float32), np.eye(4), shape, (0, 0, 0), shape)
    truth = np.arange(64).reshape(shape) * 5 % classes
    scores = (np.arange(classes)[:, None, None, None] == truth).astype(np.float32)
    back = prepared.restore(scores)
    assert back.dtype == dtype and np.array_equal(back, truth)


def test_large_values_pass_through_a_batch(tmp_path):
    from medcl.store.crops import CropDataset, StepBatches, crop_loader

    small, large = planted().astype(np.uint8), planted((205, 500, 550, 850)).astype(np.int16)
    root = folder(tmp_path / "d", {"s1": small, "s2": large}, {})
    stored, _ = prepare(load_source(str(root)), PLAN, store=tmp_path / "store", workers=1)
    data = CropDataset([item.path for item in stored], SHAPE, 0, labelled=True)
    (batch,) = crop_loader(data, StepBatches(2, 0, 1))
    found = {frozenset(np.unique(label.numpy()).tolist()) for label in batch["label"]}
    assert found == {frozenset({0, 1, 2, 3, 4}), frozenset({0, 205, 500, 550, 850})}


def test_scores_of_a_prediction_with_other_axes_and_a_rounded_reference(tmp_path):
    from medcl.evaluation.evaluate import score_folder

    root = folder(tmp_path / "d", {"s1": (planted() * 0.9999).astype(np.float32)})
    (tmp_path / "p").mkdir()
    nib.save(lps(planted()), tmp_path / "p/s1.nii.gz")
    result = score_folder(tmp_path / "p", scan(root), tmp_path / "out")
    assert result["mean"]["dice"]["estimate"] == 1.0 and [c["class"] for c in result["classes"]] == [1, 2, 3, 4]
