"""Every aggregator: order and padding change nothing; formulas against loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medcl.mil.aggregators import ABMIL, AGGREGATORS, CLAM, DSMIL, GatedABMIL, Max, Mean, TransMIL

M = 6
NAMES = list(AGGREGATORS)


def build(name: str, classes: int = 3):
    torch.manual_seed(0)
    return AGGREGATORS[name](M, classes, hidden=16).eval()


def bags(count: int = 3, instances: int = 7, dims: int = 2):
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(count, instances, M, generator=generator)
    cells = torch.stack([torch.randperm(40, generator=generator)[:instances] for _ in range(count)])
    parts = (cells // 8, cells % 8) if dims == 2 else (cells // 8, cells % 4, cells // 4 % 2)
    return h, torch.ones(count, instances, dtype=torch.bool), torch.stack(parts, dim=-1)


@pytest.mark.parametrize("dims", [0, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_instances_changes_nothing(name, dims):
    model = build(name)
    h, mask, cells = bags(dims=dims or 2)
    order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(2))
    where = cells if dims else None
    one = model(h, mask, where)
    other = model(h[:, order], mask, None if where is None else where[:, order])
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.attention[:, order], other.attention, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([0, 1, 2])
    torch.testing.assert_close(model.loss(one, labels, mask), model.loss(other, labels, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_whatever_it_holds(name):
    model = build(name)
    h, mask, cells = bags()
    alone = model(h, mask, cells)
    padded = [F.pad(t, (0, 0, 0, 4), value=99) for t in (h, cells)]
    padded[0][:, 7:] = 1e4
    wide = F.pad(mask, (0, 4), value=False)
    out = model(padded[0], wide, padded[1])
    torch.testing.assert_close(out.logits, alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.attention[:, :7], alone.attention, atol=1e-5, rtol=1e-5)
    assert not bool(out.attention[:, 7:].any())
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.loss(out, labels, wide), model.loss(alone, labels, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_probabilities_sum_to_one_and_gradient_reaches_every_weight(name):
    model = build(name)
    h, mask, cells = bags()
    out = model(h, mask, cells)
    torch.testing.assert_close(out.attention.sum(1), torch.ones(3))
    torch.testing.assert_close(model.probabilities(out).sum(1), torch.ones(3))
    assert out.logits.shape == (3, 3)
    model.loss(out, torch.tensor([0, 1, 2]), mask, torch.tensor([1.0, 2.0, 3.0])).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and bool(torch.isfinite(value.grad).all()), parameter


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_one_instance_and_bags_of_unequal_size_work(name):
    model = build(name, classes=2)
    h, mask, cells = bags()
    mask[1, 1:] = False
    out = model(h, mask, cells)
    assert out.attention[1, 0].item() == pytest.approx(1)
    alone = model(h[1:2, :1], mask[1:2, :1], cells[1:2, :1])
    torch.testing.assert_close(out.logits[1:2], alone.logits, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(model.loss(out, torch.tensor([0, 1, 1]), mask))


@pytest.mark.parametrize("kind", [ABMIL, GatedABMIL])
@torch.no_grad()
def test_attention_is_that_of_the_papers_equations(kind):
    torch.manual_seed(3)
    model = kind(M, 2, hidden=5, attention=4).eval()
    h, mask, _ = bags(1, 4)
    out = model(h, mask)
    scores = []
    for k in range(4):
        x = model.embed(h[0, k]).tolist()
        total = float(model.pool.score.bias[0])
        for j in range(4):
            a = math.tanh(
                sum(float(w) * v for w, v in zip(model.pool.tanh.weight[j], x, strict=True))
                + float(model.pool.tanh.bias[j])
            )
            if model.pool.gate is not None:
                g = sum(float(w) * v for w, v in zip(model.pool.gate.weight[j], x, strict=True)) + float(
                    model.pool.gate.bias[j]
                )
                a *= 1 / (1 + math.exp(-g))
            total += float(model.pool.score.weight[0, j]) * a
        scores.append(math.exp(total))
    expected = [s / sum(scores) for s in scores]
    assert out.attention[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_mean_and_max_are_what_they_say():
    torch.manual_seed(4)
    mean, largest = Mean(M, 2, hidden=5).eval(), Max(M, 2, hidden=5).eval()
    h, mask, _ = bags(1, 4)
    torch.testing.assert_close(mean(h, mask).embedding[0], mean.embed(h[0]).mean(0))
    torch.testing.assert_close(largest(h, mask).embedding[0], largest.embed(h[0]).amax(0))


@pytest.mark.parametrize("multi_branch", [False, True])
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("k", [2, 20])
def test_clam_tells_its_most_and_least_attended_instances_apart(multi_branch, subtyping, k):
    torch.manual_seed(5)
    model = CLAM(M, 3, hidden=8, multi_branch=multi_branch, k=k, subtyping=subtyping).eval()
    h, mask, _ = bags(2, 6)
    out = model(h, mask)
    labels = [2, 0]
    bag_terms = []
    for b, label in enumerate(labels):
        embedded = model.embed(h[b])
        class_terms = []
        for c in range(3):
            scores = model.pool(embedded[None])[0, c if multi_branch else 0].tolist()
            order = sorted(range(6), key=lambda i: -scores[i])
            few = min(k, 6)
            wanted = [(i, 1) for i in order[:few]] + [(i, 0) for i in order[::-1][:few]]
            if c != label:
                if not subtyping:
                    continue
                wanted = [(i, 0) for i in order[:few]]
            terms = []
            for i, target in wanted:
                logits = model.instance[c](embedded[i]).tolist()
                terms.append(math.log(sum(math.exp(v) for v in logits)) - logits[target])
            class_terms.append(sum(terms) / len(terms))
        bag_terms.append(sum(class_terms) / len(class_terms))
    expected = sum(bag_terms) / 2
    target = torch.tensor(labels)
    assert model.instance_loss(out, target, mask).item() == pytest.approx(expected, abs=1e-5)
    whole = 0.7 * F.cross_entropy(out.logits, target).item() + 0.3 * expected
    assert model.loss(out, target, mask).item() == pytest.approx(whole, abs=1e-5)


def test_dsmil_attends_to_what_resembles_its_best_instance():
    torch.manual_seed(6)
    model = DSMIL(M, 2, hidden=5, query=3).eval()
    h, mask, _ = bags(1, 4)
    out = model(h, mask)
    embedded = model.embed(h[0])
    scores, queries = model.instance(embedded), model.query(embedded)
    for c in range(2):
        best = max(range(4), key=lambda k: float(scores[k, c]))
        assert float(out.extra["best"][0, c]) == pytest.approx(float(scores[best, c]))
        raw = [math.exp(float(queries[k] @ queries[best]) / math.sqrt(3)) for k in range(4)]
        pooled = sum(w / sum(raw) * embedded[k] for k, w in enumerate(raw))
        torch.testing.assert_close(out.embedding[0].view(2, 5)[c], pooled, atol=1e-5, rtol=1e-5)
    label = torch.tensor([1])
    expected = 0.0
    for logits in (out.logits[0], out.extra["best"][0]):
        p = [1 / (1 + math.exp(-float(v))) for v in logits]
        expected += -(math.log(1 - p[0]) + math.log(p[1])) / 2 / 2
    assert float(model.loss(out, label, mask)) == pytest.approx(expected, abs=1e-5)


def test_transmil_knows_where_instances_lie_only_by_their_coordinates():
    model = build("transmil")
    h, mask, cells = bags()
    here, elsewhere = model(h, mask, cells), model(h, mask, cells + 5)
    torch.testing.assert_close(here.logits, elsewhere.logits)  # a shift of the whole slide is none
    spread = model(h, mask, cells * 20)
    assert not torch.allclose(here.logits, spread.logits)
    assert isinstance(model, TransMIL)
    with torch.no_grad():
        for convolution in model.position.convolutions:
            convolution.weight.zero_()
            convolution.bias.zero_()
    torch.testing.assert_close(model(h, mask, cells).logits, model(h, mask).logits)


@pytest.mark.parametrize("dims", [0, 2, 3])
def test_transmil_on_a_bag_beyond_the_exact_limit_ignores_order_and_padding(dims):
    torch.manual_seed(0)
    model = TransMIL(M, 3, hidden=16, exact=8, landmarks=4).eval()
    h, mask, cells = bags(3, 20, dims=dims or 2)
    mask[1, 15:] = False  # by landmarks too, in padding
    mask[2, 7:] = False  # exact, though beside large bags
    where = cells if dims else None
    one = model(h, mask, where)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    other = model(h[:, order], mask[:, order], None if where is None else where[:, order])
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.attention[:, order], other.attention, atol=1e-5, rtol=1e-5)
    for b, count in enumerate((20, 15, 7)):
        alone = model(
            h[b : b + 1, :count], mask[b : b + 1, :count], None if where is None else where[b : b + 1, :count]
        )
        torch.testing.assert_close(one.logits[b : b + 1], alone.logits, atol=1e-5, rtol=1e-5)
        assert not bool(one.attention[b, count:].any())
    torch.testing.assert_close(one.attention.sum(1), torch.ones(3))
    model.loss(one, torch.tensor([0, 1, 2]), mask).backward()
    used = [p for name, p in model.named_parameters() if dims or not name.startswith("position")]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in used)
