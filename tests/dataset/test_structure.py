"""Whose files are, of hundreds of made-up ways to name them: nobody is two subjects, and nothing is silent."""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict

import pytest

from medcl.dataset import naming
from medcl.dataset.by_names import doubts, named_subjects
from medcl.dataset.structure import read_subjects
from medcl.dataset.tokens import tokens

NAMES = ["anna", "bert", "carl", "dora", "emil", "fritz", "gina", "hans", "ida", "jan"]
VISITS = [
    [""],
    ["ses-1", "ses-2"],
    ["000", "001", "002"],
    ["baseline", "followup"],
    ["V1", "V2"],
    ["2019-01-02", "2020-03-04"],
]
CHANNELS = [["T1", "FLAIR"], ["T1"], [""], ["t1", "t2", "foo"], ["ct"], ["imgA", "imgB"], ["dwi", "b0"]]
SITES = [["Utrecht", "Bern"], ["site1", "site2"], ["center-A", "center-B"]]


def persons(rng: random.Random) -> list[str]:
    count = rng.randrange(3, 11)
    prefix = rng.choice(["sub-", "P", "case_", "Patient", "subj", "pt_", "ID"])
    letters = "ABCDEFGHJK0123456789"
    return rng.choice([
        [f"{prefix}{n:03}" for n in range(count)],
        [str(n) for n in rng.sample(range(1, 999), count)],
        NAMES[:count],
        ["".join(rng.choice(letters) for _ in range(8)) for _ in range(count)],
        [f"{rng.randrange(1000, 9999)}-{n:04}" for n in range(count)],
        [f"STUDY_{rng.choice('AB')}{n:02}" for n in range(count)],
        [f"1.2.840.{rng.randrange(10**6)}.{n}.77" for n in range(count)],
        [f"{('HC', 'PD')[n % 2]}{n:02}" for n in range(count)],
    ])  # fmt: skip


def folder(rng: random.Random) -> dict[str, tuple[str, str]]:
    """Image files of a made-up data set, each with its site and person."""
    every, visits, channels, kind = persons(rng), rng.choice(VISITS), rng.choice(CHANNELS), rng.randrange(5)
    sites = [""] if rng.random() < 0.7 else rng.choice(SITES)
    files = {}
    for number, site in enumerate(sites):
        for person in every if rng.random() < 0.5 or len(sites) == 1 else every[number::2]:
            for visit, channel in itertools.product(visits if rng.random() < 0.6 else visits[:1], channels):
                name = "_".join(filter(None, (person, visit, channel)))
                path = (
                    name,
                    f"{person}/{visit or 'x'}/{channel or 'image'}",
                    f"{person}/{name}",
                    f"{channel or 'images'}/{name}",
                    f"data/{person}_{visit or 'x'}/{channel or 'image'}",
                )[kind]
                files[f"{site}/{path}.nii.gz" if site else f"{path}.nii.gz"] = (site, person)
    return files


@pytest.mark.parametrize("block", range(4))
def test_nobody_is_two_subjects_and_two_are_one_only_where_scan_says_so(block):
    asked = 0
    for seed in range(block * 100, block * 100 + 100):
        files = folder(random.Random(seed))
        images = sorted(files)
        reading = read_subjects(images)
        subjects = named_subjects(images, reading, naming.subjects(images))
        of_person, in_subject = defaultdict(set), defaultdict(set)
        for image, person in files.items():
            of_person[person].add(subjects[image])
            in_subject[subjects[image]].add(person)
        assert all(len(found) == 1 for found in of_person.values()), (seed, images)
        if any(len(found) > 1 for found in in_subject.values()):
            assert reading.doubt or reading.more > len(in_subject), (seed, images)
        asked += bool(doubts(images, reading, subjects))
    assert 5 < asked < 60


@pytest.mark.parametrize(
    "name, expected",
    [
        ("张三/T1.nii", [("word", "张三"), ("role", "t1")]),
        ("imagesTr/amos_0001.nii.gz", [("role", "imagestr"), ("word", "amos"), ("id", "0001")]),
        ("label0061.nii", [("role", "label"), ("id", "0061")]),
        ("k1_ses-2_left.nii", [("id", "k1"), ("moment", "ses-2"), ("role", "left")]),
        ("site2/1.2.840.113.77.3.nii", [("place", "site2"), ("id", "1.2.840.113.77.3")]),
        ("x_2006-04-18_08_20_30.0.nii", [("word", "x"), ("moment", "2006-04-18_08_20_30.0")]),
        ("Müller.nii", [("word", "müller")]),
    ],
)
def test_tokens(name, expected):
    assert [(token.kind, token.value) for token in tokens(name)] == expected
    decomposed = name.replace("ü", "u\u0308")
    assert [token.value for token in tokens(decomposed)] == [value for _, value in expected]


AB, FIVE = ("anna", "bert", "carl"), range(1, 6)
SPELLED: dict[str, dict[str, object]] = {
    "a letter behind": {f"P{i:02}{c}": i for i in FIVE for c in "ab"},
    "visits behind": {f"S{i:02}V{v}": i for i in FIVE for v in (1, 2)},
    "days behind": {f"M{i}D{v}": i for i in FIVE for v in (0, 14)},
    "a second version": {"case01": 1, "case01v2": 1, "case02": 2, "case03": 3},
    "eyes": {f"P{i:02}{c}": i for i in FIVE for c in ("OD", "OS")},
    "sides before": {f"Knee{c}{i:02}": i for i in FIVE for c in "RL"},
    "a program's prefixes": {f"{c}sub{i:02}": i for i in FIVE for c in ("", "m", "c1", "wm", "mwp1")},
    "zeros": {f"T{m}/{i:03}" if m == 1 else f"T{m}/{i}": i for i in FIVE for m in (1, 2)},
    "two scanners": {f"{m}/{m}{i:03}": i for i in FIVE for m in ("CT", "MR")},
    "running numbers": {"001_K17": 17, "002_K18": 18, "003_K17": 17},
    "accession numbers": {"A1001/0012345": 1, "A1002/0023456": 2, "A2044/0012345": 1},
    "examinations": {"exam_77/P1/ct": 1, "exam_78/P2/ct": 2, "exam_79/P1/ct": 1},
    "lesions": {"lesion1_pat11": 11, "lesion2_pat11": 11, "lesion3_pat12": 12},
    "numbers in a person's folder": {"anna/5501": 1, "anna/5502": 1, "bert/5601": 2, "bert/5602": 2},
    "few in waves": {f"wave{w}/{i:03}": i for w in (1, 2) for i in range(4)},
    "many in waves": {f"wave{w}/{i:03}": i for w in (1, 2) for i in range(12)},
    "years": {f"{year}/{name}": name for year in (2019, 2021) for name in AB},
    "sites of three": {f"{site}/Case{i:02}": (site, i) for site in ("BIDMC", "BMC", "HK") for i in range(3)},
    "three data sets": {
        f"BraTS-{k}-{i:05}-000/BraTS-{k}-{i:05}-000-t1c": (k, i) for k in ("PED", "SSA", "MET") for i in range(15)
    },
    "an aneurysm twice": {**{f"100{i:02}/TOF": i for i in FIVE}, "10042B/TOF": 42, "10042F/TOF": 42},
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_second_reading_joins_and_asks(name):
    files = {f"{path}.nii": person for path, person in SPELLED[name].items()}
    images = sorted(files)
    reading = read_subjects(images)
    of_person = defaultdict(set)
    for image, person in files.items():
        of_person[person].add(reading.keys[image])
    assert all(len(found) == 1 for found in of_person.values()), reading.keys
    assert reading.doubt or name == "two scanners"  # CT and MR are asked by themselves
    subjects = named_subjects(images, reading, naming.subjects(images))
    assert doubts(images, reading, subjects)


@pytest.mark.parametrize(
    "files",
    [
        [f"MR{i}/{c}" for i in (17000, 17031, 17040) for c in ("T2WI", "DWI")],
        [f"{kind}/{i:03}" for kind, numbers in (("benign", range(9)), ("malignant", range(9, 20))) for i in numbers],
        [f"PET{i:03}" for i in range(4)],
    ],
)
def test_no_second_reading(files):
    reading = read_subjects([f"{path}.nii" for path in files])
    assert (
        not reading.doubt
        and len(set(reading.keys.values())) == len({re.sub(r"/[A-Z].*", "", path) for path in files}) >= 3
    )
