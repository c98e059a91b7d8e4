"""Samples of a batch side by side on a CPU's cores.

Each sample is transformed by itself, so a core a share of the batch needs no waiting between one operation and the
next: two cores make views a quarter faster so than by sharing every operation (docs/results/performance.md).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from medcl.transforms.base import Params


def by_rows(
    call: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], params: Sequence[Params]
) -> tuple[Tensor, ...]:
    """`call(*tensors, params)`, the rows shared out among as many threads as torch has on a CPU.

    Args:
        call: works on every row by itself; gives tensors with leading dimension B.
        tensors: with leading dimension B.
        params: tensors with leading dimension B.

    Returns:
        What `call` returns, but for the order in which torch sums.
    """
    batch, threads = len(tensors[0]), torch.get_num_threads()
    if tensors[0].device.type != "cpu" or min(batch, threads) < 2:
        return call(*tensors, params)
    share = -(-batch // threads)
    graph = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # each thread has these by itself

    def one(start: int) -> tuple[Tensor, ...]:
        rows = slice(start, start + share)
        with torch.inference_mode(graph[1]), torch.set_grad_enabled(graph[0]):
            return call(*(t[rows] for t in tensors), [{k: v[rows] for k, v in p.items()} for p in params])

    parts = list(_threads(threads).map(one, range(0, batch, share)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each."""
    started = Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # the first of these calls in a thread takes the process's number, also later
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "medcl-rows")
    for done in [pool.submit(alone) for _ in range(count)]:
        done.result()
    torch.set_num_threads(count)  # a thread's own setting is also what threads still to come begin with
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay behind
