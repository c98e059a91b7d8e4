"""Samples of a batch side by side on a CPU's cores.

Samples do not depend on each other, so each core takes some of them through the whole chain without waiting for the
others: on two cores a quarter faster than sharing every operation (docs/results/performance.md).
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
    """`call(*tensors, params)`, the rows shared out among a CPU's cores, as many as torch uses.

    Args:
        call: works on every row by itself; gives tensors with leading dimension B.
        tensors: with leading dimension B.
        params: tensors with leading dimension B.

    Returns:
        What `call` returns, but for the order in which torch sums.
    """
    batch, cores = len(tensors[0]), torch.get_num_threads()
    if tensors[0].device.type != "cpu" or min(batch, cores) < 2:
        return call(*tensors, params)
    threads = min(batch, cores)
    share = -(-batch // threads)
    # each thread has these by itself
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    low, kind = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def one(start: int) -> tuple[Tensor, ...]:
        rows = slice(start, start + share)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", kind, low):
            return call(*(t[rows] for t in tensors), [{k: v[rows] for k, v in p.items()} for p in params])

    parts = list(_threads(threads, cores // threads).map(one, range(0, batch, share)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@functools.lru_cache(maxsize=8)
def _threads(count: int, cores: int) -> ThreadPoolExecutor:
    """Threads in which torch uses so many cores each."""
    whole, started = torch.get_num_threads(), Barrier(count)

    def settle() -> None:
        torch.get_num_threads()  # the first of these calls in a thread takes the process's number, also later
        torch.set_num_threads(cores)
        started.wait()

    pool = ThreadPoolExecutor(count, "medcl-rows")
    for done in [pool.submit(settle) for _ in range(count)]:
        done.result()
    torch.set_num_threads(whole)  # a thread's own setting is also what threads still to come begin with
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay behind
