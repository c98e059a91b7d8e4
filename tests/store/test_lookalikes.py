from __future__ import annotations

import numpy as np
from public_layouts import image, write

from medcl.config import ScanConfig
from medcl.dataset.scan import scan
from medcl.store.lookalikes import lookalikes
from medcl.store.stage import scan as scan_stage

BIG = (40, 36, 32)


def brain(seed: int) -> np.ndarray:
    """A picture of one person: smooth blobs of its own in a head that all share."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.normal(0, 1, BIG), 2.5)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in BIG), indexing="ij"))
    return (np.where((grid**2).sum(0) < 0.9, 300 + 400 * blobs / blobs.std(), 0) + rng.normal(0, 5, BIG)).astype("f4")


def test_one_scan_under_two_subjects_is_asked(tmp_path, capsys):
    for number in range(5):
        write(tmp_path / f"s{number}.nii.gz", brain(number))
    again = brain(2) * 1.7 + 40 + np.random.default_rng(9).normal(0, 12, BIG)
    write(tmp_path / "s7.nii.gz", again.astype("f4"))
    manifest = scan_stage(ScanConfig(str(tmp_path), out=str(tmp_path / "m.json"), workers=1, json=True))
    (question,) = manifest.questions
    assert question.file == "s7.nii.gz" and "s2.nii.gz" in question.what and "give both one subject" in question.remedy


def test_different_people_alike_people_and_visits_are_not(tmp_path):
    for number in range(4):
        write(tmp_path / f"a/s{number}.nii.gz", brain(number))
        write(tmp_path / f"b/p1_ses-{number}.nii.gz", brain(50) + number)  # one person's own visits
        write(tmp_path / f"c/t{number + 5}.nii.gz", image(number))  # one template and noise
    for folder in "abc":
        manifest = scan(tmp_path / folder, workers=1)
        assert lookalikes(manifest, manifest.cases, workers=1) == []


def test_of_two_subjects_it_is_told_and_not_asked(tmp_path):
    write(tmp_path / "s1.nii.gz", brain(1))
    write(tmp_path / "s2.nii.gz", (brain(1) * 2 + 3).astype("f4"))
    manifest = scan(tmp_path, workers=1)
    (told,) = lookalikes(manifest, manifest.cases, workers=1)
    assert not told.question and not told.aside
