"""What a classifier of bags is trained by: which weights decay, what a bag is contrasted with, CLAM's dropout."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("h5py", reason="the extra `mil` is not installed")

from medcl.config.mil import MILFitConfig
from medcl.mil.aggregators import AGGREGATORS
from medcl.mil.bags import Features
from medcl.mil.classifier import build, collate
from medcl.mil.objectives import Batch
from medcl.mil.training import METHODS, train

WIDTH = 5
LABELS = [0, 1, 0, 1, 1]


def some_bags() -> list[Features]:
    rng = np.random.default_rng(0)
    return [
        Features(rng.normal(size=(n, WIDTH)).astype(np.float32), np.stack([np.arange(n), np.zeros(n, int)], 1))
        for n in (3, 4, 5, 2, 6)
    ]


@pytest.mark.parametrize("name,method", [*((name, "plain") for name in AGGREGATORS), ("abmil", "sc"), ("abmil", "ins")])
def test_a_step_decays_matrices_and_leaves_biases_and_norms_alone(name, method):
    made = {"aggregator": name, "method": method, "epochs": 1, "lr": 1e-2, "options": {"hidden": 16}}
    bags = some_bags()
    after = [
        dict(train(MILFitConfig("", "", weight_decay=decay, **made), bags, LABELS, 2, 0).named_parameters())
        for decay in (0.0, 0.5)
    ]
    assert any(p.ndim == 1 for p in after[0].values()) and any(p.ndim > 1 for p in after[0].values())
    for key, plain in after[0].items():
        if plain.ndim == 1:
            assert torch.equal(plain, after[1][key]), key
        else:  # the one step is at the peak rate
            assert not torch.allclose(plain, after[1][key], rtol=1e-4, atol=0), key


def batch_of(bags: list[Features], labels: torch.Tensor, chosen: list[int], progress: float) -> Batch:
    some = [bags[i] for i in chosen]
    return Batch(*collate(some), labels[chosen], chosen, [np.arange(len(b.h)) for b in some], progress)


def slow_supervised(anchors, others, temperature: float) -> float:
    """Mean over anchors with a positive; rows are (number, label, embedding), equal numbers are never compared."""
    terms = []
    for number, label, z in anchors:
        s = [(y, float(F.cosine_similarity(z, v, dim=0)) / temperature) for n, y, v in others if n != number]
        total = math.log(sum(math.exp(value) for _, value in s)) if s else 0.0
        same = [value - total for y, value in s if y == label]
        terms += [-sum(same) / len(same)] if same else []
    return sum(terms) / max(1, len(terms))


def test_a_bag_is_contrasted_neither_with_its_earlier_self_nor_with_its_twin_in_a_batch():
    bags, labels = some_bags(), torch.tensor(LABELS)
    config = MILFitConfig("", "", aggregator="mean", method="sc", options={"hidden": 8, "dropout": 0.0}, memory=8)
    torch.manual_seed(0)
    model = build(config, WIDTH, 2)
    objective = METHODS["sc"](model, config, [len(b.h) for b in bags], labels)
    batches: list = []
    for chosen in ([0, 1, 2], [2, 3, 1], [4, 4, 0, 2], [1, 0, 3]):
        batch = batch_of(bags, labels, chosen, 0.0)  # the weight of the contrast is 1
        with torch.no_grad():
            z = model.projection(model(batch.h, batch.mask).embedding)
            now = list(zip(chosen, labels[chosen].tolist(), z, strict=True))
            slow = slow_supervised(now, [*now, *(one for earlier in batches for one in earlier)], 0.1)
            assert float(objective.loss(batch)) == pytest.approx(slow, rel=1e-4)
        batches.append(now)
        while sum(map(len, batches)) > config.memory:  # whole batches are forgotten
            batches.pop(0)


def slow_instances(anchors, others, temperature: float) -> float:
    """Momentum contrast: the positive is an instance's own view, the negatives are those of other instances."""
    terms = []
    for row, (number, _, z) in enumerate(anchors):
        s = [float(F.cosine_similarity(z, v, dim=0)) / temperature for _, _, v in others]
        rest = sum(math.exp(value) for value, (n, _, _) in zip(s, others, strict=True) if n != number)
        terms.append(-s[row] + math.log(math.exp(s[row]) + rest))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_an_instance_is_not_contrasted_with_its_earlier_self_in_the_queue(progress):
    bags, labels = some_bags(), torch.tensor(LABELS)
    options = {"hidden": 8, "projection": 8, "dropout": 0.0, "noise": 0.0, "temperature": 0.5}
    config = MILFitConfig("", "", method="ins", options=options)
    torch.manual_seed(0)
    model = build(config, WIDTH, 2)
    with torch.no_grad():  # so that every instance of a positive bag is predicted to be positive
        model.aggregator.instance.bias.copy_(torch.tensor([-50.0, 50.0]))
    objective = METHODS["ins"](model, config, [len(b.h) for b in bags], labels)
    first = np.cumsum([0] + [len(b.h) for b in bags])
    queue: list = []
    for chosen in ([0, 1], [1, 2, 3], [0, 3, 3]):
        batch = batch_of(bags, labels, chosen, progress)
        without = copy.deepcopy(objective)
        without.net.contrast_weight = 0.0
        net = model.aggregator
        with torch.no_grad():
            ours = (objective.loss(batch) - without.loss(batch)) / objective.net.contrast_weight
            now = [
                (int(first[i]) + row, LABELS[i], F.normalize(net.project(net.embed(h)), dim=0))
                for i in chosen
                for row, h in enumerate(torch.from_numpy(bags[i].h))
            ]
        if progress:  # its own view of this step is one of its positives, and no other of its embeddings
            slow = [slow_supervised([one], [(-1, *one[1:]), *now, *now, *queue], 0.5) for one in now]
            assert float(ours) == pytest.approx(sum(slow) / len(slow), rel=1e-3)
        else:
            assert float(ours) == pytest.approx(slow_instances(now, now + queue, 0.5), rel=1e-3)
        queue = now + queue


def test_the_dropout_of_clam_acts_on_both_factors_of_its_attention():
    torch.manual_seed(0)
    model = AGGREGATORS["clam_sb"](WIDTH, 2, hidden=8, attention=1, dropout=0.4)
    with torch.no_grad():
        for layer in (model.pool.tanh, model.pool.gate):  # both factors are 1
            layer.weight.zero_()
            layer.bias.fill_(50.0)
        model.pool.score.weight.fill_(1.0)
        model.pool.score.bias.zero_()
        h = torch.randn(1, 20000, 8)
        scores = model.train().pool(h)
        kept = scores > 0
        assert float(kept.float().mean()) == pytest.approx(0.6**2, abs=0.02)  # both masks keep it
        np.testing.assert_allclose(scores[kept], 1 / 0.6**2, rtol=1e-5)
        np.testing.assert_allclose(model.eval().pool(h), 1.0, rtol=1e-5)
    assert not any("dropout" in name for name in model.state_dict())  # earlier weights still fit
