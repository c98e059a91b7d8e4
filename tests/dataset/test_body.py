"""Where the body lies: planted bodies, and data on which nothing may change."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import REAL

from medcl.dataset.body import MARGIN, body_of, connected_box, foreground_box, labelled_outside
from medcl.dataset.scan import scan
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume

GRID = np.indices((96,) * 3) - 47.5


def with_arm(width: int = 5, axis: int = 2, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A body of 32 voxels a side with a thin arm along an axis, whose far part is labelled."""
    array = np.abs(np.random.default_rng(0).normal(2, 1, (64, 64, 64)))
    label = np.zeros((64, 64, 64), np.uint8)
    array[16:48, 16:48, :32] += 200
    array[30 : 30 + width, 30 : 30 + width, 32:60] += 200
    label[30 : 30 + width, 30 : 30 + width, 40:60] = 1
    array, label = (np.moveaxis(each[..., ::-1] if flip else each, 2, axis) for each in (array, label))
    return array, label


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("width", [3, 5, 8])
def test_connected_body_stays_in_the_box(width, axis, flip):
    array, label = with_arm(width, axis, flip)
    start, stop = foreground_box(array > body_of(array).threshold)
    assert (stop[axis] - start[axis], stop[axis - 1] - start[axis - 1]) == (60 + MARGIN, 32 + 2 * MARGIN)
    assert labelled_outside(array, label, ct=False) == 0


def test_large_volumes_are_searched_on_a_coarse_grid_with_the_same_result():
    array, label = (np.kron(each, np.ones((5, 5, 5), each.dtype)) for each in with_arm())
    start, stop = foreground_box(array > body_of(array).threshold)
    assert start.tolist() == [80 - MARGIN, 80 - MARGIN, 0] and stop.tolist() == [
        240 + MARGIN,
        240 + MARGIN,
        300 + MARGIN,
    ]
    assert label[:, :, : stop[2]].sum() == label.sum()


def test_specks_and_streaks_beside_the_body_do_not_widen_the_box():
    array, _ = with_arm()
    bare = np.where(np.arange(64) < 32, array, 2.0)
    box = foreground_box(bare > 50)
    noisy = bare.copy()
    noisy[np.random.default_rng(1).random(noisy.shape) < 0.002] = 300
    noisy[20, 30, 32:60] = noisy[21, 30, 32:60] = 300  # a streak two voxels wide, that touches the body
    assert connected_box(noisy > 50)[1][2] >= 60
    assert np.array_equal(foreground_box(noisy > 50), box)


@pytest.mark.parametrize("rows", [17, 64])
def test_a_coarse_count_of_any_length_finds_the_same_part(rows):
    mask = np.zeros((rows, 300, 3), bool)
    mask[3:9, 100:299, 1] = True
    start, stop = connected_box(mask)
    assert start[0] == 3 and stop[0] == 9 and 98 <= start[1] <= 100 and 299 <= stop[1] <= 300


@pytest.mark.parametrize("radius", [13, 9, 6])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_a_small_body_is_not_cut_off_at_the_percentile_of_the_field(radius, noise):
    rng, ball = np.random.default_rng(0), (GRID**2).sum(0) < radius**2
    array = np.abs(rng.normal(0, noise, ball.shape)) if noise else np.zeros(ball.shape)
    array[ball] = rng.uniform(100, 400, int(ball.sum()))
    body = body_of(array)
    assert body.saturated(array, ball) < 0.01 and body.high < 401
    assert array[ball].min() > body.threshold > np.percentile(array[~ball], 99.9)


def test_the_range_of_a_body_that_fills_a_tenth_is_that_of_the_volume():
    rng, ball = np.random.default_rng(0), (GRID**2).sum(0) < 30**2
    array = np.where(ball, rng.normal(300, 50, ball.shape), rng.normal(0, 5, ball.shape))
    body = body_of(array)
    assert (body.low, body.high) == tuple(np.percentile(array, (0.5, 99.5))) and body.tissue == body.threshold


def test_scan_tells_of_labels_outside_the_body(tmp_path):
    from medcl.io.nifti import write_nifti

    array, label = with_arm()
    array[:, :, 32:] = np.abs(np.random.default_rng(2).normal(2, 1, (64, 64, 32)))  # nothing shows where the label lies
    write_nifti(tmp_path / "s1.nii.gz", array.astype(np.float32), np.eye(4))
    write_nifti(tmp_path / "s1_seg.nii.gz", label, np.eye(4))
    manifest = scan(tmp_path)
    (problem,) = manifest.problems
    assert problem.what.startswith("500 of 500 labelled voxels lie outside the body") and not problem.aside
    assert manifest.cases[0].label == "s1_seg.nii.gz"


@pytest.mark.skipif(not (REAL / "ACDC").is_dir(), reason="the real scans and slides do not lie beside this checkout")
def test_on_real_scans_nothing_changes():
    for name, every in (("Task04_Hippocampus", 20), ("ACDC", 14)):
        manifest = scan(REAL / name, voxels=False)
        for case in manifest.cases[::every]:
            array = np.asarray(to_canonical(read_volume(manifest.image_paths(case), case.channel)).array, np.float32)
            body, mask = body_of(array), array > body_of(array).threshold
            assert (body.low, body.high) == tuple(np.percentile(array, (0.5, 99.5)))
            for axis, (start, stop) in enumerate(zip(*foreground_box(mask), strict=True)):  # the rule of planes alone
                planes = np.flatnonzero(mask.mean(axis=tuple(i for i in range(3) if i != axis)) > 0.01)
                assert start == max(planes[0] - MARGIN, 0) and stop == min(planes[-1] + 1 + MARGIN, mask.shape[axis])
