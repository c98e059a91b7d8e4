"""Reports: self-contained, escaped, without file names, and drawn the right way round."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from fake_runs import AFFINE, SHAPE, labels, make_data, make_run
from pages import Page

from medcl.errors import MedclError
from medcl.evaluation.compare import compare
from medcl.io.nifti import write_nifti
from medcl.report import figures, overlays
from medcl.report.html import write_comparison_report, write_run_report
from medcl.report.overlays import Overlay, draw_overlay, load_overlay
from medcl.report.page import last_parts, readable, table, without_files


def self_contained(page: Page) -> None:
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    source = page.without_images()
    assert not any(word in source for word in ("@import", "url(", "http:", "https:"))
    assert all(image.get("alt") for image in page.images)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    data = make_data(root / "DOE_JANE" / "data", list("abcdefg"))
    runs = [make_run(root / f"good{d}", data, draw=d, init="/scratch/runs/voco", good=0.8, seed=1) for d in range(2)]
    baseline = [make_run(root / f"poor{d}", data, draw=d, good=0.2, seed=2) for d in range(2)]
    run = runs[0]
    rows = ["step,loss,lr,val_dice,effective_rank"]
    rows += [
        f"{s},{2 / (s + 1)},{1e-3 * s},{'' if s % 5 else 0.5 + s / 200},{'nan' if s < 3 else s}" for s in range(60)
    ]
    (run / "metrics.csv").write_text("\n".join(rows))
    (run / "plan.json").write_text(
        json.dumps({"spacing": [1.0, 1.0, 3.0], "strides": [[2, 2, 1], [2, 2, 2]], "n4": False})
    )
    (run / "provenance.json").write_text(json.dumps({"commit": "abc123", "versions": {"torch": "2.13"}, "seed": 0}))
    (run / "log.txt").write_text(
        "2026-01-01 10:00:00 INFO all is well\n"
        "2026-01-01 10:00:01 WARNING /scans/DOE_JOHN.nii.gz: set aside\n"
        "2026-01-01 10:00:02 WARNING the loss is <flat>\n" * 2
    )
    return runs, baseline


@pytest.fixture(scope="module")
def run_page(study):
    return Page(write_run_report(study[0][0]))


@pytest.fixture(scope="module")
def comparison(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    result = compare(*study, out)
    return result, Page(write_comparison_report(out, result, *study))


def test_run_report_is_one_file_that_fetches_nothing(run_page):
    self_contained(run_page)
    assert run_page.source.startswith("<!DOCTYPE html>")


def test_run_report_has_every_section(run_page):
    assert run_page.sections() == [
        "The numbers", "Best, median and worst", "Training", "What was read", "The plan", "How it was made",
    ]  # fmt: skip
    # Strips, three overlays, loss, validation, learning rate and one further series.
    assert len(run_page.images) == 8


def test_run_report_tells_the_numbers_of_the_evaluation(study, run_page):
    mean = json.loads((study[0][0] / "test" / "evaluation.json").read_text())["mean"]["dice"]
    expected = f"{100 * mean['estimate']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"
    assert f"Mean Dice {expected} % on 7 test subjects, trained with 2 labelled subjects" in run_page.text
    assert "from a pretrained encoder" in run_page.text
    assert "1 x 1 x 3" in run_page.text and "(2 x 2 x 1), (2 x 2 x 2)" in run_page.text and "abc123" in run_page.text


def test_run_report_shows_best_median_and_worst_by_dice(study, run_page):
    from medcl.evaluation.evaluate import mean_over_classes, read_scores

    rows = mean_over_classes(read_scores(study[0][0] / "test" / "evaluation.csv"))
    ranked = [row["case"] for row in sorted(rows, key=lambda row: -row["dice"])]
    shown = [image["alt"] for image in run_page.images if "outlines" in image["alt"]]
    assert [alt.split(":")[0] for alt in shown] == [
        f"Best case {ranked[0]}",
        f"Median case {ranked[3]}",
        f"Worst case {ranked[-1]}",
    ]


def test_warnings_of_the_log_are_shown_once_and_escaped(run_page):
    assert run_page.source.count("set aside</p>") == 1
    assert "the loss is &lt;flat&gt;" in run_page.source
    assert "all is well" not in run_page.text


def test_reports_name_no_files_and_no_folders(run_page, comparison):
    for page in (run_page, comparison[1]):
        source = page.without_images()
        assert "DOE" not in source and "/home" not in source and ".nii" not in source
    assert "the file is empty" in run_page.text
    assert "voco" in run_page.text  # which pretraining it came from is no secret


def test_comparison_report_opens_with_the_sentence(comparison):
    result, page = comparison
    self_contained(page)
    headline = re.search(r'<p class="headline">(.*?)</p>', page.source)
    assert headline is not None
    sentence = result["sentence"].replace("<", "&lt;")
    assert headline[1].replace("\N{NO-BREAK SPACE}", " ").lower() == f"{sentence}.".lower()
    assert page.sections() == [
        "The difference", "The numbers", "Largest, median and smallest difference", "How it was measured",
    ]  # fmt: skip
    assert len(page.images) == 6 and "Test subjects: 7." in page.text


def test_names_that_are_html_are_shown_not_run(tmp_path):
    evil = "<script>alert('x')</script>"
    data = make_data(tmp_path / "data", list("ab"), names={0: "background", 1: evil, 2: "$\\frac{$ & \"'"})
    run = make_run(tmp_path / "run", data, task=evil)
    other = make_run(tmp_path / "other", data, init="voco")
    (run / "plan.json").write_text(json.dumps({evil: evil}))
    (run / "provenance.json").write_text(json.dumps({evil: {evil: [evil]}}))
    (run / "metrics.csv").write_text(f"step,loss,{evil}\n0,1,2\n1,2,3\n".replace("'x'", "x"))
    names = (evil, "$x_{1")
    pages = [Page(write_run_report(run))]
    result = compare([run], [other], tmp_path / "out", names)
    pages.append(Page(write_comparison_report(tmp_path / "out", result, [run], [other])))
    for page in pages:
        self_contained(page)
        assert evil in page.text  # parsed as text: it was escaped
        assert "<script" not in page.source


def test_report_of_an_empty_folder_and_of_a_pretraining_run(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Page(write_run_report(tmp_path / "empty")).sections() == []
    run = tmp_path / "pretraining"
    run.mkdir()
    (run / "config.yaml").write_text("stage: pretrain\ntask: voco\nbackbone: unet\n")
    (run / "metrics.csv").write_text("step,loss,lr\n" + "".join(f"{s + 1},{3 - s / 10},0.1\n" for s in range(20)))
    page = Page(write_run_report(run))
    assert page.sections() == ["Training", "How it was made"] and "Pretraining · voco · unet" in page.text
    assert "Loss from 2.95 to 1.15 in 20 steps; not yet scored" in page.text


def test_a_moved_image_costs_its_overlay_not_the_report(tmp_path):
    data = make_data(tmp_path / "data", list("a"))
    run = make_run(tmp_path / "run", data)
    (tmp_path / "data" / "images" / "a_0.nii.gz").unlink()
    assert "a_0 is not shown: no such file." in Page(write_run_report(run)).text
    (run / "test" / "a_0.nii.gz").unlink()
    assert "a_0 is not shown: its prediction is no longer there." in Page(write_run_report(run)).text


def test_damaged_run_files_are_told_in_one_line(tmp_path):
    with pytest.raises(MedclError, match="no such run folder"):
        write_run_report(tmp_path / "nowhere")
    (tmp_path / "metrics.csv").write_text("step,loss\n1,x\n")
    with pytest.raises(MedclError, match=r"metrics\.csv: is not a table of series"):
        write_run_report(tmp_path)


def test_equal_runs_give_equal_reports(study):
    first = write_run_report(study[0][0]).read_bytes()
    assert write_run_report(study[0][0]).read_bytes() == first


def decoded(uri: str) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(base64.b64decode(uri.split(",")[1])), format="png")[..., :3]


def test_patient_right_is_on_the_left_anterior_on_top_and_voxels_in_proportion(monkeypatch):
    """Reads the axes themselves: each corner voxel must lie where its letters say."""
    seen = {}

    def keep(figure, kind="svg", dpi=150):
        seen["panels"] = [axes for part in figure.subfigs for axes in part.axes]
        return ""

    monkeypatch.setattr(overlays, "to_uri", keep)
    reference = np.zeros(SHAPE, np.int32)
    reference[5:9, 6:10, 3:5] = 1
    draw_overlay(
        Overlay(np.random.default_rng(0).random(SHAPE), reference, {"": reference}, (1.0, 1.0, 3.0)), {"": "t"}
    )
    for axes, letters, up in zip(seen["panels"], ("RLPA", "RLIS", "APIS"), (1.0, 3.0, 3.0), strict=True):
        assert [text.get_text() for text in axes.texts] == list(letters)
        left, right = axes.get_xlim()
        bottom, top = axes.get_ylim()
        assert left > right and top > bottom  # R (or A) grows with the index, and lies on the left
        image = axes.images[0]
        assert image.origin == "lower" and axes.get_aspect() == 1.0
        height = image.get_extent()[3] - image.get_extent()[2]
        assert height / image.get_array().shape[0] == pytest.approx(up)


def test_outlines_enclose_the_mask_in_mm(monkeypatch):
    seen = []
    monkeypatch.setattr(overlays, "to_uri", lambda figure, kind="svg", dpi=150: seen.append(figure) or "")
    reference = np.zeros(SHAPE, np.int32)
    reference[0:4, 6:10, 2:5] = 1  # touches the border: the outline must close all the same
    draw_overlay(Overlay(np.zeros(SHAPE), reference, {"": np.zeros_like(reference)}, (1.0, 1.0, 3.0)), {})
    coronal = seen[0].subfigs[0].axes[1]
    (outline,) = [path for lines in coronal.collections for path in lines.get_paths() if len(path.vertices)]
    np.testing.assert_allclose(outline.vertices.min(axis=0), [-0.5, 4.5])
    np.testing.assert_allclose(outline.vertices.max(axis=0), [3.5, 13.5])


def test_overlay_brings_any_orientation_to_the_same_picture(tmp_path):
    data = make_data(tmp_path / "data", ["a"])
    write_nifti(tmp_path / "p" / "a_0.nii.gz", labels(3.0), AFFINE)
    plain = load_overlay(data, data.cases[0], {"": tmp_path / "p" / "a_0.nii.gz"})
    flipped = AFFINE.copy()
    flipped[1, 1], flipped[1, 3] = -1.0, SHAPE[1] - 1
    write_nifti(tmp_path / "p" / "a_0.nii.gz", labels(3.0)[:, ::-1], flipped)
    again = load_overlay(data, data.cases[0], {"": tmp_path / "p" / "a_0.nii.gz"})
    np.testing.assert_array_equal(plain.predictions[""], again.predictions[""])
    picture = decoded(draw_overlay(plain, {"": "a"}))
    np.testing.assert_array_equal(picture, decoded(draw_overlay(again, {"": "a"})))
    blue, orange = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in (figures.SKY, figures.ORANGE))
    for colour in (blue, orange):
        assert (np.abs(picture - colour).max(axis=-1) < 0.02).sum() > 100


@pytest.mark.parametrize("reference", [np.zeros(SHAPE, np.int32), np.ones(SHAPE, np.int32)])
def test_empty_and_full_masks_and_constant_images_are_drawn(reference):
    overlay = Overlay(np.full(SHAPE, np.nan), reference, {"a": reference, "b": np.zeros(SHAPE, np.int32)}, (1, 1, 3))
    assert draw_overlay(overlay, {"a": "x"}).startswith("data:image/png;base64,")


def test_figures_leave_no_global_state(study):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    write_run_report(study[0][0])
    assert plt.get_fignums() == before


def test_paths_are_recognised():
    assert without_files("/a/DOE^JOHN.nii: is empty, see C:\\x\\y") == "[file]: is empty, see [file]"
    assert without_files("sub/DOE.nii.gz is 3 x 4") == "[file] is 3 x 4"
    assert without_files("JOHN DOE.nii.gz is empty", ["JOHN DOE.nii.gz"]) == "[file] is empty"
    assert without_files("set aside: DOE.NRRD, scan.nii.gz") == "set aside: [file], [file]"
    assert without_files("Dice 0.5, 3 of 4") == "Dice 0.5, 3 of 4"
    assert last_parts("medcl finetune /scratch/heart/ --init=/runs/voco") == "medcl finetune heart --init=voco"


def test_values_read_as_a_person_writes_them():
    assert readable([1.0, 0.5, 3]) == "1 x 0.5 x 3"
    assert readable({"a": True, "b": None}) == "a: yes; b: -"
    assert readable(1e-4) == "0.0001"


def test_tables_mark_headings_and_numbers():
    made = table(("name", "n"), [("<a>", 1)], strong=[0])
    assert '<th scope="row">&lt;a&gt;</th><td class="number">1</td>' in made and 'class="strong"' in made
    assert table(("name",), []) == ""


def test_grey_levels_of_ct_are_those_of_the_body():
    """Four fifths air at -1000 HU, a body around 50 HU: it must not be drawn in two greys."""
    from medcl.report.overlays import _window

    hounsfield = np.where(np.arange(10_000) < 8_000, -1000.0, np.linspace(-100, 200, 10_000))
    low, high = _window(hounsfield.reshape(10, 10, 100))
    assert -110 < low < 150 and 190 < high < 201
    assert _window(np.linspace(0, 1, 1000).reshape(10, 10, 10)) == pytest.approx((0.01, 0.995), abs=1e-3)
