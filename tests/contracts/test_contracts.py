"""Every pretext task on every backbone: one battery over all of them, as scikit-learn's `test_common.py`."""

from __future__ import annotations

import pytest
from battery import CHECKS, SWIN_CHECKS
from recipes import cases

from medcl.pretext.registry import TASKS, task_class

RUNS = [
    pytest.param(case, check, id=f"{case}-{check.__name__[6:]}")
    for case in cases()
    for check in (SWIN_CHECKS if case.backbone == "swin_unetr" else CHECKS)
]


@pytest.mark.parametrize(("case", "check"), RUNS)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_what_it_trains_and_documents_itself(task):
    kind = task_class(task)
    assert set(kind.trains) <= {"encoder", "decoder"} and kind.trains
    assert kind.__doc__ and kind.Options.__doc__ and "Attributes:" in kind.Options.__doc__
