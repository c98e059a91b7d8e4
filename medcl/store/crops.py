"""Random crops from the store. A crop is a function of (seed, sample number): workers and restarts change nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medcl.store.ahead import Ahead
from medcl.store.volumes import StoredVolume, open_volume


def random_start(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """First voxel of a crop anywhere inside; an axis shorter than the crop is centred in it (a negative start)."""
    return [
        int(rng.integers(0, extent - n + 1)) if extent >= n else -((n - extent) // 2)
        for extent, n in zip(shape, size, strict=True)
    ]


def start_around(
    voxel: Sequence[int], shape: Sequence[int], size: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """First voxel of a crop that contains `voxel` at a random place inside it, kept inside the volume where it fits."""
    starts = []
    for v, extent, n in zip(voxel, shape, size, strict=True):
        if extent < n:
            starts.append(-((n - extent) // 2))
        else:
            starts.append(int(np.clip(v - rng.integers(0, n), 0, extent - n)))
    return starts


class Places(Protocol):
    """Where in a volume a pretext task reads."""

    @property
    def count(self) -> int:
        """Reads a volume."""

    def __call__(self, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """First voxels of `count` reads of `size` in a volume of `shape`."""


class CropDataset(Dataset):
    """Sample number to crop.

    Args:
        volumes: folders of the store.
        size: voxels of a crop.
        seed: of the order of volumes and the places.
        labelled: read labels too.
        foreground: share of the crops that must contain a voxel of a label drawn at random, so that small structures
            are seen (nnU-Net oversamples a third).
        margin: voxels that are read beyond the crop on either side of each axis, for augmentation to move in.

    A sample is a dict with `image` (1, X, Y, Z) float32, `label` (1, X, Y, Z) where asked for, uint8, or int32 where
    the volume holds values above 255, `seed`, `start` (3,) first voxel of the read in the volume, and `extent` (3,)
    voxels of the volume. A read reaches beyond the volume where the margin does or the volume is smaller:
    `medcl.transforms.inside` tells where it holds data.
    """

    def __init__(
        self, volumes: Sequence[Path], size: Sequence[int], seed: int, labelled: bool = False, foreground: float = 0.0,
        margin: Sequence[int] = (0, 0, 0),
    ):  # fmt: skip
        self.volumes, self.size, self.seed = list(volumes), tuple(size), seed
        self.labelled, self.foreground, self.margin = labelled, foreground, tuple(margin)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def volume_of(self, number: int) -> Path:
        """The sample's volume."""
        return self.volumes[self.index_of(number)]

    def index_of(self, number: int) -> int:
        """Index of the sample's volume: every volume once an epoch, in an order of that epoch's own."""
        epoch, place = divmod(number, len(self.volumes))
        order = self._order  # read once: another thread may be an epoch ahead
        if order[0] != epoch:
            order = (epoch, np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.volumes)))
            self._order = order
        return int(order[1][place])

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 2, number])
        volume = open_volume(self.volume_of(number))
        start = [s - beyond for s, beyond in zip(self._start(volume, rng), self.margin, strict=True)]
        read = [n + 2 * beyond for n, beyond in zip(self.size, self.margin, strict=True)]
        sample = {
            "image": read_images(volume, [start], read)[0],
            "seed": torch.tensor(int(rng.integers(0, 2**62))),
            "start": torch.tensor(start),
            "extent": torch.tensor(volume.shape),
        }
        if self.labelled:
            label = volume.label(start, read)
            # torch cannot index by uint16
            sample["label"] = torch.from_numpy(label if label.dtype == np.uint8 else label.astype(np.int32))[None]
        return sample

    def _start(self, volume: StoredVolume, rng: np.random.Generator) -> list[int]:
        if self.foreground and rng.random() < self.foreground:
            points = volume.foreground
            if points:
                voxels = points[sorted(points)[rng.integers(len(points))]]
                return start_around(voxels[rng.integers(len(voxels))], volume.shape, self.size, rng)
        return random_start(volume.shape, self.size, rng)


class Anywhere:
    """One read a volume, at a random place."""

    count = 1

    def __call__(self, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """First voxels of the reads of a volume of `shape`."""
        return [random_start(shape, size, rng)]


class Partitions:
    """One read for every cell of a grid over the volume, its centre at a random place in the cell.

    The volume is divided as in Chaitanya et al. (NeurIPS 2020): cell k of g spans the voxels from k * floor(n / g) on,
    and what is left over at the far end is not sampled. A read that would stick out is moved inside.

    Args:
        grid: cells along each axis; an axis with one cell is read anywhere.
    """

    def __init__(self, grid: Sequence[int]):
        self.grid = tuple(grid)

    @property
    def count(self) -> int:
        """Reads of a volume: the number of cells in the grid."""
        return math.prod(self.grid)

    def __call__(self, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """First voxels of the reads of a volume of `shape`, the last axis of the grid fastest.

        An axis with fewer voxels than cells gives several cells the same voxel.
        """
        starts = []
        for cell in itertools.product(*map(range, self.grid)):
            start = random_start(shape, size, rng)
            for axis, (k, g) in enumerate(zip(cell, self.grid, strict=True)):
                n, extent = size[axis], shape[axis]
                if g > 1 and extent > n:
                    first, last = (
                        (k * (extent // g), (k + 1) * (extent // g)) if extent >= g else (k * extent // g,) * 2
                    )
                    centre = int(rng.integers(first, max(last, first + 1)))
                    start[axis] = min(max(centre - n // 2, 0), extent - n)
            starts.append(start)
        return starts

    def distinct(self, shape: Sequence[int], size: Sequence[int]) -> bool:
        """Whether reads at the middle of every cell start at different voxels: else cells show the same."""
        for g, extent, n in zip(self.grid, shape, size, strict=True):
            middles = [k * (extent // g) + (extent // g) // 2 - n // 2 for k in range(g)]
            if g > 1 and len({min(max(start, 0), extent - n) for start in middles if extent > n}) < g:
                return False
        return True


class ReadDataset(Dataset):
    """Sample number to the reads of one volume that a pretext task asks for.

    Args:
        volumes: folders of the store.
        size: voxels of a read.
        seed: of the order of volumes and the places.
        places: where to read in a volume of a given shape; always `places.count` reads.

    A sample is a dict whose tensors have one row a read: `image` (R, 1, X, Y, Z) float32, `seed` (R,), `volume` (R,)
    the volume's number, `place` (R,) which of the places a read is, `start` (R, 3) first voxel in the volume (negative
    where the volume is smaller), `extent` (R, 3) voxels of the volume.
    """

    def __init__(self, volumes: Sequence[Path], size: Sequence[int], seed: int, places: Places | None = None):
        self.crops = CropDataset(volumes, size, seed)
        self.places = places or Anywhere()

    def __len__(self) -> int:
        return len(self.crops.volumes)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        crops = self.crops
        rng = np.random.default_rng([crops.seed, 2, number])
        index = crops.index_of(number)
        volume = open_volume(crops.volumes[index])
        starts = self.places(volume.shape, crops.size, rng)
        return {
            "image": read_images(volume, starts, crops.size),
            "seed": torch.from_numpy(rng.integers(0, 2**62, len(starts))),
            "volume": torch.full((len(starts),), index),
            "place": torch.arange(len(starts)),
            "start": torch.tensor(starts),
            "extent": torch.tensor(volume.shape).repeat(len(starts), 1),
        }


def read_images(volume: StoredVolume, starts: Sequence[Sequence[int]], size: Sequence[int]) -> torch.Tensor:
    """Crops of one volume, (R, 1, *size) float32."""
    out = torch.empty((len(starts), 1, *size))
    for crop, start in zip(out[:, 0], starts, strict=True):
        crop.copy_(torch.from_numpy(volume.half(start, size)))
    return out


def join_reads(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The reads of several volumes as one batch, volume after volume."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


class StepBatches(Sampler[list[int]]):
    """Batches of sample numbers from step `first` on, for this rank out of `world`.

    It has no length on purpose: Lightning counts a resumed loader's batches from the interrupted epoch's position, and
    would stop early if it knew how many are left.
    """

    def __init__(self, batch: int, first: int, last: int, rank: int = 0, world: int = 1):
        self.batch, self.first, self.last, self.rank, self.world = batch, first, last, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            begin = (step * self.world + self.rank) * self.batch
            yield list(range(begin, begin + self.batch))


def crop_loader(dataset: Dataset, batches: StepBatches, workers: int = 0, pin: bool = False) -> Iterable[Any]:
    """Loader of `dataset` over `batches`: by worker processes of one thread each, or by a thread of this process."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=join_reads if isinstance(dataset, ReadDataset) else None,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )
    return loader if workers else Ahead(loader)
