"""A network divided over two processes takes the steps of a whole one, and so does its momentum teacher.

`make test` sees it in the two processes of `tests/contracts/test_contract_ranks.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_step import check

import medcl
from medcl.networks.backbones import BACKBONES

SCRIPT = Path(__file__).parents[1] / "contracts" / "sharded_step.py"


@pytest.mark.battery
@pytest.mark.parametrize("name", BACKBONES)
def test_a_divided_network_takes_the_steps_of_a_whole_one(name):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(medcl.__file__).parents[1])}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout.strip().splitlines()[-1]))
    assert "view tensor" not in done.stderr
