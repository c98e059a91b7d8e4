"""Metrics against loops, closed forms and MONAI."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl.evaluation.metrics import dice, segmentation_scores, surface, surface_distances

ONE = {1: "organ"}


def blob(seed: int, shape=(9, 8, 7), share=0.3) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


def box(shape, start, stop) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.int16)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 1
    return mask


def loop_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels with a face neighbour that is outside the mask or outside the image, one by one."""
    found = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis, step in itertools.product(range(3), (-1, 1)):
            near = list(voxel)
            near[axis] += step
            if not 0 <= near[axis] < mask.shape[axis] or not mask[tuple(near)]:
                found.append(voxel)
                break
    return found


def loop_distances(a: np.ndarray, b: np.ndarray, spacing) -> list[float]:
    ends = loop_surface(b)
    return [
        min(math.sqrt(sum(((i - j) * mm) ** 2 for i, j, mm in zip(p, q, spacing, strict=True))) for q in ends)
        for p in loop_surface(a)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_brute_force_loop(seed):
    prediction, reference = blob(seed), blob(seed + 50)
    prediction[:3] = False  # the two differ in extent
    spacing, tolerance = (0.7, 1.0, 2.5), 1.0
    (row,) = segmentation_scores(prediction.astype(int), reference.astype(int), ONE, spacing, tolerance)
    there, back = loop_distances(prediction, reference, spacing), loop_distances(reference, prediction, spacing)
    assert row["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert row["nsd"] == pytest.approx(np.mean([d <= tolerance for d in there + back]))
    both = sum(bool(p and r) for p, r in zip(prediction.flat, reference.flat, strict=True))
    assert row["dice"] == pytest.approx(2 * both / (prediction.sum() + reference.sum()))
    assert sorted(map(tuple, np.argwhere(surface(prediction)))) == sorted(loop_surface(prediction))


@pytest.mark.filterwarnings("ignore")
def test_surface_metrics_equal_monai():
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    spacing, tolerance = (1.0, 1.5, 3.0), 1.6
    prediction, reference = blob(3, (14, 12, 10), 0.5), blob(4, (14, 12, 10), 0.5)
    (row,) = segmentation_scores(prediction.astype(int), reference.astype(int), ONE, spacing, tolerance)
    pair = [torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (prediction, reference)]
    hd95 = compute_hausdorff_distance(*pair, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(*pair, class_thresholds=[tolerance], spacing=spacing)
    assert row["hd95"] == pytest.approx(float(hd95), rel=1e-5)
    assert row["nsd"] == pytest.approx(float(nsd), rel=1e-5)


@pytest.mark.parametrize(("axis", "mm"), [(0, 0.5), (1, 1.0), (2, 4.0)])
def test_a_shifted_cube_is_off_by_its_shift_in_mm(axis, mm):
    spacing = (0.5, 1.0, 4.0)
    start, stop = [4, 4, 4], [12, 12, 12]
    reference = box((20, 20, 20), start, stop)
    start[axis] += 2
    stop[axis] += 2
    (row,) = segmentation_scores(box((20, 20, 20), start, stop), reference, ONE, spacing, tolerance_mm=2 * mm)
    assert row["dice"] == pytest.approx(6 / 8)
    assert row["hd95"] == pytest.approx(2 * mm)  # the whole leading face, 1/6 of the surface, is that far away
    assert row["nsd"] == 1.0  # the tolerance is inclusive
    (strict,) = segmentation_scores(box((20, 20, 20), start, stop), reference, ONE, spacing, tolerance_mm=1.9 * mm)
    assert strict["nsd"] < 1.0
    assert row["volume_ref_ml"] == pytest.approx(8**3 * 2 / 1000)


def test_concentric_spheres_are_apart_by_their_radii():
    centre, spacing = np.array([30.0, 30.0, 30.0]), (1.0, 1.0, 2.0)
    grid = np.stack(np.meshgrid(np.arange(61), np.arange(61), np.arange(31), indexing="ij"), -1) * spacing
    radius = np.linalg.norm(grid - centre, axis=-1)
    (row,) = segmentation_scores((radius <= 15).astype(int), (radius <= 20).astype(int), ONE, spacing)
    assert row["hd95"] == pytest.approx(5, abs=1.0)
    assert row["dice"] == pytest.approx(2 * 15**3 / (15**3 + 20**3), abs=0.02)
    assert row["nsd"] == 0.0
    assert row["volume_ref_ml"] == pytest.approx(4 / 3 * math.pi * 20**3 / 1000, rel=0.03)


@pytest.mark.parametrize(
    ("predicted", "true", "outcome", "overlap"),
    [(False, False, "absent", math.nan), (False, True, "missed", 0.0), (True, False, "invented", 0.0)],
)
def test_empty_masks_follow_the_stated_convention(predicted, true, outcome, overlap):
    full = box((6, 6, 6), (1, 1, 1), (3, 3, 3))
    (row,) = segmentation_scores(full * predicted, full * true, ONE, (1, 1, 1))
    assert row["outcome"] == outcome
    assert row["dice"] == pytest.approx(overlap, nan_ok=True)
    assert row["nsd"] == pytest.approx(overlap, nan_ok=True)
    assert math.isnan(row["hd95"])


def test_background_is_never_scored_and_classes_do_not_mix():
    reference = np.zeros((8, 8, 8), dtype=np.uint8)
    reference[1:3, 1:3, 1:3], reference[5:7, 5:7, 5:7] = 1, 2
    swapped = np.array([0, 2, 1], dtype=np.uint8)[reference]
    rows = segmentation_scores(swapped, reference, {0: "background", 2: "b", 1: "a"}, (1, 1, 1))
    assert [(row["class"], row["name"], row["dice"]) for row in rows] == [(1, "a", 0.0), (2, "b", 0.0)]
    assert rows[0]["hd95"] == pytest.approx(4 * math.sqrt(3), rel=0.1)


seeds, spacings = st.integers(0, 10**6), st.tuples(*[st.floats(0.3, 5.0)] * 3)


@given(seeds, spacings)
@settings(max_examples=30, deadline=None)
def test_swapping_the_masks_changes_nothing_but_the_volumes(seed, spacing):
    a, b = blob(seed).astype(int), blob(seed + 1).astype(int)
    (forth,), (back,) = segmentation_scores(a, b, ONE, spacing), segmentation_scores(b, a, ONE, spacing)
    for key in ("dice", "hd95", "nsd"):
        assert forth[key] == pytest.approx(back[key])
    assert forth["volume_pred_ml"] == back["volume_ref_ml"]


@given(seeds, spacings)
@settings(max_examples=20, deadline=None)
def test_empty_margins_change_nothing(seed, spacing):
    a, b = blob(seed).astype(int), blob(seed + 1).astype(int)
    margin = [(3, 1), (0, 4), (2, 2)]
    padded = segmentation_scores(np.pad(a, margin), np.pad(b, margin), ONE, spacing)
    assert segmentation_scores(a, b, ONE, spacing) == padded


@given(seeds, spacings, st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_distances_scale_with_the_voxels(seed, spacing, factor):
    a, b = blob(seed), blob(seed + 1)
    small, large = surface_distances(a, b, spacing), surface_distances(a, b, [mm * factor for mm in spacing])
    np.testing.assert_allclose(small[0] * factor, large[0], rtol=1e-9)


def test_a_distance_equal_to_the_tolerance_is_within_it_whatever_the_rounding():
    first, second = box((9, 3, 3), (0, 0, 0), (1, 3, 3)), box((9, 3, 3), (3, 0, 0), (4, 3, 3))
    (row,) = segmentation_scores(first, second, ONE, (0.1, 1, 1), tolerance_mm=0.3)  # 3 * 0.1 > 0.3 in floating point
    assert row["nsd"] == 1.0


def test_a_perfect_prediction_scores_perfectly():
    mask = blob(0).astype(int)
    (row,) = segmentation_scores(mask, mask, ONE, (1, 2, 3), tolerance_mm=0)
    assert (row["dice"], row["hd95"], row["nsd"], row["outcome"]) == (1.0, 0.0, 1.0, "present")
    assert dice(mask == 1, mask == 0) == 0.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"reference": np.zeros((4, 4, 5), int)}, "one shape"),
        ({"reference": np.zeros((4, 4, 4))}, "integers"),
        ({"spacing": (1, 1, 0)}, "spacing"),
        ({"tolerance_mm": -1.0}, "tolerance"),
        ({"tolerance_mm": math.nan}, "tolerance"),
    ],
)
def test_nonsense_is_refused(change, match):
    zeros = np.zeros((4, 4, 4), int)
    good = {"prediction": zeros, "reference": zeros, "classes": ONE, "spacing": (1, 1, 1), "tolerance_mm": 1.0}
    with pytest.raises(ValueError, match=match):
        segmentation_scores(**{**good, **change})
