"""Runs that are killed, interrupted or cut off, and go on."""

from __future__ import annotations

import pytest
import torch
from small_runs import SMALL, Killed, finetuning, kill_at, pretraining

import medcl
import medcl.store.stage
from medcl import ScanConfig
from medcl.checkpoint import load_weights
from medcl.errors import MedclError
from medcl.pretext.global_local import GlobalLocal
from medcl.pretext.stage import options_of
from medcl.runtime.run import read_metrics


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


def test_a_pretraining_killed_after_its_last_step_is_finished(tmp_path, phantoms, monkeypatch):
    whole = medcl.pretrain(pretraining(phantoms, tmp_path / "whole"))

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("medcl.pretext.stage.save_seen", killed)
        medcl.pretrain(pretraining(phantoms, tmp_path / "cut", checkpoint_every=2))
    assert not (tmp_path / "cut" / "weights").exists()
    cut = medcl.pretrain(pretraining(phantoms, tmp_path / "cut", checkpoint_every=2, resume=True))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_resuming_with_other_settings_is_refused(runs, phantoms):
    with pytest.raises(MedclError, match="started with another lr"):
        medcl.pretrain(pretraining(phantoms, runs / "pre", lr=0.5, resume=True))
    with pytest.raises(MedclError, match="already holds a run"):
        medcl.pretrain(pretraining(phantoms, runs / "pre"))


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

    from medcl.runtime.training import SeedEveryStep

    def interrupt(self, trainer, module, *args):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SeedEveryStep, "on_train_batch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        medcl.pretrain(pretraining(phantoms, tmp_path / "x"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_begun_before_options_were_kept_goes_on_with_the_defaults_of_then(tmp_path, phantoms, monkeypatch):
    """The pooling of volume-level tasks has another default since: its head has another width."""
    then = {**SMALL, "pool": "mean"}
    whole = medcl.pretrain(pretraining(phantoms, tmp_path / "whole", options=then, checkpoint_every=2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        medcl.pretrain(pretraining(phantoms, tmp_path / "cut", options=then, checkpoint_every=2))
    (tmp_path / "cut" / "options.json").unlink()
    written = tmp_path / "cut" / "config.yaml"
    written.write_text(written.read_text().replace("  pool: mean\n", ""))
    cut = medcl.pretrain(pretraining(phantoms, tmp_path / "cut", checkpoint_every=2, resume=True))
    one, two = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = pretraining(phantoms, tmp_path, options={"global_contrast": {"hidden": 8}})
    nested = options_of(config, GlobalLocal, tmp_path)
    assert nested == {"global_contrast": {"pool": "mean", "hidden": 8}}
