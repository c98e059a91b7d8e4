"""Which voxels of a read or a view hold data, and what the others show.

A read may reach beyond its volume, and a view beyond its read. There an image repeats the nearest voxel that holds
data, and nothing is learnt from it. Where a read holds data is a box: its first and past-last voxel along each axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Box = tuple[Tensor, Tensor]


def data_box(reads: Mapping[str, Tensor]) -> Box:
    """First and past-last voxels (N, 3) of reads that lie in their volumes.

    Args:
        reads: `image` (N, C, D, H, W); `start` (N, 3), the first voxel of every read in its volume, and `extent`
            (N, 3), voxels of the volumes. Reads that do not say where they lie hold data everywhere.
    """
    whole = torch.tensor(reads["image"].shape[2:])
    if "start" not in reads:
        every = whole.expand(len(reads["image"]), 3)
        return torch.zeros_like(every), every
    start, extent = reads["start"], reads["extent"]
    whole = whole.to(start.device)
    return (-start).clamp(min=0).minimum(whole - 1), torch.minimum(extent - start, whole).clamp(min=1)


def box_mask(box: Box, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Which voxels lie in the boxes: (N, 1, *size) bool on `device`."""
    low, high = (edge.to(device) for edge in box)
    rows = []
    for axis, n in enumerate(size):
        voxel = torch.arange(n, device=device)
        rows.append((voxel >= low[:, axis, None]) & (voxel < high[:, axis, None]))
    x, y, z = rows
    return (x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :])[:, None]


def inside_at(where: Tensor, box: Box) -> Tensor:
    """Whether the voxel nearest to each place (N, 3, ...) holds data: (N, 1, ...) bool."""
    low, high = (edge.to(where.device, where.dtype).view(len(where), 3, *[1] * (where.ndim - 2)) for edge in box)
    return ((where >= low - 0.5) & (where <= high - 0.5)).all(1, keepdim=True)


def repeat_edge(image: Tensor, box: Box) -> Tensor:
    """Images (N, C, D, H, W) whose voxels outside the boxes show the nearest one inside, whatever they held before."""
    low, high = (edge.cpu() for edge in box)
    size = torch.tensor(image.shape[2:])
    beyond = ((low > 0) | (high < size)).any(1).nonzero().flatten().tolist()
    if not beyond:
        return image
    image = image.clone()
    for row in beyond:
        part = image[row]
        for axis, n in enumerate(image.shape[2:]):
            nearest = torch.arange(n).clamp(int(low[row, axis]), int(high[row, axis]) - 1)
            part = part.index_select(axis + 1, nearest.to(image.device))
        image[row] = part
    return image


def with_data(reads: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Images of reads, repeated beyond their data, and which voxels hold data, (N, 1, D, H, W) bool; see `data_box`."""
    image, box = reads["image"], data_box(reads)
    return repeat_edge(image, box), box_mask(box, image.shape[2:], image.device)


def starts_within(draws: Tensor, box: Box, size: Sequence[int], read: Sequence[int]) -> Tensor:
    """First voxels (N, ..., 3) of crops inside reads that hold as much data as a crop of that size can.

    Args:
        draws: uniform numbers in [0, 1), (N, ..., 3).
        box: where the reads hold data.
        size: voxels of a crop.
        read: voxels of a read.
    """
    shape = (len(draws), *[1] * (draws.ndim - 2), 3)
    low, high = (edge.to(draws.device).view(shape) for edge in box)
    crop = torch.tensor(size, device=draws.device)
    room = torch.tensor(read, device=draws.device) - crop
    # where the data is shorter than a crop, every crop between these two holds all of it
    one, other = low, high - crop
    first, last = (each.clamp(min=0).minimum(room) for each in (torch.minimum(one, other), torch.maximum(one, other)))
    return first + torch.minimum((draws * (last - first + 1)).floor().long(), last - first)
