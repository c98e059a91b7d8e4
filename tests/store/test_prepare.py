"""Preparation: geometry that comes back, intensities that do not depend on scale, a cache that is never stale."""

from __future__ import annotations

import dataclasses
import itertools
import json

import nibabel as nib
import numpy as np
import pytest

from medcl.errors import MedclError
from medcl.io.geometry import Volume, to_canonical
from medcl.io.resample import resample_labels, resample_linear, resampled_affine
from medcl.store import stage
from medcl.store.image import correct_bias, prepare_image
from medcl.store.plan import Plan, derive_plan
from medcl.store.prepare import prepare
from medcl.store.stage import load_source, plan_for
from medcl.store.volumes import open_volume

PLAN = Plan(spacing=(2.0, 2.0, 2.0))


def test_resampling_a_ramp_keeps_its_world_values():
    x = np.arange(20, dtype=np.float32)
    ramp = np.broadcast_to(x[:, None, None], (20, 6, 5))
    affine = np.diag([1.0, 1, 1, 1])
    for n in (10, 15, 33):
        out = resample_linear(ramp, (n, 6, 5))
        world = resampled_affine(affine, ramp.shape, out.shape) @ np.array([[i, 0, 0, 1] for i in range(n)]).T
        inner = slice(3, n - 3)
        np.testing.assert_allclose(out[inner, 2, 2], world[0][inner], atol=1e-3)


def test_resampling_matches_torch():
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(0)
    array = rng.normal(size=(9, 12, 7)).astype(np.float32)
    want = F.interpolate(torch.from_numpy(array)[None, None], size=(13, 12, 6), mode="trilinear", align_corners=False)
    np.testing.assert_allclose(resample_linear(array, (13, 12, 6)), want[0, 0].numpy(), atol=1e-5)


def test_labels_stay_labels():
    label = np.zeros((10, 10, 4), dtype=np.uint8)
    label[:5], label[5:, :, 2:] = 3, 7
    out = resample_labels(label, (21, 10, 12))
    assert set(np.unique(out)) <= {0, 3, 7} and out.dtype == np.uint8
    assert (out[:9] == 3).all()


@pytest.mark.parametrize("scale,offset", [(1000.0, 0.0), (1e-3, 5.0), (1.0, -300.0)])
def test_robust_normalisation_ignores_the_scanners_scale(scale, offset):
    rng = np.random.default_rng(0)
    array = rng.gamma(2.0, 1.0, size=(20, 20, 20)).astype(np.float32)
    first = prepare_image(Volume(array, np.eye(4)), PLAN).image
    second = prepare_image(Volume(array * scale + offset, np.eye(4)), PLAN).image
    np.testing.assert_allclose(first, second, atol=1e-2)
    assert abs(first.mean()) < 0.5 and 0.5 < first.std() < 1.5


def test_ct_is_clipped_to_its_window():
    array = np.linspace(-1000, 1000, 1000, dtype=np.float32).reshape(10, 10, 10)
    image = prepare_image(
        Volume(array, np.eye(4)), dataclasses.replace(PLAN, normalise="ct", spacing=(1.0, 1.0, 1.0))
    ).image
    assert image.min() == -1 and image.max() == 1


@pytest.mark.parametrize("shape", [(30, 25, 20), (31, 24, 19)])
def test_a_planted_label_survives_the_round_trip(shape):
    rng = np.random.default_rng(0)
    image = rng.normal(100, 5, size=shape).astype(np.float32)
    image[:4], image[-5:] = 0, 0  # air that is cropped away
    label = np.zeros(shape, dtype=np.uint8)
    label[10:18, 8:16, 6:14] = 1
    prepared = prepare_image(
        Volume(image, np.diag([1.0, 1.0, 1.5, 1.0])), dataclasses.replace(PLAN, spacing=(1.3, 0.9, 1.1))
    )
    small = prepared.prepare_label(label)
    assert small.shape == prepared.image.shape and prepared.crop_start[0] > 0
    scores = np.stack([small == value for value in (0, 1)]).astype(np.float32)
    back = prepared.restore(scores)
    assert back.shape == shape
    assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.93


def test_prepared_voxels_lie_where_their_affine_says():
    image = np.zeros((24, 20, 16), dtype=np.float32)
    image[6:18, 4:16, 4:12] = 50
    image[10:14, 8:12, 6:10] = 200
    affine = np.array([[0, 0, 1.5, 7], [0, -1, 0, 3], [2, 0, 0, -9], [0, 0, 0, 1.0]])
    canonical = to_canonical(Volume(image, affine))
    prepared = prepare_image(canonical, dataclasses.replace(PLAN, spacing=(1.0, 1.0, 1.0)))
    weight = np.clip(prepared.image - np.median(prepared.image), 0, None) ** 4
    centre = np.array([(g * weight).sum() for g in np.indices(weight.shape)]) / weight.sum()
    np.testing.assert_allclose((prepared.affine @ [*centre, 1])[:3], (affine @ [11.5, 9.5, 7.5, 1])[:3], atol=0.3)


def test_n4_flattens_a_planted_bias_field():
    grid = np.indices((32, 32, 24)) - 15.5
    body = (grid[0] ** 2 + grid[1] ** 2 < 200) * 100.0
    field = np.exp(0.03 * grid[0])
    corrected = correct_bias((body * field).astype(np.float32), (1.0, 1.0, 1.0))
    inside = body > 0
    spread = lambda a: a[inside].std() / a[inside].mean()  # noqa: E731
    assert spread(corrected) < 0.5 * spread(body * field)


@pytest.fixture
def folder(tmp_path, phantoms):
    manifest = load_source(str(phantoms))
    return dataclasses.replace(manifest, cases=manifest.cases[:3])


def prepared_times(store):
    return {path: path.stat().st_mtime_ns for path in store.glob("*/*/meta.json")}


def test_a_second_run_does_only_what_is_missing(folder, tmp_path):
    stored, _ = prepare(folder, PLAN, store=tmp_path)
    before = prepared_times(tmp_path)
    assert len(before) == len(stored) == 3
    next(iter(before)).unlink()
    prepare(folder, PLAN, store=tmp_path)
    after = prepared_times(tmp_path)
    assert before.keys() == after.keys()
    assert sum(before[p] == after[p] for p in before) == 2


def test_the_cache_follows_content_label_and_plan(folder, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(folder.root, root)
    manifest = dataclasses.replace(folder, root=str(root))
    paths = lambda m, plan=PLAN: [s.path for s in prepare(m, plan, store=tmp_path / "store")[0]]  # noqa: E731
    first = paths(manifest)
    assert paths(manifest, dataclasses.replace(PLAN, patch_size=(8, 8, 8))) == first
    assert not set(paths(manifest, dataclasses.replace(PLAN, spacing=(3.0, 3.0, 3.0)))) & set(first)
    label = root / manifest.cases[0].label
    nifti = nib.load(label)
    changed = np.asarray(nifti.dataobj).copy()
    changed[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(changed, nifti.affine), label)
    assert [a == b for a, b in zip(paths(manifest), first, strict=True)] == [False, True, True]


def test_a_bad_volume_is_set_aside_and_the_others_go_on(folder, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(folder.root, root)
    manifest = dataclasses.replace(folder, root=str(root))
    bad = root / manifest.cases[1].image[0]
    nifti = nib.load(bad)
    voxels = np.asarray(nifti.dataobj).astype(np.float32)
    voxels[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(voxels, nifti.affine), bad)
    stored, left = prepare(manifest, PLAN, store=tmp_path / "store")
    assert [s.case.id for s in stored] == [manifest.cases[0].id, manifest.cases[2].id]
    assert "NaN" in left.problems[-1].what and left.problems[-1].file == manifest.cases[1].image[0]


def test_nothing_usable_is_an_error(folder, tmp_path):
    gone = dataclasses.replace(folder, root=str(tmp_path / "gone"))
    with pytest.raises(MedclError, match="no volume could be prepared"):
        prepare(gone, PLAN, store=tmp_path)


def test_voxel_hash_ignores_header_type_and_compression(tmp_path):
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 200, size=(12, 10, 8)).astype(np.int16)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    flipped = affine.copy()
    flipped[0] = [-1, 0, 0, 11]
    copies = {
        "a.nii": (voxels, affine),
        "b.nii.gz": (voxels.astype(np.float32), affine),
        "c.nii": (voxels[::-1], flipped),
    }
    for name, (array, matrix) in copies.items():
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array), matrix), tmp_path / name)
    manifest = load_source(str(tmp_path))
    hashes = set()
    for case in manifest.cases:
        stored, _ = prepare(manifest.with_cases((case,)), PLAN, store=tmp_path / "store")
        hashes.add(open_volume(stored[0].path).meta["voxel_hash"])
    assert len(manifest.cases) >= 2 and len(hashes) == 1


def test_a_damaged_hash_cache_is_rebuilt(folder, tmp_path):
    first, _ = prepare(folder, PLAN, store=tmp_path)
    (tmp_path / "hashes.json").write_text("{")
    again, _ = prepare(folder, PLAN, store=tmp_path)
    assert [s.path for s in first] == [s.path for s in again]
    assert len(json.loads((tmp_path / "hashes.json").read_text())) == 2 * len(list(itertools.chain(first)))


@pytest.mark.parametrize("normalise", ["robust", "ct"])
def test_without_clipping_the_scale_is_the_same_and_a_bright_spot_stays(normalise):
    rng = np.random.default_rng(0)
    array = rng.normal(50, 20, (20, 20, 20)).astype(np.float32)
    array[10, 10, 10] = 5000.0
    plan = Plan(spacing=(1.0, 1.0, 1.0), normalise=normalise)
    clipped, whole = (prepare_image(Volume(array, np.eye(4)), plan, clip=clip).image for clip in (True, False))
    inside = (clipped > clipped.min()) & (clipped < clipped.max())
    np.testing.assert_allclose(whole[inside], clipped[inside], rtol=1e-4, atol=1e-4)
    assert whole.max() > 10 * clipped.max() and inside.mean() > 0.9


def test_sizes_are_planned_for_what_cropping_leaves(tmp_path):
    """Volumes within 24 voxels of air on every side: patches and volumes as without the air."""
    rng, body = np.random.default_rng(0), (40, 36, 36)
    for number in range(3):
        for name, air in (("bare", 0), ("aired", 24)):
            image = np.pad(rng.uniform(500, 900, body).astype(np.float32), air)
            (tmp_path / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / name / f"s{number}.nii.gz")
    plans = {
        name: plan_for(load_source(str(tmp_path / name)), "", device="cpu", store=str(tmp_path / "store"), workers=1)
        for name in ("bare", "aired")
    }
    assert plans["bare"].volume_size == body
    extra = [a - b for a, b in zip(plans["aired"].volume_size, body, strict=True)]
    assert max(extra) <= 4  # the margin that cropping leaves
    stored, _ = prepare(load_source(str(tmp_path / "aired")), plans["aired"], store=tmp_path / "store", workers=1)
    assert {open_volume(item.path).shape for item in stored} == {plans["aired"].volume_size}
    assert plans["aired"].strides == plans["bare"].strides
    headers = derive_plan(load_source(str(tmp_path / "aired")))
    assert headers.preparation() == plans["aired"].preparation()
    assert headers.volume_size == (88, 84, 84)


def test_planning_many_volumes_reads_few_of_them(tmp_path, monkeypatch):
    image = np.random.default_rng(0).uniform(500, 900, (20, 20, 20)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii.gz")
    (case,) = load_source(str(tmp_path)).cases
    cases = tuple(dataclasses.replace(case, id=f"c{i:05d}", subject=f"c{i:05d}") for i in range(5000))
    manifest = load_source(str(tmp_path)).with_cases(cases)
    asked = []
    monkeypatch.setattr(
        stage, "prepare_volumes", lambda some, plan, **how: (asked.extend(some.cases), prepare(some, plan, **how))[1]
    )
    stage.plan_for(manifest, "", device="cpu", store=str(tmp_path / "store"), workers=1)
    places = [int(case.id[1:]) for case in asked]
    assert len(places) == stage.MEASURED and min(places) < 200 and max(places) > 4800


def body_with_arm(connected: bool) -> tuple[np.ndarray, np.ndarray]:
    """A body, and a thin labelled arm that is joined to it, or too dark to tell from the field."""
    array = np.abs(np.random.default_rng(0).normal(2, 1, (64, 64, 64))).astype(np.float32)
    label = np.zeros(array.shape, np.uint8)
    array[16:48, 16:48, :32] += 200
    array[30:35, 30:35, 32:60] += 200 if connected else 0
    label[30:35, 30:35, 40:60] = 1
    return array, label


@pytest.mark.parametrize("connected", [True, False])
def test_no_labelled_voxel_is_cropped_away(tmp_path, connected):
    array, label = body_with_arm(connected)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "s1.nii.gz")
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "s1_seg.nii.gz")
    plan = Plan(spacing=(1.0, 1.0, 1.0))
    (item,), left = stage.prepare_all(load_source(str(tmp_path)), plan, str(tmp_path / "store"), workers=1)
    volume = open_volume(item.path)
    assert int((volume.label() == 1).sum()) == 500
    place = np.argwhere(volume.label() == 1).min(0) + volume.meta["crop_start"]
    assert place.tolist() == [30, 30, 40]
    told = [problem.what for problem in left.problems if "labelled voxels" in problem.what]
    assert bool(told) != connected
    if not connected:
        assert told[0].startswith("500 of 500 labelled voxels lie outside the body")
        again = stage.prepare_all(load_source(str(tmp_path)), plan, str(tmp_path / "store"), workers=1)[1]
        assert told[0] in [problem.what for problem in again.problems]  # also where the store has the volume already
    alone = prepare_image(Volume(array, np.eye(4)), plan)  # as in prediction
    assert (alone.crop_start[2] + alone.crop_shape[2] >= 60) == connected


def test_a_window_that_cuts_off_what_is_labelled_is_told_with_its_share():
    rng = np.random.default_rng(0)
    array = rng.normal(-1000, 20, (30, 30, 30)).astype(np.float32)
    array[5:25, 5:25, 5:25] = rng.normal(40, 20, (20, 20, 20))
    array[10:14, 10:14, 10:14] = 900  # bone: 64 of 8000 voxels of the body, all that is labelled
    plan = Plan(spacing=(1.0, 1.0, 1.0), normalise="ct")
    label = (array > 800).astype(np.uint8)
    ((what, remedy),) = prepare_image(Volume(array, np.eye(4)), plan, label=label).told
    assert what == "100% of what is labelled lies outside the plan's window of -175 to 250 HU" and "--plan" in remedy
    assert prepare_image(Volume(array, np.eye(4)), plan).told == ()
    wide = dataclasses.replace(plan, window=(-175.0, 1000.0))
    assert prepare_image(Volume(array, np.eye(4)), wide, label=label).told == ()


def test_lungs_cut_off_by_the_window_are_told():
    rng = np.random.default_rng(0)
    array = rng.normal(-1000, 20, (30, 30, 30)).astype(np.float32)
    array[3:27, 3:27, 3:27] = rng.normal(40, 20, (24, 24, 24))
    array[8:22, 8:22, 8:22] = rng.normal(-820, 20, (14, 14, 14))
    ((what, _),) = prepare_image(Volume(array, np.eye(4)), Plan(normalise="ct")).told
    assert what.startswith("20% of the body lies outside the plan's window")


def test_voxels_that_overflow_are_refused_before_the_store_is_written(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.normal(100, 10, (12, 12, 12))
    blob = np.zeros(array.shape)
    blob[4:8, 4:8, 4:8] = 1e6 + rng.normal(0, 0.1, (4, 4, 4))
    volumes = {"beyond": array * 1e300, "blob": blob, "large": (array * 1e30).astype(np.float32), "plain": array}
    for name, voxels in volumes.items():
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    plan = dataclasses.replace(PLAN, spacing=(1.0, 1.0, 1.0))
    stored, left = prepare(load_source(str(tmp_path)), plan, store=tmp_path / "store", workers=1)
    told = {problem.file: problem.what for problem in left.problems}
    assert "beyond what float32 holds" in told["beyond.nii.gz"] and "as good as constant" in told["blob.nii.gz"]
    large, plain = (open_volume(item.path).image() for item in stored)
    assert [item.case.id for item in stored] == ["large", "plain"]
    np.testing.assert_allclose(large, plain, atol=0.01)


def test_nan_is_rejected_or_taken_as_zero(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.normal(100, 10, (12, 12, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "whole.nii.gz")
    array[:2], array[5, 5, 5] = np.nan, np.inf
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "holed.nii.gz")
    filled = np.where(np.isfinite(array), array, 0)
    manifest = load_source(str(tmp_path))
    zero = dataclasses.replace(PLAN, nan="zero")
    assert set(zero.preparation()) - set(PLAN.preparation()) == {"nan"}  # other stores keep their keys
    (first,), left = prepare(manifest, PLAN, store=tmp_path / "store", workers=1)
    assert first.case.id == "whole" and "289 voxels are NaN" in left.problems[0].what
    assert "--nan zero" in left.problems[0].remedy
    (holed, _), left = prepare(manifest, zero, store=tmp_path / "store", workers=1)
    want = prepare_image(Volume(filled, np.eye(4)), zero).image.astype(np.float16)
    assert left.problems == () and np.array_equal(open_volume(holed.path).image(), want)
    assert open_volume(holed.path).meta["notes"] == ["289 voxels that are NaN or infinite were taken as 0"]
    quick = stage.plan_for(manifest, "", device="cpu", store=str(tmp_path / "store"), workers=1, nan="zero")
    assert quick.nan == "zero" and len(stage.scan_folder(tmp_path, nan="zero", workers=1).cases) == 2


@pytest.mark.parametrize("spacing,told", [(0.5, "grow 8 x"), (4.0, "shrink 64 x"), (1.2, None)])
def test_a_plan_for_another_spacing_is_told_with_its_factor(tmp_path, caplog, spacing, told):
    image = np.random.default_rng(0).uniform(500, 900, (12, 12, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii.gz")
    stage.tell_growth(load_source(str(tmp_path)), Plan(spacing=(spacing,) * 3), "runs/pre")
    warnings = [record.getMessage() for record in caplog.records if "voxels" in record.getMessage()]
    assert len(warnings) == (told is not None)
    if told:
        assert told in warnings[0] and warnings[0].startswith("runs/pre resamples to") and "1 x 1 x 1 mm" in warnings[0]
