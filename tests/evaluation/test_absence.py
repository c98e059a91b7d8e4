"""Structures that the reference lacks count by one rule: means, pairs, classes, curves and pages say the same."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import AFFINE, labels, make_data, make_run

from medcl.config import BenchmarkConfig
from medcl.efficiency.grid import make_grid
from medcl.efficiency.table import rows_by_key, summarise, table, write_summary
from medcl.errors import MedclError
from medcl.evaluation.absence import absences, with_absence_rule
from medcl.evaluation.compare import compare, print_comparison
from medcl.evaluation.evaluate import COLUMNS, notices, score_folder
from medcl.evaluation.pairing import paired_means
from medcl.evaluation.statistics import sign_flip_p
from medcl.io.nifti import write_nifti
from medcl.report.benchmark import write_benchmark_report
from medcl.report.html import write_comparison_report, write_run_report

# dice, nsd, hd95 by outcome
SCORES = {"present": (1, 1, 0.0), "missed": (0, 0, math.nan), "invented": (0, 0, math.nan), "absent": (math.nan,) * 3}


def rows_of(outcomes: dict[str, dict[str, str]]) -> list[dict[str, object]]:
    """Rows of `evaluation.csv` from the outcome of each subject and class."""
    return [
        {
            "case": f"{subject}_0", "subject": subject, "class": value, "name": name, "outcome": outcome,
            **dict(zip(("dice", "nsd", "hd95"), SCORES[outcome], strict=True)),
            "volume_pred_ml": 0.0, "volume_ref_ml": 0.0,
        }
        for subject, by_class in outcomes.items()
        for value, (name, outcome) in enumerate(by_class.items(), 1)
    ]  # fmt: skip


def run_of(folder: Path, outcomes: dict[str, dict[str, str]], draw: int = 0) -> Path:
    """The files of a scored run that a comparison reads, as an earlier version wrote them."""
    (folder / "test").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"labels": "2", "draw": draw, "init": folder.name}))
    (folder / "split.json").write_text(json.dumps({"test": list(outcomes), "labelled": ["x"]}))
    with open(folder / "test" / "evaluation.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows_of(outcomes):
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return folder


SUBJECTS = [f"s{i:02d}" for i in range(20)]


def healthy(invented: int, organ: bool = True) -> dict[str, dict[str, str]]:
    """20 healthy subjects, of whom the first few get a lesion; with an organ that is found in all."""
    return {
        subject: {**({"organ": "present"} if organ else {}), "lesion": "invented" if i < invented else "absent"}
        for i, subject in enumerate(SUBJECTS)
    }


@pytest.mark.parametrize("absent", ["nothing", "one"])
def test_an_invented_lesion_in_half_of_the_healthy_is_seen_in_means_and_in_pairs(tmp_path, absent, capsys):
    right, wrong = run_of(tmp_path / "right", healthy(0)), run_of(tmp_path / "wrong", healthy(10))
    result = compare([right], [wrong], tmp_path / "out", ("right", "wrong"), absent=absent)
    mean = result["metrics"]["dice"]["mean"]
    assert (mean["first"]["estimate"], mean["second"]["estimate"]) == (1.0, 0.75)  # (1 + 0) / 2 in 10 of 20
    assert mean["estimate"] == 0.25 and mean["n_subjects"] == 20 and mean["n_excluded"] == 0
    assert mean["p"] == sign_flip_p([0.5] * 10 + [0.0] * 10)[0] < 0.01  # 2 of 2^10 sign patterns, sampled
    lesion = result["metrics"]["dice"]["classes"][1]
    assert lesion["estimate"] == {"nothing": 1.0, "one": 0.5}[absent]
    assert lesion["n_subjects"] == {"nothing": 10, "one": 20}[absent] and lesion["p"] < 0.01
    assert lesion["first"]["estimate"] - lesion["second"]["estimate"] == lesion["estimate"]
    assert result["metrics"]["nsd"]["mean"]["estimate"] == 0.25
    (line,) = result["sensitivity"]
    assert "invented 0 times by right, 10 times by wrong" in line and "+25.0 Dice points" in line and "p = " in line
    assert ("counted as 1 there" in line.lower()) == (absent == "nothing")
    print_comparison(result)
    shown = capsys.readouterr().out
    assert line in shown
    page = write_comparison_report(tmp_path / "out", result, [right], [wrong]).read_text()
    assert ("invented 0 times by right" in page and "as soon as one of them invents it" in page) or absent == "one"


def test_a_lesion_that_is_the_only_class_is_not_lost_with_its_healthy_subjects(tmp_path):
    right, wrong = run_of(tmp_path / "a", healthy(0, organ=False)), run_of(tmp_path / "b", healthy(10, organ=False))
    mean = compare([right], [wrong], tmp_path / "out")["metrics"]["dice"]["mean"]
    assert mean["estimate"] == 1.0 and mean["n_subjects"] == 10 and mean["p"] < 0.01
    both = compare([right], [wrong], tmp_path / "out", absent="one")["metrics"]["dice"]["mean"]
    assert both["estimate"] == 0.5 and both["n_subjects"] == 20


def test_inventions_in_other_draws_do_not_cost_each_other_their_subjects(tmp_path):
    """A subject needs a value in every draw: what one draw invents must count in the others too."""
    right = [run_of(tmp_path / f"a{d}", healthy(0, organ=False), d) for d in range(2)]
    wrong = [run_of(tmp_path / "b0", healthy(10, organ=False), 0), run_of(tmp_path / "b1", healthy(4, organ=False), 1)]
    mean = compare(right, wrong, tmp_path / "out")["metrics"]["dice"]["mean"]
    assert mean["n_subjects"] == 10 and mean["n_excluded"] == 10  # the rest is absent everywhere
    assert mean["estimate"] == pytest.approx((10 + 4) / 20)


@pytest.mark.parametrize("absent", ["nothing", "one"])
@pytest.mark.parametrize("seed", range(3))
def test_the_difference_is_that_of_the_means_and_of_a_slow_sum(tmp_path, seed, absent):
    rng = np.random.default_rng(seed)
    truth = {s: [bool(rng.integers(2)) for _ in range(3)] for s in SUBJECTS[:9]}

    def told(held: bool) -> str:
        return rng.choice(["present", "missed"]) if held else rng.choice(["invented", "absent"])

    def arm() -> dict[str, dict[str, str]]:
        return {s: dict(zip("klm", map(told, held), strict=True)) for s, held in truth.items()}

    made = [[arm(), arm()] for _ in range(2)]
    runs = [[run_of(tmp_path / f"{i}{d}", made[d][i], d) for d in range(2)] for i in range(2)]
    result = compare(*runs, tmp_path / "out", absent=absent)
    differences = []
    for s in truth:
        per_draw = []
        for d in range(2):
            values = []
            for k in "klm":
                every = {made[e][i][s][k] for e in range(2) for i in range(2)}
                if every != {"absent"} or absent == "one":
                    values.append([float(made[d][i][s][k] in ("present", "absent")) for i in range(2)])
            if values:
                per_draw.append(np.mean(values, axis=0))
        if per_draw:
            differences.append(np.mean(per_draw, axis=0))
    for block in (result["metrics"]["dice"]["mean"], *result["metrics"]["dice"]["classes"]):
        assert block["first"]["estimate"] - block["second"]["estimate"] == pytest.approx(block["estimate"])
    mean = result["metrics"]["dice"]["mean"]
    expected = np.mean(differences, axis=0)
    assert (mean["first"]["estimate"], mean["second"]["estimate"]) == pytest.approx(tuple(expected))
    forth = {row["subject"]: row["difference"] for row in result["subjects"]}
    assert np.mean(list(forth.values())) == pytest.approx(mean["estimate"])


def test_a_distance_that_one_arm_lacks_is_told_and_not_silently_dropped(tmp_path, capsys):
    found = {s: {"organ": "present", "lesion": "present"} for s in SUBJECTS}
    lost = {s: {"organ": "present", "lesion": "missed" if i < 3 else "present"} for i, s in enumerate(SUBJECTS)}
    result = compare([run_of(tmp_path / "a", found)], [run_of(tmp_path / "b", lost)], tmp_path / "out", ("a", "b"))
    (line,) = result["warnings"]
    assert line.startswith("HD95 leaves out 3 pairs of 40 (draw, case and class), 0 missed by a alone, 3 missed by b")
    lesion = result["metrics"]["hd95"]["classes"][1]
    assert lesion["n_subjects"] == lesion["first"]["n_subjects"] == lesion["second"]["n_subjects"] == 17
    assert result["metrics"]["dice"]["classes"][1]["estimate"] == pytest.approx(3 / 20)
    print_comparison(result)
    assert line in capsys.readouterr().out
    assert result["sensitivity"] == []  # nothing is absent, so both rules agree


def test_settling_twice_changes_nothing_and_leaves_what_has_a_value():
    names = [dict(zip(("k", "m"), pair, strict=True)) for pair in itertools.product(SCORES, repeat=2)]
    runs = [rows_of({"a": each}) for each in names]
    for absent in ("nothing", "one"):
        once = with_absence_rule(runs, absent)
        np.testing.assert_equal(with_absence_rule(once, absent), once)
        for before, after in zip(itertools.chain(*runs), itertools.chain(*once), strict=True):
            if not math.isnan(before["dice"]):
                assert after is before
    assert absences(with_absence_rule(runs, "one")) == 0
    assert absences(with_absence_rule([rows_of({"a": {"k": "absent"}})] * 2)) == 2
    (row,) = paired_means(rows_of({"a": {"k": "absent"}}), rows_of({"a": {"k": "invented"}}))
    assert (row["dice"], row["dice_baseline"]) == (1.0, 0.0)


def test_an_evaluation_says_its_rule_and_what_the_other_would_give(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b"], names={0: "background", 1: "front", 2: "back", 5: "lesion"})
    run = make_run(tmp_path / "run", data, good=1.0)
    plain = score_folder(run / "test", data, tmp_path / "plain")
    one = score_folder(run / "test", data, tmp_path / "one", absent="one")
    assert (tmp_path / "plain" / "evaluation.csv").read_bytes() == (tmp_path / "one" / "evaluation.csv").read_bytes()
    front_and_back = plain["mean"]["dice"]["estimate"]
    assert one["mean"]["dice"]["estimate"] == pytest.approx((2 * front_and_back + 1) / 3)
    assert plain["absent"]["otherwise"] == one["mean"] and one["absent"]["otherwise"] == plain["mean"]
    assert one["classes"][2]["dice"]["estimate"] == 1.0 and plain["classes"][2]["dice"]["estimate"] is None
    for result, said in ((plain, "counts nothing there; counted as 1"), (one, "counts 1 there; left out")):
        assert any(line.startswith("absent from reference and prediction: 2 times") and said in line
                   for line in notices(result))  # fmt: skip
        assert any("counts 0 (Dice, NSD) where it is invented" in line for line in result["conventions"])
    with pytest.raises(MedclError, match=r"unknown rule 'two'.*nothing or one"):
        score_folder(run / "test", data, tmp_path / "two", absent="two")
    with pytest.raises(MedclError, match="unknown rule"):
        compare([run], [run], tmp_path / "two", absent="two")


def test_results_of_an_earlier_version_open(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b"])
    runs = [make_run(tmp_path / name, data) for name in ("first", "second")]
    for run in runs:
        path = run / "test" / "evaluation.json"
        old = json.loads(path.read_text())
        del old["absent"]
        path.write_text(json.dumps(old))
        assert "Mean Dice" in write_run_report(run).read_text()
    result = compare(runs[:1], runs[1:], tmp_path / "out")
    del result["sensitivity"], result["absent"]
    assert "The numbers" in write_comparison_report(tmp_path / "out", result, runs[:1], runs[1:]).read_text()


def test_a_benchmark_sees_inventions_in_every_column(tmp_path):
    arms = {"scratch": {}, "wrong": {"pretrain": {"task": "voco"}}, "same": {"pretrain": "wrong"}}
    config = BenchmarkConfig("scans", str(tmp_path / "out"), arms=arms, labels=["1", "all"], draws=3)
    grid = make_grid(config)
    for cell in grid.cells:
        outcomes = healthy(10 if (cell.arm, cell.labels, cell.draw) == ("wrong", "1", 0) else 0)
        run_of(Path(cell.config.out), outcomes, cell.draw)
    result = summarise(config, grid)
    mean = {(e["arm"], e["labels"]): e["dice"]["estimate"] for e in result["entries"]}
    for entry in result["entries"]:
        if "difference" in entry:
            gap = mean[entry["arm"], entry["labels"]] - mean["scratch", entry["labels"]]
            assert entry["difference"]["estimate"] == pytest.approx(gap, abs=1e-12)
    assert mean["wrong", "1"] == pytest.approx(1 - 10 * 0.5 / 20 / 3) and mean["wrong", "all"] == 1.0
    assert any(line.startswith("wrong at 1 label: -8.3 Dice points") for line in result["sentences"])
    assert "Counted as 1 there:" in result["sensitivity"][0] and len(result["sensitivity"]) == 1 + 4
    assert any(line.startswith("wrong at 1 label: -8.3 Dice points") for line in result["sensitivity"])
    out = Path(config.out)
    (out / "config.yaml").write_text(json.dumps({"arms": arms, "finetune": {}, "by_labels": {}, "pretrain": {}}))
    page = write_benchmark_report(out, result).read_text()
    assert "If absent structures counted otherwise" in page and table(result)[1]
    write_summary(out, result, rows_by_key(config, grid))
    assert {"invented", "absent"} <= {row["outcome"] for row in csv.DictReader((out / "results.csv").open())}
    with pytest.raises(MedclError, match="--absent"):
        make_grid(BenchmarkConfig("scans", "out", arms=arms, absent="0"))


def test_the_page_shows_the_cases_by_the_differences_that_were_compared(tmp_path):
    data = make_data(tmp_path / "data", ["a", "b", "c"], names={0: "background", 1: "front", 2: "back", 5: "lesion"})
    right, wrong = (make_run(tmp_path / name, data, good=1.0) for name in ("right", "wrong"))
    odd = labels()
    odd[0, 0, 0] = 5
    write_nifti(wrong / "test" / "b_0.nii.gz", odd, AFFINE)
    score_folder(wrong / "test", data, wrong / "test", subjects=data.subjects)
    result = compare([right], [wrong], tmp_path / "out")
    largest = max(result["cases"], key=lambda row: row["difference"])
    assert largest["case"] == "b_0"
    page = write_comparison_report(tmp_path / "out", result, [right], [wrong]).read_text()
    assert f"Largest difference: b_0, {100 * largest['difference']:+.1f} Dice points" in page
