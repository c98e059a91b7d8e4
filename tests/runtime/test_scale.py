"""Two processes by the real command take the steps of one with the joined batch, and one of them writes the run."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import medcl
from medcl import FinetuneConfig, PretrainConfig
from medcl.checkpoint import load_weights
from medcl.errors import MedclError
from medcl.pretext.stage import check as check_pretrain
from medcl.runtime.run import read_config, read_metrics
from medcl.runtime.scale import check_scale, is_follower, rank_of
from medcl.segmentation.stage import check as check_finetune

SETTINGS = {"task": "voco", "steps": 3, "width": 4, "lr": 1e-3, "accelerator": "cpu", "precision": "32", "seed": 1}
COMMAND, CUT_OFF = ["-m", "medcl.cli"], Path(__file__).parents[1] / "contracts" / "cut_off.py"
# dropout is drawn by each process for itself
OPTIONS = {"hidden": 16, "embedding": 8, "crops": 2, "feature_dropout": 0.0}


def arguments(source: Path, out: Path, **more) -> list[str]:
    named = [f"--{name}={value}" for name, value in {**SETTINGS, **more}.items()]
    return ["pretrain", str(source), "--out", str(out), *named, *(f"--options.{k}={v}" for k, v in OPTIONS.items())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, phantoms):
    """One process: with the joined batch, and with one half of it."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(folder / "store"))
        return {
            batch: medcl.pretrain(
                PretrainConfig(str(phantoms), str(folder / str(batch)), batch_size=batch, options=OPTIONS, **SETTINGS)
            )
            for batch in (4, 2)
        }


def weights(run: Path) -> torch.Tensor:
    tensors = load_weights(run)[1]
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def two(program: list[str], source: Path, out: Path, store: Path, strategy: str, *more: str):
    """Two processes by this program, which takes the command's arguments."""
    named = {"batch_size": 2, "devices": 2, "strategy": strategy, "checkpoint_every": 2}
    call = [sys.executable, *program, *arguments(source, out, **named), *more]
    place = str(Path(medcl.__file__).parents[1])
    env = {**os.environ, "MEDCL_STORE": str(store), "OMP_NUM_THREADS": "1", "PYTHONPATH": place}
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def together(tmp_path_factory, phantoms):
    """Two processes, each with all weights or with its share, on half of the joined batch each."""
    folder = tmp_path_factory.mktemp("together")

    @functools.cache
    def trained(strategy: str):
        return folder / strategy, two(COMMAND, phantoms, folder / strategy, folder / "store", strategy)

    return trained


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.battery)])
def test_two_processes_train_as_one_with_the_joined_batch(alone, together, strategy):
    run, done = together(strategy)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_config(run)["devices"] == 2
    assert {"config.yaml", "log.txt", "manifest.json", "metrics.csv", "provenance.json", "weights", "report.html"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "log.txt").read_text().count("Encoder in") == 1
    assert done.stdout.count("Next: medcl finetune") == 1

    joint, whole, half = weights(run), weights(alone[4]), weights(alone[2])
    assert float((joint - whole).norm()) < 0.2 * float((half - whole).norm())
    steps = [[row["loss"] for row in read_metrics(folder)] for folder in (run, alone[4])]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)
    assert load_weights(run)[0].tensors == load_weights(alone[4])[0].tensors  # as many are trained


@pytest.mark.battery
def test_a_divided_run_goes_on_after_a_kill_as_if_nothing_had_been(together, tmp_path, phantoms):
    run, store = tmp_path / "run", tmp_path / "store"
    assert two([str(CUT_OFF)], phantoms, run, store, "fsdp").returncode != 0
    assert not (run / "weights").exists()
    done = two(COMMAND, phantoms, run, store, "fsdp", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(weights(run), weights(together("fsdp")[0]))
    assert load_weights(run)[0].tensors == load_weights(together("fsdp")[0])[0].tensors


@dataclass
class Scale:
    devices: int = 2
    nodes: int = 1
    strategy: str = "auto"
    out: str = ""


def test_ranks_are_those_of_the_launcher(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert rank_of(Scale()) == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_of(Scale()) == 1
    monkeypatch.setenv("NODE_RANK", "3")
    assert rank_of(Scale(nodes=4)) == 7
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert rank_of(Scale(nodes=4)) == 5 and is_follower(Scale(nodes=4))
    assert not is_follower(Scale(devices=1))  # many independent runs under one srun


def test_what_cannot_work_is_told_at_once():
    for changes in ({"devices": 0}, {"nodes": 0}, {"strategy": "zero"}):
        with pytest.raises(MedclError, match=f"--{next(iter(changes))}"):
            PretrainConfig("scans", "run", **changes)
    with pytest.raises(MedclError, match="nobody to share"):
        check_scale(Scale(devices=1, strategy="fsdp"), "cpu")


def test_dividing_weights_is_refused_where_it_cannot_work(monkeypatch):
    with pytest.raises(MedclError, match="pretraining alone"):
        check_finetune(FinetuneConfig("scans", "run", strategy="fsdp", devices=2))
    with pytest.raises(MedclError, match="compiled"):
        check_pretrain(PretrainConfig("scans", "run", strategy="fsdp", devices=2, compile=True))
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(MedclError, match=r"torch 2\.8"):
        check_scale(Scale(strategy="fsdp"), "cpu")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    check_scale(Scale(strategy="fsdp"), "cpu")
