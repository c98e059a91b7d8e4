"""The synthetic subjects are deterministic, anatomically consistent, varied, and hard where real anatomy is hard."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medcl.dataset.phantom import LABELS, ORIENTATIONS, Subject, make_subject, write_phantoms


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return [make_subject((7, number)) for number in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", subjects=7, seed=3)


def centre_mm(label: np.ndarray, affine: np.ndarray, value: int) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.argwhere(label == value)).mean(axis=0)


def test_a_subject_is_a_function_of_its_seed() -> None:
    first, again, other = make_subject(5), make_subject(5), make_subject(6)
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.label, other.label)


def test_a_subject_does_not_depend_on_how_many_are_written(folder: Path, tmp_path: Path) -> None:
    fewer = write_phantoms(tmp_path, subjects=2, seed=3)
    for kind in ("imagesTr", "labelsTr"):
        name = f"{kind}/phantom_001.nii.gz"
        left, right = nib.load(folder / name), nib.load(fewer / name)
        np.testing.assert_array_equal(left.get_fdata(), right.get_fdata())
        np.testing.assert_array_equal(left.affine, right.affine)


def test_every_organ_is_there_in_a_sensible_volume(subjects: list[Subject]) -> None:
    for subject in subjects:
        millilitres = (
            np.bincount(subject.label.ravel(), minlength=len(LABELS))
            * abs(np.linalg.det(subject.affine[:3, :3]))
            / 1000
        )
        assert len(millilitres) == len(LABELS)
        assert 130 < millilitres[1] < 500, "liver"
        assert (millilitres[2:] > 10).all() and (millilitres[2:] < 130).all(), millilitres
        assert subject.image.dtype == np.float32 and subject.label.dtype == np.uint8
        assert np.isfinite(subject.image).all() and subject.image.min() >= 0


def test_organs_keep_their_places(subjects: list[Subject]) -> None:
    for subject in subjects:
        at = {name: centre_mm(subject.label, subject.affine, value) for value, name in LABELS.items() if value}
        assert at["left_kidney"][0] + 40 < at["right_kidney"][0]
        assert at["liver"][0] > at["aorta"][0] + 10 > at["spleen"][0] + 20
        assert at["stomach"][1] > at["left_kidney"][1]
        assert at["liver"][2] > at["right_kidney"][2]


def test_anatomy_varies_between_subjects(subjects: list[Subject]) -> None:
    volumes = np.array([np.bincount(s.label.ravel(), minlength=7)[1:] * abs(np.linalg.det(s.affine)) for s in subjects])
    variation = volumes.std(axis=0) / volumes.mean(axis=0)
    assert (variation > 0.08).all() and (variation < 0.6).all(), variation
    relative = np.array([centre_mm(s.label, s.affine, 2) - centre_mm(s.label, s.affine, 1) for s in subjects])
    assert (relative.std(axis=0) > 2).all()


def test_contrast_and_unit_vary_between_subjects(subjects: list[Subject]) -> None:
    many = subjects + [make_subject((8, number)) for number in range(14)]
    levels = np.array([[np.median(s.image[s.label == value]) for value in range(1, 7)] for s in many])
    stomach_brighter = levels[:, 4] > levels[:, 0]
    assert 2 <= stomach_brighter.sum() <= len(many) - 2, "some subjects have stomach and liver inverted"
    tops = np.array([s.image.max() for s in many])
    assert tops.max() / tops.min() > 50


def test_intensity_alone_does_not_tell_organs(subjects: list[Subject]) -> None:
    for subject in subjects:
        left, right = (subject.image[subject.label == value] for value in (3, 4))
        assert abs(np.median(left) - np.median(right)) < 0.3 * np.median(left), "both kidneys look alike"
        unlabelled = subject.image[subject.label == 0]
        for value in range(2, 7):
            low, high = np.quantile(subject.image[subject.label == value], (0.25, 0.75))
            lookalikes = ((unlabelled > low) & (unlabelled < high)).sum()
            assert lookalikes > (subject.label == value).sum() / 2, LABELS[value]


def test_thick_slices_are_averages_of_thin_ones() -> None:
    thin, thick = make_subject(3), make_subject(3, thick=3)
    assert thick.image.shape == (56, 48, 16)
    np.testing.assert_allclose(np.linalg.norm(thick.affine[:3, 2]), 3 * np.linalg.norm(thin.affine[:3, 2]))
    assert set(np.unique(thick.label)) == set(LABELS)
    for value in range(1, 7):  # the grid's centre is the same place, so organs stay where they were
        moved = centre_mm(thin.label, thin.affine, value) - centre_mm(thick.label, thick.affine, value)
        offset = thin.affine[:3, :3] @ ((np.array(thin.image.shape) - 1) / 2) + thin.affine[:3, 3]
        offset -= thick.affine[:3, :3] @ ((np.array(thick.image.shape) - 1) / 2) + thick.affine[:3, 3]
        assert np.abs(moved - offset).max() < 2.0


@pytest.mark.parametrize("orientation", sorted(set(ORIENTATIONS)))
def test_stored_orientation_hides_nothing(orientation: str) -> None:
    plain, stored = make_subject(4), make_subject(4, orientation=orientation)
    assert "".join(nib.aff2axcodes(stored.affine)) == orientation
    for voxels, expected in ((stored.image, plain.image), (stored.label, plain.label)):
        canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, stored.affine))
        np.testing.assert_array_equal(np.asarray(canonical.dataobj), expected)
        np.testing.assert_allclose(canonical.affine, plain.affine, atol=1e-9)


def test_the_folder_is_a_decathlon_data_set(folder: Path) -> None:
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == {str(value): name for value, name in LABELS.items()}
    assert dataset["numTraining"] == len(dataset["training"]) == 7
    codes, thick = set(), 0
    for pair in dataset["training"]:
        image, label = nib.load(folder / pair["image"]), nib.load(folder / pair["label"])
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        codes.add("".join(nib.aff2axcodes(image.affine)))
        zooms = image.header.get_zooms()
        thick += max(zooms) / min(zooms) > 1.9
        values = np.asarray(label.dataobj)
        assert set(np.unique(values)) == set(LABELS)
        # aligned: the liver is told from what surrounds it by less spread than the whole has
        voxels = image.get_fdata()
        assert voxels[values == 1].std() < 0.6 * voxels.std()
    assert thick == 2 and codes >= {"RAS", "LPS", "LAS"}


def test_a_given_spacing_is_used() -> None:
    subject = make_subject(1, spacing=4.0, shape=(48, 44, 44))
    assert subject.image.shape == (48, 44, 44)
    np.testing.assert_allclose(np.abs(np.diag(subject.affine)[:3]), 4.0)
