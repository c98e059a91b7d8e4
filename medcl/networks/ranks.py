"""Joining the batches of several ranks, with gradient: one process with the joined batch gives the same step.

Every rank computes the loss of the whole batch. The gradient that comes back through a gather is summed over ranks and
so counts each rank's copy of that loss; the mean that DDP takes over ranks makes it the gradient of one loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, in the order of ranks: (n, ...) to (world * n, ...). Floats carry gradient.

    Every rank must hold equally many rows.
    """
    if world_size() == 1:
        return x
    x = x.contiguous()
    if x.is_floating_point() and x.requires_grad:
        return torch.cat(list(_Gather.apply(x)), dim=0)
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim=0)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, with gradient."""
    return x if world_size() == 1 else gather_rows(x[None]).sum(0)


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is the sum over ranks of what each of them asks of this rank's rows.

    By all_reduce, which every backend has; `torch.distributed.nn` needs reduce_scatter for it, which gloo lacks.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def, override]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        stacked = torch.stack(grads)
        dist.all_reduce(stacked)
        return stacked[dist.get_rank()]
