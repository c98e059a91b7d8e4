"""Trial steps that leave no trace, and what an optimiser decays."""

from __future__ import annotations

import pytest
import torch

from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.runtime.optimizer import adamw
from medcl.runtime.training import preserved


class Little(torch.nn.Module):
    """A table of position beside an attention's other weights, as `swin_unetr` has them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.relative_position_bias_table = torch.nn.Parameter(torch.randn(5, 2))
        self.norm = torch.nn.BatchNorm1d(4)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) + self.relative_position_bias_table[: len(x)]


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_trial_steps_leave_no_trace_even_where_they_fail(error):
    torch.manual_seed(0)
    module = Little()
    module(torch.randn(4, 3)).sum().backward()
    before, drawn = state_of(module), torch.get_rng_state()
    grads = [p.grad.clone() for p in module.parameters()]

    def trial():
        with preserved(module):
            assert all(p.grad is None for p in module.parameters())
            module(torch.randn(4, 3)).square().sum().backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
            if error:
                raise error("out of memory")

    if error:
        with pytest.raises(error):
            trial()
    else:
        trial()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_tables_of_position_are_not_decayed():
    """As `no_weight_decay_keywords` of Swin's release; all other matrices are."""
    net = build_backbone(BackboneSpec("swin_unetr", width=12))
    groups = adamw(net, 1e-3, 0.1, 10, 0.1)["optimizer"].param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    tables = 0
    for name, parameter in net.named_parameters():
        table = name.endswith("relative_position_bias_table")
        tables += table
        assert (id(parameter) in free) == (table or parameter.ndim == 1), name
    assert tables == 8


@pytest.mark.parametrize("given", [False, True])
def test_a_run_that_still_decayed_its_tables_can_be_resumed(given, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(4, 3)

    def made(module, positions):
        with monkeypatch.context() as patch:
            patch.setattr("medcl.runtime.optimizer.POSITIONS", positions)
            known = list(module.first.parameters()) if given else ()
            return adamw(module, 1e-2, 0.1, 10, 0.1, known, 0.5)["optimizer"]

    module = Little()
    old = made(module, ("nothing",))
    for _ in range(3):
        module(x).square().sum().backward()
        old.step()
    again = Little()
    again.load_state_dict(module.state_dict())
    new = made(again, ("relative_position_bias_table",))
    new.load_state_dict(old.state_dict())
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(old.state[p]["exp_avg"], new.state[q]["exp_avg"])
        assert torch.equal(old.state[p]["exp_avg_sq"], new.state[q]["exp_avg_sq"])
    table = {id(again.relative_position_bias_table)}
    assert all((group["weight_decay"] > 0) == all(p.ndim > 1 and id(p) not in table for p in group["params"])
               for group in new.param_groups)  # fmt: skip
    third = made(again, ("relative_position_bias_table",))  # and a run of today's once more, as it is
    third.load_state_dict(new.state_dict())
    assert all(torch.equal(new.state[p]["exp_avg"], third.state[p]["exp_avg"]) for p in again.parameters())
