"""A network divided over two processes takes the steps of a whole one, and so does its momentum teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import medcl

SCRIPT = Path(__file__).parents[1] / "contracts" / "sharded_step.py"


@pytest.mark.parametrize(
    "name", ["unet", *(pytest.param(name, marks=pytest.mark.battery) for name in ("dynunet", "swin_unetr"))]
)
def test_a_divided_network_takes_the_steps_of_a_whole_one(name):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(medcl.__file__).parents[1])}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["sharded"] and found["held"] < 0.6  # an uneven tensor's remainder is the first rank's
    assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-4)
    assert found["apart"] < 1e-5
    assert "view tensor" not in done.stderr
