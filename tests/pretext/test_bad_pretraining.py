"""What cannot be pretrained on is told at start-up, by one clear line on the command line."""

from __future__ import annotations

import pytest

from medcl import cli
from medcl.config.parsing import parse
from medcl.dataset.phantom import write_phantoms

SMALL = ("--steps", "2", "--batch_size", "2", "--width", "4", "--accelerator", "cpu", "--precision", "32")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("scans"), 4, shape=(24, 24, 24))


@pytest.fixture(scope="module")
def one_scan(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("one"), 1, shape=(24, 24, 24))


def told(capsys, out, *args: str) -> str:
    code = cli.main(["pretrain", "--out", str(out), *SMALL, *map(str, args)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code, "it ran"
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize(
    "args,said",
    [
        (("--task", "simclr", "--options.temperature", "0"), "temperature is 0"),
        (("--task", "pixpro", "--options.temperature", "0"), "temperature is 0"),
        (("--task", "voco", "--options.crop_size", "[24, 24, 24]"), "a single base crop"),
        (("--task", "voco", "--options.grid", "[1, 1, 1]"), "a single base crop"),
        (("--task", "local_contrast", "--options.blocks", "9"), "9 decoder blocks"),
        (("--task", "pixpro", "--options.blocks", "9"), "9 decoder blocks"),
        (("--task", "global_contrast", "--options.partitions", "[1, 1, 99]"), "99 partitions"),
        (("--task", "global_contrast", "--options.partitions", "[1, 1, 1]"), "no negatives"),
        (("--task", "global_local", "--options.global_contrast.temperature", "0"), "temperature is 0"),
        (("--rank_weight", "-1"), "--rank_weight"),
    ],
    ids=" ".join,
)
def test_options_that_cannot_work(scans, tmp_path, capsys, args, said):
    line = told(capsys, tmp_path / "run", scans, *args)
    assert said in line and line.endswith(".")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["simclr", "dcl", "global_contrast"])
def test_a_batch_of_one_where_volumes_are_compared(scans, tmp_path, capsys, task):
    assert "2 volumes a step" in told(capsys, tmp_path / "run", scans, "--task", task, "--batch_size", "1")


@pytest.mark.parametrize("args", [("--task", "simclr"), ("--task", "voco", "--options.variant", "v2")], ids=" ".join)
def test_one_volume_where_two_are_needed(one_scan, tmp_path, capsys, args):
    assert "2 different volumes, and there is 1" in told(capsys, tmp_path / "run", one_scan, *args)


def test_volumes_smaller_than_the_crop_and_a_batch_of_one_are_told_and_trained_on(scans, tmp_path):
    run = tmp_path / "run"
    args = ["pretrain", str(scans), "--out", str(run), *SMALL, "--task", "mae", "--options.size", "[32, 32, 32]"]
    assert cli.main([*args, "--batch_size", "1"]) == 0
    told = [line for line in (run / "log.txt").read_text().splitlines() if "smaller than a read" in line]
    assert len(told) == 1 and "32 x 32 x 32" in told[0]


def test_stop_on_collapse_may_be_spelled_with_dashes():
    config = parse("pretrain", ("source",), "PretrainConfig", ["SCANS", "--out", "o", "--stop-on-collapse"])
    assert config.stop_on_collapse is True and config.source == "SCANS"


def test_options_of_a_part_are_numbers_and_names_on_the_command_line():
    flags = ["--options.global_contrast.temperature", "0.2", "--options.local_contrast.strategy", "LD"]
    config = parse("pretrain", ("source",), "PretrainConfig", ["SCANS", "--out", "o", *flags])
    assert config.options == {"global_contrast": {"temperature": 0.2}, "local_contrast": {"strategy": "LD"}}
