"""Reading ahead in a thread: decompression lets go of Python's lock, so reads hide behind the training step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

DEPTH = 2  # batches kept ready
WAIT = 0.1  # seconds between two looks at whether anyone still reads


class Ahead:
    """Iterates over `source` in a thread of its own, up to `depth` items ahead; order and items stay the same.

    An error in the source is raised where its item would have come. The thread ends with the iterator.
    """

    def __init__(self, source: Iterable[Any], depth: int = DEPTH):
        self.source, self.depth = source, depth

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[tuple[str, Any]] = queue.Queue(self.depth)
        stopped = threading.Event()
        items = iter(self.source)  # here, because making a DataLoader's iterator draws from the global generator
        threading.Thread(target=_fill, args=(items, ready, stopped), daemon=True, name="medcl-read").start()
        try:
            while True:
                kind, item = ready.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise item
                yield item
        finally:
            stopped.set()


def _fill(items: Iterator[Any], ready: queue.Queue[tuple[str, Any]], stopped: threading.Event) -> None:
    def put(kind: str, item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, item), timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put("item", item):
                return
        put("end", None)
    except BaseException as error:  # raised again by the reader
        put("error", error)
