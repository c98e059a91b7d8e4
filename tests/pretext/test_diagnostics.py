"""Diagnostics against closed forms, verdicts on planted runs, probes on planted features."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch

import medcl
from medcl import PretrainConfig
from medcl.checkpoint import load_weights
from medcl.dataset.phantom import write_phantoms
from medcl.errors import MedclError
from medcl.evaluation.probe import ProbeData, left_out, neighbours, probe, ridge
from medcl.losses.coding_rate import unused_rate
from medcl.losses.diagnostics import (
    RankMemory,
    alignment,
    describe_pairs,
    effective_rank,
    similarity_gap,
    spread,
    uniformity,
)
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.simclr import SimCLR
from medcl.pretext.watch import Watch
from medcl.runtime.run import read_metrics


@pytest.mark.parametrize("n,d", [(8, 8), (20, 5), (6, 30)])
def test_effective_rank_of_orthogonal_and_of_equal_rows(n, d):
    rank = min(n, d)
    rows = torch.eye(d).repeat(math.ceil(n / d), 1)[: (n // d) * d if n > d else n]
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(torch.ones(n, d) + 1e-7 * torch.randn(n, d)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(rows * torch.rand(len(rows), 1).add(0.1)) == pytest.approx(rank, rel=1e-6)


def test_effective_rank_equals_its_definition():
    rows = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    p = np.sqrt(np.linalg.eigvalsh(unit.T @ unit))
    p = p / p.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_alignment_uniformity_and_gap_equal_loops():
    torch.manual_seed(0)
    z = torch.randn(7, 4)
    unit = (z / z.norm(dim=1, keepdim=True)).tolist()
    positive = torch.rand(7, 7) > 0.6
    positive.fill_diagonal_(False)
    square = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in unit] for p in unit]
    pairs = [square[i][j] for i in range(7) for j in range(7) if positive[i, j]]
    assert alignment(z, positive) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    heat = [math.exp(-2 * square[i][j]) for i in range(7) for j in range(7) if i != j]
    assert uniformity(z) == pytest.approx(math.log(sum(heat) / len(heat)), rel=1e-5)
    one, other = similarity_gap(z, positive, ~positive)
    assert one == pytest.approx(1 - sum(pairs) / len(pairs) / 2, rel=1e-5) and other != one


def test_collapsed_and_spread_out_embeddings_look_so():
    same, apart = torch.ones(64, 16), torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert spread(same) == 0 and spread(apart) == pytest.approx(1, abs=0.05)
    assert uniformity(same) == pytest.approx(0, abs=1e-5) and uniformity(apart) < -3
    none = torch.zeros(64, 64, dtype=torch.bool)
    assert math.isnan(describe_pairs(same, none, none)["alignment"])


def test_the_memory_tells_a_rank_once_it_is_full():
    memory = RankMemory(32)
    for _ in range(16):
        assert memory.rank() is None
        memory.add(torch.randn(10, 8))  # two of them are kept
    assert memory.rank() is not None
    for _ in range(40):
        memory.add(torch.ones(10, 8))
    assert memory.rank() == pytest.approx(1, abs=1e-6)


class Stub:
    remedies = SimCLR.remedies


def watch_at(losses, trivial, steps=1000, **attributes):
    watch = Watch(Stub(), steps)
    watch.losses.extend(losses)
    watch.trivial = {name: deque([value]) for name, value in trivial.items()}
    for name, value in attributes.items():
        setattr(watch, name, value)
    return watch.verdicts(steps)


def test_verdicts_on_planted_runs():
    noise = np.random.default_rng(0).normal(0, 0.01, 100)
    lines = {"constant": 2.0, "orthogonal": 3.0}
    assert set(watch_at(2.0 + noise, lines)) == {"constant"}
    assert "--lr" in watch_at(2.0 + noise, lines)["constant"]
    assert set(watch_at(3.0 + noise, lines)) == {"orthogonal"}
    assert set(watch_at(2.3 + noise, lines)) == {"constant"}  # still, and worse than that
    assert not watch_at(1.5 + noise, lines)  # below every trivial value
    floor = {"orthogonal": 0.0, "collapsed": -2.0}
    assert set(watch_at(-1.99 + noise, floor)) == {"collapsed"} and not watch_at(-1.6 + noise, floor)
    assert not watch_at(np.linspace(2.5, 1.6, 100), lines)  # passing by
    assert not watch_at((2.0 + noise)[:60], lines)  # too early to say
    alike = {"constant": 2.0, "orthogonal": 2.0}
    assert set(watch_at(2.0 + noise, alike, last_spread=0.05)) == {"constant"}
    assert set(watch_at(2.0 + noise, alike, last_spread=0.8)) == {"orthogonal"}
    assert set(watch_at(1 + noise, lines, first_rank=20.0, best_rank=30.0, last_rank=8.0)) == {"rank"}
    assert not watch_at(1 + noise, lines, first_rank=20.0, best_rank=30.0, last_rank=18.0)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), 8, shape=(24, 24, 24))


def collapsing(monkeypatch):
    original = SimCLR.embed

    def embed(self, views):
        z, marks = original(self, views)
        return {"z": z["z"] * 1e-6 + 1.0}, marks

    monkeypatch.setattr(SimCLR, "embed", embed)


def config(phantoms, out, **changes):
    options = {"size": [8, 8, 8], "hidden": 16, "embedding": 8, "rotate_deg": 0.0, "scale": [1.0, 1.0]}
    given = {"task": "simclr", "options": options, "width": 4, "store": str(out.parent / "store")}
    return PretrainConfig(str(phantoms), str(out), **(given | changes))


def test_a_collapsed_run_says_so_and_stops_if_asked(phantoms, tmp_path, monkeypatch):
    collapsing(monkeypatch)
    monkeypatch.setattr("medcl.pretext.watch.WINDOW", 20)
    run = medcl.pretrain(config(phantoms, tmp_path / "warned", steps=40))
    told = [line for line in (run / "log.txt").read_text().splitlines() if "stands still" in line]
    assert len(told) == 1 and "equal embeddings" in told[0]
    rows = [row for row in read_metrics(run) if "trivial_constant" in row]
    assert len(rows) == 4 and rows[-1]["loss"] == pytest.approx(rows[-1]["trivial_constant"], rel=0.01)
    with pytest.raises(MedclError, match="stands still"):
        medcl.pretrain(config(phantoms, tmp_path / "stopped", steps=40, stop_on_collapse=True))
    assert (tmp_path / "stopped" / "checkpoints" / "last.ckpt").exists()


def test_probes_follow_a_run(phantoms, tmp_path):
    run = medcl.pretrain(config(phantoms, tmp_path / "probed", steps=5, probe=3, probe_every=3))
    rows = [row["probe_voxel_linear"] for row in read_metrics(run) if "probe_voxel_linear" in row]
    assert len(rows) == 3 and all(0 < value <= 1 for value in rows)
    for wrong in (1, 50):
        with pytest.raises(MedclError, match="--probe"):
            medcl.pretrain(config(phantoms, tmp_path / f"x{wrong}", probe=wrong))


def test_ridge_equals_least_squares_with_added_rows():
    rng = np.random.default_rng(0)
    x, y, q = rng.normal(size=(40, 5)), rng.normal(size=(40, 2)), rng.normal(size=(7, 5))
    x[:, 2] *= 100
    scale = x.std(0, ddof=1)
    a = (x - x.mean(0)) / scale
    padded = np.vstack([a, np.eye(5) * math.sqrt(0.01 * 40)])
    weights = np.linalg.lstsq(padded, np.vstack([y - y.mean(0), np.zeros((5, 2))]), rcond=None)[0]
    slow = (q - x.mean(0)) / scale @ weights + y.mean(0)
    ours = ridge(*(torch.from_numpy(each).float() for each in (x, y, q)))
    np.testing.assert_allclose(ours.numpy(), slow, atol=1e-4)


def test_nobody_is_told_by_their_own_rows():
    x = torch.randn(30, 4)
    owner = torch.arange(3).repeat_interleave(10)
    y = torch.nn.functional.one_hot(owner).float()
    for predict in (ridge, neighbours):
        told = left_out(predict, x, y, owner)
        assert not (told.argmax(1) == owner).any()


def test_the_probe_finds_what_the_image_shows_and_no_more():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("dynunet", strides=((2, 2, 2),) * 2, width=8))
    images, voxels, classes = [], [], []
    for _ in range(4):
        image = 0.1 * torch.randn(16, 16, 16)
        image[:8] += 3.0
        places = torch.randint(0, 16, (80, 3))
        images.append(image[None])
        voxels.append(places.float())
        classes.append((places[:, 0] < 8).long())
    shares = torch.tensor([[0.5, 0.5]] * 4)
    data = ProbeData(torch.stack(images), tuple(voxels), tuple(classes), shares, torch.arange(4))
    assert probe(backbone, data)["probe_voxel_linear"] > 0.9
    shuffled = tuple(c[torch.randperm(len(c))] for c in classes)
    backbone.train()
    frozen = next(module for module in backbone.modules() if not list(module.children())).eval()
    probe(backbone, data)
    assert backbone.training and not frozen.training  # a task may hold parts of it in eval

    chance = probe(backbone, ProbeData(data.images, data.voxels, shuffled, shares, data.subject))
    assert chance["probe_voxel_linear"] < 0.65 and chance["probe_voxel_knn"] < 0.65


@pytest.mark.parametrize("n,d", [(6, 20), (20, 6), (9, 9)])
def test_the_unused_rate_equals_its_definition_and_its_ends(n, d):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)

    def rate(eigenvalues) -> float:
        return sum(0.5 * math.log(1 + d / (n * 0.25) * value) for value in eigenvalues)

    most = rate([n / min(n, d)] * min(n, d))
    assert float(unused_rate(rows)) == pytest.approx(1 - rate(np.linalg.eigvalsh(unit.T @ unit)) / most, abs=1e-5)
    even = torch.eye(d).repeat(math.ceil(n / d), 1)[: n if n <= d else n // d * d]
    assert float(unused_rate(3 * even)) == pytest.approx(0, abs=1e-5)
    same = torch.ones(n, d).requires_grad_()
    collapsed = unused_rate(same)
    assert collapsed > 0.6
    collapsed.backward()
    assert bool(same.grad.isfinite().all())


def test_the_unused_rate_is_float32_under_autocast_and_pushes_rows_apart():
    rows = (torch.ones(12, 30) + 0.1 * torch.randn(12, 30, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer, before = torch.optim.SGD([rows], 3.0), effective_rank(rows.detach())
    for _ in range(50):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = unused_rate(rows)
        assert value.dtype == torch.float32
        value.backward()
        optimizer.step()
    assert effective_rank(rows.detach()) > 2 * before
    assert float(unused_rate(torch.ones(1, 4))) == 0


def test_ranks_before_and_after_are_of_the_same_reads_and_leave_no_trace(phantoms, tmp_path, monkeypatch):
    short = {"steps": 4, "checkpoint_every": 2, "rank_weight": 0.5}
    run = medcl.pretrain(config(phantoms, tmp_path / "looked", **short))
    ends = read_metrics(run)[-1]
    assert ends["rank_before"] > 1 and ends["rank_after"] > 1 and "unused_rate" in ends
    still = read_metrics(medcl.pretrain(config(phantoms, tmp_path / "still", **short, lr=1e-12)))[-1]
    assert still["rank_after"] == pytest.approx(still["rank_before"], rel=1e-3)
    assert still["rank_before"] == ends["rank_before"]
    monkeypatch.setattr(Watch, "rank_of_unseen", lambda *_: None)
    other = medcl.pretrain(config(phantoms, tmp_path / "not", **short))
    one, two = (load_weights(folder)[1] for folder in (run, other))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_stage_is_judged_by_its_own_steps():
    watch = Watch(None, 300, False)
    assert not watch.past_first_steps(50) and watch.past_first_steps(70)
    watch.since = 150  # the second stage of a run
    assert not watch.past_first_steps(175) and watch.past_first_steps(190)
