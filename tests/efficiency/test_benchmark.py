"""The benchmark: a fair grid, what is done is not done again, and sums that a loop over subjects gives too."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runs import make_data, make_run

import medcl
from medcl.cli import main
from medcl.config import BenchmarkConfig, FinetuneConfig
from medcl.efficiency.grid import make_grid
from medcl.efficiency.table import rows_by_key, summarise, table, write_summary
from medcl.errors import MedclError
from medcl.report.benchmark import write_benchmark_report
from medcl.runtime.files import read_json
from medcl.runtime.run import changes, write_config
from medcl.store.signature import subject_hash

VOCO = {"task": "voco", "options": {"hidden": 16, "embedding": 8, "crops": 2}}
ARMS = {"scratch": {}, "voco": {"pretrain": VOCO}, "slow": {"pretrain": "voco", "finetune": {"pretrained_lr": 0.1}}}


def config_of(out="out", **more) -> BenchmarkConfig:
    return BenchmarkConfig("scans", str(out), **{"arms": ARMS, "labels": [1, 2], "draws": 2, **more})


def test_arms_share_draws_and_schedule_and_differ_in_their_start_only():
    grid = make_grid(config_of(finetune={"steps": 7, "precision": 32}, by_labels={2: {"steps": 9}}))
    assert list(grid.encoders) == ["voco"] and len(grid.cells) == 3 * 2 * 2
    for labels, steps in (("1", 7), ("2", 9)):
        for draw in range(2):
            arms = {c.arm: c.config for c in grid.cells if (c.labels, c.draw) == (labels, draw)}
            assert arms["scratch"].init == "none" and arms["scratch"].steps == steps
            assert arms["voco"].init == arms["slow"].init == grid.encoders["voco"].out
            assert replace(arms["voco"], init="none", out="") == replace(arms["scratch"], out="")
            assert arms["slow"].pretrained_lr == 0.1 and arms["scratch"].precision == "32"


def test_an_arm_may_have_fewer_cells_and_semi_supervision_has_none_where_everyone_is_labelled():
    arms = {"scratch": {}, "st": {"finetune": {"semi": "self_training"}}, "few": {"labels": [2]}}
    grid = make_grid(config_of(arms=arms, labels=["2", "all"], by_labels={"all": {"draws": 1}}))
    cells = sorted((c.arm, c.labels, c.draw) for c in grid.cells)
    two = [(arm, "2", draw) for arm in ("few", "scratch", "st") for draw in range(2)]
    assert cells == sorted([*two, ("scratch", "all", 0)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arms": {}}, "no arms"),
        ({"baseline": "scrach"}, "Did you mean 'scratch'"),
        ({"arms": {"scratch": {"finetune": {"steps": 900}}}}, "same for every arm"),
        ({"arms": {"scratch": {"augment": "none"}}}, "unknown key 'augment'"),
        ({"arms": {"scratch": {}, "b": {"pretrain": "voc0"}}}, "no arm with a pretraining"),
        ({"arms": {"scratch": {}, "b": {"pretrain": {"taks": "voco"}}}}, "Did you mean 'task'"),
        ({"arms": {"scratch": {}, "../b": {}}}, "name of a folder"),
        ({"arms": {"scratch": {"labels": [1]}}}, "baseline is run at every"),
        ({"arms": {"scratch": {}, "b": {"labels": [5]}}}, "not all among"),
        ({"finetune": {"draw": 3}}, "set by the benchmark"),
        ({"by_labels": {4: {"steps": 3}}}, "not among the labels"),
        ({"subjects": "train"}, "--subjects: .train. cannot be used"),
        ({"draws": 0}, "--draws: 0 cannot be used"),
        ({"labels": [2, "2"]}, "stands there twice"),
        ({"labels": ["two"]}, "no number of labelled subjects"),
        ({"labels": [0]}, "no number of labelled subjects"),
        ({"arms": {"scratch": {}, "b": {"labels": 2}}}, "is no list"),
        ({"arms": {"scratch": {}, "b": {"finetune": None}}}, "not a list of `key: value`"),
    ],
)
def test_what_is_no_comparison_is_refused_in_one_line(options, said):
    with pytest.raises(MedclError, match=said):
        make_grid(config_of(**options))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    manifest = make_data(folder / "data", subjects=tuple("abcdefgh"), frames=2)
    good = {"scratch": 0.3, "voco": 0.8, "slow": 0.3}
    for number, cell in enumerate(make_grid(config_of(folder / "out", labels=["1", "all"], draws=3)).cells):
        seed = number if cell.arm != "slow" else 100 + number
        make_run(Path(cell.config.out), manifest, draw=cell.draw, labels=cell.labels, good=good[cell.arm], seed=seed)
    return folder


@pytest.fixture
def scored(tmp_path, made):
    """A benchmark whose runs are made up: `voco` is better than scratch, `slow` as good as it."""
    shutil.copytree(made / "out", tmp_path / "out")
    config = config_of(tmp_path / "out", labels=["1", "all"], draws=3)
    return config, make_grid(config)


def test_the_sums_are_those_of_a_loop_over_draws_and_subjects(scored):
    config, grid = scored
    result = summarise(config, grid)
    for entry in result["entries"]:
        values: dict[str, list[float]] = {}
        for draw in range(config.draws):
            by_arm = {}
            for arm in (entry["arm"], "scratch"):
                run = Path(config.out) / "runs" / f"{arm}-{entry['labels']}-{draw}"
                with open(run / "test" / "evaluation.csv") as stream:
                    by_arm[arm] = [(row["subject"], float(row["dice"])) for row in csv.DictReader(stream)]
            for subject in "abcdefgh":
                mean = {arm: np.mean([d for s, d in rows if s == subject]) for arm, rows in by_arm.items()}
                values.setdefault("own", []).append(mean[entry["arm"]])
                values.setdefault("gap", []).append(mean[entry["arm"]] - mean["scratch"])
        assert entry["dice"]["estimate"] == pytest.approx(np.mean(values["own"]))
        if entry["arm"] != "scratch":
            assert entry["difference"]["estimate"] == pytest.approx(np.mean(values["gap"]))
            assert entry["p_holm"] >= entry["difference"]["p"]
        scratch = next(e for e in result["entries"] if (e["arm"], e["labels"]) == ("scratch", "all"))
        assert entry["share_of_all"] == pytest.approx(entry["dice"]["estimate"] / scratch["dice"]["estimate"])


def test_a_planted_difference_is_found_and_none_is_invented(scored):
    result = summarise(*scored)
    verdicts = {(e["arm"], e["labels"]): e["verdict"] for e in result["entries"] if "verdict" in e}
    assert verdicts["voco", "1"] == verdicts["voco", "all"] == "ahead"
    assert verdicts["slow", "1"] == verdicts["slow", "all"] == "undecided"
    told = next(line for line in result["sentences"] if line.startswith("voco at 1 label:"))
    assert "3 draws x 8 subjects: ahead of scratch" in told


def edit(run: Path, change) -> None:
    """Changes the rows of a run's scores; a row for which `change` gives None is taken out."""
    path = run / "test" / "evaluation.csv"
    with open(path, newline="") as stream:
        lines = list(csv.DictReader(stream))
    kept = [new for line in lines if (new := change(dict(line))) is not None]
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(kept)


def entry_of(result, arm, labels):
    return next(e for e in result["entries"] if (e["arm"], e["labels"]) == (arm, labels))


def test_what_one_arm_invents_counts_in_both(scored):
    """Where the reference lacks a class, predicting none of it counts 1 as soon as another run invents it."""
    config, grid = scored

    def absent(row):
        lacks = row["class"] == "2" and row["subject"] == "a"
        return {**row, "outcome": "absent", **dict.fromkeys(("dice", "nsd", "hd95"), "")} if lacks else row

    def invented(row):
        lacks = row["class"] == "2" and row["subject"] == "a"
        return {**row, "outcome": "invented", "dice": "0", "nsd": "0", "hd95": ""} if lacks else row

    for arm in ("scratch", "voco", "slow"):
        for labels in ("1", "all"):
            for run in grid.runs(arm, labels):
                edit(run, absent)
    before = summarise(config, grid)
    for run in grid.runs("voco", "1"):
        edit(run, invented)
    after = summarise(config, grid)
    gaps = [entry_of(result, "voco", "1")["difference"]["estimate"] for result in (before, after)]
    front = [
        [np.mean([float(row["dice"]) for row in csv.DictReader((run / "test" / "evaluation.csv").open())
                  if row["subject"] == "a" and row["class"] == "1"]) for run in grid.runs(arm, "1")]
        for arm in ("voco", "scratch")
    ]  # fmt: skip
    of_a = np.mean(front[0]) - np.mean(front[1])
    assert gaps[1] - gaps[0] == pytest.approx(((of_a - 1) / 2 - of_a) / 8)


@pytest.mark.parametrize("arm", ["scratch", "voco"])
def test_a_case_that_was_not_scored_is_left_out_of_both_arms_and_told(arm, scored):
    config, grid = scored
    edit(grid.runs(arm, "1")[0], lambda row: None if row["subject"] == "c" else row)
    result = summarise(config, grid)
    assert entry_of(result, "voco", "1")["difference"]["n_subjects"] == 7
    assert entry_of(result, "voco", "all")["difference"]["n_subjects"] == 8
    (warning,) = result["warnings"]
    assert warning.startswith(f"{arm} at 1 label, draw 0: 2 cases not scored, such as c_0")


def test_a_baseline_without_any_overlap_is_no_error(scored):
    config, grid = scored
    for run in grid.runs("scratch", "all"):
        edit(run, lambda row: {**row, "dice": "0"})
    result = summarise(config, grid)
    assert {entry["share_of_all"] for entry in result["entries"]} == {None}
    write_summary(Path(config.out), result, rows_by_key(config, grid))


@pytest.mark.parametrize("draws", [1, 2])
def test_few_draws_are_too_few_to_say(draws, scored):
    few = replace(scored[0], draws=draws)
    result = summarise(few, make_grid(few))
    assert {e["verdict"] for e in result["entries"] if "verdict" in e} == {"few draws"}


def test_a_row_for_every_subject_class_arm_number_and_draw(scored):
    config, grid = scored
    rows = rows_by_key(config, grid)
    assert len(rows) == 3 * 2 * 3 and all(len(of_cell) == 8 * 2 * 2 for _, of_cell in rows)


def test_the_page_shows_the_table_and_both_figures(scored):
    config, grid = scored
    out = Path(config.out)
    (out / "config.yaml").write_text(json.dumps({"arms": ARMS, "finetune": {}, "by_labels": {}, "pretrain": {}}))
    result = summarise(config, grid)
    page = write_benchmark_report(out, result).read_text()
    assert page.count("<img") == 3 and all(line[2].split()[0] in page for line in table(result)[1])


def test_a_benchmark_by_one_command_goes_on_where_it_stopped(tmp_path, phantoms, capsys):
    recipe = tmp_path / "bench.yaml"
    text = """
    arms: {scratch: {}, voco: {pretrain: {task: voco, options: {hidden: 16, embedding: 8, crops: 2}}}}
    labels: [1, 2]
    draws: 1
    pretrain: {steps: 3, batch_size: 2, width: 4}
    finetune: {steps: 2, batch_size: 2, width: 4}
    parallel: 1
    """
    recipe.write_text(text.replace("    ", "", 0))
    call = ["benchmark", str(recipe), str(phantoms), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    first = read_json(tmp_path / "out" / "benchmark.json")
    assert len(first["entries"]) == 4 and "Dice points" in capsys.readouterr().out
    runs = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 4
    split = {run.name: read_json(run / "split.json") for run in runs}
    for labels in "12":
        assert split[f"scratch-{labels}-0"] == split[f"voco-{labels}-0"]
    assert set(split["voco-1-0"]["labelled"]) < set(split["voco-2-0"]["labelled"])
    pretrained = set(read_json(tmp_path / "out" / "encoders" / "voco" / "weights" / "contract.json")["subjects"])
    held = map(subject_hash, (*split["voco-1-0"]["test"], *split["voco-1-0"]["val"]))
    assert pretrained == set(map(subject_hash, split["voco-1-0"]["train"])) and not pretrained & set(held)

    times = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    lost = tmp_path / "out" / "runs" / "voco-2-0" / "test" / "evaluation.json"
    lost.unlink()
    assert main(call) == 0
    after = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*") if path.is_file()}
    changed = {path for path in times if after.get(path) != times[path]}
    assert lost in changed and all(path.parent == lost.parent or path.name == "log.txt" for path in changed)
    assert read_json(tmp_path / "out" / "benchmark.json")["entries"] == first["entries"]

    recipe.write_text(text.replace("steps: 2,", "steps: 4,"))
    assert main(call) == 2 and "was run with another steps" in capsys.readouterr().err
    call[2] = str(tmp_path)
    assert main(call) == 2 and f"holds a benchmark of {phantoms}" in capsys.readouterr().err


def test_a_run_of_an_older_version_stands_where_new_settings_are_at_their_defaults(tmp_path):
    config = FinetuneConfig("scans", str(tmp_path))
    write_config(tmp_path, "finetune", config)
    old = "".join(line for line in (tmp_path / "config.yaml").open() if not line.startswith("pretrained_lr"))
    (tmp_path / "config.yaml").write_text(old)
    assert changes(tmp_path, config, "finetune") == []
    assert changes(tmp_path, replace(config, pretrained_lr=0.5), "finetune") == ["pretrained_lr"]


def test_it_can_be_called_from_python():
    assert medcl.benchmark.__name__ == "benchmark" and medcl.BenchmarkConfig is BenchmarkConfig


def test_only_arms_whose_encoder_is_missing_wait_for_it(tmp_path, phantoms, monkeypatch):
    import medcl.efficiency.stage as module

    class Enough(Exception):
        pass

    rounds = []

    def run(tasks, at_once):
        rounds.append({Path(task.config.out).name for task in tasks})
        if len(rounds) == 2:
            raise Enough
        return []

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "_done", lambda task: Path(task.config.out).name == "old")
    arms = {"scratch": {}, "old": {"pretrain": {"steps": 2}}, "new": {"pretrain": {"steps": 3}}}
    with pytest.raises(Enough):
        medcl.benchmark(BenchmarkConfig(str(phantoms), str(tmp_path / "out"), arms, ["2"], draws=1))
    assert rounds == [{"old", "new", "scratch-2-0", "old-2-0"}, {"new-2-0"}]


def test_an_error_that_nobody_foresaw_ends_one_training_only(tmp_path, monkeypatch, capsys):
    import medcl.efficiency.stage as module

    def steps(task, run):
        if run.name == "bad":
            raise ValueError("who\nknows")
        return "done"

    monkeypatch.setattr(module, "_steps", steps)
    tasks = [module._Task(FinetuneConfig("s", str(tmp_path / name)), "test", 1) for name in ("bad", "good")]
    assert module._run(tasks, 1) == [f"{tmp_path / 'bad'}: ValueError: who knows"]
    assert "good: done" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "bad" / "log.txt").read_text()


@pytest.mark.parametrize("text", ["a: [", "- 1\n"])
def test_a_recipe_that_is_no_recipe_is_told_by_its_file(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(MedclError, match=r"recipe\.yaml"):
        make_grid(config_of(arms={"scratch": {}, "b": {"pretrain": {"config": str(path)}}}))
