"""What the benchmarks share: two or more ways of one job measured turn by turn, A B A B, in one run.

A machine that others use gives figures that mean little; a ratio taken round by round means something, because both
sides of a round saw the same neighbours. Each figure is a median over rounds with its lowest and highest value.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

Seconds = dict[str, list[float]]


def rounds_of(arms: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1, clock: str = "wall") -> Seconds:
    """Seconds of every arm in every round; the arms take turns, and `warm` rounds before are not counted.

    Args:
        arms: what to call. A call that returns a number has measured itself.
        rounds: that are counted.
        warm: rounds before them.
        clock: `wall`, or `cpu`: seconds of processor time of this process, which a busy machine changes less.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    spent: Seconds = {name: [] for name in arms}
    for number in range(-warm, rounds):
        for name, call in arms.items():
            began = now()
            own = call()
            if number >= 0:
                spent[name].append(own if isinstance(own, float) else now() - began)
    return spent


def spread(values: list[float], form: str = "{:.3g}") -> str:
    """`median (lowest to highest)`."""
    low, mid, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{mid} ({low} to {high})"


def ratios(spent: Seconds, slow: str, fast: str) -> list[float]:
    """How many times faster `fast` is than `slow`, round by round."""
    return [a / b for a, b in zip(spent[slow], spent[fast], strict=True)]


def tell(title: str, spent: Seconds, amount: float, unit: str, ours: str) -> dict[str, float]:
    """Prints rates and ratios; returns the median ratio of `ours` to each other arm."""
    print(f"\n{title}", flush=True)
    found = {}
    for name, values in spent.items():
        line = f"  {name:<34} {spread([amount / v for v in values])} {unit}"
        if name != ours:
            times = ratios(spent, name, ours)
            found[name] = statistics.median(times)
            line += f"   {ours} / this: {spread(times)}x"
        print(line, flush=True)
    return found


def verdict(what: str, value: float, bound: float, least: bool = True) -> bool:
    """Prints whether a figure keeps its bound."""
    kept = value >= bound if least else value <= bound
    print(f"  {'holds' if kept else 'FAILS'}: {what} {value:.3g} ({'at least' if least else 'at most'} {bound:g})")
    return kept


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process: its memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_mb() -> float:
    """The most resident memory this process has had, in MB; not `ru_maxrss`, which is inherited from the parent."""
    try:
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        return float("nan")


def begin(doc: str | None, *options: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Parses the options, sets the threads, and prints what the figures depend on."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, settings in options:
        parser.add_argument(name, **settings)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 takes one a core")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor time where one process does the work: for a busy machine",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    args = parser.parse_args()
    import torch

    from medcl.runtime.run import commit

    warnings.filterwarnings("ignore")  # of other packages, about what is not installed

    args.threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    print(f"commit {commit()}, torch {torch.__version__}, {args.threads} threads, load {load:.1f}, "
          f"{args.rounds} rounds, {args.clock} clock", flush=True)  # fmt: skip
    return args
