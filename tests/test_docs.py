"""What the documentation says works: its worked examples are run, its links exist, its configs are read."""

from __future__ import annotations

import contextlib
import importlib
import re
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

import medcl
from medcl import BenchmarkConfig, ExportConfig, FinetuneConfig, PredictConfig, PretrainConfig
from medcl.checkpoint import load_weights
from medcl.config import from_mapping
from medcl.config.mil import MILFitConfig, MILPretrainConfig
from medcl.efficiency.grid import make_grid
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext import registry
from medcl.store.plan import Plan

ROOT = Path(__file__).parents[1]

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
        from_mapping(kind, {"bags": "x", "out": "y", **settings}, str(path))
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


def test_the_walk_through_the_house_names_functions_that_exist():
    """Names such as `store.stage.plan_for`, and rooms such as `mil/`, in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "medcl").iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in (ROOT / "medcl").glob("[a-z]*.py")}
    table = text[text.index("| room") : text.index("The package's own")]
    assert set(re.findall(r"`([a-z]+)/`", table)) - {"semi"} == rooms
    assert set(re.findall(r"`([a-z_]+)\.py`", table)) == files
    walk = text[text.index("## From a folder") : text.index("## Decisions")]
    names = re.findall(r"`((?:" + "|".join(rooms | files) + r")\.[\w.]+)`", walk)
    assert len(names) > 20
    for name in names:
        parts, found = name.split("."), None
        for cut in range(len(parts), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(["medcl", *parts[:cut]]))
                break
        for attribute in parts[cut:]:
            found = getattr(found, attribute)


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"`((?:docs|configs|pipelines|tests|medcl|benchmarks)/[\w./-]+)`", text)):
        if "TASK" not in name and "rotation" not in name:
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_exported_network_predicts_alike_in_plain_monai(runs, phantoms, tmp_path, monkeypatch):
    """The script of docs/export.md, on a scan that lies otherwise, against `medcl predict`."""
    page = (ROOT / "docs" / "export.md").read_text()
    (tmp_path / "apply.py").write_text(re.search(r"```python\n(.*?)```", page, re.S).group(1))  # type: ignore[union-attr]
    image = nib.load(sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0])
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("PIL"))
    scan = tmp_path / "scan.nii.gz"
    nib.save(turned, scan)
    folder = medcl.export(ExportConfig(str(runs / "fine"), out=str(tmp_path / "export")))
    assert "medcl" not in (tmp_path / "apply.py").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["apply.py", str(folder), str(scan), "plain.nii.gz"])
    runpy.run_path("apply.py", run_name="__main__")
    ours = next(medcl.predict(PredictConfig(str(runs / "fine"), str(scan), str(tmp_path / "ours"))).glob("*.nii.gz"))
    plain, told = (nib.load(path) for path in (tmp_path / "plain.nii.gz", ours))
    a, b = (np.asarray(each.dataobj) for each in (plain, told))
    assert np.allclose(plain.affine, told.affine) and a.shape == b.shape
    assert len(np.unique(b)) > 1 and (a == b).mean() > 0.98
