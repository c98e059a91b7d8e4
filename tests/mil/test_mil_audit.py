"""Bags that an encoder or a classifier has seen: every result of them says so, and what nobody knows is told."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("h5py", reason="the extra `mil` is not installed")
pytest.importorskip("sklearn", reason="the extra `mil` is not installed")

from PIL import Image
from small_bags import config, write_set

from medcl import cli
from medcl.config import ReportConfig
from medcl.config.mil import MILEvaluateConfig, MILPredictConfig, MILPrepareConfig, MILPretrainConfig
from medcl.errors import MedclError
from medcl.leakage.audit import compared
from medcl.leakage.seen import Seen, SeenVolume, save_seen, seen_by
from medcl.mil.audit import BagAudit, audit_bags, encoder_of, record_encoder, volume_marks
from medcl.mil.bag_set import load
from medcl.mil.bags import Bag, Features, read_features, write_features
from medcl.mil.evaluation import evaluate_bags, print_scores, score
from medcl.mil.prepare import prepare_bags
from medcl.mil.pretrain import pretrain_patches
from medcl.mil.stage import fit, predict_bags
from medcl.report.bags import write_prediction_report
from medcl.report.stage import write_report
from medcl.runtime.files import read_json, write_json, write_rows
from medcl.store.signature import sign, subject_hash

TILE = {"tile": 32, "mpp": 0.0, "tissue": 0.0}
FIT = {"folds": 2, "epochs": 1, "options": {"hidden": 8}}


def pictures(folder: Path, count: int, first: int = 0, group: str = "g") -> Path:
    """A table of images, each its own group and unlike any other."""
    folder.mkdir()
    rows = []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(90, 230, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"i{number}.png")
        rows.append({"bag_id": f"i{number}", "path": f"i{number}.png", "label": "ab"[number % 2],
                     "group": f"{group}{number}"})  # fmt: skip
    write_rows(folder / "bags.csv", rows)
    return folder / "bags.csv"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Pretrained on images 0 to 3, of groups g0 to g3."""
    folder = tmp_path_factory.mktemp("encoder")
    source = pictures(folder / "images", 4)
    more = {"width": 0.125, "steps": 2, "batch_size": 4, "tile": 32, "mpp": 0.0, "tissue": 0.0}
    return pretrain_patches(MILPretrainConfig(str(source), str(folder / "run"), **more))


def prepared(source: Path, out: Path, encoder: object) -> Path:
    return prepare_bags(MILPrepareConfig(str(source), str(out), encoder=str(encoder), **TILE))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def leaking(encoder, tmp_path_factory):
    """Features of the images that the encoder has seen and of two others, under groups of other names."""
    folder = tmp_path_factory.mktemp("leaking")
    return prepared(pictures(folder / "images", 6, group="other"), folder / "features", encoder)


def test_every_result_of_bags_that_the_encoder_has_seen_is_marked(leaking, tmp_path, capsys):
    sentence = "leakage: 4 of 6 held-out bags were seen in training of their encoder: 4 with the same content"
    assert cli.main(["mil", "fit", str(leaking), "--out", str(tmp_path / "run"), "--folds", "2", "--epochs", "1"]) == 0
    printed = capsys.readouterr()
    assert sentence[1:] in re.sub(r"\s+", " ", printed.out) and sentence in printed.err
    run = tmp_path / "run"
    for name in ("metrics.json", "audit.json", "provenance.json"):
        assert read_json(run / name)["leakage"][0].startswith(sentence), name
    assert (run / "report.html").read_text().split("The numbers")[0].count(sentence) == 1
    (run / "report.html").unlink()
    write_report(ReportConfig(str(run)))  # drawn again
    assert sentence in (run / "report.html").read_text()
    assert {row["bag_id"] for row in rows_of(run / "predictions.csv") if row["seen"] == "encoder"} == {
        "i0", "i1", "i2", "i3"
    }  # fmt: skip
    again = evaluate_bags(MILEvaluateConfig(str(run), out=str(tmp_path / "scores.json")))
    assert again["leakage"][0].startswith(sentence) and read_json(tmp_path / "scores.json")["leakage"]
    shutil.copy(run / "predictions.csv", tmp_path / "alone.csv")  # even away from its run
    assert "4 of 6 held-out bags" in evaluate_bags(MILEvaluateConfig(str(tmp_path / "alone.csv")))["leakage"][0]


def test_it_is_an_error_where_the_user_says_so(leaking, tmp_path):
    with pytest.raises(MedclError, match=r"leakage: 4 of 6 .*--allow_leakage"):
        fit(config(leaking, tmp_path / "run", **FIT, allow_leakage=False))
    assert not (tmp_path / "run").exists()


def test_new_bags_told_by_a_classifier_are_compared_with_all_it_knows(encoder, leaking, tmp_path):
    """Image 0 is known to the encoder, image 4 to the classifier alone, 7 to neither; groups have new names."""
    run = fit(config(leaking, tmp_path / "run", **FIT))
    source = pictures(tmp_path / "new", 8, group="new")
    rows = [row for row in rows_of(source) if row["bag_id"] in ("i0", "i4", "i7")]
    write_rows(source, [{**row, "bag_id": f"x{row['bag_id'][1:]}"} for row in rows])
    new = prepared(source, tmp_path / "features", encoder)
    told = predict_bags(MILPredictConfig(str(run), str(new), str(tmp_path / "told")))
    assert {row["bag_id"]: row["seen"] for row in rows_of(told / "predictions.csv")} == {
        "x0": "yes", "x4": "yes", "x7": ""
    }  # fmt: skip
    told_by = [line.split(":")[1] for line in BagAudit.load(told).leakage]
    assert told_by == [
        " 1 of 3 held-out bags were seen in training of their encoder",
        " 2 of 3 held-out bags were seen in training of the classifier",
    ]
    assert len(evaluate_bags(MILEvaluateConfig(str(told)))["leakage"]) == 2
    assert "of the classifier" in write_prediction_report(told).read_text()
    with pytest.raises(MedclError, match="leakage"):
        predict_bags(MILPredictConfig(str(run), str(new), str(tmp_path / "no"), allow_leakage=False))
    (run / "weights" / "seen.json").unlink()  # as of a run made before
    older = BagAudit.load(predict_bags(MILPredictConfig(str(run), str(new), str(tmp_path / "older"))))
    assert len(older.leakage) == 1 and "fitted before" in " ".join(older.gaps)


def test_other_images_of_the_same_patients_are_seen_and_strangers_are_not(encoder, tmp_path, capsys):
    same = load(prepared(pictures(tmp_path / "same", 4, first=100, group="g10"), tmp_path / "f0", encoder))
    assert audit_bags(same.bags, same.features) == BagAudit(subjects=audit_bags(same.bags, same.features).subjects)
    source = pictures(tmp_path / "patients", 4, first=200)
    write_rows(source, [{**row, "group": f"g{n}"} for n, row in enumerate(rows_of(source))])
    folder = prepared(source, tmp_path / "f1", encoder)
    assert "4 of 4 held-out bags were seen in training of their encoder: 4 with the same group" in (
        audit_bags(load(folder).bags, load(folder).features).leakage[0]
    )
    clean = fit(config(tmp_path / "f0", tmp_path / "run", **FIT))
    print_scores(read_json(clean / "metrics.json"))
    write_report(ReportConfig(str(clean)))
    assert "eakage" not in capsys.readouterr().out
    body = (clean / "report.html").read_text().split("How it was made")[0]
    assert "eakage" not in body and "not compared" not in body
    # groups that only the reference knows
    reference = tmp_path / "reference.csv"
    write_rows(reference, [{"bag_id": b.id, "path": "x", "label": b.label, "group": "g1"} if b.id == "i100" else
                           {"bag_id": b.id, "path": b.id, "label": b.label, "group": b.group} for b in same.bags])
    late = evaluate_bags(MILEvaluateConfig(str(clean), str(reference)))
    assert "1 of 4 held-out bags, such as i100, are of groups seen in training" in late["leakage"][0]


def test_the_same_content_under_two_groups_is_told(tmp_path):
    source = pictures(tmp_path / "images", 4)
    shutil.copy(tmp_path / "images" / "i0.png", tmp_path / "images" / "i3.png")
    loaded = load(prepared(source, tmp_path / "features", "resnet18"))
    found = audit_bags(loaded.bags, loaded.features)
    assert "2 of 4 held-out bags were seen under another group: 2 with the same content" in found.leakage[0]
    assert found.seen == {"i0": "group", "i3": "group"} and not found.gaps  # random weights have seen nothing


def test_what_is_not_known_is_told_and_old_files_still_open(encoder, tmp_path, capsys):
    foreign = load(prepared(pictures(tmp_path / "images", 4), tmp_path / "foreign", "torch.nn:Flatten"))
    assert "torch.nn:Flatten was trained on is not known" in audit_bags(foreign.bags, foreign.features).gaps[0]
    bare = fit(config(write_set(tmp_path / "bare", 12, 6), tmp_path / "run", **FIT))  # as other tools write features
    metrics = read_json(bare / "metrics.json")
    assert not metrics["leakage"] and len(metrics["gaps"]) == 2
    for name in ("leakage", "gaps"):
        metrics.pop(name)
    write_json(bare / "metrics.json", metrics)  # as of a run made before
    (bare / "audit.json").unlink()
    print_scores(metrics)
    assert "Nothing says what the encoder of these bags has seen" in capsys.readouterr().out
    write_report(ReportConfig(str(bare)))
    assert "nothing says what the encoder" in (bare / "report.html").read_text()
    assert "nothing says" in evaluate_bags(MILEvaluateConfig(str(bare)))["gaps"][0]
    with pytest.raises(TypeError):
        score([], ["a", "b"])  # type: ignore[call-arg]
    old = tmp_path / "old"
    shutil.copytree(encoder, old)
    (old / "weights" / "seen.json").unlink()
    seen = seen_by(old)
    assert {v.subject for v in seen.volumes} == {subject_hash(f"g{n}") for n in range(4)} and len(seen.gaps) == 1


def test_features_of_before_get_their_marks_without_being_extracted_anew(encoder, tmp_path, monkeypatch):
    source = pictures(tmp_path / "images", 2)
    folder = prepared(source, tmp_path / "features", encoder)
    path = folder / "features" / "i0.h5"
    before = read_features(path)
    content = before.meta.pop("content")
    write_features(path, before)
    shutil.rmtree(folder / "encoder")
    assert encoder_of(load(folder).features, load(folder).bags).gaps
    monkeypatch.setattr("medcl.mil.prepare.encode", lambda *a: pytest.fail("extracted anew"))
    prepared(source, tmp_path / "features", encoder)
    after = read_features(path)
    assert after.meta["content"] == content and np.array_equal(after.h, before.h)
    assert len(encoder_of(load(folder).features, load(folder).bags).volumes) == 4


def test_volumes_are_told_by_their_voxels_and_by_their_picture_whatever_the_name(tmp_path):
    rng = np.random.default_rng(0)
    scans = [np.cumsum(rng.normal(size=(30, 28, 26)), axis=n % 3).astype(np.float32) for n in range(4)]
    stranger = np.cumsum(rng.normal(size=(30, 28, 26)), axis=1).astype(np.float32)
    changed = [scans[0], scans[1][::-1], 3 * scans[2] + 5, stranger]  # a copy, mirrored, rescaled
    seen = [SeenVolume(s.voxels, s.values, subject_hash(f"sub{n}"), "pretraining", "voco", lambda s=s: s.thumbnail)
            for n, s in enumerate(map(sign, scans))]  # fmt: skip
    run = tmp_path / "voco"
    save_seen(run, Seen(tuple(seen)))
    out = tmp_path / "features"
    record_encoder(out, str(run), "unet:abc:mean-max")
    told = []
    for number, scan in enumerate(changed):
        path = out / "features" / f"v{number}.h5"
        write_features(path, Features(np.ones((2, 3), np.float32), None, "unet:abc:mean-max:cells-4x4x4",
                                      volume_marks(scan)))  # fmt: skip
        told.append(Bag(f"v{number}", path, "a", f"p{number}"))
    found = audit_bags(told, [read_features(bag.path) for bag in told])
    assert {each["case"]: each["kind"] for each in found.overlaps} == {"v0": "exact", "v1": "exact", "v2": "alike"}
    assert not found.gaps
    other = [Features(each.h, None, "unet:abd:mean-max", each.meta) for each in (read_features(b.path) for b in told)]
    assert encoder_of(other, told).gaps  # what is kept is of another encoder


def test_subjects_that_chose_a_network_s_weights_count_as_seen(tmp_path):
    run, given = tmp_path / "fine", ("fine-tuning", "selection")
    volumes = tuple(SeenVolume(subject=subject_hash(stage), stage=stage, run="fine") for stage in given)
    save_seen(run, Seen(volumes))
    record_encoder(tmp_path / "out", str(run), "unet:abc")
    kept = seen_by(tmp_path / "out" / "encoder").volumes
    assert [(v.subject, v.stage) for v in kept] == [(subject_hash(stage), stage) for stage in given]
    held = Seen((SeenVolume(subject=subject_hash("selection"), name="bag"),))
    assert "validated on" in compared(Seen(kept), held)["sentence"]
