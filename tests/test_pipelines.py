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
