"""Dense consistency between two views: the same voxel of the body is alike, whatever view shows it.

Xie et al., "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning",
CVPR 2021. Distances are in mm, so that thick slices count as far apart as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medcl.losses.contrastive import contrast, cosine


def close_pairs(one: Tensor, other: Tensor, diagonal: Tensor, threshold: float) -> Tensor:
    """Which voxels of two maps show the same place: their distance over the larger voxel diagonal is below `threshold`.

    Args:
        one, other: centres in mm, (N, P, 3) and (N, Q, 3).
        diagonal: of a voxel of the two maps in mm, the larger of both, (N,).
        threshold: 0.7 in the paper.

    Returns:
        (N, P, Q) bool.
    """
    distance = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return distance < threshold * diagonal[:, None, None]


def propagate(x: Tensor, transformed: Tensor, gamma: float, inside: Tensor | None = None) -> Tensor:
    """y_i = sum over j of max(cos(x_i, x_j), 0)^gamma g(x_j): every voxel smoothed over those that look like it.

    Equation 2. In float32 under any autocast.

    Args:
        x: embeddings (N, P, d).
        transformed: g(x), (N, P, d).
        gamma: sharpness, 2 in the paper.
        inside: which voxels j hold data and are summed over, (N, P) bool; by default all.
    """
    with torch.autocast(x.device.type, enabled=False):
        # a root has no gradient at 0, and two voxels may well be orthogonal
        alike = cosine(x, x).clamp(min=0).pow(gamma)
        return (alike if inside is None else alike * inside[:, None]) @ transformed.float()


def propagation_loss(y: Tensor, teacher: Tensor, close: Tensor) -> Tensor:
    """-mean cos(y_i, x'_j) - mean cos(y_j, x'_i) over pairs (i, j) of the two views that show the same place.

    Equation 3, a mean over a read's pairs, then over reads that have some. At best -2, which embeddings that are all
    the same reach as well: it is the momentum teacher that keeps them apart.

    Args:
        y: propagated embeddings of the student, (N, 2, P, d).
        teacher: embeddings of the teacher, (N, 2, P, d), without gradient.
        close: (N, P, P); see `close_pairs`.
    """
    teacher = teacher.detach()
    alike = cosine(y[:, 0], teacher[:, 1]) + cosine(y[:, 1], teacher[:, 0]).mT
    count = close.sum((1, 2))
    each = (alike * close).sum((1, 2)) / count.clamp(min=1)
    return -each.sum() / (count > 0).sum().clamp(min=1)


def dense_contrast(
    x: Tensor, teacher: Tensor, close: Tensor, temperature: float, apart: Tensor | None = None
) -> Tensor:
    """PixContrast: voxels of one view against the other view's, those that show the same place being positive.

    Mean of both directions. A term for every positive pair, with that pair alone in the numerator and all that show
    another place beside it in the denominator; the paper sums an anchor's positives inside the logarithm.

    Args:
        x: embeddings of the student, (N, 2, P, d).
        teacher: embeddings of the teacher, (N, 2, P, d), without gradient.
        close: (N, P, P); see `close_pairs`.
        temperature: of the similarities.
        apart: which pairs show different places, (N, P, P) bool; by default all that are not close.
    """
    teacher = teacher.detach()
    apart = ~close if apart is None else apart
    one = contrast(x[:, 0], teacher[:, 1], close, apart, temperature)
    return 0.5 * (one + contrast(x[:, 1], teacher[:, 0], close.mT, apart.mT, temperature))
