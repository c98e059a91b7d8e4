"""Splits are by subject, nested, and a function of names and seeds alone."""

from __future__ import annotations

import pytest
from conftest import case_for, manifest_for
from hypothesis import given
from hypothesis import strategies as st

from medcl.dataset.splits import Split, cases_of, draw_labelled, make_split, ranked
from medcl.errors import MedclError


def people(n: int, frames: int = 1, labelled: int | None = None):
    labelled = n if labelled is None else labelled
    return manifest_for(
        case_for(f"p{i:03d}_f{f}", subject=f"p{i:03d}", label=i < labelled) for i in range(n) for f in range(frames)
    )


@given(n=st.integers(8, 60), seed=st.integers(0, 5), test=st.floats(0, 0.5), val=st.floats(0, 0.4))
def test_parts_are_disjoint_and_everyone_is_in_one(n, seed, test, val):
    manifest = people(n)
    split = make_split(manifest, test, val, seed)
    assert sorted((*split.train, *split.val, *split.test)) == list(manifest.subjects)
    assert len(split.test) == round(test * n)


def test_frames_of_a_patient_stay_together():
    manifest = people(20, frames=2)
    split = make_split(manifest)
    for part in (split.train, split.val, split.test):
        assert len(cases_of(manifest, part)) == 2 * len(part)


@given(draw=st.integers(0, 9), few=st.integers(1, 10), more=st.integers(0, 8))
def test_a_draw_contains_the_smaller_draws(draw, few, more):
    manifest = people(40)
    split = make_split(manifest)
    small = draw_labelled(split, manifest, str(few), draw).labelled
    assert draw_labelled(split, manifest, str(few + more), draw).labelled[:few] == small
    assert set(small) <= set(split.train)


def test_draws_differ_and_repeat():
    manifest = people(40)
    split = make_split(manifest)
    draws = [draw_labelled(split, manifest, "2", draw).labelled for draw in range(5)]
    assert len(set(draws)) > 1
    assert draws[3] == draw_labelled(split, manifest, "2", 3).labelled


def test_a_new_subject_changes_nobody_elses_order():
    names = [f"s{i}" for i in range(30)]
    with_one_more = [s for s in ranked([*names, "late"], "key") if s != "late"]
    assert with_one_more == ranked(names, "key")


def test_few_labelled_subjects_all_train():
    split = make_split(people(12, labelled=2))
    assert not split.val and not split.test and len(split.train) == 12


def test_a_published_test_set_is_held_out():
    manifest = manifest_for([*(case_for(f"a{i}") for i in range(20)), case_for("t", label=False, split="test")])
    assert "t" in make_split(manifest).test


@pytest.mark.parametrize("labels", ["0", "-1", "99", "two"])
def test_impossible_numbers_of_labels_are_refused(labels):
    manifest = people(20)
    with pytest.raises(MedclError, match="--labels"):
        draw_labelled(make_split(manifest), manifest, labels)


def test_nobody_labelled_is_refused():
    manifest = people(5, labelled=0)
    with pytest.raises(MedclError, match="no labelled subject"):
        draw_labelled(make_split(manifest), manifest, "all")


@pytest.mark.parametrize("content", ["[]", "3", '{"train": ["a"]}', '{"train": [], "val": [], "test": [], "extra": 1}'])
def test_a_file_that_holds_no_split_is_told_in_one_line(tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(MedclError, match="holds no split of subjects"):
        Split.load(tmp_path / "split.json")
