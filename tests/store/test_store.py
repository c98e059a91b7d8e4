"""The store gives back what was put in, crop by crop, and a write is whole or absent."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medcl.errors import MedclError
from medcl.store import volumes as module
from medcl.store.crops import CropDataset, StepBatches, crop_loader, random_start, start_around
from medcl.store.volumes import StoredVolume, write_volume


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(70, 33, 20)).astype(np.float16)
    label = (rng.random(image.shape) > 0.98).astype(np.uint8) * 3
    points = {"3": np.argwhere(label == 3)[:50].tolist()}
    path = tmp_path_factory.mktemp("store") / "ab" / "abc"
    write_volume(path, image, label, {"case": "c", "foreground": points})
    return path, image, label


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(-5, 60)] * 3), st.tuples(*[st.integers(1, 40)] * 3))
def test_a_crop_is_the_slice_of_the_padded_volume(volume, start, size):
    path, image, label = volume
    start = [min(s, n - 1) for s, n in zip(start, image.shape, strict=True)]
    pad = [(100, 100)] * 3
    window = tuple(slice(s + 100, s + 100 + n) for s, n in zip(start, size, strict=True))
    opened = module.open_volume(path)
    np.testing.assert_array_equal(opened.image(start, size), np.pad(image, pad, mode="edge")[window])
    np.testing.assert_array_equal(opened.label(start, size), np.pad(label, pad)[window])


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_array", full)
    with pytest.raises(MedclError, match="the disk is full"):
        write_volume(tmp_path / "x", np.zeros((4, 4, 4)), None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_volume_says_what_to_delete(volume, tmp_path):
    path = tmp_path / "broken"
    write_volume(path, volume[1], None, {"case": "c", "foreground": {}})
    (path / "image.b2nd").write_bytes(b"junk")
    with pytest.raises(MedclError, match="damaged"):
        StoredVolume(path)


def test_starts_stay_inside_and_contain_the_voxel():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert all(0 <= s <= 10 for s in random_start((20, 20, 20), (10, 10, 10), rng))
        voxel = rng.integers(0, 20, 3)
        start = start_around(voxel, (20, 20, 20), (7, 7, 7), rng)
        assert all(s <= v < s + 7 and 0 <= s <= 13 for s, v in zip(start, voxel, strict=True))
    assert random_start((6, 20, 20), (10, 10, 10), rng)[0] == -2


def test_samples_depend_on_seed_and_number_only(volume):
    def dataset(seed):
        return CropDataset([volume[0]] * 3, (16, 16, 16), seed, labelled=True, foreground=0.5)

    first, again, other = dataset(1), dataset(1), dataset(2)
    [again[n] for n in (9, 2)]  # whatever was read before
    for name in ("image", "label", "seed"):
        assert torch.equal(first[7][name], again[7][name])
    assert not torch.equal(first[7]["seed"], other[7]["seed"])


def test_every_volume_comes_once_an_epoch(tmp_path):
    dataset = CropDataset([tmp_path / str(i) for i in range(7)], (4, 4, 4), 0)
    orders = [[dataset.volume_of(e * 7 + i).name for i in range(7)] for e in range(3)]
    assert all(sorted(order) == [str(i) for i in range(7)] for order in orders)
    assert orders[0] != orders[1]


def test_oversampled_crops_contain_a_label(volume):
    dataset = CropDataset([volume[0]], (4, 4, 4), 0, labelled=True, foreground=1.0)
    assert all(dataset[n]["label"].any() for n in range(30))


def test_resumed_batches_and_ranks_continue_one_sequence(volume):
    whole = [n for batch in StepBatches(4, 0, 6) for n in batch]
    assert [n for batch in StepBatches(4, 2, 6) for n in batch] == whole[8:]
    ranks = [list(StepBatches(2, 0, 6, rank, 2)) for rank in (0, 1)]
    assert [n for pair in zip(*ranks, strict=True) for batch in pair for n in batch] == whole
    loader = crop_loader(CropDataset([volume[0]], (8, 8, 8), 0), StepBatches(2, 1, 3))
    assert [tuple(batch["image"].shape) for batch in loader] == [(2, 1, 8, 8, 8)] * 2
