"""INS: pseudo-labels from bag labels alone, against hand-made values; what it can and cannot know."""

from __future__ import annotations

import csv
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("h5py", reason="the extra `mil` is not installed")

from medcl.config.mil import MILFitConfig, MILPredictConfig
from medcl.losses import instances as losses
from medcl.mil.bags import Features, write_features
from medcl.mil.classifier import build, predict
from medcl.mil.ins import INS
from medcl.mil.ins_objective import InstanceContrast
from medcl.mil.objectives import Batch
from medcl.mil.stage import fit, predict_bags
from medcl.mil.training import train
from medcl.runtime.files import write_rows


def planted(count: int = 40, seed: int = 0, classes: int = 2):
    """Bags of noise; in a bag of class c a fifth of the instances is shifted along axis c."""
    rng = np.random.default_rng(seed)
    bags, labels, marks = [], [], []
    for number in range(count):
        h = rng.normal(size=(int(rng.integers(8, 16)), 6)).astype(np.float32)
        mark = np.arange(len(h)) < (len(h) // 5 if number % classes else 0)
        h[mark, number % classes] += 4
        bags.append(Features(h, np.arange(len(h))[:, None].repeat(2, 1)))
        labels.append(number % classes)
        marks.append(mark)
    return bags, labels, marks


def test_what_an_instance_can_be_follows_from_its_bag_alone():
    can = losses.candidates(torch.tensor([0, 1, 2]), 3)
    assert can.tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert losses.first_pseudo_labels(can).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    for function in (losses.candidates, InstanceContrast.__init__, train):
        assert not any("instance" in name or "truth" in name for name in inspect.signature(function).parameters)


def test_a_positive_bag_has_a_positive_instance_and_a_negative_one_has_none():
    logits = torch.tensor([[5.0, 0, 9], [5, 1, 9], [0, 9, 0], [0, 9, 9], [1, 0, 0]])
    bag, labels = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 0, 2])
    can = losses.candidates(labels[bag], 3)
    assert losses.predicted_classes(logits, can, bag, labels).tolist() == [0, 1, 0, 2, 0]


def test_prototypes_are_running_means_on_the_sphere():
    q = F.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 1]]), dim=1)
    classes, usable = torch.tensor([0, 1, 1, 1]), torch.tensor([True, False, True, True])
    first = losses.updated_prototypes(torch.zeros(3, 2), q, classes, usable, 0.9)
    assert first.tolist() == [[1, 0], [0, 1], [0, 0]]  # a class that was not met stays empty
    second = losses.updated_prototypes(first, q[[2, 1]], torch.tensor([0, 0]), torch.tensor([True, False]), 0.9)
    torch.testing.assert_close(second[0], torch.tensor([0.9, 0.1]) / np.hypot(0.9, 0.1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(second[1], first[1])


def test_pseudo_labels_move_to_the_nearest_prototype_that_is_allowed():
    prototypes = torch.tensor([[1.0, 0], [0, 1]])
    can = losses.candidates(torch.tensor([0, 1, 1]), 2)
    q = torch.tensor([[0.0, 1], [0, 1], [1, 0]])  # the first lies at the wrong prototype, and is known to be negative
    told = losses.updated_pseudo_labels(losses.first_pseudo_labels(can), q, prototypes, can, keep=0.8)
    torch.testing.assert_close(told, torch.tensor([[1.0, 0], [0.4, 0.6], [0.6, 0.4]]))
    kept = losses.updated_pseudo_labels(told, q, torch.zeros(2, 2), can, keep=0.8)
    assert torch.equal(kept, told)  # no prototype, no news


def test_soft_cross_entropy_equals_the_hard_one_at_one_hot_labels():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    hard = F.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.soft_cross_entropy(logits, F.one_hot(labels, 3).float()), hard)


def test_the_bag_head_knows_classes_not_channels_and_attention_is_the_share_of_positives():
    torch.manual_seed(0)
    net = INS(6, 3, hidden=16).eval()
    h, mask = torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = net(h, mask)
    assert out.logits.shape == (2, 3) and out.embedding.shape == (2, 16)
    positive = (1 - out.extra["instance"].softmax(2)[:, :, 0]) * mask
    torch.testing.assert_close(out.attention, positive / positive.sum(1, keepdim=True))
    order = torch.randperm(5)
    torch.testing.assert_close(net(h[:1, order], mask[:1]).logits, out.logits[:1])
    torch.testing.assert_close(net(h[1:, :3], mask[1:, :3]).logits, out.logits[1:])


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_gradient_reaches_every_weight_and_the_teacher_follows_slowly(progress):
    torch.manual_seed(0)
    bags, labels, _ = planted(4)
    config = MILFitConfig("", "", method="ins", options={"hidden": 16, "momentum": 0.5})
    model = build(config, 6, 2).train()
    objective = InstanceContrast(model, config, [len(b.h) for b in bags], torch.tensor(labels))
    from medcl.mil.classifier import collate

    for _ in range(2):  # the queue and the prototypes are empty in the first
        batch = Batch(*collate(bags), torch.tensor(labels), range(4), [np.arange(len(b.h)) for b in bags], progress)
        model.zero_grad()
        objective.loss(batch).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and bool(weight.grad.abs().sum() > 0), name
    assert len(objective.queue) == 2 * sum(len(b.h) for b in bags)
    before = model.aggregator.project.weight.detach().clone()
    with torch.no_grad():
        model.aggregator.project.weight.add_(1.0)
    objective.after_step()
    torch.testing.assert_close(objective.teacher.module[1].weight, before + 0.5)
    for pseudo, label in zip(objective.pseudo, labels, strict=True):
        certain = pseudo[:, 0] == 1
        assert bool(certain.all()) if label == 0 else not bool(certain.any())


@pytest.mark.parametrize("classes", [2, 3])
def test_planted_instances_are_classified_from_bag_labels(classes):
    config = MILFitConfig("", "", method="ins", epochs=30, lr=5e-3, options={"hidden": 32})
    bags, labels, _ = planted(60, classes=classes)
    model = train(config, bags, labels, classes, seed=0)
    held, truth, marks = planted(30, seed=1, classes=classes)
    told = predict(model, held)
    assert np.mean([t.probabilities.argmax() == y for t, y in zip(told, truth, strict=True)]) >= 0.85
    wrong = [t.instances.argmax(1) != np.where(m, y, 0) for t, m, y in zip(told, marks, truth, strict=True)]
    assert np.concatenate(wrong).mean() < 0.05


def test_the_stage_writes_classes_of_instances(tmp_path):
    bags, labels, _ = planted(12)
    for number, bag in enumerate(bags):
        write_features(tmp_path / f"{number}.h5", bag)
    rows = [{"bag_id": f"b{n}", "path": f"{n}.h5", "label": ("healthy", "ill")[y]} for n, y in enumerate(labels)]
    write_rows(tmp_path / "bags.csv", rows)
    source = str(tmp_path / "bags.csv")
    more = {"options": {"hidden": 16}, "epochs": 3, "folds": 2, "most_instances": 6}
    run = fit(MILFitConfig(source, str(tmp_path / "run"), method="ins", **more))
    assert json.loads((run / "metrics.json").read_text())["bags"] == 12
    told = predict_bags(MILPredictConfig(str(run), source, str(tmp_path / "told")))
    row = next(csv.DictReader((told / "attention" / "b1.csv").read_text().splitlines()))
    assert float(row["p_healthy"]) + float(row["p_ill"]) == pytest.approx(1, abs=1e-4)
