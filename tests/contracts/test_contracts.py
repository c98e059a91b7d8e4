"""Every pretext task on every backbone: one battery over all of them, as scikit-learn's `test_common.py`."""

from __future__ import annotations

from collections.abc import Callable

import battery
import pytest
from battery import CHECKS, SWIN_CHECKS, SWIN_IN_BF16
from recipes import Case, cases

from medcl.pretext.registry import TASKS, task_class

REPRESENTATIVES = {("voco", "dynunet"), ("pixcontrast", "swin_unetr")}


def marks(case: Case, check: Callable[[Case], None]) -> list[pytest.MarkDecorator]:
    """`make test` runs every task on `unet`, and one task on each other backbone; `make test-all` the rest."""
    small = (case.task, case.backbone) in REPRESENTATIVES and (case.backbone != "swin_unetr" or check in SWIN_CHECKS)
    plain = case.backbone == "unet" and not case.options
    return [] if small or plain else [pytest.mark.battery]


RUNS = [
    pytest.param(case, check, id=f"{case}-{check.__name__[6:]}", marks=marks(case, check))
    for case in cases()
    for check in CHECKS
] + [
    pytest.param(Case(task, "swin_unetr"), battery.check_half_precision_at_a_low_temperature, id=f"{task}-swin-bf16",
                 marks=pytest.mark.battery)
    for task in SWIN_IN_BF16
]  # fmt: skip


@pytest.mark.parametrize(("case", "check"), RUNS)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_what_it_trains_and_documents_itself(task):
    kind = task_class(task)
    assert set(kind.trains) <= {"encoder", "decoder"} and kind.trains
    assert kind.__doc__ and kind.Options.__doc__ and "Attributes:" in kind.Options.__doc__


@pytest.mark.parametrize("task", ["local_contrast", "pixpro"])
def test_a_loss_that_does_not_reach_the_decoder_is_found(task, monkeypatch):
    """The battery's check of gradients can fail."""
    case = Case(task, "unet")
    plain = type(case.network()).decode
    monkeypatch.setattr(type(case.network()), "decode", lambda *args: plain(*args).detach())
    with pytest.raises((AssertionError, RuntimeError)):
        battery.check_one_step(case)
