"""What scan tells: the table of a folder, problems of one kind in one line, questions first."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from medcl.dataset.case import Manifest, Problem
from medcl.dataset.scan import print_summary, scan, summary_dict
from medcl.dataset.summary import grouped
from medcl.errors import MedclError
from medcl.store.stage import confirm


def write(path: Path, seed: int, shape: tuple[int, ...] = (6, 7, 8)) -> None:
    path.parent.mkdir(exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 400, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, 2.5, 1])), path)


def printed(manifest: Manifest) -> str:
    stream = io.StringIO()
    print_summary(manifest, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_summary_tells_what_a_person_wants_to_know(tmp_path):
    write(tmp_path / "images/s1.nii", 0)
    (tmp_path / "labels").mkdir()
    nib.save(nib.Nifti1Image((np.arange(6 * 7 * 8) % 3).reshape(6, 7, 8).astype("u1"), np.diag([1, 1, 2.5, 1])),
             tmp_path / "labels/s1.nii")  # fmt: skip
    write(tmp_path / "images/s2_b.nii", 1, (8, 7, 8))
    for number in range(25):
        (tmp_path / f"images/empty[{number}].nii").touch()
    manifest = scan(tmp_path)
    text = printed(manifest)
    for words in ("2 of 2 subjects", "1 labelled, 1 without", "RAS 2", "6 x 7 x 8", "8 x 7 x 8", "2.5 mm", "by names"):
        assert words in text
    assert text.count("0 bytes") == 1 and "empty[0]" in text and "(24 more files likewise)" in text
    facts = json.loads(json.dumps(summary_dict(manifest)))
    assert (facts["cases"], facts["subjects"], facts["labelled"], facts["set_aside"]) == (2, 2, 1, 25)
    assert facts["shape"] == {"min": [6, 7, 8], "median": [7, 7, 8], "max": [8, 7, 8]} and len(facts["problems"]) == 25


def test_problems_of_one_kind_are_one_line():
    def constant(number: int) -> Problem:
        return Problem(f"a/s{number}.nii", f"the volume is constant: every voxel is {number}", "Leave it out.")

    other = Problem("a/s9.nii", "the file is empty (0 bytes)", "Leave it out.")
    lines = [line for _, line in grouped([constant(0), other, constant(1), constant(2)])]
    assert lines == [f"{constant(0)} (2 more files likewise)", str(other)]
    assert [line for _, line in grouped([constant(0), constant(1)])] == [str(constant(0)), str(constant(1))]


def test_a_question_is_shown_first_and_closes_the_folder_until_it_is_answered(tmp_path):
    write(tmp_path / "s1.nii", 0)
    question = Problem("s1.nii", "may be somebody else", "Say so in a table.", aside=False, question=True)
    asked = replace(scan(tmp_path), problems=(question,))
    assert "1 question," in printed(asked) and summary_dict(asked)["questions"][0]["file"] == "s1.nii"
    asked.save(tmp_path / "asked.json")
    loaded = Manifest.load(tmp_path / "asked.json")
    with pytest.raises(MedclError, match=r"may be somebody else.*--yes"):
        confirm(loaded, "a folder", yes=False)
    taken = confirm(loaded, "a folder", yes=True)
    assert taken.questions == () and taken.problems[0].what == question.what
    assert confirm(taken, "a folder", yes=False) == taken


def test_a_folder_of_nothing_but_bad_files_is_told_too(tmp_path):
    (tmp_path / "empty.nii").touch()
    manifest = scan(tmp_path)
    assert manifest.cases == () and "0 of 0 subjects" in printed(manifest) and "empty.nii" in printed(manifest)
