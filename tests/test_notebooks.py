"""The notebooks run from top to bottom, in a process of their own, as a reader would run them."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_without_output_and_imports_what_exists(path):
    cells = code_cells(path)
    assert cells and not any(cell["outputs"] for cell in cells)
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.battery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path):
    cells = code_cells(path)
    # process pools start anew from the script's path, so it must not run again on import
    body = "\n".join("".join(cell["source"]) for cell in cells).replace("\n", "\n    ")
    script = tmp_path / "cells.py"
    script.write_text(f"import matplotlib\nmatplotlib.use('Agg')\nif __name__ == '__main__':\n    {body}\n")
    call = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert call.returncode == 0, call.stderr[-2000:]
    assert "monai.networks.nets.UNet" in call.stdout
