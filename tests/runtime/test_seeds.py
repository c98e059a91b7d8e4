"""A draw is no other seed, and a run that goes on keeps the seed that it began with."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import Killed, finetuning, kill_at

import medcl
from medcl.checkpoint import load_weights
from medcl.mil import stage as mil_stage
from medcl.segmentation.stage import SEED, seed_of
from medcl.transforms.random import mix, mixed_seed


def test_every_pair_of_seed_and_draw_has_a_seed_of_its_own():
    seeds = [mixed_seed(seed, draw) for seed in range(60) for draw in range(60)]
    assert len(set(seeds)) == 3600 and all(0 <= seed < 2**32 for seed in seeds)
    assert [mixed_seed(seed, 0) for seed in range(60)] == list(range(60))  # draw 0 is as it was
    # nor are they those of the unlabelled patches, which are mixed of the seed as well
    assert not set(seeds) & {mix(seed, 1) for seed in range(60)}


def test_seed_0_of_draw_1_is_not_seed_1_of_draw_0(phantoms, tmp_path):
    made = {}
    for seed, draw in ((0, 1), (1, 0)):
        config = finetuning(phantoms, tmp_path / f"{seed}{draw}", width=4, steps=1, seed=seed, draw=draw, labels="all")
        run = medcl.finetune(config)
        made[seed, draw] = load_weights(run)[1]
        assert json.loads((run / SEED).read_text())["seed"] == mixed_seed(seed, draw)
    first, second = made.values()  # all subjects in both: only the random numbers can differ
    assert all(not torch.equal(first[name], second[name]) for name in first if first[name].ndim > 1)


def test_a_run_begun_under_the_sum_goes_on_under_it(phantoms, tmp_path, monkeypatch):
    def settings(out, **more):
        return finetuning(phantoms, tmp_path / out, width=4, draw=3, checkpoint_every=2, **more)

    with monkeypatch.context() as patch:
        patch.setattr("medcl.segmentation.stage.mixed_seed", lambda seed, draw: seed + draw)
        whole = medcl.finetune(settings("whole"))
        with pytest.raises(Killed):
            kill_at(patch, 3)
            medcl.finetune(settings("cut"))
    (tmp_path / "cut" / SEED).unlink()  # which no run had then
    assert seed_of(settings("cut"), tmp_path / "cut") == 3 != seed_of(settings("new"), None)
    cut = medcl.finetune(settings("cut", resume=True))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_repeats_and_folds_of_bags_have_seeds_of_their_own(monkeypatch, tmp_path):
    """Seed 0 in its second repeat is divided otherwise than seed 1 in its first, and trained from other weights."""
    pytest.importorskip("h5py", reason="the extra `mil` is not installed")
    pytest.importorskip("sklearn", reason="the extra `mil` is not installed")
    from small_bags import config, write_set

    bags = write_set(tmp_path / "bags", 16, 8)
    trained = {}
    original = mil_stage.train

    def spy(config, bags, labels, classes, seed, device):
        trained[config.seed].append(seed)
        return original(config, bags, labels, classes, seed, device)

    monkeypatch.setattr(mil_stage, "train", spy)
    for seed, repeats in ((0, 2), (1, 1)):
        trained[seed] = []
        out = tmp_path / f"run{seed}"
        mil_stage.fit(config(bags, out, folds=2, repeats=repeats, seed=seed, epochs=1, final=False))
    folds = [json.loads((tmp_path / f"run{seed}" / "folds.json").read_text()) for seed in (0, 1)]
    second = [each["test"] for each in folds[0] if each["repeat"] == 1]
    assert sorted(second) != sorted(each["test"] for each in folds[1])
    assert len({*trained[0], *trained[1]}) == 6
