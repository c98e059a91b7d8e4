"""Subjects as alike as inbred animals are not taken for one; their copies are; and the audit says how sure it is."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from inbred import animal, template
from scipy.ndimage import zoom

import medcl
from medcl import AuditConfig, cli
from medcl.errors import MedclError
from medcl.leakage.audit import checked, compared, notes_on, refuse
from medcl.leakage.likeness import Row, Spread
from medcl.leakage.matching import THRESHOLD, scores
from medcl.leakage.overlap import compare
from medcl.leakage.seen import Seen, SeenVolume
from medcl.store.signature import sign

SEEN, HELD = 9, 4


@pytest.fixture(scope="module")
def animals():
    strain = template(0, (36, 34, 32))
    return [animal(strain, i, amplitude=0.4) for i in range(SEEN + HELD)]


@pytest.fixture(scope="module")
def known(animals):
    return [volume_of(array, f"animal{i}") for i, array in enumerate(animals)]


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory):
    """One for the file: the same animals are compared with each other again and again."""
    return str(tmp_path_factory.mktemp("likeness"))


def volume_of(array, name, subject=""):
    one = sign(np.ascontiguousarray(array, np.float32))
    return SeenVolume(one.voxels, one.values, subject or name, picture=lambda: one.thumbnail, name=name)


def cropped(array):
    return array[tuple(slice(round(0.1 * n), n - round(0.1 * n)) for n in array.shape)]


PLANTED = {
    "scaled": lambda v: 37 * v + 1000,
    "rounded": lambda v: np.rint(v / v.max() * 255),
    "gamma": lambda v: (v / v.max()) ** 0.7,
    "finer": lambda v: zoom(v, 1.4, order=1),
    "cropped": cropped,
    "cropped, permuted, scaled": lambda v: 3 * cropped(v).transpose(1, 2, 0)[::-1] - 5,
}


def audited(seen, held, store, within=False):
    result = compare(Seen(tuple(seen)), Seen(tuple(held)), within, store)
    assert {each.kind for each in result.overlaps} <= {"alike"}
    return {(each.case, each.seen) for each in result.overlaps}, {each.case for each in result.similar}


def test_animals_of_one_template_look_alike_and_none_is_called_a_copy(known, store):
    pictures = [volume.thumbnail for volume in known]
    likeness = [match.score for match in scores(pictures, pictures) if match.known != match.new]
    assert 0.88 < np.median(likeness) < max(likeness) < 0.97  # what the threshold alone calls one animal
    for seen, held in ((known[:SEEN], known[SEEN:]), (known[:5], known[5:8]), (known[:2], known[2:5])):
        found, similar = audited(seen, held, store)
        assert not found and len(similar) == len(held)
    found, similar = audited(known[:8], known[:8], store, within=True)
    assert not found and len(similar) == 8


def test_planted_copies_of_animals_stand_out(animals, known, store):
    """One of every animal, each changed in another way."""
    planted = [volume_of(change(animals[i]), f"copy{i}") for i, change in enumerate(PLANTED.values())]
    found, similar = audited(known[:SEEN], [known[SEEN], *planted], store)
    assert found == {(f"copy{i}", f"animal{i}") for i in range(len(PLANTED))}
    assert similar == {known[SEEN].name}


def test_a_copy_of_several_copies_is_found_with_all_of_them(animals, known, store):
    """The next in likeness is a copy too; what must stand apart is the next subject."""
    changes = (lambda v: 2 * v + 3, lambda v: cropped(v), lambda v: (v / v.max()) ** 0.8)
    again = [volume_of(change(animals[i]), f"again{i}") for i in range(5) for change in changes[: 1 + (i == 4)]]
    again += [volume_of(changes[2](animals[4]), "third4")]
    planted = [volume_of(5 * animals[i] - 1, f"copy{i}") for i in (1, 4)]
    found, similar = audited([*known[:5], *again], planted, store)
    assert found == {
        ("copy1", "animal1"), ("copy1", "again1"), ("copy4", "animal4"), ("copy4", "again4"), ("copy4", "third4"),
    }  # fmt: skip
    assert not similar


def test_the_many_volumes_of_one_animal_do_not_hide_the_others(animals, known, store):
    """Its own time points are as alike as copies, and another animal's take all places of the first search."""
    rng = np.random.default_rng(0)
    times = [
        volume_of(animals[i] + rng.normal(0, 0.01, animals[i].shape), f"animal{i}_{t}", f"animal{i}")
        for i in range(4) for t in range(6)
    ]  # fmt: skip
    copies = [volume_of(cropped(animals[2]) * 3, f"copy_{t}", "copy") for t in range(2)]
    found, similar = audited(times, [*known[4:6], *copies], store)
    assert {(case.split("_")[0], seen.split("_")[0]) for case, seen in found} == {("copy", "animal2")}
    assert similar == {volume.name for volume in known[4:6]}


def test_animals_of_two_strains_are_not_taken_for_one_another(known, store):
    """Within a strain all are alike, and far from the other: a step that is no copy."""
    strain = template(1, (36, 34, 32))
    other = [volume_of(animal(strain, i, amplitude=0.4), f"other{i}") for i in range(4)]
    mixed = [*known[:4], *other]
    assert not audited(mixed, mixed, store, within=True)[0]
    assert not audited(mixed[::2], mixed[1::2], store)[0]


def test_with_few_subjects_the_threshold_decides_and_the_result_says_so(known, store):
    result = compared(Seen(tuple(known[:2])), Seen(tuple(known[2:4])), store=store)
    assert len({each["case"] for each in result["overlaps"]}) == 2
    assert result["false_alarms"]["sentence"].startswith("too few subjects")


# --- the rate of false alarms -----------------------------------------------------------------------------------------


def test_the_rate_is_that_of_audits_in_which_each_volume_is_held_out_in_turn(animals, known, store):
    seen = [*known[:7], volume_of(cropped(animals[0]), "again")]
    result = compared(Seen(tuple(seen)), Seen((known[7],)), store=store)
    one_by_one = [bool(audited([v for v in seen if v is not held], [held], store)[0]) for held in seen]
    rate = result["false_alarms"]
    assert (rate["volumes"], rate["pairs"], rate["called"]) == (8, 28, sum(one_by_one)) == (8, 28, 2)
    clean = compared(Seen(tuple(known[:8])), Seen((known[8],)), store=store)["false_alarms"]
    assert clean["called"] == 0 and clean["below"] == pytest.approx(1 - 0.05 ** (1 / 8), abs=1e-3)
    assert "below 31% a volume" in clean["sentence"] and "of 8 volumes" in clean["sentence"]


def test_of_one_folder_the_copies_that_were_found_are_no_false_alarms(animals, known, store):
    folder = Seen((*known[:7], volume_of(cropped(animals[0]), "again")))
    result = compared(folder, folder, True, store)
    assert {each["case"] for each in result["overlaps"]} == {"animal0", "again"}
    assert (result["false_alarms"]["volumes"], result["false_alarms"]["called"]) == (6, 0)


def row(*likeness, subject="new", far=False):
    return Row(subject, {f"{subject}-{i}": score for i, score in enumerate(likeness)}, 20, far)


@pytest.mark.parametrize(
    "likeness,copies",
    [
        ((0.97, 0.93, 0.925, 0.92, 0.91), 1),
        ((0.94, 0.93, 0.925, 0.92, 0.91), 0),
        ((0.999, 0.97, 0.92, 0.91, 0.91), 2),  # two copies, one of them cropped
        ((0.999, 0.998, 0.997, 0.996, 0.996, 0.996, 0.92), 6),  # equal pictures are one
        ((0.87, 0.5), 0),
    ],
)
def test_a_copy_stands_above_a_step(likeness, copies):
    assert Spread().copies(row(*likeness)) == {f"new-{i}" for i in range(copies)}


def test_a_step_may_be_down_to_those_that_were_not_aligned():
    assert Spread().copies(row(0.92, far=True)) == {"new-0"} and Spread().copies(row(0.92)) == set()


def test_a_step_must_be_wider_than_different_subjects_show():
    litters = [row(0.96, 0.90, 0.9, 0.89, 0.89, subject=f"litter{i}") for i in range(30)]  # each with one sibling
    one, copy = row(0.96, 0.9, 0.9, 0.9, 0.9), row(0.999, 0.9, 0.9, 0.9, 0.9)
    assert Spread().copies(one) == {"new-0"}
    assert Spread(tuple(litters)).copies(one) == set() and Spread(tuple(litters)).copies(copy) == {"new-0"}
    few = [row(0.9, 0.89, 0.89, 0.88, 0.88, subject=f"s{i}") for i in range(27)] + litters[:3]
    assert Spread(tuple(few)).copies(one) == {"new-0"}  # a few may be copies of each other


# --- what a person reads ----------------------------------------------------------------------------------------------


def save(folder, arrays, first=0):
    folder.mkdir()
    for number, array in enumerate(arrays):
        nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.eye(4)), folder / f"m{first + number}.nii.gz")
    return str(folder)


def test_eight_animals_pass_and_are_told_and_a_copy_among_them_is_refused(animals, tmp_path, store, capsys):
    seen, held = save(tmp_path / "seen", animals[:5]), save(tmp_path / "held", animals[5:8], first=5)
    out = tmp_path / "audit.json"
    assert cli.main(["audit", seen, held, "--out", str(out), "--store", store]) == 0
    told = capsys.readouterr().out
    assert "3 of 3 held-out volumes look like a seen one, though no more than" in told
    assert "No overlap: none of 3" in told and "false-alarm rate below 45% a volume" in told
    result = json.loads(out.read_text())
    assert result["overlaps"] == [] and {each["kind"] for each in result["similar"]} == {"similar"}
    nib.save(nib.Nifti1Image(cropped(animals[3]) * 2, np.eye(4)), tmp_path / "held" / "x9.nii.gz")
    assert cli.main(["audit", seen, held, "--store", store]) == cli.OVERLAP
    assert "such as x9, seen as m3" in capsys.readouterr().out


def test_what_only_looks_alike_is_not_refused_and_stands_on_the_result(known, store, caplog):
    result = compared(Seen(tuple(known[:5])), Seen(tuple(known[5:8])), store=store)
    with caplog.at_level("INFO", logger="medcl"):
        refuse(result, False, "here")
    assert "whether they are copies was not decided" in caplog.text and "false-alarm rate" in caplog.text
    check = checked([result])
    assert check["leakage"] is None and len(check["similar"]) == len(result["similar"]) > 0
    assert any("look like a seen one" in line for line in notes_on({"leakage": check["leakage"], "audit": check}))


def test_an_audit_of_nothing_is_an_error(animals, tmp_path, store, capsys):
    good = save(tmp_path / "good", animals[:2])
    broken = [np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array) for array in animals[2:4]]
    bad, empty = save(tmp_path / "bad", broken), save(tmp_path / "empty", [])
    for sides in ((empty, good), (good, empty), (bad, good), (good, bad), (bad, bad)):
        assert cli.main(["audit", *sides, "--store", store]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medcl: error")]
        assert "no volumes found" in line or "none of its 2 volumes could be read: there is nothing to compare" in line
    with pytest.raises(MedclError, match="holds one subject, and nobody to compare it with"):
        medcl.audit(AuditConfig(save(tmp_path / "one", animals[:1]), str(tmp_path / "one"), store=store))
    manifest = tmp_path / "manifest.json"
    assert cli.main(["scan", good, "--out", str(manifest)]) == 0
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "cases": []}))
    with pytest.raises(MedclError, match="holds no volume: there is nothing to compare"):
        medcl.audit(AuditConfig(good, str(manifest), store=store))


def test_the_threshold_is_as_it_was():
    assert THRESHOLD == 0.88
