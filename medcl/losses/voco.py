"""VoCo: volume contrast by predicting how much a random crop overlaps each base crop.

Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image Analysis",
CVPR 2024. The functions here follow the widely used release with a momentum teacher, which weights the prediction term
by the overlap and squares the other terms; the paper's text has neither.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # inside the logarithm: a prediction that is wrong by exactly 1 stays finite


def overlap_labels(starts: Tensor, crop: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Share of each random crop's volume inside each base crop.

    Base crop (i, j, k) spans [i c0, (i+1) c0) x [j c1, (j+1) c1) x [k c2, (k+1) c2); a random crop has the same size.
    The share is the product of the three one-dimensional overlaps over the crop's volume.

    Args:
        starts: first voxel of each random crop in the canvas, (B, K, 3).
        crop: voxels of a crop along each axis, (3,).
        grid: base crops along each axis.

    Returns:
        (B, K, n) with n = prod(grid), the last axis of the grid fastest; rows sum to 1 where the bases cover the crop.
    """
    shares = []
    for axis, count in enumerate(grid):
        base = torch.arange(count, device=starts.device, dtype=starts.dtype) * crop[axis]
        distance = (starts[..., axis, None] - base).abs()
        shares.append((1 - distance / crop[axis]).clamp(min=0))
    x, y, z = shares
    return torch.einsum("bki,bkj,bkl->bkijl", x, y, z).flatten(2)


def similarities(crops: Tensor, bases: Tensor) -> Tensor:
    """ReLU of the cosine between crop embeddings (B, K, d) and base embeddings (B, n, d): (B, K, n).

    In float32 whatever the autocast: a cosine rounded to bf16 is off by up to 0.004, and may exceed 1.
    """
    with torch.autocast(crops.device.type, enabled=False):
        crops, bases = F.normalize(crops.float(), dim=-1), F.normalize(bases.float(), dim=-1)
        return F.relu(crops @ bases.transpose(-1, -2))


def prediction_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """sum(-y log(1 - |y - l| + eps)) / sum(y) over overlapping pairs, plus the mean of l^2 over the others."""
    positive = labels > 0
    error = (labels - predicted).abs()
    attract = (-labels * torch.log((1 - error + EPS).clamp(min=EPS)))[positive].sum() / labels.sum().clamp(min=EPS)
    apart = predicted[~positive]
    return attract + (apart.square().mean() if apart.numel() else apart.sum())


def base_regulariser(bases: Tensor) -> Tensor:
    """Mean over pairs i < j of ReLU(cos(q_i, sg[q_j]))^2: base crops of one volume are different places.

    Args:
        bases: student embeddings of the base crops, (B, n, d).
    """
    cosine = similarities(bases, bases.detach())
    upper = torch.triu(torch.ones(cosine.shape[-2:], dtype=torch.bool, device=cosine.device), diagonal=1)
    return cosine[:, upper].square().mean()


def teacher_loss(
    student_crops: Tensor, student_bases: Tensor, teacher_crops: Tensor, teacher_bases: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The whole objective of the momentum-teacher form.

    The prediction is l = (ReLU cos(p_student, q_teacher) + ReLU cos(p_teacher, q_student)) / 2; embeddings of the
    teacher carry no gradient.

    Args:
        student_crops, teacher_crops: embeddings of the random crops, (B, K, d).
        student_bases, teacher_bases: embeddings of the base crops, (B, n, d).
        labels: overlap shares, (B, K, n).

    Returns:
        `loss` and its parts, and the mean prediction on overlapping and on other pairs (a collapse shows there
        first).
    """
    predicted = 0.5 * (
        similarities(student_crops, teacher_bases.detach()) + similarities(teacher_crops.detach(), student_bases)
    )
    predict, regularise = prediction_loss(predicted, labels), base_regulariser(student_bases)
    with torch.no_grad():
        positive = labels > 0
        apart = predicted[~positive]
        gap = {
            "similarity_pos": predicted[positive].mean(),
            "similarity_neg": apart.mean() if apart.numel() else apart.sum(),
        }
    return {"loss": predict + regularise, "predict": predict, "regularise": regularise, **gap}
