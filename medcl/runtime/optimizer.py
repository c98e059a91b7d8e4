"""The optimiser and its schedule: AdamW, warm-up and cosine, and rates for what comes from a pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from medcl.runtime.run import log

# as in the release of Swin (Liu et al., ICCV 2021), `no_weight_decay_keywords`
POSITIONS = ("relative_position_bias_table",)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear rise over `warmup` of the steps, then half a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def decayed(parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases and the parameters of normalisation."""
    return parameter.ndim > 1


def adamw(
    module: torch.nn.Module, lr: float, weight_decay: float, steps: int, warmup: float,
    given: Collection[torch.nn.Parameter] = (), given_lr: float = 1.0, frozen: float = 0.0,
    shares: Mapping[torch.nn.Parameter, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """AdamW with warm-up and cosine for `configure_optimizers`; matrices and kernels alone are decayed.

    Args:
        module: whose parameters to train.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; biases, normalisation and tables of position have none.
        steps: of the run.
        warmup: share of them over which the rate rises.
        given: parameters that come from a pretraining.
        given_lr: their learning rate as a share of `lr`.
        frozen: share of the steps in which they stay as they are.
        shares: a further factor on the rate of some of them; see `layer_shares`.
    """
    # rate of a given parameter as a share of the others'
    own = {p: given_lr * (shares or {}).get(p, 1.0) for p in given}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    train = [p for _, p in named]
    tables = {p for name, p in named if name.endswith(POSITIONS)}
    groups: list[dict[str, Any]] = []
    factors: list[Callable[[int], float]] = []

    def late(step: int, share: float) -> float:
        return 0.0 if step < frozen * steps else share * warmup_cosine(step, steps, warmup)

    def usual(step: int) -> float:
        return warmup_cosine(step, steps, warmup)

    for decay in (True, False):
        for share in (None, *sorted(set(own.values()))):
            chosen = [p for p in train if (decayed(p) and p not in tables) == decay and own.get(p) == share]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay if decay else 0.0})
                factors.append(usual if share is None else partial(late, share=share))
    # fused where measured to help; on a GPU Lightning refuses to clip for it in 16 bits
    fused = all(p.device.type == "cpu" for p in train)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    # it would take scaled gradients, so Lightning refuses there too; but a CPU has bf16 alone, which is not scaled
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if tables:
        optimizer.register_load_state_dict_pre_hook(partial(_regroup_position_tables, train, tables))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)  # type: ignore[arg-type]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _regroup_position_tables(
    train: Sequence[torch.nn.Parameter], tables: Collection[torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> dict[str, Any] | None:  # fmt: skip
    """Regroups the state of a run that still decayed tables of position, so that it can be resumed."""
    now = [group["params"] for group in optimizer.param_groups]
    half = len(now) // 2  # decayed groups first, each with its counterpart in the second half
    at = {p: k % half for k, group in enumerate(now) for p in group}
    before = [[p for p in train if at[p] == k % half and (p.ndim > 1) == (k < half)] for k in range(len(now))]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes == [len(group) for group in now] or sizes != [len(group) for group in before]:
        return None
    log.info("Tables of position were decayed so far and no longer are.")
    number = {p: k for k, p in enumerate(p for group in now for p in group)}
    moved = {k: number[p] for k, p in enumerate(p for group in before for p in group)}
    groups = [{**old, "params": [number[p] for p in group]}
              for old, group in zip(state["param_groups"], now, strict=True)]  # fmt: skip
    return {**state, "state": {moved[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def layer_shares(
    stages: Sequence[Sequence[torch.nn.Module]], given: Collection[torch.nn.Parameter], decay: float
) -> dict[torch.nn.Parameter, float]:
    """Layer-wise decay of the learning rate: decay^k for the k-th given stage, counted from the output.

    What is closer to the image is more general and moves less (Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR
    2022). Only given parameters are slowed: a new decoder behind a pretrained encoder learns at the full rate.

    Args:
        stages: modules in the order of the data, as `Backbone.stages` gives them.
        given: parameters that come from a pretraining.
        decay: 1 for none.
    """
    known = set(given)
    pretrained = [found for stage in stages if (found := known & {p for m in stage for p in m.parameters()})]
    return {p: decay**k for k, stage in enumerate(reversed(pretrained), 1) for p in stage}
