"""The pipelines are of this version: they import, say what they take, and stay short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PIPELINES = sorted((Path(__file__).parents[1] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_a_pipeline_imports_and_is_short(path):
    assert len(path.read_text().splitlines()) < 100
    call = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=120)
    assert call.returncode == 0 and "--out" in call.stdout


@pytest.mark.parametrize("name", ["chaitanya2020_acdc", "hippocampus_label_efficiency", "mil_ucsb"])
def test_a_missing_folder_is_told_in_one_line(name, tmp_path):
    path = Path(__file__).parents[1] / "pipelines" / f"{name}.py"
    call = [sys.executable, str(path), str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "nowhere" in done.stderr
