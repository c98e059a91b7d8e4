"""Pretraining in several forms, end to end: from another run's weights, slice by slice, in stages."""

from __future__ import annotations

import pytest
import torch

import medcl
from medcl import ExportConfig, FinetuneConfig, PredictConfig, PretrainConfig
from medcl.checkpoint import load_weights
from medcl.errors import MedclError
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.runtime.optimizer import adamw, warmup_cosine
from medcl.runtime.run import read_metrics

GLOBAL = {"hidden": 16, "embedding": 8, "partitions": [1, 1, 2]}


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEDCL_STORE", str(tmp_path_factory.getbasetemp() / "forms"))


def pretraining(source, out, **more) -> PretrainConfig:
    return PretrainConfig(str(source), str(out), **{"steps": 3, "batch_size": 2, "width": 4, **more})


def test_a_decoder_is_pretrained_on_the_encoder_of_another_run(tmp_path, phantoms):
    first = medcl.pretrain(pretraining(phantoms, tmp_path / "g", task="global_contrast", options=GLOBAL))
    second = medcl.pretrain(pretraining(phantoms, tmp_path / "l", task="local_contrast", init=str(first)))
    (_, before), (contract, after) = load_weights(first), load_weights(second)
    names = build_backbone(contract.backbone).tensor_names("encoder")
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert contract.trained == ("encoder", "decoder")
    decoder = build_backbone(contract.backbone).tensor_names("decoder")
    assert any(not torch.equal(before[name], after[name]) for name in decoder)
    with pytest.raises(MedclError, match="width"):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x", task="local_contrast", init=str(first), width=8))


def test_stages_in_one_command(tmp_path, phantoms):
    run = medcl.pretrain(
        pretraining(phantoms, tmp_path / "s", task="global_local", steps=6, options={"global_contrast": GLOBAL})
    )
    assert "local contrast from here on" in (run / "log.txt").read_text()
    assert {row["step"] for row in read_metrics(run)} == set(range(1, 7))
    assert load_weights(run)[0].options["local_contrast"]["freeze_encoder"] is True


def test_a_slicewise_network_goes_all_the_way(tmp_path, phantoms):
    run = medcl.pretrain(pretraining(phantoms, tmp_path / "p", task="global_contrast", options=GLOBAL, spatial_dims=2))
    contract, state = load_weights(run)
    assert contract.backbone.spatial_dims == 2 and all(stride[2] == 1 for stride in contract.plan.strides)
    kernels = [tuple(t.shape[2:]) for t in state.values() if t.ndim == 5]
    assert kernels and all(kernel[2] == 1 for kernel in kernels)
    fine = medcl.finetune(
        FinetuneConfig(str(phantoms), str(tmp_path / "f"), init=str(run), labels="1", steps=2, batch_size=1)
    )
    medcl.predict(PredictConfig(str(fine), str(phantoms), str(tmp_path / "out"), subjects="test"))
    assert list((tmp_path / "out").glob("*.nii.gz"))
    medcl.export(ExportConfig(str(fine), out=str(tmp_path / "export")))


def test_more_partitions_than_slices_end_before_any_training(tmp_path, phantoms):
    with pytest.raises(MedclError, match="400 partitions"):
        medcl.pretrain(
            pretraining(phantoms, tmp_path / "x", task="global_contrast", options={**GLOBAL, "partitions": [1, 1, 400]})
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("frozen,share", [(0.5, 1.0), (0.0, 0.1)])
def test_pretrained_weights_have_a_rate_of_their_own(frozen, share):
    net = build_backbone(BackboneSpec("unet", strides=((2, 2, 2),), width=4))
    given = net.encoder_parameters()
    made = adamw(net, 1e-2, 0.1, 10, 0.2, given, share, frozen)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    known = {id(p) for p in given}
    for step in range(10):
        for group in optimizer.param_groups:
            wanted = 1e-2 * warmup_cosine(step, 10, 0.2)
            if id(group["params"][0]) in known:
                wanted *= 0.0 if step < 10 * frozen else share
            assert group["lr"] == pytest.approx(wanted)
        optimizer.step()
        schedule.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
