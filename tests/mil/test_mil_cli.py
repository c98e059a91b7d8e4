"""What people get wrong with bags, by the command line: one clear line each, and the rest goes on."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="the extra `mil` is not installed")
pytest.importorskip("sklearn", reason="the extra `mil` is not installed")

from conftest import REAL  # noqa: E402
from small_bags import WIDTH, picture, table, write_set  # noqa: E402  # noqa: E402

from medcl import cli  # noqa: E402
from medcl.mil.bags import Features, read_features, write_features  # noqa: E402

FIT = ["--folds", "2", "--epochs", "1", "--options.hidden", "8"]


def call(capsys, *args: object) -> tuple[int, list[str]]:
    """The exit code of `medcl mil`, and the lines of its errors and warnings."""
    code = cli.main(["mil", *map(str, args)])
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return code, lines


def overwrite(path, h) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = h
        file.attrs["encoder"] = "stub"


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "bags", 12, 6)


@pytest.mark.parametrize(
    "spoil,told",
    [
        (lambda p: overwrite(p, np.empty((0, WIDTH), np.float32)), "holds no instance"),
        (lambda p: overwrite(p, np.full((3, WIDTH), np.nan, np.float32)), "3 of 3 instances are not finite"),
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b"\x89HDF broken"), "cannot be read"),
    ],
    ids=["empty bag", "NaN features", "missing file", "damaged file"],
)
def test_a_bag_that_cannot_be_used_is_told_in_a_line_and_the_fit_goes_on(folder, tmp_path, capsys, spoil, told):
    spoil(folder / "features" / "bag03.h5")
    code, lines = call(capsys, "fit", folder, "--out", tmp_path / "run", *FIT)
    warned = [line for line in lines if "set aside" in line]
    assert code == 0 and len(warned) == 1 and told in warned[0] and "bag03" in warned[0]
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["aside"]) == {"bag03"}


def test_bags_of_one_instance_and_of_fewer_than_clams_k_are_fitted(folder, tmp_path, capsys):
    for number in range(4):
        write_features(
            folder / "features" / f"bag{number:02d}.h5", Features(np.ones((1, WIDTH), np.float32), encoder="stub")
        )
    for aggregator in ("clam_sb", "clam_mb"):
        code, _ = call(capsys, "fit", folder, "--out", tmp_path / aggregator, "--aggregator", aggregator, *FIT)
        assert code == 0 and (tmp_path / aggregator / "report.html").exists()


def refuse_width(folder):
    write_features(folder / "features" / "bag02.h5", Features(np.zeros((3, 9), np.float32), encoder="stub"))


def refuse_two_groups(folder):
    with open(folder / "bags.csv", "a") as stream:
        stream.write("bag02,features/bag02.h5,malignant,77\n")


def refuse_same_file_in_two_groups(folder):
    with open(folder / "bags.csv", "a") as stream:
        stream.write("again,features/bag02.h5,benign,77\n")


def refuse_few(folder):
    with open(folder / "bags.csv") as stream:
        rows = list(csv.reader(stream))
    with open(folder / "bags.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([r for r in rows if r[2] != "malignant" or r[0] == "bag01"])


@pytest.mark.parametrize(
    "spoil,told",
    [
        (refuse_width, "bag00 has features of width 6, bag02 9.*one encoder"),
        (refuse_two_groups, "bag02 is listed in two groups, labelled benign and malignant"),
        (refuse_same_file_in_two_groups, "bag02 and again are the same file in groups 1 and 77.*training and test"),
        (refuse_few, "class malignant occurs in 1 groups, fewer than 2 folds"),
    ],
)
def test_a_set_that_cannot_be_right_is_refused_in_one_line(folder, tmp_path, capsys, spoil, told):
    spoil(folder)
    code, lines = call(capsys, "fit", folder, "--out", tmp_path / "run", *FIT)
    assert code != 0 and len(lines) == 1 and re.search(told, lines[0]), lines
    assert not (tmp_path / "run").exists()


def test_a_group_in_training_and_test_is_told_by_predict_and_by_evaluate(folder, tmp_path, capsys):
    assert call(capsys, "fit", folder, "--out", tmp_path / "run", *FIT)[0] == 0
    rows = [["bag_id", "path", "label", "group"]]
    for number, group in enumerate(("new", "3")):
        write_features(folder / "features" / f"x{number}.h5", Features(np.ones((4, WIDTH), np.float32), encoder="stub"))
        rows.append([f"x{number}", f"features/x{number}.h5", ("benign", "malignant")[number], group])
    with open(folder / "bags.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    code, lines = call(capsys, "predict", tmp_path / "run", folder, tmp_path / "told")
    assert code == 0 and sum("1 of 2 bags, such as x1, are of groups" in line for line in lines) == 1
    code, lines = call(capsys, "evaluate", tmp_path / "told")
    assert code == 0 and sum("1 of 2 bags, such as x1, were trained on" in line for line in lines) == 1


def test_extraction_sets_aside_what_it_cannot_read_lists_it_and_goes_on(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "good.png")
    picture(tmp_path / "glass.png", (250, 250, 250))
    rows = [["good", "good.png", "a", "1"], ["glass", "glass.png", "b", "2"], ["lost", "lost.svs", "b", "3"]]
    told = {"glass": "holds no tissue", "lost": "no such file"}
    if (REAL / "slides" / "broken.svs").exists():
        rows.append(["broken", REAL / "slides" / "broken.svs", "b", "4"])
        told["broken"] = "cannot be read"
    (tmp_path / "notes.txt").write_text("no slide")
    rows.append(["notes", "notes.txt", "b", "5"])
    told["notes"] = "is no slide or image"
    source = table(tmp_path, *rows)
    code, lines = call(capsys, "prepare", source, tmp_path / "out", "--tile", 32, "--mpp", 0)
    aside = [line for line in lines if "set aside: " in line]
    assert code == 0 and len(aside) == len(told)
    assert set(json.loads((tmp_path / "out" / "aside.json").read_text())) == set(told)
    for bag, reason in told.items():
        assert any(reason in line and bag in line for line in aside), bag
    assert read_features(tmp_path / "out" / "features" / "good.h5").h.shape[1] == 512
    assert [row["bag_id"] for row in csv.DictReader((tmp_path / "out" / "bags.csv").open())] == ["good"]


def test_a_slide_without_resolution_is_told_with_the_remedy(tmp_path, capsys, monkeypatch):
    from medcl.mil import slides

    picture(tmp_path / "a.png")
    monkeypatch.setattr(slides, "SLIDES", (*slides.SLIDES, ".png"))  # a slide whose file says no microns per pixel
    source = table(tmp_path, ["a", "a.png", "x", "1"])
    code, lines = call(capsys, "prepare", source, tmp_path / "out", "--tile", 32)
    assert code != 0 and sum("does not say its resolution. Give --slide_mpp" in line for line in lines) == 1
    assert call(capsys, "prepare", source, tmp_path / "out", "--tile", 32, "--slide_mpp", 0.5)[0] == 0
