"""The stages end to end on a small phantom set: transfer, what is refused before training, export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, Killed, finetuning, pretraining

import medcl
import medcl.store.stage
from medcl import ExportConfig, PrepareConfig
from medcl.checkpoint import load_weights, rebuild
from medcl.dataset.splits import make_split
from medcl.errors import MedclError
from medcl.runtime.run import read_metrics, setup_log
from medcl.store.signature import subject_hash
from medcl.store.stage import load_source


def test_equal_voxels_under_two_names_are_told_whatever_the_compression(tmp_path, phantoms, capsys):
    source = tmp_path / "scans"
    shutil.copytree(phantoms / "imagesTr", source)
    first = sorted(source.glob("*.nii.gz"))[0]
    nib.save(nib.load(first), source / "another.nii")
    setup_log()
    medcl.prepare(PrepareConfig(str(source), workers=2))
    told = capsys.readouterr().err
    assert "holds the same voxels as" in told and "another.nii" in told


def test_the_config_of_a_run_can_be_given_again(runs, tmp_path, phantoms):
    from medcl.config.parsing import parse

    path = str(runs / "pre" / "config.yaml")
    again = parse("pretrain", ["source"], "PretrainConfig", [f"--config={path}", f"--out={tmp_path}"])
    assert again.options == SMALL and again.out == str(tmp_path)
    with pytest.raises(MedclError, match="is the config of `medcl pretrain`"):
        parse("finetune", ["source"], "FinetuneConfig", [f"--config={path}"])


def test_a_run_folder_holds_what_it_promises(runs):
    for run in ("pre", "fine"):
        for name in ("config.yaml", "plan.json", "manifest.json", "metrics.csv", "log.txt", "provenance.json"):
            assert (runs / run / name).stat().st_size > 0, name
        assert any((runs / run / "tensorboard").iterdir())
        assert (runs / run / "checkpoints" / "last.ckpt").exists()
    assert {"loss", "lr"} <= read_metrics(runs / "pre")[-1].keys()
    assert any("val_dice" in row for row in read_metrics(runs / "fine"))


def test_pretraining_holds_out_what_finetuning_tests_on(runs):
    seen = set(load_weights(runs / "pre")[0].subjects)
    split = json.loads((runs / "fine" / "split.json").read_text())
    assert seen and not seen & {subject_hash(each) for each in (*split["test"], *split["val"])}
    assert {subject_hash(each) for each in split["labelled"]} <= seen and len(split["labelled"]) == 2


def test_every_pretrained_tensor_is_taken_over(runs, phantoms, monkeypatch):
    from medcl.segmentation import stage

    seen = {}
    original = stage.transfer

    def spy(contract, state, backbone, where):
        result = original(contract, state, backbone, where)
        seen["encoder"] = {n: backbone.net.state_dict()[n].clone() for n in backbone.tensor_names("encoder")}
        seen["result"] = result
        return result

    monkeypatch.setattr(stage, "transfer", spy)
    medcl.finetune(finetuning(phantoms, runs / "spied", init=str(runs / "pre"), steps=1))
    _, state = load_weights(runs / "pre")
    assert seen["result"].matched == len(seen["encoder"]) > 10
    assert all(torch.equal(state[name], tensor) for name, tensor in seen["encoder"].items())


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"width": 8}, "width is 4 there, 8 here"),
        ({"backbone": "dynunet"}, "name is unet there, dynunet here"),
        ({"norm": "batch"}, "norm is instance there, batch here"),
    ],
)
def test_a_network_that_does_not_match_is_refused_before_training(runs, phantoms, tmp_path, change, reason):
    with pytest.raises(MedclError, match=reason) as caught:
        medcl.finetune(finetuning(phantoms, tmp_path / "x", init=str(runs / "pre"), **change))
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_tampered_weights_are_not_loaded(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "pre", copy)
    with open(next((copy / "weights").glob("*.safetensors")), "ab") as stream:
        stream.write(b"x")
    with pytest.raises(MedclError, match="vouches"):
        load_weights(copy)


@pytest.mark.parametrize("backbone,width", [("unet", 4), ("dynunet", 4), ("swin_unetr", 12)])
def test_exported_weights_load_strictly_into_plain_monai(tmp_path, backbone, width):
    import monai.networks.nets as nets

    from medcl.checkpoint import Contract, save_weights
    from medcl.networks.backbones import BackboneSpec, build_backbone
    from medcl.store.plan import Plan

    spec = BackboneSpec(backbone, width=width, out_channels=3)
    original = build_backbone(spec)
    save_weights(tmp_path, original, Contract("pretrained", spec, Plan(), ("encoder",), "voco"))
    out = medcl.export(ExportConfig(str(tmp_path)))
    told = json.loads((out / "model.json").read_text())
    plain = getattr(nets, told["class"].rsplit(".", 1)[1])(**told["arguments"])
    plain.load_state_dict(load_file(str(out / "model.safetensors")), strict=True)
    x = torch.randn(1, 1, 64, 32, 32) if backbone == "swin_unetr" else torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), original.eval()(x))
        _, again = rebuild(tmp_path)
        pairs = zip(original.encode(x), again.eval().encode(x), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert told["input"]["orientation"] == "RAS" and told["input"]["spacing"]


def test_a_folder_with_two_labelled_subjects_trains_on_both(tmp_path, phantoms):
    manifest = medcl.store.stage.load_source(str(phantoms))
    few = [dataclasses.replace(c, label=c.label if i < 2 else None) for i, c in enumerate(manifest.cases)]
    manifest.with_cases(tuple(few)).save(tmp_path / "few.json")
    run = medcl.finetune(finetuning(tmp_path / "few.json", tmp_path / "run", width=4))
    split = json.loads((run / "split.json").read_text())
    assert len(split["labelled"]) == 2 and not split["val"] and not split["test"]
    assert load_weights(run)[0].step == 4


@pytest.mark.parametrize(
    "change,told",
    [
        ({"steps": 0}, "--steps"),
        ({"lr": -1.0}, "--lr"),
        ({"backbone": "resnet"}, "Give unet, dynunet or swin_unetr"),
        ({"task": "vocco"}, "Did you mean 'voco'"),
        ({"options": {"momentun": 1}}, "Did you mean 'momentum'"),
        ({"accelerator": "tpu"}, "--accelerator"),
        ({"precision": "8"}, "--precision"),
        ({"subjects": "some"}, "--subjects"),
        ({"options": {"crop_size": (24, 24, 24), "grid": (1, 1, 1)}}, "single base crop"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(phantoms, tmp_path, change, told):
    with pytest.raises(MedclError, match=told):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x", **change))
    assert not Path(tmp_path / "x").exists()


def test_another_split_than_pretrainings_is_refused(runs, phantoms, tmp_path):
    with pytest.raises(MedclError, match=r"were seen in training.*--allow_leakage"):
        medcl.finetune(finetuning(phantoms, tmp_path / "x", init=str(runs / "pre"), split_seed=5, steps=1))
    assert not (tmp_path / "x").exists()


def test_a_plan_that_prepares_otherwise_than_pretraining_is_refused(runs, phantoms, tmp_path):
    plan = json.loads((runs / "pre" / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "spacing": [3, 3, 3]}))
    with pytest.raises(MedclError, match="prepares volumes otherwise"):
        medcl.finetune(finetuning(phantoms, tmp_path / "x", init=str(runs / "pre"), plan=str(tmp_path / "plan.json")))


def test_a_drawn_subject_whose_volume_is_bad_is_an_error(phantoms, tmp_path, runs):
    copy = tmp_path / "copy"
    shutil.copytree(phantoms, copy)
    drawn = json.loads((runs / "fine" / "split.json").read_text())["labelled"][0]
    label = next((copy / "labelsTr").glob(f"{drawn}*"))
    nifti = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(nifti.dataobj).astype(np.float32) + 0.5, nifti.affine), label)
    with pytest.raises(MedclError, match=f"labelled volumes of {drawn} cannot be used"):
        medcl.finetune(finetuning(copy, tmp_path / "x", width=4))


def test_weights_of_another_state_are_cleared_only_once_the_new_contract_stands(tmp_path, monkeypatch):
    from medcl import checkpoint
    from medcl.checkpoint import Contract, save_weights
    from medcl.networks.backbones import BackboneSpec, build_backbone
    from medcl.store.plan import Plan

    spec = BackboneSpec(width=4)
    first = build_backbone(spec)
    contract = Contract("pretrained", spec, Plan(), ("encoder",), "voco")
    save_weights(tmp_path, first, contract)

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_json", killed)
        save_weights(tmp_path, build_backbone(spec), contract)
    _, state = load_weights(tmp_path)
    assert all(torch.equal(state[k], v) for k, v in first.net.state_dict().items())
    save_weights(tmp_path, build_backbone(spec), contract)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 1


def test_ct_is_recognised_by_its_air_whether_or_not_voxels_were_scanned(tmp_path):
    from medcl.store.stage import load_source

    rng = np.random.default_rng(0)
    for i in range(3):
        voxels = rng.normal(0, 50, (12, 12, 12)).astype(np.int16)
        voxels[:4] = -1000
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"scan{i}.nii.gz")
    assert {case.modality for case in load_source(str(tmp_path)).cases} == {"CT"}


@pytest.mark.parametrize("value,told", [(0, "crops is 0"), ("many", "crops is 'many'")])
def test_options_that_cannot_work_are_one_line(phantoms, tmp_path, value, told):
    with pytest.raises(MedclError, match=told):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x", options={"crops": value}))


def test_labelled_volumes_that_cannot_be_used_are_left_out_of_all_and_missed_in_a_draw(tmp_path, phantoms, capsys):
    """A folder is read by headers first: what its voxels hold comes out when they are prepared."""
    folder = tmp_path / "scans"
    shutil.copytree(phantoms, folder)
    split = make_split(load_source(str(folder)))
    damaged = sorted(split.train)[0]
    path = folder / "imagesTr" / f"{damaged}.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj, np.float32)
    array[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    run = medcl.finetune(finetuning(folder, tmp_path / "all", labels="all", width=4))
    count = len(split.train) - 1
    assert f"Training on {count} volumes of {count} labelled subjects" in (run / "log.txt").read_text()
    with pytest.raises(MedclError, match=f"labelled volumes of {damaged}"):
        medcl.finetune(finetuning(folder, tmp_path / "few", labels=str(len(split.train)), width=4))
    medcl.finetune(finetuning(folder, tmp_path / "few", labels="all", width=4))  # the folder is free
