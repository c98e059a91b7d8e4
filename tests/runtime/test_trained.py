"""Recorded, transferred, slowed, frozen and exported are exactly the tensors that training has changed."""

from __future__ import annotations

import json
import logging
import shutil
from fnmatch import fnmatch

import pytest
import pytorch_lightning as pl
import torch
from small_runs import Killed, finetuning, kill_at, pretraining

import medcl
from medcl import ExportConfig
from medcl.checkpoint import load_weights, transfer
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.runtime.optimizer import adamw
from medcl.runtime.trained import Record, Trained, count, summary
from medcl.store.plan import Plan

PIX = {"blocks": 1, "hidden": 8, "embedding": 4, "size": [16, 16, 16]}
PLAN = Plan(spacing=(4.0, 4.0, 4.0), volume_size=(28, 24, 24), patch_size=(16, 16, 16), strides=((2, 2, 2),) * 3)


def pixcontrast(source, out, **more):
    """With one of two decoder blocks before the output layer."""
    PLAN.save(out.parent / "plan.json")
    more = {"task": "pixcontrast", "steps": 3, "options": PIX, "plan": str(out.parent / "plan.json"), **more}
    return pretraining(source, out, **more)


def beginning(contract, seed=0):
    """The network as a run of this seed starts it, built once more."""
    pl.seed_everything(seed, verbose=False)
    return build_backbone(contract.backbone)


def differing(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.fixture(scope="module")
def pix(tmp_path_factory, phantoms):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(tmp_path_factory.getbasetemp() / "trained"))
        return medcl.pretrain(pixcontrast(phantoms, tmp_path_factory.mktemp("trained") / "pix"))


def test_the_contract_names_exactly_what_has_changed(pix):
    contract, state = load_weights(pix)
    start = beginning(contract)
    changed = differing(state, start.net.state_dict())
    assert set(contract.tensors) == changed
    decoder = start.tensor_names("decoder")
    assert 0 < len(decoder & changed) < len(decoder) and not start.tensor_names("head") & changed
    assert contract.trained == ("encoder", "decoder") and contract.doubtful == ()


def test_exactly_those_are_taken_over_and_counted_and_the_rest_is_left_to_each_draw(pix):
    contract, state = load_weights(pix)
    fresh = beginning(contract, seed=5)
    own = {name: tensor.clone() for name, tensor in fresh.net.state_dict().items()}
    taken = transfer(contract, state, fresh, "here")
    assert differing(own, fresh.net.state_dict()) == set(contract.tensors) == taken.names
    total = len(list(fresh.net.parameters()))
    assert str(taken) == (
        f"{len(contract.tensors)} of {total} tensors pretrained; "
        f"{total - len(contract.tensors)} others start from random values"
    )


def test_exactly_those_are_frozen_and_stay_pretrained_in_the_contract(pix, phantoms, tmp_path):
    run = medcl.finetune(finetuning(phantoms, tmp_path / "f", init=str(pix), frozen=1, steps=2))
    (before, old), (after, new) = load_weights(pix), load_weights(run)
    body = beginning(before).tensor_names("encoder") | beginning(before).tensor_names("decoder")
    assert all(torch.equal(old[name], new[name]) for name in before.tensors)
    assert {name for name in body if not torch.equal(old[name], new[name])} == body - set(before.tensors)
    assert set(after.tensors) == set(new) and after.trained == ("encoder", "decoder", "head")
    slowed = medcl.finetune(finetuning(phantoms, tmp_path / "s", init=str(pix), pretrained_lr=0, steps=2))
    assert all(torch.equal(old[name], load_weights(slowed)[1][name]) for name in before.tensors)


def test_the_export_lists_them_and_says_what_is_random(pix, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("medcl"), "propagate", True)
    medcl.export(ExportConfig(str(pix), out=str(tmp_path / "e")))
    contract, state = load_weights(pix)
    told = json.loads((tmp_path / "e" / "model.json").read_text())
    assert told["trained_tensors"] == sorted(contract.tensors)
    assert f"{len(contract.tensors)} of {len(state)} tensors trained" in caplog.text
    (line,) = {r.getMessage() for r in caplog.records if "random:" in r.getMessage()}
    patterns = line.split(": ")[1].rstrip(".").split(", ")
    meant = {name for name in state if any(fnmatch(name, pattern) for pattern in patterns)}
    assert meant == set(state) - set(contract.tensors)


def test_a_chain_of_runs_adds_up_and_a_frozen_encoder_stays_trained(pix, phantoms, tmp_path):
    options = {"freeze_encoder": True, "blocks": 2, "size": [16, 16, 16]}
    config = pixcontrast(phantoms, tmp_path / "l", task="local_contrast", init=str(pix), options=options)
    run = medcl.pretrain(config)
    (first, old), (second, new) = load_weights(pix), load_weights(run)
    start = beginning(second)
    transfer(first, old, start, "")
    assert set(second.tensors) == set(first.tensors) | differing(start.net.state_dict(), new) > set(first.tensors)


@pytest.mark.parametrize("norm,backbone", [("batch", "unet"), ("instance", "dynunet")])
def test_an_interrupted_run_records_what_a_whole_one_does(phantoms, tmp_path, monkeypatch, norm, backbone):
    more = {"norm": norm, "backbone": backbone, "checkpoint_every": 2}
    whole = medcl.pretrain(pixcontrast(phantoms, tmp_path / "whole", **more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        medcl.pretrain(pixcontrast(phantoms, tmp_path / "cut", **more))
    cut = medcl.pretrain(pixcontrast(phantoms, tmp_path / "cut", resume=True, **more))
    with monkeypatch.context() as patch, pytest.raises(Killed):  # its training ended, its weights unwritten
        patch.setattr("medcl.pretext.stage.save_seen", lambda *args: (_ for _ in ()).throw(Killed))
        medcl.pretrain(pixcontrast(phantoms, tmp_path / "late", **more))
    late = medcl.pretrain(pixcontrast(phantoms, tmp_path / "late", resume=True, **more))
    contract, state = load_weights(whole)
    assert set(contract.tensors) == differing(state, beginning(contract).net.state_dict())  # running statistics too
    assert contract.tensors == load_weights(cut)[0].tensors == load_weights(late)[0].tensors
    assert norm != "batch" or any("running_mean" in name for name in contract.tensors)


def test_the_teacher_that_is_kept_has_learnt_what_its_student_has(phantoms, tmp_path):
    run = medcl.finetune(finetuning(phantoms, tmp_path / "t", width=4, semi="mean_teacher", steps=2, val_every=1))
    contract, state = load_weights(run)
    assert set(contract.tensors) == set(state)


# --- what counts ------------------------------------------------------------------------------------------------------


def trained_for(net, loss, steps=3, frozen=0.0, given=()):
    """The record of a few steps of AdamW with weight decay, and the names of all tensors that differ."""
    start = {name: tensor.clone() for name, tensor in net.net.state_dict().items()}
    record = Record(net)
    made = adamw(net, 1e-2, 0.5, steps, 0.0, given, 1.0, frozen)
    for _ in range(steps):
        made["optimizer"].zero_grad()
        loss(net).backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return set(record.trained(net, [made["optimizer"]], net).tensors), differing(start, net.net.state_dict())


def small(name="unet", norm="instance"):
    torch.manual_seed(0)
    return build_backbone(BackboneSpec(name, strides=((2, 2, 2),) * 2, width=4, norm=norm))


def encoded(net):
    return net.encode(torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)))


def test_weight_decay_teaches_nothing():
    """A level whose gradient is 0 throughout shrinks, and is as random as before."""
    net = small()
    trained, changed = trained_for(net, lambda net: encoded(net)[0].square().sum() + 0.0 * encoded(net)[-1].sum())
    levels = net.encoder_modules()
    first = {f"model.0.{name}" for name in levels[0].state_dict()}
    assert trained == first < changed


def test_what_has_no_gradient_is_left_alone_and_what_has_a_rate_of_nought_too():
    net = small("dynunet")
    trained, changed = trained_for(net, lambda net: encoded(net)[-1].square().sum())
    assert trained == changed == net.tensor_names("encoder")  # under every name
    assert count(net, trained) == len(net.encoder_parameters()) < len(trained)
    net = small()
    given = net.encoder_parameters()
    trained, changed = trained_for(net, lambda net: net.decode(encoded(net)).square().sum(), frozen=1, given=given)
    assert trained == changed == net.tensor_names("decoder") | net.tensor_names("head")


def test_running_statistics_count_where_they_have_moved():
    net = small(norm="batch")
    trained, changed = trained_for(net, lambda net: net.decode(encoded(net), 1).square().sum())
    assert trained == changed and any("running_var" in n for n in net.tensor_names("decoder") & trained)
    assert not net.tensor_names("head") & trained


def test_a_constant_bias_in_front_of_a_normalisation_counts_where_rounding_has_moved_it():
    net = small()
    trained, changed = trained_for(net, lambda net: encoded(net)[0].square().sum())
    biases = {name for name in changed if name.endswith("conv.bias")}
    assert biases and biases <= trained == changed


def test_names_are_told_by_the_fewest_patterns():
    everything = {"a.x.w", "a.x.b", "a.y.w", "b.w", "ab.w", "c"}
    assert summary({"a.x.w", "a.x.b", "ab.w"}, everything) == ["a.x.*", "ab.*"]
    assert summary({"a.x.w", "a.y.w", "c"}, everything) == ["a.x.w", "a.y.*", "c"]
    assert summary(everything, everything) == ["a.*", "ab.*", "b.*", "c"]


# --- older runs -------------------------------------------------------------------------------------------------------


def test_an_older_contract_opens_and_its_doubt_goes_along(pix, phantoms, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(pix, old)
    path = old / "weights" / "contract.json"
    contract = json.loads(path.read_text())
    assert contract["medcl_contract"] == 2
    tensors = set(contract.pop("tensors"))
    del contract["doubtful"]
    path.write_text(json.dumps({**contract, "medcl_contract": 1}))
    run = medcl.finetune(finetuning(phantoms, tmp_path / "f", init=str(old), frozen=1, steps=2))
    (before, _), (after, _) = load_weights(old), load_weights(run)
    parts = beginning(before).tensor_names("encoder") | beginning(before).tensor_names("decoder")
    assert set(before.trained_in(beginning(before)).tensors) == parts > tensors
    assert set(after.doubtful) == parts
    assert f"{len(parts)} are known by part only" in (run / "log.txt").read_text()
    again = medcl.finetune(finetuning(phantoms, tmp_path / "g", init=str(run), steps=2))
    assert load_weights(again)[0].doubtful == ()  # all of it has been trained since


def test_a_record_keeps_what_it_was_given():
    net = small()
    record = Record(net, Trained(("x", "y"), ("y",)))
    assert record.trained(net, [], net) == Trained(("x", "y"), ("y",))


def test_features_of_levels_that_were_never_trained_are_told(pix, tmp_path, caplog, monkeypatch):
    from medcl.mil.patch_encoders import instance_encoder

    monkeypatch.setattr(logging.getLogger("medcl"), "propagate", True)
    instance_encoder(str(pix))
    assert "never trained" not in caplog.text
    shutil.copytree(pix, tmp_path / "run")
    path = tmp_path / "run" / "weights" / "contract.json"
    contract = json.loads(path.read_text())
    contract["tensors"] = [name for name in contract["tensors"] if not name.startswith("model.0.")]
    path.write_text(json.dumps(contract))
    instance_encoder(str(tmp_path / "run"))
    assert "tensors of the encoder were never trained" in caplog.text and "model.0.*" in caplog.text
