"""One scan under two subjects' names is found on its grid, whatever was done to it; different subjects are not."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import REAL
from inbred import animal, template
from scipy.ndimage import binary_erosion, binary_fill_holes, binary_opening, gaussian_filter

from medcl.dataset.phantom import make_subject
from medcl.dataset.scan import scan
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume
from medcl.store.near_equal import near_equal
from medcl.store.signature import thumbnail

COUNT = 12


def stripped(volume):
    """Without its outer layers, as a brain without its skull."""
    body = binary_fill_holes(binary_opening(gaussian_filter(volume, 1.5) > 0.12 * volume.max()))
    return volume * binary_erosion(body, iterations=3)


CHANGES = {
    "another gamma": lambda v, rng: (v / v.max()) ** 0.6,
    "clipped at percentiles": lambda v, rng: np.clip(v, *np.percentile(v, (2, 98))),
    "standardised": lambda v, rng: (v - v.mean()) / v.std(),
    "noise of 3%": lambda v, rng: v + rng.normal(0, 0.03 * v.max(), v.shape),
    "smoothed": lambda v, rng: gaussian_filter(v, 0.8),
    "stripped": lambda v, rng: stripped(v),
    "stripped, gamma, noise": lambda v, rng: stripped((v / v.max()) ** 0.7 + rng.normal(0, 0.02, v.shape)),
}


@pytest.fixture(scope="module", params=["people", "animals of one template"])
def volumes(request):
    if request.param == "people":
        return [np.asarray(make_subject((9, i), shape=(48, 44, 44)).image) for i in range(COUNT)]
    strain = template(0, (48, 44, 44))
    return [animal(strain, i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(volumes):
    return [thumbnail(volume) for volume in volumes]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_scan_under_another_name_is_found_and_nobody_else(volumes, pictures, change):
    planted = [thumbnail(CHANGES[change](volumes[i], np.random.default_rng(i))) for i in (2, 7)]
    names = [f"s{i}" for i in range(COUNT + 2)]
    found = near_equal([*pictures, *planted], names, ["grid"] * (COUNT + 2))
    assert {(pair.first, pair.second) for pair in found} == {(2, COUNT), (7, COUNT + 1)}
    own = near_equal([*pictures, *planted], [*names[:COUNT], "s2", "s7"], ["grid"] * (COUNT + 2))
    assert own == []


def test_different_subjects_of_a_grid_are_not_questioned(pictures):
    assert near_equal(pictures, [f"s{i}" for i in range(COUNT)], ["grid"] * COUNT) == []


def test_three_names_of_one_scan_are_three_pairs(volumes, pictures):
    again = [thumbnail(np.sqrt(volumes[0])), thumbnail(3 * volumes[0] + 2)]
    found = near_equal([*pictures, *again], [f"s{i}" for i in range(COUNT + 2)], ["grid"] * (COUNT + 2))
    assert {(pair.first, pair.second) for pair in found} == {(0, COUNT), (0, COUNT + 1), (COUNT, COUNT + 1)}


def test_two_volumes_alone_are_compared_and_other_grids_are_not(volumes, pictures):
    two = [pictures[0], thumbnail(np.sqrt(volumes[0]))]
    assert [(pair.first, pair.second) for pair in near_equal(two, ["a", "b"], [1, 1])] == [(0, 1)]
    assert near_equal(two, ["a", "b"], [1, 2]) == []


def test_a_constant_thumbnail_is_like_nothing(pictures):
    flat = np.zeros((24, 24, 24), np.uint8)
    assert near_equal([flat, flat, *pictures], [f"s{i}" for i in range(COUNT + 2)], [0] * (COUNT + 2)) == []


@pytest.mark.skipif(not (REAL / "ACDC").exists(), reason="the real scans and slides do not lie beside this checkout")
def test_different_hearts_are_not_questioned():
    manifest = scan(REAL / "ACDC", voxels=False)
    cases = manifest.cases[:40]
    pictures = [thumbnail(to_canonical(read_volume(manifest.image_paths(case))).array) for case in cases]
    assert near_equal(pictures, [case.subject for case in cases], [0] * len(cases)) == []  # as if of one grid
