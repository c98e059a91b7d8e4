"""Reading ahead changes when items are made, and nothing else."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from medcl.store.ahead import Ahead
from medcl.store.crops import ReadDataset, StepBatches, crop_loader, join_reads
from medcl.store.volumes import open_volume, read_meta


def threads() -> int:
    return sum(thread.name == "medcl-read" for thread in threading.enumerate())


def ended(before: int) -> bool:
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    return threads() == before


def test_items_come_in_order_and_no_more_than_depth_ahead():
    made = []

    def source():
        for i in range(20):
            made.append(i)
            yield i

    seen = []
    for item in Ahead(source(), depth=2):
        seen.append(item)
        time.sleep(0.005)
        assert len(made) <= len(seen) + 2 + 1  # two ready and one in the hand of the thread
    assert seen == list(range(20))


def test_items_are_made_while_the_reader_is_busy():
    made = threading.Event()

    def source():
        yield 0
        made.set()
        yield 1

    items = iter(Ahead(source()))
    assert next(items) == 0
    assert made.wait(5)  # nobody has asked for the second item yet


def test_an_error_comes_out_where_its_item_would_have():
    def source():
        yield 1
        raise ValueError("damaged")

    items = iter(Ahead(source()))
    assert next(items) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(items)


def test_the_thread_ends_with_a_reader_that_stops_early():
    def forever():
        while True:
            yield 0

    before = threads()
    items = iter(Ahead(forever()))
    next(items)
    assert threads() == before + 1
    items.close()
    assert ended(before)


def test_batches_are_those_of_the_data_set(phantoms, tmp_path):
    import medcl

    stored, _ = medcl.prepare(medcl.PrepareConfig(str(phantoms), store=str(tmp_path)))
    dataset = ReadDataset([item.path for item in stored], (16, 16, 16), seed=3)
    batches = list(crop_loader(dataset, StepBatches(2, 0, 8)))
    assert len(batches) == 8
    for step, batch in enumerate(batches):
        alone = join_reads([dataset[number] for number in (2 * step, 2 * step + 1)])
        assert alone.keys() == batch.keys()
        assert all(torch.equal(alone[name], batch[name]) for name in alone)
    assert read_meta(stored[0].path) == open_volume(stored[0].path).meta


def test_a_thread_has_volumes_of_its_own(phantoms, tmp_path):
    import medcl

    stored, _ = medcl.prepare(medcl.PrepareConfig(str(phantoms), store=str(tmp_path)))
    path, others = stored[0].path, []
    thread = threading.Thread(target=lambda: others.append(open_volume(path)))
    thread.start()
    thread.join()
    assert open_volume(path) is open_volume(path)
    assert others[0] is not open_volume(path)
