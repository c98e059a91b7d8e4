"""Bags: files that people have, cross-validation by group, planted instances, SC-MIL's loss, what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py", reason="the extra `mil` is not installed")
pytest.importorskip("sklearn", reason="the extra `mil` is not installed")

from small_bags import WIDTH, config, planted, write_set  # noqa: E402

from medcl.config.mil import MILEvaluateConfig, MILFitConfig, MILPredictConfig  # noqa: E402
from medcl.errors import MedclError  # noqa: E402
from medcl.losses.bags import SCHEDULES, contrast_weight, supervised_contrast  # noqa: E402
from medcl.mil.aggregators import AGGREGATORS  # noqa: E402
from medcl.mil.bag_set import load  # noqa: E402
from medcl.mil.bags import Features, classes_of, read_bags, read_features, read_instances, write_features  # noqa: E402
from medcl.mil.classifier import build, collate  # noqa: E402
from medcl.mil.evaluation import evaluate_bags  # noqa: E402
from medcl.mil.places import cells_of  # noqa: E402
from medcl.mil.stage import divide, fit, predict_bags  # noqa: E402
from medcl.mil.training import like_sized, train  # noqa: E402

SMALL = {"hidden": 16}


@pytest.fixture(scope="module")
def bag_folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("bags"))


@pytest.mark.parametrize("method,balance", [("plain", "weights"), ("sc", "sampling")])
def test_planted_instances_are_found_from_bag_labels(bag_folder, tmp_path, method, balance):
    run = fit(config(bag_folder, tmp_path / "run", method=method, balance=balance, epochs=30))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["scores"]["auroc"]["estimate"] > 0.95
    assert metrics["bags"] == 40 and metrics["groups"] == 20 and metrics["classes"] == ["benign", "malignant"]
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 40 and all(abs(float(r["p_benign"]) + float(r["p_malignant"]) - 1) < 1e-4 for r in rows)
    told = predict_bags(MILPredictConfig(str(run), str(bag_folder), str(tmp_path / "told")))
    _, labels, marks = planted()
    hits = []
    for number, (label, mark) in enumerate(zip(labels, marks, strict=True)):
        if label:
            text = (told / "attention" / f"bag{number:02d}.csv").read_text()
            first = next(csv.DictReader(text.splitlines()))
            hits.append(bool(mark[int(first["instance"])]))
            assert int(first["x"]) == 256 * int(first["instance"])
    assert np.mean(hits) >= 0.9
    again = evaluate_bags(MILEvaluateConfig(str(told), out=str(tmp_path / "scores.json")))
    assert again["scores"]["auroc"]["estimate"] > 0.95 and (tmp_path / "scores.json").exists()


def test_no_group_is_divided_and_every_bag_is_held_out_once_a_repeat(bag_folder, tmp_path):
    run = fit(config(bag_folder, tmp_path / "run", repeats=2, epochs=1, final=False))
    divisions = json.loads((run / "folds.json").read_text())
    for repeat in range(2):
        tests = [set(d["test"]) for d in divisions if d["repeat"] == repeat]
        assert len(tests) == 4 and len(set.union(*tests)) == sum(map(len, tests)) == 20
    assert divisions[0]["test"] != divisions[4]["test"]
    with pytest.raises(MedclError, match="no classifier"):
        predict_bags(MILPredictConfig(str(run), str(bag_folder), str(tmp_path / "told")))


def test_folds_keep_classes_even():
    labels = np.array([0] * 30 + [1] * 10)
    for learn, held in divide(labels, [str(i // 2) for i in range(40)], 5, 0):
        assert 0 < labels[held].sum() <= 4 and not set(learn) & set(held)


def test_equal_seeds_give_equal_predictions(bag_folder, tmp_path):
    texts = [
        (fit(config(bag_folder, tmp_path / f"run{n}", epochs=2, final=False)) / "predictions.csv").read_text()
        for n in (0, 1)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_learns_bags_of_one_instance_and_three_classes(name):
    rng = np.random.default_rng(0)
    labels = [0, 1, 2] * 6
    bags = [
        Features((rng.normal(size=(1 + n % 3, 4)) + 4 * np.eye(4)[label]).astype(np.float32))
        for n, label in enumerate(labels)
    ]
    model = train(MILFitConfig("", "", aggregator=name, epochs=60, lr=3e-3, balance="none"), bags, labels, 3, 0)
    from medcl.mil.classifier import predict

    told = predict(model, bags)
    assert np.mean([t.probabilities.argmax() == y for t, y in zip(told, labels, strict=True)]) > 0.8
    for bag, t in zip(bags, told, strict=True):
        assert t.attention.shape == (len(bag.h),) and t.attention.sum() == pytest.approx(1, abs=1e-4)


def test_files_of_other_tools_are_read(tmp_path):
    h, where = np.random.rand(5, 7).astype(np.float32), np.arange(10).reshape(5, 2)
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = h, where
        file["coords"].attrs["patch_size"] = 256
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = h[None], where[None]
    with h5py.File(tmp_path / "stamp.h5", "w") as file:
        file["feats"], file["coords"] = h, where
    torch.save({"features": torch.from_numpy(h), "coords": torch.from_numpy(where)}, tmp_path / "dict.pt")
    torch.save(torch.from_numpy(h), tmp_path / "tensor.pt")
    np.savez(tmp_path / "both.npz", features=h, coords=where)
    np.save(tmp_path / "plain.npy", h)
    for path in sorted(tmp_path.iterdir()):
        found = read_features(path)
        np.testing.assert_array_equal(found.h, h)
        if path.name not in ("tensor.pt", "plain.npy"):
            np.testing.assert_array_equal(found.coordinates, where)
    assert read_features(tmp_path / "clam.h5").meta["patch_size"] == 256


def test_a_table_of_instances_is_a_set_of_bags(tmp_path):
    path = tmp_path / "instances.csv"
    path.write_text("bag_id,label,group,a,b\nx,pos,p1,1,2\ny,neg,p2,3,4\nx,pos,p1,5,6\n")
    bags, features = read_instances(path)
    assert [(b.id, b.label, b.group) for b in bags] == [("x", "pos", "p1"), ("y", "neg", "p2")]
    np.testing.assert_array_equal(features["x"].h, [[1, 2], [5, 6]])
    path.write_text("bag_id,label,a\nx,pos,1\nx,neg,5\n")
    with pytest.raises(MedclError, match="neg and pos"):
        read_instances(path)


def test_one_bad_bag_is_set_aside_and_the_rest_goes_on(tmp_path):
    folder = write_set(tmp_path / "bags", 16, 8)
    (folder / "features" / "bag03.h5").unlink()
    (folder / "features" / "bag05.h5").write_bytes(b"\x89HDF broken")
    for number, h in ((7, np.full((3, WIDTH), np.nan, np.float32)), (9, np.empty((0, WIDTH), np.float32))):
        with h5py.File(folder / "features" / f"bag{number:02d}.h5", "w") as file:
            file["features"] = h
            file.attrs["encoder"] = "stub"
    loaded = load(folder)
    assert set(loaded.aside) == {"bag03", "bag05", "bag07", "bag09"} and len(loaded.bags) == 12
    for bag, told in (
        ("bag03", "no such file"),
        ("bag05", "cannot be read"),
        ("bag07", "not finite"),
        ("bag09", "no inst"),
    ):
        assert told in loaded.aside[bag] and bag in loaded.aside[bag]


def rows(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["bag_id,path,label,group", *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    "lines,told",
    [
        (["a,x.h5,pos,p1", "a,y.h5,neg,p2"], "in two groups, labelled pos and neg"),
        (["a,x.h5,pos,p1", "a,x.h5,pos,p1"], "twice"),
        (["a,x.h5,pos,p1", "b,x.h5,pos,p2"], "the same file in groups p1 and p2"),
        ([",x.h5,pos,p1"], "no bag_id"),
        ([], "holds no bag"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(tmp_path, lines, told):
    with pytest.raises(MedclError, match=told):
        read_bags(rows(tmp_path / "bags.csv", *lines))


def test_features_of_two_widths_or_encoders_do_not_mix(tmp_path):
    folder = write_set(tmp_path / "bags", 8, 4)
    write_features(folder / "features" / "bag02.h5", Features(np.zeros((3, WIDTH + 1), np.float32), encoder="stub"))
    with pytest.raises(
        MedclError, match=r"bag0\d has features of width 6, bag0\d 7|bag0\d has features of width 7, bag0\d 6"
    ):
        load(folder)
    write_features(folder / "features" / "bag02.h5", Features(np.zeros((3, WIDTH), np.float32), encoder="other"))
    with pytest.raises(MedclError, match="features of encoder"):
        load(folder)


@pytest.mark.parametrize(
    "change,told",
    [
        ({"folds": 30}, "20 groups|10 groups"),
        ({"folds": 1}, "--folds"),
        ({"lr": 0}, "--lr"),
        ({"temperature": 0.0}, "--temperature"),
        ({"method": "magic"}, "plain, sc"),
        ({"aggregator": "abmli"}, "abmil"),
        ({"options": {"width": 3}}, "--options"),
        ({"schedule": "steep"}, "linear"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_end_before_a_folder_is_made(bag_folder, tmp_path, change, told):
    with pytest.raises(MedclError, match=told):
        fit(config(bag_folder, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_another_encoder_than_the_classifiers_is_refused(bag_folder, tmp_path):
    run = fit(config(bag_folder, tmp_path / "run", epochs=1))
    other = write_set(tmp_path / "other", 8, 4, encoder="another")
    with pytest.raises(MedclError, match="encoder another"):
        predict_bags(MILPredictConfig(str(run), str(other), str(tmp_path / "told")))


def test_classes_are_told_and_the_positive_one_is_last(tmp_path):
    table = rows(tmp_path / "bags.csv", "a,x,tumour,1", "b,y,normal,2", "c,z,tumour,3")
    assert classes_of(read_bags(table)) == ("normal", "tumour")
    with pytest.raises(MedclError, match="all bags are of class"):
        classes_of(read_bags(rows(tmp_path / "one.csv", "a,x,tumour,1")))
    with pytest.raises(MedclError, match="no label"):
        classes_of(read_bags(rows(tmp_path / "none.csv", "a,x,,1")))


def test_collating_pads_and_counts_cells():
    bags = [
        Features(np.ones((2, 3), np.float32), np.array([[512, 0], [0, 256]])),
        Features(np.ones((4, 3), np.float32), np.zeros((4, 2))),
    ]
    h, mask, where = collate(bags)
    assert h.shape == (2, 4, 3) and mask.sum(1).tolist() == [2, 4] and not h[0, 2:].any()
    assert where[0, :2].tolist() == [[1, 0], [0, 1]]
    assert cells_of(Features(np.ones((3, 1)), np.array([[10, 0], [266, 0], [522, 512]]))).tolist() == [
        [0, 0],
        [1, 0],
        [2, 1],
    ]
    assert collate([bags[0], Features(np.ones((1, 3), np.float32))])[2] is None


def test_a_bag_alone_is_as_among_others_and_its_values_stay() -> None:
    rng = np.random.default_rng(0)
    big, small = (Features(rng.normal(size=(k, 3)).astype(np.float32), np.arange(2 * k).reshape(k, 2)) for k in (5, 2))
    for bag in (big, Features(big.h.astype(np.float16), big.coordinates)):
        before = bag.h.copy()
        bag.h.flags.writeable = True
        alone, padded = collate([bag]), collate([bag, small])
        for one, both in zip(alone, padded, strict=True):
            assert one is not None and both is not None
            assert one.dtype == both.dtype and torch.equal(one[0], both[0])
        bag.h.flags.writeable = False  # as of a file mapped for reading
        assert torch.equal(collate([bag])[0], alone[0])
        np.testing.assert_array_equal(bag.h, before)


@pytest.mark.parametrize("b,n,d", [(4, 0, 3), (6, 5, 8), (3, 2, 4)])
def test_supervised_contrast_equals_a_loop(b, n, d):
    torch.manual_seed(b)
    z, memory = torch.randn(b, d), torch.randn(n, d)
    labels, older = torch.arange(b) % 2, torch.arange(n) % 3
    every = [(v, int(y)) for v, y in zip([*z, *memory], [*labels, *older], strict=True)]
    terms = []
    for i in range(b):
        s = [float(z[i] @ v / z[i].norm() / v.norm()) / 0.2 for v, _ in every]
        total = math.log(sum(math.exp(s[a]) for a in range(len(every)) if a != i))
        same = [s[p] - total for p, (_, y) in enumerate(every) if p != i and y == int(labels[i])]
        if same:
            terms.append(-sum(same) / len(same))
    ours = supervised_contrast(z, labels, 0.2, memory if n else None, older if n else None)
    assert float(ours) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_weight_of_the_contrast_falls_from_one_to_zero():
    for schedule in SCHEDULES:
        values = [contrast_weight(t / 10, schedule) for t in range(11)]
        assert values[0] == 1 and values[-1] == pytest.approx(0, abs=1e-9)
        assert all(a >= b for a, b in itertools.pairwise(values))
    assert contrast_weight(0.5, "parabolic") == 0.75


def test_an_unknown_option_of_an_aggregator_is_named():
    with pytest.raises(MedclError, match="abmil"):
        build(MILFitConfig("", "", aggregator="abmil", options={"depth": 2}), 4, 2)


def test_parts_of_like_size_pad_little_and_hold_every_bag_once():
    sizes = [1044, 4, 9, 5000, 12, 6, 900, 10]
    parts = like_sized(sizes)
    assert sorted(i for part in parts for i in part) == list(range(8)) and [3] in parts and [0, 6] in parts
    assert like_sized([5, 9, 7]) == [[0, 1, 2]] and like_sized([3]) == [[0]]


@pytest.mark.parametrize("balance", ["none", "weights"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(name, balance):
    from medcl.mil.objectives import Batch, Plain

    bags, _, _ = planted(7)
    target = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    made = config("", "", aggregator=name, balance=balance, options={"hidden": 16, "dropout": 0.0})
    torch.manual_seed(0)
    model = build(made, WIDTH, 2)
    objective = Plain(model, made, [len(b.h) for b in bags], target)
    assert objective.divisible
    grads = []
    for parts in ([list(range(7))], [[0, 3], [1, 2, 6], [4, 5]], [[i] for i in range(7)]):
        model.zero_grad()
        for part in parts:
            rows = [np.arange(len(bags[i].h)) for i in part]
            batch = Batch(*collate([bags[i] for i in part]), target[part], part, rows, 0.0)
            (objective.loss(batch) * objective.share(target[part], target)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for divided in grads[1:]:
        torch.testing.assert_close(divided, grads[0], atol=1e-6, rtol=1e-4)
