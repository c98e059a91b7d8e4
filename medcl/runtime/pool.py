"""A process pool that outlives its workers: a task that kills its process loses only itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

FEWEST = 48  # below this many tasks, starting processes costs more than it saves


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_safely(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    failed: Sequence[Result],
    workers: int | None = None,
    title: str | None = None,
    fewest: int = FEWEST,
    chunk: int = 0,
) -> list[Result]:
    """`[function(task) for task in tasks]` over processes.

    Args:
        function: importable by name, because processes are spawned (forking is unsafe once torch has threads).
        tasks: picklable arguments.
        failed: the result of each task whose process dies.
        workers: processes; by default one per available core. With 1, or few tasks, everything runs in this process.
        title: shown beside a progress bar; no bar if None.
        fewest: tasks below which everything runs in this process.
        chunk: tasks handed to a process at a time; 0 chooses. 1 for long tasks of unlike length.
    """
    workers = min(workers or available_cores(), len(tasks))
    with _Bar(title, len(tasks)) as bar:
        if workers <= 1 or len(tasks) < fewest:
            return [bar.step(function(task)) for task in tasks]
        results = list(failed)
        size = chunk or max(1, min(64, len(tasks) // (4 * workers)))
        chunks = [range(start, min(start + size, len(tasks))) for start in range(0, len(tasks), size)]
        left = _run(function, tasks, chunks, results, workers, bar)
        while left:
            # A lone worker takes one task after the other, so the first left over is the one that killed it.
            left = _run(function, tasks, [range(index, index + 1) for index in left], results, 1, bar)[1:]
        return results


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keeps new processes from running the user's script again, which they would to find functions defined in it.

    Ours are importable, and a script without a main guard would start everything once more in every worker.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    chunks: Sequence[range],
    results: list[Result],
    workers: int,
    bar: _Bar,
) -> list[int]:
    """Fills `results` chunk by chunk; returns the indices left over when a worker died."""
    left = []
    spawn = multiprocessing.get_context("spawn")
    with _main_hidden(), ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures: dict[Future[list[Result]], range] = {}
        for position, chunk in enumerate(chunks):
            try:
                futures[pool.submit(_chunk, function, [tasks[index] for index in chunk])] = chunk
            except BrokenProcessPool:
                left += [index for later in chunks[position:] for index in later]
                break
        for future in as_completed(futures):
            chunk = futures[future]
            try:
                results[chunk.start : chunk.stop] = future.result()
                bar.step(None, len(chunk))
            except BrokenProcessPool:
                left += list(chunk)
    return sorted(left)


def _chunk(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]


class _Bar:
    """A progress bar, or nothing."""

    def __init__(self, title: str | None, total: int):
        self.title, self.total = title, total

    def __enter__(self) -> _Bar:
        if self.title is not None:
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), transient=True)
            self.progress.start()
            self.id = self.progress.add_task(self.title, total=self.total)
        return self

    def step(self, result: Result, count: int = 1) -> Result:
        if self.title is not None:
            self.progress.advance(self.id, count)
        return result

    def __exit__(self, *_: object) -> None:
        if self.title is not None:
            self.progress.stop()
