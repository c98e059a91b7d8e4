"""The command line: fast help, one-line errors, flags and YAML into the same config."""

from __future__ import annotations

import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from medcl import cli
from medcl.config import FinetuneConfig
from medcl.config.parsing import parse
from medcl.errors import MedclError


def run(*args: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "medcl.cli", *args], capture_output=True, text=True, **more)


def finetune(*args: str) -> FinetuneConfig:
    return parse("finetune", ("source",), "FinetuneConfig", list(args))


def test_help_answers_in_half_a_second():
    took = []
    for _ in range(3):
        began = time.perf_counter()
        answer = run("--help")
        took.append(time.perf_counter() - began)
        assert answer.returncode == 0
    assert min(took) < 0.5
    for name in cli.COMMANDS:
        assert name in answer.stdout


def test_import_medcl_loads_nothing_heavy():
    code = "import medcl, sys; print(sorted({'torch','monai','numpy','jsonargparse'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_every_option(name, capsys):
    import dataclasses

    import medcl.config

    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(getattr(medcl.config, cli.COMMANDS[name][2])):
        assert f"--{field.name}" in shown


def test_positional_arguments_flags_and_dashes():
    config = finetune("SCANS", "--out", "o", "--labels", "2", "--val-every=7", "--flip", "--lr", "1e-4")
    assert config == FinetuneConfig("SCANS", "o", labels="2", val_every=7, flip=True, lr=1e-4)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\nlr: 0.5\nout: somewhere\n")
    config = finetune("SCANS", "--config", str(path), "--steps", "9")
    assert (config.steps, config.lr, config.out) == (9, 0.5, "somewhere")


def test_options_of_the_task_are_nested():
    config = parse("pretrain", ("source",), "PretrainConfig", ["S", "--out", "o", "--options.momentum", "0.5"])
    assert float(config.options["momentum"]) == 0.5


def test_lists_take_several_values():
    config = parse("compare", ("runs",), "CompareConfig", ["a", "b", "--baseline", "c", "d", "--out", "o"])
    assert (config.runs, config.baseline) == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    "recipe", sorted((cli.Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_understood(recipe):
    words = 2 if recipe.stem.startswith("mil") else 1
    command = " ".join(recipe.stem.split("_")[:words])
    _, positional, kind, _ = cli.COMMANDS[command]
    loose = [str(recipe), "SOURCE"] if "config" in positional else ["SOURCE", "--config", str(recipe)]
    parse(command, positional, kind, [*loose, "--out", "o"])


@pytest.mark.parametrize(
    "args,told",
    [
        (["finetune", "S", "--out", "o", "--label", "2"], "Did you mean 'labels'"),
        (["finetune", "S", "--out", "o", "--steps", "many"], "steps"),
        (["finetune", "S"], "out missing|out"),
        (["finetun"], "Did you mean 'finetune'"),
        (["finetune", "S", "T", "--out", "o"], "too many arguments"),
        (["finetune", "S", "--out"], "needs a value"),
        (["scan", "no/such/folder"], "no/such/folder"),
        (["evaluate", "no/such/folder"], "no such folder"),
        (["report", "."], "config.yaml"),
        (["export", "."], "no weights"),
        (["compare", "--out", "x", "a", "--baseline", "b"], "a"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(args, told, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("medcl: error:") and re.search(told, lines[0])
    assert "unexpected" not in lines[0]


def test_an_unknown_key_names_file_and_neighbour(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("step: 7\n")
    with pytest.raises(MedclError, match=r"c\.yaml: unknown key 'step'. Did you mean 'steps'"):
        finetune("S", "--config", str(path))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n"])
def test_a_broken_config_file_is_one_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MedclError, match=r"c\.yaml"):
        finetune("S", "--config", str(path))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_tells_the_options_of_the_command_and_no_others(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert "print_config" not in told and "Print the configuration" not in told and "  [--" not in told
    assert "--config" in told
    if name == "evaluate":
        assert told.startswith("usage: medcl evaluate PREDICTIONS [REFERENCE] [--option VALUE ...]")


def test_a_benchmark_finds_its_recipes_from_anywhere(tmp_path, monkeypatch):
    """What lies where the command runs comes first, then what lies beside the benchmark's file and one folder up."""
    configs, here = tmp_path / "configs", tmp_path / "here"
    configs.mkdir()
    here.mkdir()
    (configs / "task.yaml").write_text("task: voco\n")
    named = "{config: configs/task.yaml, steps: 7}"
    arms = f"{{a: {{pretrain: {named}}}, b: {{pretrain: {{config: task.yaml}}}}, c: {{pretrain: a}}, d: {{}}}}"
    (configs / "b.yaml").write_text(f"arms: {arms}\n")
    monkeypatch.chdir(here)

    def recipes():
        config = parse("benchmark", ("config", "source"), "BenchmarkConfig", [str(configs / "b.yaml"), "S", "--out=o"])
        return config.arms["a"]["pretrain"], config.arms["b"]["pretrain"]["config"], config.arms["c"]["pretrain"]

    beside = str(configs / "task.yaml")
    assert recipes() == ({"config": beside, "steps": 7}, beside, "a")
    (here / "task.yaml").write_text("task: mae\n")
    assert recipes()[1] == "task.yaml"


def test_debug_shows_the_traceback(tmp_path):
    answer = run("scan", str(tmp_path / "none"), "--debug")
    assert answer.returncode != 0 and "Traceback" in answer.stderr


def test_what_nobody_foresaw_is_still_one_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "scan", ("", ("source",), "ScanConfig", lambda config: 1 / 0))
    assert cli.main(["scan", "x"]) == 2
    error = capsys.readouterr().err.strip()
    assert "ZeroDivisionError" in error and "--debug" in error and "\n" not in error


def test_scan_then_pretrain_on_a_folder_with_bad_volumes(tmp_path, phantoms, capsys, monkeypatch):
    import shutil

    folder = tmp_path / "scans"
    shutil.copytree(phantoms / "imagesTr", folder)
    files = sorted(folder.glob("*.nii.gz"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:500])
    affine = np.eye(4)
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 3, np.int16), affine), folder / "constant.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 9), np.int16), affine), folder / "flat.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9, 2), np.int16), affine), folder / "fourd.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scan", str(folder), "--out", str(tmp_path / "m.json")]) == 0
    shown = capsys.readouterr().out
    for name in (files[0].name, files[1].name, "constant.nii.gz", "flat.nii.gz", "fourd.nii.gz"):
        assert name in shown
    out = tmp_path / "run"
    options = ["--options.hidden=8", "--options.embedding=4", "--options.size=[16, 16, 16]", "--batch_size=2"]
    assert cli.main(["pretrain", str(folder), "--out", str(out), "--steps", "2", "--width", "4", *options]) == 0
    assert list((out / "weights").glob("*.safetensors")) and (out / "report.html").exists()
