"""Every task's defaults work on volumes of a few voxels."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from conftest import case_for, manifest_for

import medcl
from medcl.config import PretrainConfig
from medcl.errors import MedclError
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.registry import TASKS, task_class
from medcl.store.plan import derive_plan


@pytest.mark.parametrize("dims", [3, 2])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_made_with_its_defaults(task, dims):
    for shape in ((12, 10, 6), (6, 6, 6)):
        plan = derive_plan(manifest_for([case_for(f"c{i}", shape) for i in range(6)]))
        plan = plan.slicewise() if dims == 2 else plan
        backbone = build_backbone(BackboneSpec("unet", 1, 2, plan.strides, spatial_dims=dims))
        assert task_class(task)(backbone, plan, {}).describe()


@pytest.mark.parametrize(
    "task,shape,remedy,options",
    [
        ("local_contrast", (8, 8, 8), "a smaller --options.region", {"region": 2}),
        ("global_contrast", (32, 32, 3), "at most 3", {"partitions": [1, 1, 3]}),
        ("global_local", (8, 8, 8), "a smaller --options.local_contrast.region", {"local_contrast": {"region": 2}}),
        ("global_local", (32, 32, 3), "at most 3", {"global_contrast": {"partitions": [1, 1, 3]}}),
    ],
)
def test_what_does_not_fit_is_one_line_whose_remedy_works(task, shape, remedy, options):
    plan = derive_plan(manifest_for([case_for(f"c{i}", shape) for i in range(6)]))
    backbone = build_backbone(BackboneSpec("unet", 1, 2, plan.strides))
    with pytest.raises(MedclError) as caught:
        task_class(task)(backbone, plan, {})
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    task_class(task)(backbone, plan, options)


def test_pretraining_by_default_runs_on_small_volumes(tmp_path):
    for number in range(6):
        image = np.random.default_rng(number).normal(100, 10, (12, 10, 6))
        image[3:9, 3:8, 2:5] += 200
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / f"s{number}.nii.gz")
    run = medcl.pretrain(PretrainConfig(str(tmp_path), str(tmp_path / "run"), steps=2))
    assert (run / "weights" / "contract.json").exists()
