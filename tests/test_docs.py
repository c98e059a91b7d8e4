"""What the documentation says works: its worked example is run, its links exist, its configs are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import medcl
from medcl import BenchmarkConfig, FinetuneConfig, PretrainConfig
from medcl.checkpoint import load_weights
from medcl.config import from_mapping
from medcl.config_mil import MILFitConfig, MILPretrainConfig
from medcl.data.plan import Plan
from medcl.downstream.mil_stage import check as check_fit
from medcl.evaluation.grid import make_grid
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext import registry
from medcl.pretext.patches import check as check_pretrain

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "contracts"))

import battery  # noqa: E402
from recipes import Case  # noqa: E402

GUIDE = (ROOT / "docs" / "adding_a_task.md").read_text()


@pytest.fixture
def rotation(tmp_path, monkeypatch):
    """The task of the guide, installed as the guide says."""
    source = re.search(r"```python\n(.*?)```", GUIDE, re.S).group(1)  # type: ignore[union-attr]
    assert len(source.splitlines()) <= 65
    (tmp_path / "rotation_of_the_guide.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = re.search(r'^    "rotation": "(.*)",$', GUIDE, re.M).group(1)  # type: ignore[union-attr]
    assert line == "medcl.pretext.rotation:Rotation"
    monkeypatch.setitem(registry.TASKS, "rotation", "rotation_of_the_guide:Rotation")


def test_the_worked_example_passes_the_battery(rotation):
    case = Case("rotation", "unet", (("size", 16),))
    for check in battery.CHECKS:
        check(case)


def test_the_worked_example_trains_from_its_config(rotation, tmp_path, phantoms):
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", GUIDE, re.S).group(1))  # type: ignore[union-attr]
    config = from_mapping(
        PretrainConfig,
        {**settings, "source": str(phantoms), "out": str(tmp_path / "run"), "steps": 4, "width": 4, "batch_size": 2},
        "guide",
    )
    run = medcl.pretrain(config)
    assert load_weights(run)[0].task == "rotation"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_of_its_command(path, monkeypatch):
    settings = yaml.safe_load(path.read_text())
    if path.stem.startswith("benchmark"):
        monkeypatch.chdir(ROOT)  # recipes are named from there
        assert make_grid(from_mapping(BenchmarkConfig, {"source": "x", "out": "y", **settings}, str(path))).cells
        return
    if path.stem.startswith("finetune"):
        from_mapping(FinetuneConfig, {"source": "x", "out": "y", **settings}, str(path))
        return
    if path.stem.startswith("mil"):
        kind = MILFitConfig if path.stem.startswith("mil_fit") else MILPretrainConfig
        config = from_mapping(kind, {"bags": "x", "out": "y", **settings}, str(path))
        (check_fit if kind is MILFitConfig else check_pretrain)(config)
        return
    assert path.stem.startswith("pretrain")
    config = from_mapping(PretrainConfig, {"source": "x", "out": "y", **settings}, str(path))
    large = config.backbone == "swin_unetr"
    plan = Plan(volume_size=(128, 128, 128), patch_size=(96, 96, 96)) if large else Plan(
        volume_size=(35, 50, 36), patch_size=(40, 56, 40), strides=((2, 2, 2),) * 2
    )  # fmt: skip
    if config.spatial_dims == 2:
        plan = plan.slicewise()
    width = 12 if large else 4
    spec = BackboneSpec(config.backbone, strides=plan.strides, width=width, spatial_dims=config.spatial_dims)
    task = registry.task_class(config.task)(build_backbone(spec), plan, config.options)
    assert task.describe()


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"`((?:docs|configs|pipelines|tests|medcl|benchmarks)/[\w./-]+)`", text)):
        if "TASK" not in name and "rotation" not in name:
            assert (ROOT / name).exists(), f"{page} names {name}"
