"""Planted overlaps are found, each kind alone; strangers are not; leakage is refused, and marked where allowed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import zoom

import medcl
from medcl import AuditConfig, CompareConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, cli
from medcl.dataset.phantom import make_subject
from medcl.errors import MedclError
from medcl.leakage.audit import overlaps
from medcl.leakage.matched import remembered
from medcl.leakage.matching import THRESHOLD, scores
from medcl.leakage.seen import Seen, seen_by, seen_in
from medcl.store.signature import thumbnail
from medcl.store.stage import load_source

COUNT = 14


@pytest.fixture(scope="module")
def volumes():
    return [np.asarray(make_subject((7, i), shape=(44, 38, 36)).image) for i in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(volumes):
    return [thumbnail(volume) for volume in volumes]


def cropped(volume, low=0.1, high=0.1):
    return volume[tuple(slice(round(low * n), n - round(high * n)) for n in volume.shape)]


def respaced(volume, factor):
    return zoom(volume, [round(n / factor) / n for n in volume.shape], order=1)


PLANTED = {
    "scaled": lambda v: 37 * v + 1000,
    "rounded": lambda v: np.rint(v / v.max() * 255).astype(np.uint8),
    "gamma": lambda v: (v / v.max()) ** 0.7,
    "finer": lambda v: respaced(v, 0.7),
    "coarser": lambda v: respaced(v, 1.4),
    "cropped": cropped,
    "cropped on one side": lambda v: cropped(v, 0.1, 0.0),
    "cropped unevenly": lambda v: cropped(v, 0.03, 0.08),
    "flipped": lambda v: v[::-1, :, ::-1],
    "permuted": lambda v: v.transpose(2, 0, 1),
    "all": lambda v: 3 * respaced(cropped(v), 1.4).transpose(1, 2, 0)[::-1] - 5,
}


@pytest.mark.parametrize("way", ["new", "known"])
@pytest.mark.parametrize("kind", PLANTED)
def test_every_planted_overlap_scores_far_above_strangers(volumes, pictures, kind, way):
    chosen = range(0, COUNT, 3)
    planted = [thumbnail(PLANTED[kind](volumes[i])) for i in chosen]
    others = [pictures[i] for i in range(COUNT) if i not in chosen]
    if way == "new":
        found = scores(pictures, planted)
        hits = [match for match in found if match.known == chosen[match.new]]
    else:
        found = scores(planted + others, [pictures[i] for i in chosen])
        hits = [match for match in found if match.known == match.new]
    assert len(hits) == len(chosen)
    assert min(match.score for match in hits) > THRESHOLD + 0.03
    assert max([match.score for match in found if match not in hits], default=0) < THRESHOLD - 0.03


def test_strangers_are_below_the_threshold(pictures):
    for match in scores(pictures, pictures):
        assert match.score > 0.99 if match.known == match.new else match.score < THRESHOLD - 0.03


def test_a_constant_volume_matches_nothing(pictures):
    flat = np.zeros((24, 24, 24), np.uint8)
    assert not [match for match in scores([flat, *pictures], [flat]) if match.score >= THRESHOLD]


def manifest_of(phantoms):
    return load_source(str(phantoms))


def copy_one(phantoms, folder, name="stranger", change=None, scaled=True):
    """A folder that holds the first phantom under another name."""
    manifest = manifest_of(phantoms)
    image = nib.load(manifest.image_paths(manifest.cases[0])[0])
    array = np.asarray(image.dataobj, np.float32)
    array = change(array) if change else array
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array), np.diag([2.0, 3, 4, 1])), folder / f"{name}.nii.gz")
    return manifest.cases[0]


@pytest.mark.parametrize(
    "kind,change",
    [
        ("exact", None),  # another header, voxel type and compression
        ("exact", lambda v: v[::-1].transpose(1, 0, 2)),
        ("alike", lambda v: 5 * v + 7),
        ("alike", lambda v: cropped(v)),
    ],
)
def test_the_audit_of_folders_tells_kind_and_names(phantoms, tmp_path, kind, change, capsys):
    case = copy_one(phantoms, tmp_path / "test", change=change)
    out = tmp_path / "audit.json"
    assert cli.main(["audit", str(phantoms), str(tmp_path / "test"), "--out", str(out)]) == cli.OVERLAP == 3
    shown = capsys.readouterr().out
    assert "1 of 1 held-out volumes were seen" in shown and case.id in shown
    (overlap,) = json.loads(out.read_text())["overlaps"]
    assert (overlap["kind"], overlap["case"], overlap["seen"]) == (kind, "stranger", case.id)


def test_strangers_pass_the_audit(phantoms, tmp_path, volumes, capsys):
    nib.save(nib.Nifti1Image(volumes[3], np.eye(4)), tmp_path / "someone.nii.gz")
    assert cli.main(["audit", str(phantoms), str(tmp_path)]) == 0
    assert "No overlap: none of 1 held-out volumes is among the 12 seen" in capsys.readouterr().out


def test_another_volume_of_a_subject_is_told(phantoms, volumes, tmp_path):
    subject = manifest_of(phantoms).subjects[2]
    nib.save(nib.Nifti1Image(volumes[5], np.eye(4)), tmp_path / f"{subject}.nii.gz")
    (overlap,) = medcl.audit(AuditConfig(str(phantoms), str(tmp_path)))["overlaps"]
    assert (overlap["kind"], overlap["case"]) == ("subject", subject)


def test_a_plain_copy_under_another_subject_is_an_overlap_of_its_folder(phantoms, tmp_path, capsys):
    """A scan sets one of the two aside, and the audit has to tell them all the same."""
    folder = tmp_path / "scans"
    shutil.copytree(phantoms / "imagesTr", folder)
    one, *_ = sorted(folder.glob("*.nii.gz"))
    shutil.copy(one, folder / "stranger.nii.gz")
    assert cli.main(["audit", str(folder), str(folder), "--store", str(tmp_path / "store"), "--workers", "2"]) == 3
    told = capsys.readouterr().out
    assert "stranger.nii.gz" in told and one.name in told and "1 of" in told
    (folder / "stranger.nii.gz").unlink()
    assert cli.main(["audit", str(folder), str(folder), "--store", str(tmp_path / "store")]) == 0


def test_a_folder_against_itself_tells_only_what_goes_under_two_names(phantoms, tmp_path):
    shutil.copytree(phantoms / "imagesTr", tmp_path / "scans")
    assert not medcl.audit(AuditConfig(str(tmp_path / "scans"), str(tmp_path / "scans")))["overlaps"]
    copy_one(phantoms, tmp_path / "scans", change=lambda v: 2 * v)
    found = medcl.audit(AuditConfig(str(tmp_path / "scans"), str(tmp_path / "scans")))["overlaps"]
    assert len(found) == 2 and {each["kind"] for each in found} == {"alike"}


FRAMES = 6  # one more than the known volumes that a new one is aligned with


def frames_of(volume, seed):
    """Volumes of one person that look more like each other than like a cropped copy: the same, with fresh noise."""
    rng = np.random.default_rng(seed)
    return [np.asarray(volume + rng.normal(0, 0.01 * volume.max(), volume.shape), np.float32) for _ in range(FRAMES)]


def save_frames(folder, who, frames):
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        nib.save(nib.Nifti1Image(frame, np.eye(4)), folder / f"{who}_frame{number:02}.nii.gz")


def audited(first, second):
    """Who was found alike to whom, by the names before the frame, and how many held-out volumes that concerns."""
    found = medcl.audit(AuditConfig(str(first), str(second), workers=1))["overlaps"]
    assert {each["kind"] for each in found} == {"alike"}
    pairs = {(each["case"].split("_")[0], each["seen"].split("_")[0]) for each in found}
    return pairs, len({each["case"] for each in found})


def test_copies_are_found_behind_the_many_frames_of_their_own_subjects(volumes, tmp_path):
    for i in range(2):
        save_frames(tmp_path / "scans", f"p{i}", frames_of(volumes[i], seed=i))
    save_frames(tmp_path / "scans", "copy", [3 * cropped(frame) + 5 for frame in frames_of(volumes[0], seed=0)])
    assert audited(tmp_path / "scans", tmp_path / "scans") == ({("p0", "copy"), ("copy", "p0")}, 2 * FRAMES)


def test_a_copy_under_the_same_subject_id_of_another_folder_is_told(volumes, tmp_path):
    save_frames(tmp_path / "one", "p0", frames_of(volumes[0], seed=0))
    save_frames(tmp_path / "two", "p0", [3 * cropped(frame) + 5 for frame in frames_of(volumes[0], seed=0)])
    assert audited(tmp_path / "one", tmp_path / "two") == ({("p0", "p0")}, FRAMES)


def test_equal_pictures_of_one_owner_are_not_compared_and_of_two_are(pictures, tmp_path):
    known = [pictures[0], pictures[0], pictures[1]]
    alike = [(match.known, match.new) for match in remembered(known, known, tmp_path, ["a", "b", "b"], ["a", "b", "b"])]
    assert alike == [(1, 0), (0, 1)]
    everyone = remembered(known, known, tmp_path)  # the store keeps the answers to the two questions apart
    assert {(match.known, match.new) for match in everyone} == {(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)}
    assert not remembered(known, known, tmp_path, ["a"] * 3, ["a"] * 3)


# --- stages -----------------------------------------------------------------------------------------------------------

SMALL = {"hidden": 16, "embedding": 8, "size": [16, 16, 16]}


def pretraining(source, out, **more) -> PretrainConfig:
    return PretrainConfig(str(source), str(out), **{"steps": 2, "batch_size": 2, "width": 4, "options": SMALL, **more})


def finetuning(source, out, **more) -> FinetuneConfig:
    return FinetuneConfig(str(source), str(out), **{"steps": 2, "batch_size": 2, "labels": "2", "val_every": 2, **more})


@pytest.fixture(scope="module")
def leaky(tmp_path_factory, phantoms, runs):
    """A chain: the first encoder saw a rescaled, flipped copy of a test subject under a stranger's name."""
    folder = tmp_path_factory.mktemp("leaky")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(folder / "store"))
        clean, fine = folder / "clean", folder / "fine"
        shutil.copytree(runs / "pre", clean)
        shutil.copytree(runs / "fine", fine)
        test = json.loads((fine / "split.json").read_text())["test"][0]
        manifest = manifest_of(phantoms)
        case = next(case for case in manifest.cases if case.subject == test)
        scans = folder / "scans"
        scans.mkdir()
        for i in range(3):
            nib.save(nib.Nifti1Image(make_subject((9, i), shape=(28, 24, 24)).image, np.eye(4)), scans / f"o{i}.nii.gz")
        image = nib.load(manifest.image_paths(case)[0])
        nib.save(
            nib.Nifti1Image(9 * np.asarray(image.dataobj, np.float32)[::-1] + 4, image.affine), scans / "leak.nii.gz"
        )
        medcl.pretrain(pretraining(scans, folder / "first", plan=str(clean)))
        medcl.pretrain(pretraining(phantoms, folder / "second", init=str(folder / "first")))
    return folder, case.id


def test_a_clean_run_is_neither_refused_nor_marked(leaky, monkeypatch):
    folder, _ = leaky
    monkeypatch.setenv("MEDCL_STORE", str(folder / "store"))
    assert json.loads((folder / "fine" / "audit.json").read_text())["overlaps"] == []
    assert "leakage" not in json.loads((folder / "fine" / "provenance.json").read_text())
    assert medcl.evaluate(EvaluateConfig(str(folder / "fine")))["leakage"] == []
    result = medcl.audit(AuditConfig(str(folder / "fine"), str(folder / "fine")))
    assert result["seen"] == len(seen_by(folder / "clean").volumes) and result["held_out"] == 4


def test_records_hold_no_names(leaky, phantoms):
    folder, _ = leaky
    for file in ("seen.json", "contract.json"):
        text = (folder / "clean" / "weights" / file).read_text()
        assert not any(f'"{subject}"' in text for subject in manifest_of(phantoms).subjects)


def test_leakage_through_a_chain_is_refused_then_marked_on_every_result(leaky, phantoms, tmp_path, monkeypatch):
    folder, case = leaky
    monkeypatch.setenv("MEDCL_STORE", str(folder / "store"))
    shutil.move(folder / "first", tmp_path / "moved")  # the record is whole without it
    config = finetuning(phantoms, tmp_path / "run", init=str(folder / "second"))
    with pytest.raises(MedclError, match=rf"{case}, seen as pretraining first.*--allow_leakage"):
        medcl.finetune(config)
    assert not (tmp_path / "run").exists()
    run = medcl.finetune(dataclasses.replace(config, allow_leakage=True))
    assert case in json.loads((run / "provenance.json").read_text())["leakage"]
    (line,) = medcl.evaluate(EvaluateConfig(str(run)))["leakage"]
    assert line.startswith("leakage: 1 of ") and case in line
    assert cli.main(["report", str(run)]) == 0 and "leakage: 1 of" in (run / "report.html").read_text()
    scratch = medcl.finetune(finetuning(phantoms, tmp_path / "scratch", width=4))
    assert medcl.evaluate(EvaluateConfig(str(scratch)))["leakage"] == []
    told = medcl.compare(CompareConfig([str(run)], [str(scratch)], str(tmp_path / "cmp")))
    assert len(told["leakage"]) == 1 and "pretrained: leakage" in told["leakage"][0]
    assert told["leakage"][0] in told["warnings"]


def test_training_volumes_given_as_test_are_refused_by_evaluate(leaky, phantoms, tmp_path, monkeypatch):
    """The reference holds, under a test subject's name, a volume that was trained on."""
    folder, _ = leaky
    monkeypatch.setenv("MEDCL_STORE", str(folder / "store"))
    split = json.loads((folder / "fine" / "split.json").read_text())
    shutil.copytree(phantoms, tmp_path / "data")
    manifest = manifest_of(tmp_path / "data")
    by_subject = {case.subject: case for case in manifest.cases}
    for sort in ("imagesTr", "labelsTr"):
        source, target = (by_subject[split[part][0]].id for part in ("labelled", "test"))
        image = nib.load(tmp_path / "data" / sort / f"{source}.nii.gz")
        array = np.asarray(image.dataobj) * (2 if sort == "imagesTr" else 1)
        nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "data" / sort / f"{target}.nii.gz")
    config = EvaluateConfig(str(folder / "fine"), str(tmp_path / "data"), out=str(tmp_path / "out"))
    with pytest.raises(MedclError, match=f"such as {target}, seen as"):
        medcl.evaluate(config)
    assert medcl.evaluate(dataclasses.replace(config, allow_leakage=True))["leakage"]


def test_without_thumbnails_hashes_and_subjects_still_compare(leaky, phantoms, tmp_path):
    folder, _ = leaky
    shutil.copytree(folder / "clean", tmp_path / "run")
    (tmp_path / "run" / "weights" / "thumbnails.npz").unlink()
    result = medcl.audit(AuditConfig(str(tmp_path / "run"), str(phantoms)))
    assert {each["kind"] for each in result["overlaps"]} == {"exact"}
    assert len(result["overlaps"]) == len(seen_by(folder / "clean").volumes)
    assert "thumbnails of run were left out" in result["gaps"][0]


def test_an_older_run_is_compared_by_what_its_contract_says(leaky, phantoms, tmp_path):
    folder, _ = leaky
    shutil.copytree(folder / "clean", tmp_path / "old")
    for name in ("seen.json", "thumbnails.npz"):
        (tmp_path / "old" / "weights" / name).unlink()
    contract = json.loads((tmp_path / "old" / "weights" / "contract.json").read_text())
    manifest = manifest_of(phantoms)
    split = json.loads((folder / "clean" / "split.json").read_text())
    contract["subjects"] = split["train"]  # as names, which older runs hold
    (tmp_path / "old" / "weights" / "contract.json").write_text(json.dumps(contract))
    seen = seen_by(tmp_path / "old")
    assert "before medcl kept signatures" in seen.gaps[0]
    found = overlaps(seen, seen_in(manifest, manifest.cases))
    assert {(each.kind, each.case) for each in found} == {
        ("exact", case.id) for case in manifest.cases if case.subject in split["train"]
    }
    contract["volumes"] = []
    (tmp_path / "old" / "weights" / "contract.json").write_text(json.dumps(contract))
    assert {each.kind for each in overlaps(seen_by(tmp_path / "old"), seen_in(manifest, manifest.cases))} == {"subject"}


def test_an_empty_record_overlaps_with_nothing(phantoms):
    manifest = manifest_of(phantoms)
    assert overlaps(Seen(), seen_in(manifest, manifest.cases)) == []


def test_a_run_that_holds_nobody_out_cannot_be_tested_on(leaky, phantoms):
    folder, _ = leaky
    shutil.copytree(folder / "clean", folder / "nobody", dirs_exist_ok=True)
    (folder / "nobody" / "split.json").unlink()
    with pytest.raises(MedclError, match="holds no subject out"):
        medcl.audit(AuditConfig(str(phantoms), str(folder / "nobody")))


def test_thumbnails_are_read_when_asked_for_and_the_older_form_is_understood(leaky, tmp_path):
    folder, _ = leaky
    shutil.copytree(folder / "clean", tmp_path / "run")
    path = tmp_path / "run" / "weights" / "thumbnails.npz"
    pictures = [volume.thumbnail for volume in seen_by(folder / "clean").volumes]
    assert pictures and all(picture.shape == (24, 24, 24) and picture.dtype == np.uint8 for picture in pictures)
    seen = seen_by(tmp_path / "run")
    with open(path, "r+b") as stream:  # within the first thumbnail; the table at the end stays whole
        stream.seek(200)
        stream.write(bytes(64))
    with pytest.raises(MedclError, match="is damaged"):
        _ = [volume.thumbnail for volume in seen.volumes]
    np.savez_compressed(path, rows=np.arange(len(pictures)), pictures=np.stack(pictures))
    for volume, picture in zip(seen_by(tmp_path / "run").volumes, pictures, strict=True):
        np.testing.assert_array_equal(volume.thumbnail, picture)


def test_a_volume_that_cannot_be_read_is_told_and_a_run_without_its_held_out_volumes_refused(
    leaky, phantoms, volumes, tmp_path, capsys
):
    held = tmp_path / "held"
    held.mkdir()
    nib.save(nib.Nifti1Image(volumes[0], np.eye(4)), held / "good.nii.gz")
    broken = np.array(volumes[1], np.float32)
    broken[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(broken, np.eye(4)), held / "broken.nii.gz")
    assert cli.main(["audit", str(phantoms), str(held)]) == 0
    assert "1 of 2 volumes held out or given, such as broken, could not be read" in capsys.readouterr().out
    seen = seen_in(load_source(str(held)), load_source(str(held)).cases, "pretraining")
    assert "broken" not in seen.gaps[0] and "1 of 2 volumes of pretraining" in seen.gaps[0]
