"""CT is told by Hounsfield units: planted volumes of every kind, the same by folder, by manifest and by header."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import upright, write_series

from medcl.dataset.case import Manifest
from medcl.dataset.modality import SAMPLED, check_hounsfield, evidence_of
from medcl.dataset.scan import scan
from medcl.errors import MedclError
from medcl.store.plan import derive_plan
from medcl.store.prepare import prepare
from medcl.store.stage import confirm, load_source

SHAPE = (32, 32, 24)


def mr(seed: int, shape=SHAPE) -> np.ndarray:
    array = np.random.default_rng(seed).normal(100, 10, shape)
    array[8:24, 8:24, 6:18] += 200
    array[12:20, 12:20, 9:15] += 300
    return array.astype(np.float32)


def ct(seed: int, noise: float = 15) -> np.ndarray:
    """A body of fat, muscle and bone with a lung, in air (HU)."""
    rng = np.random.default_rng(seed)
    array = np.full(SHAPE, -1000.0)
    array[5:27, 5:27] = -100
    array[7:25, 7:25] = 40
    array[9:15, 9:15, 4:20] = -850
    array[16:18, 16:18] = 700
    return np.round(array + rng.normal(0, noise, SHAPE)).astype(np.int16)


def padded(value: int) -> np.ndarray:
    array = ct(0)
    array[:2], array[-2:], array[:, :2], array[:, -2:] = value, value, value, value
    return array


def outlier(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[0, 0, 0] = value
    return array


def z_scored(array: np.ndarray) -> np.ndarray:
    return (array - array.mean()) / array.std()


def noise(seed: int, scale: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, SHAPE)


ORGAN = np.random.default_rng(0).normal(60, 30, SHAPE)  # a liver, and some fat
ORGAN[:6] = np.random.default_rng(1).normal(-100, 20, (6, *SHAPE[1:]))

KINDS = {
    "CT": (ct(0), "HU"),
    "noisy CT": (ct(0, 60), "HU"),
    "CT as float": (ct(0).astype(np.float64) + 0.25, "HU"),
    "CT clipped to -1000..1000": (ct(0).clip(-1000, 1000), "HU"),
    "CT clipped at -1024": (ct(0).clip(-1024, 3071), "HU"),
    "CT padded with -2000": (padded(-2000), "HU"),
    "CT padded with -3024": (padded(-3024), "HU"),
    "CT clipped to -200..300": (ct(0).clip(-200, 300), "possible"),
    "CT of an organ": (ORGAN, "possible"),
    "CT of air and lung only": (np.random.default_rng(0).normal(-900, 60, SHAPE), "possible"),
    "CT stored 1024 too high": ((ct(0).astype(int) + 1024).clip(0, 4095).astype(np.uint16), "offset"),
    "CT in 0..1": ((ct(0).clip(-1000, 1000) + 1000) / 2000.0, "other"),
    "CT in -1..1": (ct(0).clip(-1000, 1000) / 1000.0, "other"),
    "CT as bytes": (((ct(0).clip(-160, 240) + 160) * 255 / 400).astype(np.uint8), "other"),
    "CT shifted down twice": (ct(0) - 1024, "other"),
    "CT of bone and enhanced blood": (mr(0), "positive"),
    "MR": (mr(0) * 5, "other"),
    "MR with an outlier": (outlier(mr(0) * 10, -620), "other"),
    "MR with air at -1000 in one voxel": (outlier(mr(0) * 5, -1000), "other"),
    "MR, z-scored": (z_scored(mr(0)), "other"),
    "MR with 0 around it": (np.where(mr(0) > 150, mr(0) * 10, 0), "other"),
    "PET": (np.random.default_rng(0).gamma(1.0, 2.0, SHAPE).clip(0, 20), "other"),
    "noise around 0": (noise(0, 300), "possible"),
    "wide noise around 0": (noise(0, 1000), "possible"),
    "phase": (np.random.default_rng(0).uniform(-4096, 4096, SHAPE), "possible"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_voxels_say(kind):
    array, units = KINDS[kind]
    assert evidence_of(array).units == units
    assert evidence_of(array.astype(np.float32)[::-1].transpose(2, 0, 1)).units == units
    if units in ("HU", "possible", "positive"):
        check_hounsfield(array)
    else:
        with pytest.raises(MedclError, match=r"s\.nii: voxels from .* are not in HU"):
            check_hounsfield(array, "s.nii")


def folder(root: Path, **volumes: np.ndarray) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, array in volumes.items():
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), root / f"{name}.nii.gz")
    return root


def both(root: Path) -> tuple[Manifest, Manifest]:
    """By headers and samples, and by all voxels; modalities and plans must agree."""
    quick, full = load_source(str(root)), scan(root)
    assert [case.modality for case in quick.cases] == [case.modality for case in full.cases]
    return quick, full


@pytest.mark.parametrize("array", [outlier(mr(1) * 10, -620), z_scored(mr(1)), mr(1) - 600, KINDS["phase"][0]])
def test_what_is_no_ct_never_takes_the_hu_window(tmp_path, array):
    for manifest in both(folder(tmp_path, a=array, b=outlier(array, float(array.max()) + 1))):
        assert manifest.problems == () and derive_plan(manifest).normalise == "robust"


@pytest.mark.parametrize("kind", ["CT", "CT padded with -2000", "CT clipped to -1000..1000"])
def test_a_ct_without_a_word_on_it_takes_the_hu_window(tmp_path, kind):
    array = KINDS[kind][0]
    for manifest in both(folder(tmp_path, a=array, b=array[::-1])):
        assert manifest.problems == () and derive_plan(manifest).normalise == "ct"


@pytest.mark.parametrize(
    "array", [(mr(0) / 700).clip(0, 1), KINDS["CT stored 1024 too high"][0], KINDS["CT as bytes"][0], z_scored(mr(0))]
)
def test_a_named_ct_that_is_not_in_hu_is_asked_about(tmp_path, array):
    for manifest in both(folder(tmp_path, s1_ct=array)):
        (question,) = manifest.questions
        assert "is a CT by its header or name, but its voxels" in question.what and "\n" not in str(question)
        with pytest.raises(MedclError, match="are not in HU"):
            confirm(manifest, str(tmp_path), yes=False)
        assert derive_plan(confirm(manifest, str(tmp_path), yes=True)).normalise == "robust"


def test_an_unnamed_ct_stored_too_high_is_asked_about(tmp_path):
    for manifest in both(folder(tmp_path, a=KINDS["CT stored 1024 too high"][0])):
        assert manifest.questions[0].what.startswith("looks like a CT stored 1024 too high")


def test_organs_of_a_ct_follow_what_is_known_of_the_folder(tmp_path):
    assert {c.modality for m in both(folder(tmp_path / "named", s1_ct=ORGAN)) for c in m.cases} == {"CT"}
    assert {c.modality for m in both(folder(tmp_path / "alone", s1=ORGAN)) for c in m.cases} == {"unknown"}
    assert {c.modality for m in both(folder(tmp_path / "beside", s1=ORGAN, s2=ct(0))) for c in m.cases} == {"CT"}


@pytest.mark.parametrize("names", [("p1_ct", "p1_pet"), ("a", "b"), ("b", "a")])
@pytest.mark.parametrize("other", [KINDS["PET"][0], mr(0), mr(1) * 10])
def test_pet_and_mr_beside_ct_are_refused(tmp_path, names, other):
    for manifest in both(folder(tmp_path, **{names[0]: ct(0), names[1]: other})):
        with pytest.raises(MedclError, match=r"CT and others .* mixed"):
            derive_plan(manifest)


def test_a_volume_that_the_sample_missed_is_refused_before_the_store_is_written(tmp_path):
    volumes = {f"s{i:02d}": ct(i) for i in range(2 * SAMPLED)}
    root = folder(tmp_path / "d", **{**volumes, "s00": KINDS["PET"][0]})
    manifest = load_source(str(root))  # five were read, and not the first
    plan = derive_plan(manifest)
    assert plan.normalise == "ct"
    stored, left = prepare(manifest, plan, store=tmp_path / "store", workers=1)
    assert len(stored) == 2 * SAMPLED - 1
    assert left.problems[0].file == "s00.nii.gz" and "are not in HU" in left.problems[0].what


def test_a_pet_series_is_known_by_its_header(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 999, (4, 5, 6))
    write_series(tmp_path, voxels, upright(6), edit=lambda data, _: setattr(data, "Modality", "PT"))
    for manifest in both(tmp_path):
        assert [case.modality for case in manifest.cases] == ["PET"]
        assert derive_plan(manifest).normalise == "robust" and manifest.problems == ()


def test_a_ct_series_without_its_offset_is_asked_about(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 2999, (4, 5, 6))
    write_series(tmp_path, voxels, upright(6), edit=lambda data, _: setattr(data, "RescaleIntercept", 0))
    for manifest in both(tmp_path):
        assert len(manifest.questions) == 1 and manifest.cases[0].modality == "unknown"
