"""No route to a result goes past the check: folders of predictions, validation subjects, older results."""

from __future__ import annotations

import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from fake_runs import make_data, make_run
from small_runs import finetuning, pretraining

import medcl
from medcl import AuditConfig, EvaluateConfig, PredictConfig, cli
from medcl.dataset.phantom import write_phantoms
from medcl.dataset.splits import make_split
from medcl.errors import MedclError
from medcl.evaluation.compare import compare, print_comparison
from medcl.evaluation.evaluate import notices, print_table
from medcl.leakage.audit import overlaps
from medcl.leakage.seen import FINE_TUNING, SELECTION, Seen, seen_by, seen_in
from medcl.report.html import write_comparison_report, write_run_report
from medcl.store.stage import load_source


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, phantoms):
    """A fine-tuned run, its split, and its label maps of everybody in its folder."""
    folder = tmp_path_factory.mktemp("checked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(tmp_path_factory.getbasetemp() / "checked-store"))
        run = medcl.finetune(finetuning(phantoms, folder / "run", width=4, steps=2))
        medcl.predict(PredictConfig(str(run), str(phantoms), str(folder / "out")))
    return run, json.loads((run / "split.json").read_text()), folder / "out"


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEDCL_STORE", str(tmp_path_factory.getbasetemp() / "checked-store"))


def kept(out, folder, subjects):
    """The label maps of some subjects, as they were predicted."""
    folder.mkdir()
    for subject in subjects:
        shutil.copy(next(out.glob(f"*{subject}*")), folder)
    return folder


# --- folders of predictions -------------------------------------------------------------------------------------------


def test_predictions_of_everybody_are_refused_then_marked(tuned, phantoms, tmp_path):
    _, split, out = tuned
    config = EvaluateConfig(str(out), str(phantoms), out=str(tmp_path / "scores"))
    with pytest.raises(MedclError, match=r"2 of 12 held-out volumes were seen in training.*--allow_leakage") as error:
        medcl.evaluate(config)
    assert "1 of 12 held-out volumes were validated on to choose the weights" in str(error.value)
    assert not (tmp_path / "scores").exists()
    result = medcl.evaluate(EvaluateConfig(str(out), str(phantoms), out=str(tmp_path / "scores"), allow_leakage=True))
    (line,) = result["leakage"]
    assert line.startswith("leakage: 2 of 12") and line in notices(result)
    told = {each["case"]: each["selection"] for each in result["audit"]["overlaps"]}
    assert {case.split(".")[0] for case in told} == {*split["labelled"], *split["val"]}
    assert [case for case, chosen in told.items() if chosen] == split["val"]


def test_predictions_of_test_subjects_and_of_strangers_are_clean(tuned, phantoms, tmp_path):
    run, split, out = tuned
    held = kept(out, tmp_path / "held", split["test"])
    assert medcl.evaluate(EvaluateConfig(str(held), str(phantoms)))["leakage"] == []
    strangers = write_phantoms(tmp_path / "strangers", 2, seed=77, shape=(28, 24, 24))
    for image in sorted((strangers / "imagesTr").iterdir()):  # other people with names of their own
        image.rename(image.with_name("new_" + image.name))
    for label in sorted((strangers / "labelsTr").iterdir()):
        label.rename(label.with_name("new_" + label.name))
    (strangers / "dataset.json").unlink()
    there = medcl.predict(PredictConfig(str(run), str(strangers), str(tmp_path / "there")))
    result = medcl.evaluate(EvaluateConfig(str(there), str(strangers)))
    assert result["leakage"] == [] and result["audit"]["gaps"] == []


@pytest.mark.parametrize("how", ["resaved", "moved"])
def test_what_is_not_known_is_no_clean_result(tuned, phantoms, tmp_path, how, capsys):
    run, split, out = tuned
    held = kept(out, tmp_path / "held", split["test"])
    if how == "resaved":  # by whatever drops the comment
        for path in held.iterdir():
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), path)
        told = "nothing is known of what made 3 predictions"
    else:
        copy = tmp_path / "gone"
        shutil.copytree(run, copy)
        held = medcl.predict(PredictConfig(str(copy), str(phantoms), str(tmp_path / "its"), subjects="test"))
        shutil.rmtree(copy)
        told = "gone, which made 3 predictions"
    result = medcl.evaluate(EvaluateConfig(str(held), str(phantoms)))
    assert result["leakage"] is None and told in result["audit"]["gaps"][0]
    print_table(result)
    assert told in capsys.readouterr().out.replace("\n", " ")


def test_each_label_map_is_checked_against_the_run_that_made_it(tuned, phantoms, tmp_path):
    """As of the folds of a cross-validation in one folder: what one has trained on, another may be scored on."""
    _, split, out = tuned
    other = medcl.finetune(finetuning(phantoms, tmp_path / "other", width=4, steps=1, split_seed=1, draw=1))
    theirs = json.loads((other / "split.json").read_text())
    seen = {*theirs["labelled"], *theirs["val"]}
    mine = [subject for subject in (*split["labelled"], *split["val"]) if subject not in seen]
    assert mine
    folder = kept(out, tmp_path / "folds", split["test"])
    everybody = medcl.predict(PredictConfig(str(other), str(phantoms), str(tmp_path / "all")))
    for subject in mine:
        shutil.copy(next(everybody.glob(f"*{subject}*")), folder)
    assert medcl.evaluate(EvaluateConfig(str(folder), str(phantoms)))["leakage"] == []
    shutil.copy(next(out.glob(f"*{mine[0]}*")), folder)
    with pytest.raises(MedclError, match="leakage: 1 of"):
        medcl.evaluate(EvaluateConfig(str(folder), str(phantoms)))


# --- validation subjects ----------------------------------------------------------------------------------------------


def test_validation_volumes_are_recorded_and_no_leakage_of_their_own_run(tuned):
    run, split, _ = tuned
    seen = seen_by(run)
    assert sum(volume.stage == SELECTION for volume in seen.volumes) == len(split["val"]) == 1
    assert not medcl.audit(AuditConfig(str(run), str(run)))["overlaps"]
    result = medcl.evaluate(EvaluateConfig(str(run), subjects="val"))
    assert result["leakage"] == [] and any("chosen by their scores" in line for line in notices(result))
    assert medcl.evaluate(EvaluateConfig(str(run)))["leakage"] == []


def test_a_run_goes_on_from_another_of_its_split_and_not_where_its_choice_is_tested_on(tuned, phantoms, tmp_path):
    run, split, _ = tuned
    again = medcl.finetune(finetuning(phantoms, tmp_path / "again", init=str(run), steps=1))
    assert json.loads((again / "audit.json").read_text())["overlaps"] == []
    pre = medcl.pretrain(pretraining(phantoms, tmp_path / "pre", init=str(run), steps=1))
    assert sum(volume.stage == SELECTION for volume in seen_by(pre).volumes) == 1  # through a pretraining
    other = next(seed for seed in range(1, 99) if who_tests(phantoms, seed) >= set(split["val"])
                 and not who_tests(phantoms, seed) & set(split["labelled"]))  # fmt: skip
    config = finetuning(phantoms, tmp_path / "x", init=str(run), steps=1, split_seed=other)
    with pytest.raises(MedclError, match=r"1 of \d held-out volumes were validated on.*seen as validation run"):
        medcl.finetune(config)


def who_tests(phantoms, seed):
    return set(make_split(load_source(str(phantoms)), seed=seed).test)


def test_what_was_trained_on_is_told_before_what_was_validated_on(phantoms):
    manifest = load_source(str(phantoms))
    one, two = manifest.cases[:2]
    seen = seen_in(manifest, [one, two], SELECTION, "a") + seen_in(manifest, [one], FINE_TUNING, "b")
    seen = Seen(tuple(dataclasses.replace(volume, name="") for volume in seen.volumes))  # as it is read from a run
    found = {each.case: each for each in reversed(overlaps(seen, seen_in(manifest, [one, two])))}
    assert (found[one.id].seen, found[one.id].selection) == ("fine-tuning b", False)
    assert (found[two.id].seen, found[two.id].selection) == ("validation a", True)
    (left,) = overlaps(seen, seen_in(manifest, [one, two], SELECTION))  # validated on again
    assert left.case == one.id and left.seen == "fine-tuning b"
    assert overlaps(Seen(), seen_in(manifest, [one])) == []


def test_of_an_older_run_the_split_says_whom_it_chose_its_weights_by(tuned, phantoms, tmp_path):
    run, split, _ = tuned
    old = tmp_path / "old"
    shutil.copytree(run, old)
    path = old / "weights" / "seen.json"
    record = json.loads(path.read_text())
    del record[SELECTION]
    record["volumes"] = [each for each in record["volumes"] if each["stage"] != SELECTION]
    path.write_text(json.dumps(record))
    seen = seen_by(old)
    assert [volume.stage for volume in seen.volumes].count(SELECTION) == 1
    assert any("before medcl recorded validation volumes" in gap for gap in seen.gaps)
    manifest = load_source(str(phantoms))
    held = [case for case in manifest.cases if case.subject in split["val"]]
    (found,) = overlaps(seen, seen_in(manifest, held))
    assert found.kind == "subject" and found.selection
    (old / "split.json").unlink()
    assert any("whom it chose its weights by is not known" in gap for gap in seen_by(old).gaps)


# --- what is printed and drawn ----------------------------------------------------------------------------------------


def test_older_results_open_with_a_note_that_they_were_not_checked(tmp_path, capsys):
    manifest = make_data(tmp_path / "data", ("a", "b", "c"))
    runs = [make_run(tmp_path / name, manifest, good=good) for name, good in (("one", 0.9), ("two", 0.5))]
    for run in runs:
        path = run / "test" / "evaluation.json"
        result = json.loads(path.read_text())
        assert result["leakage"] is None  # scored past the stage, and so told to be unchecked
        result["leakage"] = []
        del result["audit"]  # as written before
        path.write_text(json.dumps(result))
    note = "no check for leakage stands in this result"
    assert note in write_run_report(runs[0]).read_text()
    told = compare(runs[:1], runs[1:], tmp_path / "out")
    assert told["leakage"] == [] and any(note in line for line in told["unchecked"])
    print_comparison(told)
    assert note in capsys.readouterr().out
    assert note in write_comparison_report(tmp_path / "out", told, runs[:1], runs[1:]).read_text()
    (runs[0] / "test" / "evaluation.json").unlink()  # numbers without their check are not drawn
    page = write_run_report(runs[0]).read_text()
    assert "Best:" not in page and "Dice" not in page.split("</h1>")[1].split("How it was made")[0]


def test_the_command_refuses_in_one_line(tuned, phantoms, capsys):
    _, _, out = tuned
    assert cli.main(["evaluate", str(out), str(phantoms)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medcl: error")]
    assert "leakage: 2 of 12" in line and "--allow_leakage" in line
