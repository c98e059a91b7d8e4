"""Contrast of voxels and Core-tuning: slow references, planted truths, absent classes; rates by layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from recipes import SmallSwin

from medcl.errors import MedclError
from medcl.losses.core_tuning import core_tuning, focal_contrast, hard_pairs
from medcl.losses.pixel_contrast import draw_voxels, pixel_contrast, voxel_classes
from medcl.losses.segmentation import shares
from medcl.networks.backbones import BACKBONES, BackboneSpec, build_backbone
from medcl.runtime.optimizer import adamw, layer_shares, warmup_cosine
from medcl.segmentation.core_tuning import CoreTuning
from medcl.segmentation.semi.pixel_contrast import PixelContrast
from medcl.segmentation.semi.rows import Rows

SIZE = (3, 4, 2)


def slow_pixel_contrast(z, label, keys, classes, anchors, least, temperature):
    """The definition, anchor by anchor."""
    means, drawn = {}, []
    for n in range(len(z)):
        for c in classes:
            voxels = (label[n] == c).nonzero().tolist()
            if len(voxels) < least:
                continue
            means[n, c] = torch.stack([z[n, :, x, y, w] for x, y, w in voxels]).mean(0)
            voxels.sort(key=lambda v: -float(keys[n][tuple(v)]))
            drawn += [(n, c, z[n, :, x, y, w]) for x, y, w in voxels[:anchors]]
    terms = []
    for _, c, anchor in drawn:
        s = {k: float(F.cosine_similarity(anchor, mean, dim=0)) / temperature for k, mean in means.items()}
        others = sum(math.exp(value) for (_, k), value in s.items() if k != c)
        terms += [-value + math.log(math.exp(value) + others) for (_, k), value in s.items() if k == c]
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("classes,least", [([1, 2, 3], 1), ([1, 2], 3), ([0, 1, 2, 3], 4)])
def test_pixel_contrast_follows_its_definition(classes, least):
    torch.manual_seed(0)
    z, keys = torch.randn(3, 5, *SIZE), torch.rand(3, *SIZE)
    label = torch.randint(-1, 4, (3, *SIZE))
    label[0][label[0] == 2] = 1  # absent from one patch
    found = pixel_contrast(z, label, keys, classes, 2, least, 0.1)
    assert found == pytest.approx(slow_pixel_contrast(z, label, keys, classes, 2, least, 0.1), rel=1e-4)


def test_an_absent_class_skips_itself_only_and_ignored_voxels_take_no_part():
    torch.manual_seed(0)
    z, keys = torch.randn(2, 5, *SIZE, requires_grad=True), torch.rand(2, *SIZE)
    label = torch.zeros(2, *SIZE, dtype=torch.long)
    label[:, 0] = 1
    label[0, 1] = 2
    label[:, 2] = -1
    loss = pixel_contrast(z, label, keys, [1, 2, 3], 8, 2, 0.1)
    (gradient,) = torch.autograd.grad(loss, z)
    touched = (gradient != 0).any(1)
    assert float(loss.detach()) > 0 and touched[label == 1].any() and touched[label == 2].any()
    assert not touched[label <= 0].any()
    few = pixel_contrast(z, label, keys, [2, 3], 8, 2, 0.1)  # a single class is there: nothing to be told from
    assert float(few.detach()) == 0
    assert float(pixel_contrast(z, label * 0, keys, [1, 2], 8, 2, 0.1).detach()) == 0


def test_the_own_mean_is_not_among_the_negatives():
    """Two classes told apart entirely: with the own mean as a negative the loss could not fall below log 2."""
    label = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    label[0, 1] = 1
    z = torch.stack([1.0 - label, label.float()], dim=1)
    assert pixel_contrast(z, label, torch.rand(1, 2, 2, 2), [0, 1], 3, 1, 0.1).item() == pytest.approx(
        math.log1p(math.exp(-10)), abs=1e-6
    )


def test_draws_are_of_the_class_without_repetition_and_few_where_there_are_few():
    label = torch.tensor([[1, 1, 2, 0, 1, -1]])
    index, drawn = draw_voxels(label, torch.tensor([[0.1, 0.0, 0.3, 0.9, 0.5, 0.8]]), [1, 2, 3], 2)
    assert index[0, 0].tolist() == [4, 0] and drawn[0].tolist() == [[True, True], [True, False], [False, False]]
    assert index[0, 1, 0] == 2


def test_a_coarse_voxel_has_a_class_where_one_trusted_class_fills_most_of_it():
    label = torch.zeros(1, 1, 4, 2, 2, dtype=torch.long)
    label[0, 0, 0] = 1
    label[0, 0, 1, 0] = 1  # three quarters of the first coarse voxel
    weight = torch.ones(1, 1, 4, 2, 2)
    assert voxel_classes(shares(label, 3), weight, (2, 1, 1)).flatten().tolist() == [1, 0]
    weight[0, 0, 0] = 0  # a quarter of it is left
    weight[0, 0, 2:] = 0
    assert voxel_classes(shares(label, 3), weight, (2, 1, 1)).flatten().tolist() == [-1, -1]


def test_pixel_contrast_reaches_network_and_head_and_refuses_a_single_class():
    net = build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 2),), 4))
    method = PixelContrast(net, {"least": 1, "anchors": 4})
    target = shares(torch.randint(0, 3, (2, 1, 4, 4, 4)), 3)
    target = F.interpolate(target, scale_factor=4)  # blocks, so that coarse voxels have a class
    rows = Rows(torch.randn(2, 1, 16, 16, 16), target, torch.ones(2, 1, 16, 16, 16), torch.arange(2), 1)
    logits, features = net.forward_with_features(rows.image)
    told = method.loss(logits, features, rows)
    told["loss"].backward()
    assert float(told["contrast"].detach()) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.head.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.encoder_parameters())
    # no pseudo-label loss unless asked for: the paper's
    assert told["loss"].item() == pytest.approx(0.1 * told["contrast"].item(), rel=1e-5)
    with pytest.raises(MedclError, match="background true"):
        PixelContrast(build_backbone(BackboneSpec("unet", 1, 2, ((2, 2, 2),), 4)), {})


def slow_focal(z, others, positive, negative, temperature, focus):
    terms = []
    for i in range(len(z)):
        s = [float(F.cosine_similarity(z[i], o, dim=0)) / temperature for o in others]
        total = sum(math.exp(v) for j, v in enumerate(s) if positive[i, j] or negative[i, j])
        for j, value in enumerate(s):
            if positive[i, j]:
                q = math.exp(value) / total
                terms.append(-((1 - q) ** focus) * math.log(q))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
def test_the_focal_contrast_follows_its_definition(focus):
    torch.manual_seed(0)
    z, others = torch.randn(5, 4), torch.randn(7, 4)
    positive = torch.rand(5, 7) < 0.3
    negative = ~positive & (torch.rand(5, 7) < 0.6)
    positive[4], negative[4] = False, False
    wanted = slow_focal(z, others, positive, negative, 0.3, focus)
    assert focal_contrast(z, others, positive, negative, 0.3, focus) == pytest.approx(wanted, rel=1e-4)


def test_the_focal_contrast_has_a_finite_gradient_where_a_pair_is_perfect_or_alone():
    z = torch.eye(3, requires_grad=True)
    positive = torch.eye(3, dtype=torch.bool)
    for negative in (~positive, positive & False):
        loss = focal_contrast(z, z, positive, negative, 0.01)
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_the_hardest_positive_is_of_the_class_though_all_its_similarities_are_positive():
    """The released code takes the least of sim * mask: row 0, of another class, whose masked similarity is 0."""
    z = torch.tensor([[0.0, 1.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.6]])
    label = torch.tensor([0, 1, 1, 1])
    hardest, nearest, usable = hard_pairs(z, label)
    assert hardest.tolist()[1:] == [3, 3, 1] and usable.tolist() == [False, True, True, True]
    assert nearest.tolist() == [3, 0, 0, 0]


def test_core_tuning_follows_its_definition():
    torch.manual_seed(0)
    n = 6
    features, label = torch.randn(n, 4), torch.tensor([0, 0, 0, 1, 1, 2])
    head, classifier = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    share, blend, shuffle = torch.rand(n), 0.8 + 0.2 * torch.rand(n), torch.rand(n, n)
    found = core_tuning(features, head(features), label, share, blend, shuffle, head, classifier, 0.5)
    z = head(features).detach()
    pairs, mixture = [], []
    for i in range(n):
        same = [j for j in range(n) if label[j] == label[i] and j != i]
        other = [j for j in range(n) if label[j] != label[i]]
        if not same:
            continue  # the only row of its class has no positive

        def alike(j, i=i):
            return float(F.cosine_similarity(z[i], z[j], dim=0))

        hp, hn = min(same, key=alike), max(other, key=alike)
        far = max(other, key=lambda j: float(shuffle[i, j]))
        hard = share[i] * features[hp] + (1 - share[i]) * features[hn]
        semi = blend[i] * features[hn] + (1 - blend[i]) * features[far]
        others = [z[j] for j in (*same, *other)] + [head(hard), head(semi)]
        s = [float(F.cosine_similarity(z[i], o.detach(), dim=0)) / 0.5 for o in others]
        total = sum(math.exp(v) for v in s)
        for j in (*range(len(same)), len(others) - 2):
            q = math.exp(s[j]) / total
            pairs.append(-(1 - q) * math.log(q))
        log_p = torch.log_softmax(classifier(hard), 0)
        mixture.append(float(-(share[i] * log_p[label[hp]] + (1 - share[i]) * log_p[label[hn]]).detach()))
    wanted = sum(pairs) / len(pairs) + sum(mixture) / len(mixture)
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_core_tuning_reads_labelled_rows_alone_and_is_a_function_of_their_seeds():
    torch.manual_seed(0)
    net = build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 2),), 4))
    core = CoreTuning(net)
    label = F.interpolate(torch.randint(0, 3, (3, 1, 4, 4, 4)).float(), scale_factor=4).long()
    rows = Rows(torch.randn(3, 1, 16, 16, 16), shares(label, 3), torch.ones(3, 1, 16, 16, 16), torch.arange(3), 2)
    features = torch.randn(3, net.feature_channels, 8, 8, 8, requires_grad=True)
    loss = core(features, rows)
    assert loss.item() == core(features, rows).item() > 0
    loss.backward()
    assert (features.grad[2] == 0).all() and (features.grad[:2] != 0).any()
    assert all(p.grad is not None for p in core.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_hold_every_parameter_but_the_output_layers_once(name):
    net = build_backbone(BackboneSpec(name, 1, 3, ((2, 2, 2),) * 3, 12 if name == "swin_unetr" else 4))
    stages = [{id(p) for m in stage for p in m.parameters()} for stage in net.stages()]
    assert sum(map(len, stages)) == len(set().union(*stages))
    head = {id(p) for m in net.head_modules() for p in m.parameters()}
    assert set().union(*stages) == {id(p) for p in net.parameters()} - head


@pytest.mark.parametrize("name", BACKBONES)
def test_the_output_layer_reads_the_features_that_are_told(name):
    spec = BackboneSpec(name, 1, 3, ((2, 2, 2),) * 3, 12 if name == "swin_unetr" else 4)
    net = (SmallSwin(spec) if name == "swin_unetr" else build_backbone(spec)).eval()
    with torch.no_grad():
        x = torch.randn(1, 1, 64, 32, 32) if name == "swin_unetr" else torch.randn(1, 1, 16, 16, 16)
        logits, features = net.forward_with_features(x)
        assert torch.equal(logits, net(x)) and torch.equal(net.head_modules()[0](features), logits)
    assert features.shape[1] == net.feature_channels
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_rates_fall_with_the_distance_from_the_output_for_given_weights_only():
    net = build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 2),) * 2, 4))
    encoder = net.encoder_modules()
    given = net.encoder_parameters()
    shares_of = layer_shares(net.stages(), given, 0.5)
    made = adamw(net, 1e-2, 0.1, 10, 0.2, given, 0.8, 0.3, shares_of)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    wanted = {id(p): 1.0 for p in net.parameters()}
    for k, module in enumerate(reversed(encoder), 1):
        wanted.update({id(p): 0.8 * 0.5**k for p in module.parameters()})
    old = {id(p) for p in given}
    for step in range(6):
        for group in optimizer.param_groups:
            for p in group["params"]:
                rate = 0.0 if id(p) in old and step < 3 else wanted[id(p)]
                assert group["lr"] == pytest.approx(1e-2 * rate * warmup_cosine(step, 10, 0.2))
                assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0)
        optimizer.step()
        schedule.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
