"""Semi-supervision in fine-tuning: what is read, what counts, what is kept, and that it resumes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small_runs import Killed, kill_at

import medcl
import medcl.store.crops
from medcl import FinetuneConfig
from medcl.checkpoint import load_weights
from medcl.errors import MedclError
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.runtime.run import read_metrics
from medcl.runtime.training import LAST
from medcl.segmentation.module import SegmentationModule
from medcl.segmentation.semi.registry import METHODS, build_method
from medcl.segmentation.semi.rows import Rows
from medcl.segmentation.semi.self_training import SelfTraining
from medcl.store.signature import subject_hash
from medcl.store.stage import load_source
from medcl.store.volumes import open_volume
from medcl.transforms.compose import Compose, strong_augmentation
from medcl.transforms.spatial import RandomSpatial


def finetuning(source, out, **more) -> FinetuneConfig:
    settings = {"steps": 4, "batch_size": 2, "labels": "2", "val_every": 2, "width": 4, **more}
    return FinetuneConfig(str(source), str(out), **settings)


def network(classes: int = 3):
    torch.manual_seed(0)
    return build_backbone(BackboneSpec("unet", 1, classes, ((2, 2, 2),), 4))


@pytest.mark.parametrize("semi", METHODS)
@pytest.mark.parametrize("mix", [pytest.param("none", marks=pytest.mark.battery), "cutmix"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, phantoms, monkeypatch, semi, mix):
    options = {"start": 0.25, "momentum": 0.6}
    settings = {"checkpoint_every": 2, "semi": semi, "mix": mix, "semi_options": options}
    whole = medcl.finetune(finetuning(phantoms, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        medcl.finetune(finetuning(phantoms, tmp_path / "cut", **settings))
    cut = medcl.finetune(finetuning(phantoms, tmp_path / "cut", resume=True, **settings))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_metrics(whole) == read_metrics(cut)


def test_only_images_of_unlabelled_training_subjects_are_read(tmp_path, phantoms, monkeypatch):
    read, labels = set(), set()
    original = medcl.store.crops.CropDataset.__getitem__

    def spy(self, number):
        sample = original(self, number)
        (labels if self.labelled else read).add(self.volume_of(number))
        assert self.labelled or "label" not in sample
        return sample

    monkeypatch.setattr(medcl.store.crops.CropDataset, "__getitem__", spy)
    run = medcl.finetune(finetuning(phantoms, tmp_path / "run", steps=12, semi="mean_teacher"))
    split = json.loads((run / "split.json").read_text())
    assert split["val"] and split["test"]
    contract = load_weights(run)[0]
    assert set(contract.subjects) == set(map(subject_hash, split["train"]))
    assert not set(contract.subjects) & set(map(subject_hash, (*split["val"], *split["test"])))
    of = {}
    for case in load_source(str(phantoms)).cases:
        of.setdefault(case.subject, case)
    hashes = {path: open_volume(path).meta["voxel_hash"] for path in read | labels}
    assert len(read) == len(split["train"]) - 2 and len(labels) == 2 and not read & labels
    assert set(hashes.values()) == set(contract.volumes)


def test_the_teacher_is_kept_and_differs_from_the_student(tmp_path, phantoms):
    run = medcl.finetune(
        finetuning(phantoms, tmp_path / "run", semi="mean_teacher", semi_options={"momentum": 0.6}, val_every=4)
    )
    contract, kept = load_weights(run)
    assert contract.step == 4 and contract.options["semi"] == "mean_teacher"
    assert contract.options["semi_options"]["momentum"] == 0.6 and contract.options["semi_options"]["weight"] == 5.0
    state = torch.load(run / LAST, weights_only=True)["state_dict"]
    teacher = {k.removeprefix("semi.teacher.module.net."): v for k, v in state.items() if ".teacher." in k}
    student = {k.removeprefix("backbone.net."): v for k, v in state.items() if k.startswith("backbone.net.")}
    assert kept.keys() <= teacher.keys() == student.keys()
    assert all(torch.equal(kept[name], teacher[name]) for name in kept)
    assert any(not torch.equal(kept[name], student[name]) for name in kept)


def test_before_its_start_self_training_is_supervised_training(tmp_path, phantoms):
    plain = medcl.finetune(finetuning(phantoms, tmp_path / "plain"))
    late = medcl.finetune(finetuning(phantoms, tmp_path / "late", semi="self_training", semi_options={"start": 0.5}))
    a, b = ([row["loss"] for row in read_metrics(run)] for run in (plain, late))
    assert a[:2] == b[:2] and a[3] != b[3]
    assert "trusted" not in read_metrics(late)[0] and "trusted" in read_metrics(late)[3]


def test_pseudo_labels_count_where_they_are_confident():
    method = SelfTraining(network(), {"threshold": 0.8})
    p = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.79, 0.11], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]]).T.view(1, 3, 4, 1, 1)
    target, weight = method.targets(p)
    assert weight.flatten().tolist() == [1, 0, 1, 1]
    assert target.argmax(1).flatten().tolist() == [0, 1, 2, 1] and set(target.unique().tolist()) == {0, 1}
    soft, _ = SelfTraining(network(), {"hard": False}).targets(p)
    assert torch.equal(soft, p)


def says(method, monkeypatch, probabilities):
    """The method's teacher gives these whatever it sees."""
    monkeypatch.setattr(method.teacher.module, "forward", lambda image: probabilities.clamp(min=1e-9).log())


def ball(radius, size=32):
    """Class 1 with certainty within a ball, background outside."""
    axis = torch.arange(size) - (size - 1) / 2
    inside = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() <= radius
    return torch.stack([~inside, inside, torch.zeros_like(inside)])[None].float()


@pytest.mark.parametrize("semi", METHODS)
def test_nothing_is_learnt_outside_the_patch(monkeypatch, semi):
    """Moved by half its length, half of the patch comes from outside."""
    method = build_method(semi, network(), {})
    says(method, monkeypatch, ball(100.0, 16))
    half = Compose([RandomSpatial(0.0, (1.0, 1.0), translate=[(0.5, 0.5), 0.0, 0.0])])
    rows = method.rows(torch.randn(1, 1, 16, 16, 16), torch.arange(1), half, (1.0, 1.0, 1.0))
    kept = rows.weight[0, 0] > 0
    assert kept.flatten(1).any(1).tolist() == [False] * 8 + [True] * 8 and kept[8:].all()
    assert (rows.target[0, 1][kept] == 1).all()


@pytest.mark.parametrize("hard", [True, False])
def test_what_the_teacher_says_moves_with_the_voxels(monkeypatch, hard):
    """Labels and holes where it is unsure, as a label map of the same places would; probabilities interpolated."""
    method = build_method("self_training", network(), {"threshold": 0.6, "hard": hard})
    torch.manual_seed(1)
    p = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4, 4), (16, 16, 16)).softmax(1) ** 4
    p = p / p.sum(1, keepdim=True)
    says(method, monkeypatch, p)
    image, seeds = torch.randn(2, 1, 16, 16, 16), torch.arange(2)
    turn = Compose([RandomSpatial(40.0, (0.8, 1.2))])
    rows = method.rows(image, seeds, turn, (1.0, 1.0, 1.0))
    best, label = p.max(1, keepdim=True)
    params = turn.draw(seeds, image.shape)
    if hard:
        _, moved = turn.apply_both(image, torch.where(best >= 0.6, label, 7), params)
        _, inside = turn.apply_both(image, torch.ones_like(label), params)
        sure = (moved != 7) & (inside > 0)
        assert torch.equal(rows.weight > 0, sure) and 0 < sure.float().mean() < 1
        assert torch.equal(rows.target.argmax(1, keepdim=True)[sure], moved[sure])
        assert set(rows.weight.unique().tolist()) == {0, 1} == set(rows.target.unique().tolist())
    else:
        _, soft, inside = turn.apply_soft(image, torch.cat([p, (best >= 0.6).float()], 1), params)
        torch.testing.assert_close(rows.target, soft[:, :3])
        torch.testing.assert_close(rows.weight, soft[:, 3:] * inside)


def test_a_structure_keeps_its_size_however_often_it_is_its_own_teacher(monkeypatch):
    """Each round moves the label by a random rotation and takes it for the next round's teacher.

    Interpolated shares wear off what is convex, a little every time (the second form, which shows that this would).
    """
    method = build_method("self_training", network(), {"threshold": 0.0})
    turn = Compose([RandomSpatial(180.0, (1.0, 1.0))])
    image = torch.zeros(1, 1, 32, 32, 32)
    start = label = worn = ball(4.0)
    for round_ in range(40):
        says(method, monkeypatch, label)
        seed = torch.tensor([round_])
        label = method.rows(image, seed, turn, (1.0, 1.0, 1.0)).target
        _, worn, _ = turn.apply_soft(image, worn, turn.draw(seed, image.shape))
        worn = torch.nn.functional.one_hot(worn.argmax(1), 3).movedim(-1, 1).float()
    size, wanted, without = (float(x[:, 1].sum()) for x in (label, start, worn))
    assert size == pytest.approx(wanted, rel=0.25)
    assert without < 0.5 * wanted


@pytest.mark.parametrize("semi", METHODS)
def test_the_unlabelled_loss_knows_no_true_label_and_spares_the_teacher(semi):
    """Its gradient with respect to the labelled rows is none, where a method does not say that it reads them."""
    net = network()
    method = build_method(semi, net, {})
    rows = Rows(
        torch.randn(2, 1, 8, 8, 8), torch.softmax(torch.randn(2, 3, 8, 8, 8), 1), torch.ones(2, 1, 8, 8, 8),
        torch.arange(2), 1,
    )  # fmt: skip
    logits, features = net.forward_with_features(rows.image)
    logits.retain_grad()
    method.loss(logits, features, rows)["loss"].backward()
    if not method.reads_features:
        assert (logits.grad[0] == 0).all() and (logits.grad[1] != 0).any()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_is_asked_about_the_patch_and_not_its_augmentation(monkeypatch):
    net = network()
    method = build_method("self_training", net, {})
    seen = []
    monkeypatch.setattr(method.teacher.module, "forward", lambda x: seen.append(x) or torch.cat([x, -x, x * 0], dim=1))
    image, seeds = torch.randn(2, 1, 16, 16, 16), torch.arange(2)
    augmentation = strong_augmentation()
    rows = method.rows(image, seeds, augmentation, (1.0, 1.0, 1.0))
    assert torch.equal(seen[0], image) and not torch.equal(rows.image, image)
    assert torch.equal(rows.image, augmentation(image, seeds, spacing=(1.0, 1.0, 1.0)))


def test_the_teacher_is_an_average_that_forgets_its_beginning():
    net = network()
    method = build_method("mean_teacher", net, {"momentum": 0.75})
    name = next(iter(dict(net.named_parameters())))
    values, wanted = [1.0, 5.0, 3.0, 9.0, 2.0], None
    for step, value in enumerate(values):
        with torch.no_grad():
            net.get_parameter(name).fill_(value)
        method.after_step(net, step)
        share = min(1 - 1 / (step + 1), 0.75)
        wanted = value if wanted is None else share * wanted + (1 - share) * value
        assert method.teacher.module.get_parameter(name).flatten()[0] == pytest.approx(wanted)
    # the first four steps are a plain mean
    assert wanted == pytest.approx(0.75 * (18 / 4) + 0.25 * 2)


@pytest.mark.parametrize(
    "change,told",
    [
        ({"semi": "mean_techer"}, "Did you mean 'mean_teacher'"),
        ({"semi": "mean_teacher", "semi_options": {"momentun": 0.9}}, "Did you mean 'momentum'"),
        ({"semi": "mean_teacher", "semi_options": {"momentum": 1.0}}, "--semi_options.momentum"),
        ({"semi": "self_training", "semi_options": {"threshold": 1.5}}, "--semi_options.threshold"),
        ({"semi": "self_training", "semi_options": {"start": 1.0}}, "--semi_options.start"),
        ({"semi": "mean_teacher", "semi_options": {"patches": -1}}, "--semi_options.patches"),
        ({"semi_options": {"weight": 1.0}}, "options without a method"),
        ({"semi": "mean_teacher", "labels": "all"}, "every training subject is labelled"),
        ({"semi": "mean_teacher", "augment": "none"}, "Use --augment strong"),
        ({"semi": "pixel_contrast", "semi_options": {"temperature": 0}}, "--semi_options.temperature"),
        ({"layer_decay": 0.7}, "Name them with --init"),
        ({"layer_decay": 1.5}, "--layer_decay"),
        ({"core_tuning": -1.0}, "--core_tuning"),
        ({"mix": "cutmx"}, "Did you mean 'cutmix'"),
        ({"mix": "mixup", "batch_size": 1}, "has no partner"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_written(phantoms, tmp_path, change, told):
    with pytest.raises(MedclError, match=told) as caught:
        medcl.finetune(finetuning(phantoms, tmp_path / "x", **change))
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_it_starts_from_pretrained_weights_too(tmp_path, phantoms, runs):
    pre, seen = runs / "pre", []
    original = SegmentationModule.__init__

    def spy(self, backbone, *args, **kwargs):
        original(self, backbone, *args, **kwargs)
        seen.append({k: v.clone() for k, v in self.semi.teacher.module.net.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "__init__", spy)
        run = medcl.finetune(
            finetuning(phantoms, tmp_path / "fine", width=0, init=str(pre), semi="mean_teacher", steps=2)
        )
    _, state = load_weights(pre)
    backbone = build_backbone(load_weights(run)[0].backbone)
    assert all(torch.equal(seen[0][name], state[name]) for name in backbone.tensor_names("encoder"))


def test_core_tuning_beside_mixed_patches_resumes_bit_for_bit(tmp_path, phantoms, monkeypatch):

    settings = {"checkpoint_every": 2, "core_tuning": 0.1, "mix": "mixup"}
    whole = medcl.finetune(finetuning(phantoms, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        medcl.finetune(finetuning(phantoms, tmp_path / "cut", **settings))
    cut = medcl.finetune(finetuning(phantoms, tmp_path / "cut", resume=True, **settings))
    assert read_metrics(whole) == read_metrics(cut) and all(row["core"] > 0 for row in read_metrics(whole))
    first, second = (load_weights(run)[1] for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_weights_stay_and_slowed_ones_move_less(tmp_path, phantoms, runs):
    pre, moved = runs / "pre", {}
    state = load_weights(pre)[1]
    for name, change in (("frozen", {"frozen": 1.0}), ("slow", {"layer_decay": 0.3}), ("plain", {})):
        run = medcl.finetune(
            finetuning(phantoms, tmp_path / name, width=0, init=str(pre), val_every=4, weight_decay=0.0, **change)
        )
        contract, tuned = load_weights(run)
        encoder = build_backbone(contract.backbone).tensor_names("encoder")
        moved[name] = sum(float((tuned[k] - state[k]).abs().sum()) for k in encoder)
    assert moved["frozen"] == 0 < moved["slow"] < 0.5 * moved["plain"]


def test_pasted_pseudo_labels_are_trusted_as_far_as_the_weight_has_risen(tmp_path, phantoms, monkeypatch):
    given, original = [], Rows.mix

    def mix(self, kind, trust=1.0):
        given.append(trust)
        return original(self, kind, trust)

    monkeypatch.setattr(Rows, "mix", mix)
    medcl.finetune(finetuning(phantoms, tmp_path / "run", width=4, semi="mean_teacher", mix="cutmix",
                              semi_options={"ramp": 1.0, "weight": 3.0}))  # fmt: skip
    assert given == pytest.approx([math.exp(-5 * (1 - step / 4) ** 2) for step in range(4)])
