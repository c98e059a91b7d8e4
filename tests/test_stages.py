"""The stages end to end on a small phantom set: resume, transfer, prediction on the input's grid, export."""

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

import medcl
import medcl.data.stage
from medcl import (
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PredictConfig,
    PrepareConfig,
    PretrainConfig,
    ScanConfig,
)  # fmt: skip
from medcl.checkpoint import load_weights, rebuild
from medcl.data.io import to_canonical
from medcl.data.signature import subject_hash
from medcl.downstream.predict import Predictor, predict_cases
from medcl.downstream.segmentation import class_scores
from medcl.errors import MedclError
from medcl.run import read_metrics

SMALL = {"hidden": 16, "embedding": 8, "crops": 2}


def pretraining(source, out, **more) -> PretrainConfig:
    return PretrainConfig(
        str(source), str(out), **{"task": "voco", "steps": 6, "batch_size": 2, "width": 4, "options": SMALL, **more}
    )


def finetuning(source, out, **more) -> FinetuneConfig:
    return FinetuneConfig(str(source), str(out), **{"steps": 4, "batch_size": 2, "labels": "2", "val_every": 2, **more})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, phantoms):
    """A pretraining and a fine-tuning from it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(folder / "store"))
        medcl.pretrain(pretraining(phantoms, folder / "pre"))
        medcl.finetune(finetuning(phantoms, folder / "fine", init=str(folder / "pre")))
    return folder


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int):
    """Makes training die in the middle of a step, as a kill would."""
    from medcl.training import SeedEveryStep

    original = SeedEveryStep.on_train_batch_start

    def start(self, trainer, module, *args):
        original(self, trainer, module, *args)
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(SeedEveryStep, "on_train_batch_start", start)


@pytest.mark.parametrize("backbone", ["unet", "dynunet"])
def test_a_killed_pretraining_resumes_bit_for_bit(tmp_path, phantoms, monkeypatch, backbone):
    whole = medcl.pretrain(pretraining(phantoms, tmp_path / "whole", checkpoint_every=2, backbone=backbone))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        medcl.pretrain(pretraining(phantoms, tmp_path / "cut", checkpoint_every=2, backbone=backbone))
    assert not (tmp_path / "cut" / "weights").exists()
    cut = medcl.pretrain(pretraining(phantoms, tmp_path / "cut", checkpoint_every=2, backbone=backbone, resume=True))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert read_metrics(whole) == read_metrics(cut)


def test_a_killed_finetuning_resumes_bit_for_bit(tmp_path, phantoms, monkeypatch):
    whole = medcl.finetune(finetuning(phantoms, tmp_path / "whole", width=4, checkpoint_every=2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        medcl.finetune(finetuning(phantoms, tmp_path / "cut", width=4, checkpoint_every=2))
    cut = medcl.finetune(finetuning(phantoms, tmp_path / "cut", width=4, checkpoint_every=2, resume=True))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_metrics(whole) == read_metrics(cut)


def test_a_resumed_run_goes_on_with_what_it_began_with_though_the_source_has_grown(tmp_path, phantoms, monkeypatch):
    everyone = medcl.scan(ScanConfig(str(phantoms), str(tmp_path / "all.json")))
    few = everyone.with_cases(everyone.cases[:9])
    source = tmp_path / "source.json"
    for begin, config in ((medcl.pretrain, pretraining), (medcl.finetune, finetuning)):
        settings = {"width": 4, "checkpoint_every": 2}
        few.save(source)
        whole = begin(config(source, tmp_path / f"{begin.__name__}-whole", **settings))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 3)
            begin(config(source, tmp_path / f"{begin.__name__}-cut", **settings))
        everyone.save(source)
        cut = begin(config(source, tmp_path / f"{begin.__name__}-cut", resume=True, **settings))
        first, second = (load_weights(run)[1] for run in (whole, cut))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name in ("split.json", "plan.json", "manifest.json"):
            assert (whole / name).read_text() == (cut / name).read_text(), name


def test_equal_voxels_under_two_names_are_told_whatever_the_compression(tmp_path, phantoms, capsys):
    source = tmp_path / "scans"
    shutil.copytree(phantoms / "imagesTr", source)
    first = sorted(source.glob("*.nii.gz"))[0]
    nib.save(nib.load(first), source / "another.nii")
    medcl.prepare(PrepareConfig(str(source)))
    told = capsys.readouterr().err
    assert "holds the same voxels as" in told and "another.nii" in told


def test_the_config_of_a_run_can_be_given_again(runs, tmp_path, phantoms):
    from medcl.parsing import parse

    path = str(runs / "pre" / "config.yaml")
    again = parse("pretrain", ["source"], "PretrainConfig", [f"--config={path}", f"--out={tmp_path}"])
    assert again.options == SMALL and again.out == str(tmp_path)
    with pytest.raises(MedclError, match="is the config of `medcl pretrain`"):
        parse("finetune", ["source"], "FinetuneConfig", [f"--config={path}"])


def test_resuming_with_other_settings_is_refused(runs, phantoms):
    with pytest.raises(MedclError, match="started with another lr"):
        medcl.pretrain(pretraining(phantoms, runs / "pre", lr=0.5, resume=True))
    with pytest.raises(MedclError, match="already holds a run"):
        medcl.pretrain(pretraining(phantoms, runs / "pre"))


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
    from medcl.downstream import stage

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
    from medcl.data.plan import Plan
    from medcl.networks.backbones import BackboneSpec, build_backbone

    spec = BackboneSpec(backbone, width=width, out_channels=3)
    original = build_backbone(spec)
    save_weights(tmp_path, original, Contract("pretrained", spec, Plan(), ("encoder",), "voco"))
    out = medcl.export(ExportConfig(str(tmp_path)))
    told = json.loads((out / "model.json").read_text())
    plain = getattr(nets, told["class"].rsplit(".", 1)[1])(**told["arguments"])
    plain.load_state_dict(load_file(str(out / "model.safetensors")), strict=True)
    x = torch.randn(1, 1, 64, 64, 32) if backbone == "swin_unetr" else torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), original.eval()(x))
        _, again = rebuild(tmp_path)
        pairs = zip(original.encode(x), again.eval().encode(x), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert told["input"]["orientation"] == "RAS" and told["input"]["spacing"]


class ThresholdPredictor(Predictor):
    """Labels what is bright, so that the truth is known and only the geometry is on trial."""

    def __call__(self, volume):
        from medcl.data.io import from_canonical
        from medcl.data.prepare import prepare_image

        plan = dataclasses.replace(self.contract.plan, spacing=(1.2, 1.7, 2.1))
        prepared = prepare_image(to_canonical(volume), plan)
        bright = prepared.image > 0.5 * (prepared.image.max() + np.median(prepared.image))
        scores = np.stack([~bright, bright]).astype(np.float32)
        return from_canonical(prepared.restore(scores), volume.affine)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("oblique", [False, True])
def test_a_prediction_lies_on_the_inputs_own_grid(runs, tmp_path, codes, oblique):
    rng = np.random.default_rng(0)
    shape = (40, 28, 22)
    label = np.zeros(shape, dtype=np.uint8)
    label[8:20, 6:16, 5:14] = 1
    image = (rng.normal(100, 3, shape) + 300.0 * label).astype(np.float32)
    affine = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)),
        shape,
    )
    affine = np.diag([1.5, 2.0, 2.5, 1.0]) @ affine
    if oblique:
        a = np.deg2rad(20)
        turn = np.array([[np.cos(a), -np.sin(a), 0, 5], [np.sin(a), np.cos(a), 0, -8], [0, 0, 1, 3], [0, 0, 0, 1]])
        affine = turn @ affine
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "in.nii.gz")
    from medcl.data.stage import load_source

    manifest = load_source(str(tmp_path))
    out = predict_cases(ThresholdPredictor(runs / "fine"), manifest, manifest.cases, tmp_path / "out")
    found = nib.load(out / f"{manifest.cases[0].id}.nii.gz")
    assert found.shape == shape
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    voxels = np.asarray(found.dataobj)
    assert 2 * (voxels * label).sum() / (voxels.sum() + label.sum()) > 0.9


def test_a_real_predictor_writes_labels_of_the_data_set(runs, phantoms, tmp_path):
    out = medcl.predict(PredictConfig(str(runs / "fine"), str(phantoms), str(tmp_path / "out"), subjects="test"))
    files = sorted(out.glob("*.nii.gz"))
    split = json.loads((runs / "fine" / "split.json").read_text())
    assert [f.name.removesuffix(".nii.gz") for f in files] == sorted(split["test"])
    image = nib.load(phantoms / "imagesTr" / files[0].name)
    found = nib.load(files[0])
    assert found.shape == image.shape and np.allclose(found.affine, image.affine, atol=1e-4)
    assert set(np.unique(np.asarray(found.dataobj))) <= set(range(7))


def test_sliding_window_scores_are_probabilities_and_pad_small_volumes():
    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([x * 0, x * self.weight * 5], dim=1)

    rng = np.random.default_rng(0)
    for shape in ((20, 9, 14), (5, 6, 7)):
        image = rng.normal(size=shape).astype(np.float32)
        for mirror in (False, True):
            scores = class_scores(Identity(), image, (8, 8, 8), precision="32-true", accelerator="cpu", mirror=mirror)
            assert scores.shape == (2, *shape)
            np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)
            np.testing.assert_allclose(scores[1], 1 / (1 + np.exp(-5 * image)), atol=1e-4)


def test_evaluating_a_run_predicts_its_test_subjects(runs):
    result = medcl.evaluate(EvaluateConfig(str(runs / "fine")))
    split = json.loads((runs / "fine" / "split.json").read_text())
    assert len(list((runs / "fine" / "test").glob("*.nii.gz"))) == len(split["test"])
    assert result and (runs / "fine" / "test" / "evaluation.csv").exists()


def test_an_encoder_alone_cannot_predict(runs, phantoms, tmp_path):
    with pytest.raises(MedclError, match="not a segmentation network"):
        medcl.predict(PredictConfig(str(runs / "pre"), str(phantoms), str(tmp_path)))


def test_one_volume_in_one_label_map_out(runs, phantoms, tmp_path):
    path = sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0]
    out = medcl.predict(PredictConfig(str(runs / "fine"), str(path), str(tmp_path / "one")))
    assert [f.name for f in out.iterdir()] == [path.name]


def test_a_folder_with_two_labelled_subjects_trains_on_both(tmp_path, phantoms):
    manifest = medcl.data.stage.load_source(str(phantoms))
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
        ({"backbone": "resnet"}, "unknown backbone"),
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


def test_a_loss_that_is_not_finite_stops_the_run(phantoms, tmp_path, monkeypatch):
    from medcl.pretext.voco import VoCo

    original = VoCo.objective
    calls = []

    def broken(self, z, marks):
        calls.append(1)
        losses = original(self, z, marks)
        return {**losses, "loss": losses["loss"] * float("nan")} if len(calls) > 6 else losses

    monkeypatch.setattr(VoCo, "objective", broken)
    with pytest.raises(MedclError, match="not finite"):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x"))


def test_a_run_cut_off_before_its_first_checkpoint_can_be_resumed(tmp_path, phantoms, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1)
        medcl.pretrain(pretraining(phantoms, tmp_path / "cut"))
    run = medcl.pretrain(pretraining(phantoms, tmp_path / "cut", resume=True))
    assert read_metrics(run)[-1]["step"] == 6


def test_an_interruption_comes_out_as_one_and_leaves_the_signal_alone(tmp_path, phantoms, monkeypatch):
    import signal

    from medcl.training import SeedEveryStep

    def interrupt(self, trainer, module, *args):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SeedEveryStep, "on_train_batch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x"))
    assert signal.getsignal(signal.SIGINT) is before


def test_scans_are_never_overwritten_by_predictions(runs, phantoms):
    images = phantoms / "imagesTr"
    before = {path: path.read_bytes() for path in images.iterdir()}
    with pytest.raises(MedclError, match="holds the scans themselves"):
        medcl.predict(PredictConfig(str(runs / "fine"), str(images), str(images)))
    assert before == {path: path.read_bytes() for path in images.iterdir()}


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
    from medcl.data.plan import Plan
    from medcl.networks.backbones import BackboneSpec, build_backbone

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
    from medcl.data.stage import load_source

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
