"""Plans: derived from headers, readable, and checked when a person has edited them."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import case_for, manifest_for

from medcl.errors import MedclError
from medcl.store.plan import Plan, derive_plan, patch_for, strides_for, target_spacing


def test_anisotropic_scans_stay_anisotropic():
    plan = derive_plan(manifest_for(case_for(f"c{i}", (216, 256, 10), (1.5, 1.5, 10.0)) for i in range(3)))
    assert plan.spacing == (1.5, 1.5, 10.0)
    assert plan.strides[0] == (2, 2, 1)
    assert plan.patch_size[2] >= 10 and plan.patch_size[0] > 8 * plan.patch_size[2]


def test_isotropic_scans_halve_every_axis():
    plan = derive_plan(manifest_for([case_for("c", (35, 51, 36))]))
    assert plan.strides == ((2, 2, 2),) * 3
    assert all(p >= v for p, v in zip(plan.patch_size, (35, 51, 36), strict=True))


def test_a_thick_axis_takes_the_finer_scans_spacing():
    spacings = np.array([[1, 1, z] for z in (4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6)], float)
    assert target_spacing(spacings)[2] == 5.0


def test_axes_are_those_of_ras_whatever_the_file_says():
    turned = case_for("c", (10, 20, 30), (3.0, 2.0, 1.0))
    affine = [[0, 0, 1, 0], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]]  # first array axis runs upwards
    turned = dataclasses.replace(turned, affine=tuple(map(tuple, affine)))
    assert derive_plan(manifest_for([turned])).spacing == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("volume,spacing", [((512, 512, 300), (0.8, 0.8, 1.5)), ((300, 30, 20), (1, 1, 1))])
def test_a_patch_keeps_to_its_budget_and_its_volume(volume, spacing):
    patch = patch_for(volume, spacing, 160_000)
    assert math.prod(patch) <= 160_000 * 1.1
    assert all(p <= v for p, v in zip(patch, volume, strict=True))


def test_tiny_patches_are_not_halved_away():
    assert strides_for([6, 6, 6], [1, 1, 1]) == ((1, 1, 1),)


def test_a_plan_reads_back_equal(tmp_path):
    plan = derive_plan(manifest_for([case_for("c", (64, 64, 64))], names={0: "background", 1: "organ"}))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan
    assert plan.labels == {1: "organ"}


@pytest.mark.parametrize(
    "change,told",
    [
        ({"spaceing": [1, 1, 1]}, "Did you mean 'spacing'"),
        ({"spacing": [1, 0, 1]}, "Give three numbers, each more than 0"),
        ({"spacing": ["1", 1, 1]}, "Give three numbers"),
        ({"spacing": 3}, "Give three numbers"),
        ({"normalise": "zscore"}, "Give ct or robust"),
        ({"modality": "PET"}, "Give MR, CT or unknown"),
        ({"patch_size": [64, 64]}, "Give three whole numbers, each 1 or more"),
        ({"volume_size": [1]}, "Give three whole numbers"),
        ({"n4": "no"}, "Give true or false"),
        ({"normalise": "ct", "window": [1]}, "Give two numbers"),
        ({"normalise": "ct", "window": None}, "Give two numbers"),
        ({"strides": [[2, 2]]}, "for every level"),
        ({"strides": [[0, 2, 2]]}, "for every level"),
        ({"strides": []}, "for every level"),
        ({"patch_size": [33, 64, 64]}, "multiple"),
        ({"normalise": "ct", "window": [250, -175]}, "window"),
        ({"strides": 3}, "cannot be understood"),
    ],
)
def test_an_edited_plan_that_cannot_work_is_refused_in_one_line(tmp_path, change, told):
    path = tmp_path / "plan.json"
    Plan().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MedclError, match=told) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_ct_and_mr_do_not_share_a_plan():
    with pytest.raises(MedclError, match="mixed"):
        derive_plan(manifest_for([case_for("a", modality="CT"), case_for("b", modality="MR")]))
