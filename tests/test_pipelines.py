"""The pipelines are of this version: they import, say what they take, and stay short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PIPELINES = sorted((Path(__file__).parents[1] / "pipelines").glob("*.py"))


def ended_with(path: Path, *args: object) -> object:
    """What the script gives to `SystemExit`; run in this process, for another would import everything once more."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", [str(path), *map(str, args)])
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_a_pipeline_imports_and_is_short(path, capsys):
    assert len(path.read_text().splitlines()) < 100
    assert ended_with(path, "--help") == 0 and "--out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chaitanya2020_acdc", "hippocampus_label_efficiency", "mil_ucsb"])
def test_a_missing_folder_is_told_in_one_line(name, tmp_path):
    path = Path(__file__).parents[1] / "pipelines" / f"{name}.py"
    told = str(ended_with(path, tmp_path / "nowhere", "--out", tmp_path / "out"))
    assert len(told.splitlines()) == 1 and "nowhere" in told
