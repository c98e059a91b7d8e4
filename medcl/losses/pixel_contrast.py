"""Contrast of voxels against the mean embeddings of classes, under labels and pseudo-labels.

Chaitanya et al., "Local contrastive loss with pseudo-label based self-training for semi-supervised medical image
segmentation", Medical Image Analysis 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medcl.losses.contrastive import contrast

IGNORED = -1


def voxel_classes(
    target: Tensor, weight: Tensor, size: tuple[int, int, int], offset: Sequence[float] | None = None
) -> Tensor:
    """The class of every voxel of a coarser map: the one that fills more than half of it with trusted voxels.

    A voxel of the map takes up a box as long as the step from one to the next, around the place where it lies.

    Args:
        target: share of every class, (N, K, D, H, W).
        weight: of every voxel, (N, 1, D, H, W).
        size: voxels of the map.
        offset: where the first voxel of the map lies, in voxels of the target; see `Backbone.offsets`. By default amid
            the voxels that it covers.

    Returns:
        (N, *size) int64, -1 where no class does.
    """
    share = target * weight
    if offset is not None:
        for axis, (first, n, m) in enumerate(zip(offset, target.shape[2:], size, strict=True), 2):
            share = moved(share, first - (n / m - 1) / 2, axis)
    share, label = F.adaptive_avg_pool3d(share, size).max(dim=1)
    return label.masked_fill(share <= 0.5, IGNORED)


def moved(x: Tensor, by: float, axis: int) -> Tensor:
    """What lies `by` voxels further along an axis, linear between voxels; outside, the border's."""
    if by == 0:
        return x
    n, whole = x.shape[axis], math.floor(by)
    index = torch.arange(n, device=x.device) + whole
    near, far = (x.index_select(axis, i.clamp(0, n - 1)) for i in (index, index + 1))
    return torch.lerp(near, far, by - whole)


def draw_voxels(label: Tensor, keys: Tensor, classes: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` random voxels of every class in every patch: those with the largest keys.

    Args:
        label: (N, V) int64.
        keys: random numbers from 0 up, (N, V).
        classes: which classes, K of them.
        count: how many of each.

    Returns:
        Index of every drawn voxel (N, K, count), and whether it is one (N, K, count): a class may have fewer.
    """
    of = label[:, None] == torch.tensor(classes, device=label.device)[:, None]
    best = keys[:, None].masked_fill(~of, -1.0).topk(min(count, label.shape[1]), dim=2)
    return best.indices, best.values >= 0


def pixel_contrast(
    z: Tensor, label: Tensor, keys: Tensor, classes: list[int], anchors: int, least: int, temperature: float
) -> Tensor:
    """Random voxels of a class against the mean embeddings of the classes, in their own patch and in the others.

    The means of the anchor's own class are positive, in its patch and in all others ("intra" and "inter"); those of all
    other classes are negative. A class with few voxels in a patch has neither anchors nor a mean there. (The release
    skips the whole step where any class is absent, and has the anchor's own mean among the negatives.)

    Args:
        z: embeddings (N, d, D, H, W).
        label: class of every voxel, (N, D, H, W), negative where it is not to be used.
        keys: random numbers from 0 up, (N, D, H, W): which voxels are drawn.
        classes: which classes take part; the paper leaves out the background.
        anchors: voxels drawn of each class in each patch, 3 in the paper.
        least: voxels that a class needs in a patch to take part there.
        temperature: 0.1 in the paper.

    Returns:
        A scalar; 0 where no patch has two classes.
    """
    with torch.autocast(z.device.type, enabled=False):
        rows, label = z.float().flatten(2), label.flatten(1)  # (N, d, V), (N, V)
        n, d, _ = rows.shape
        of = label[:, None] == torch.tensor(classes, device=label.device)[:, None]  # (N, K, V)
        count = of.sum(2)
        present = count >= least
        means = torch.einsum("nkv,ndv->nkd", of.float(), rows) / count.clamp(min=1)[:, :, None]
        index, drawn = draw_voxels(label, keys.flatten(1), classes, anchors)
        k, a = index.shape[1:]
        chosen = rows.gather(2, index.view(n, 1, k * a).expand(-1, d, -1)).transpose(1, 2).reshape(-1, d)
    usable = (drawn & present[:, :, None]).flatten()
    kind = torch.arange(k, device=z.device)
    same = kind.repeat_interleave(a).repeat(n)[:, None] == kind.repeat(n)
    pairs = usable[:, None] & present.flatten()
    return contrast(chosen, means.flatten(0, 1), same & pairs, ~same & pairs, temperature)
