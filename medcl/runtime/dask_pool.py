"""The same tasks as `medcl.runtime.pool`, on the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from medcl.errors import MedclError
from medcl.runtime.pool import available_cores

Task = TypeVar("Task")
Result = TypeVar("Result")
WAIT = 30  # seconds for a scheduler to answer


def map_by_dask(
    function: Callable[[Task], Result], tasks: Sequence[Task], failed: Sequence[Result], address: str
) -> list[Result]:
    """`[function(task) for task in tasks]` over a cluster; a task that kills its worker loses only itself.

    Args:
        function: importable by name on every worker.
        tasks: picklable arguments; the paths in them must mean the same on every worker.
        failed: the result of each task whose worker dies.
        address: of the scheduler; or `local` for one process a core of this machine.

    Raises:
        MedclError: Dask is missing or does not answer, or a task raised one.
    """
    try:
        from distributed import Client, LocalCluster
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise MedclError("Dask is not installed", "--dask", 'pip install "medcl[dask]".') from None
    if not tasks:
        return []
    where: Any = address
    if address == "local":
        where = LocalCluster(n_workers=available_cores(), threads_per_worker=1, dashboard_address=None)
    try:
        client = Client(where, timeout=WAIT)
    except (OSError, ValueError) as error:
        raise MedclError(f"no Dask scheduler answers ({error})", address, "Check the address.") from None
    try:
        futures = client.map(function, tasks, pure=False, retries=1)
        results = list(failed)
        for index, future in enumerate(futures):
            try:
                results[index] = future.result()
            except KilledWorker:
                continue
        return results
    finally:
        client.close()
        if address == "local":
            where.close()
