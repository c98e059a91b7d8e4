"""VoCo: volume contrast by predicting how much a random crop overlaps each base crop.

Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image Analysis",
CVPR 2024; its extension "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors". The paper and its
two releases differ in their objective; `VARIANTS` holds all three. Below, y is the overlap of a random crop with a base
crop and l the prediction of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medcl.losses.contrastive import cosine


@dataclass(frozen=True)
class Variant:
    """What the published forms of VoCo differ in.

    Attributes:
        teacher: momentum network behind the targets: `full`, `projector` (the backbone is shared), or `none`.
        symmetric: predict from the teacher's random crops and the student's base crops as well, and take the mean.
        positive_weighting: weight -log(1 - |y - l|) of a pair by its overlap y.
        negative: term of a pair without overlap: `square` for l^2, `log` for -log(1 - l), each with a mean of its own;
            `pooled` for -log(1 - l) in one mean with the pairs that overlap.
        regulariser_power: 1 for |cos| of two base crops, 2 for ReLU(cos)^2.
        inter: predict, between two volumes, the similarities that the teacher sees there.
    """

    teacher: str
    symmetric: bool
    positive_weighting: bool
    negative: str
    regulariser_power: int
    inter: bool


VARIANTS = {
    # the text of the CVPR paper: one network, and a plain mean over all pairs
    "paper": Variant("none", False, False, "pooled", 1, False),
    # the release for 10,000 volumes: student and teacher
    "teacher": Variant("full", True, True, "square", 2, False),
    # the release for 160,000 volumes: one backbone, two projectors, and a term between volumes
    "v2": Variant("projector", False, True, "log", 2, True),
}

EPS = 1e-6  # inside the logarithm: a prediction that is wrong by exactly 1 stays finite


def overlap_labels(
    starts: Tensor, crop: Tensor, grid: tuple[int, int, int], box: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Share of each random crop's volume inside each base crop.

    Base crop (i, j, k) spans [i c0, (i+1) c0) x [j c1, (j+1) c1) x [k c2, (k+1) c2); a random crop has the same size.
    The share is the product of the three one-dimensional overlaps over the crop's volume. Where the canvas is larger
    than the volume, only voxels of the volume are counted, in the overlap and in the crop.

    Args:
        starts: first voxel of each random crop in the canvas, (B, K, 3).
        crop: voxels of a crop along each axis, (3,).
        grid: base crops along each axis.
        box: first and past-last voxels of the canvas that hold data, (B, 3) each; by default all do.

    Returns:
        (B, K, n) with n = prod(grid), the last axis of the grid fastest; rows sum to 1 where the bases cover the crop.
        0 for a crop without any data.
    """
    shares = []
    for axis, count in enumerate(grid):
        size, first = crop[axis], starts[..., axis, None]
        base = torch.arange(count, device=starts.device, dtype=starts.dtype) * size
        if box is None:
            shares.append((1 - (first - base).abs() / size).clamp(min=0))
            continue
        low, high = (edge[:, None, None, axis].to(starts) for edge in box)
        begin, end = first.maximum(low), (first + size).minimum(high)
        common = (end.minimum(base + size) - begin.maximum(base)).clamp(min=0)
        shares.append(common / (end - begin).clamp(min=1))
    x, y, z = shares
    return torch.einsum("bki,bkj,bkl->bkijl", x, y, z).flatten(2)


def bases_with_data(crop: Tensor, grid: tuple[int, int, int], box: tuple[Tensor, Tensor]) -> Tensor:
    """Which base crops hold a voxel of the volume, (B, n) bool; arguments as in `overlap_labels`."""
    along = []
    for axis, count in enumerate(grid):
        base = torch.arange(count, device=crop.device) * crop[axis]
        low, high = (edge[:, None, axis].to(crop.device) for edge in box)
        along.append((base < high) & (base + crop[axis] > low))
    x, y, z = along
    return (x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :]).flatten(1)


def similarities(crops: Tensor, bases: Tensor) -> Tensor:
    """ReLU of the cosine between crop embeddings (B, K, d) and base embeddings (B, n, d): (B, K, n)."""
    return F.relu(cosine(crops, bases))


def prediction_loss(
    predicted: Tensor, labels: Tensor, weighted: bool = True, negative: str = "square", usable: Tensor | None = None
) -> Tensor:
    """How far predictions l are from overlaps y; see `Variant` for the choices.

    By default sum(-y log(1 - |y - l| + eps)) / sum(y) over overlapping pairs, plus the mean of l^2 over the others.

    Args:
        predicted, labels: (B, K, n), in [0, 1].
        weighted: `Variant.positive_weighting`.
        negative: `Variant.negative`.
        usable: which pairs count, bool, broadcast to (B, K, n); by default all.
    """
    off = -torch.log((1 - (labels - predicted).abs() + EPS).clamp(min=EPS))
    usable = torch.ones_like(labels, dtype=torch.bool) if usable is None else usable.expand_as(labels)
    overlaps = (labels > 0) & usable
    weight = labels if weighted else torch.ones_like(labels)
    chosen = usable if negative == "pooled" else overlaps
    attract = (weight * off)[chosen].sum() / weight[chosen].sum().clamp(min=EPS)
    if negative == "pooled":
        return attract
    apart = (predicted.square() if negative == "square" else off)[usable & ~overlaps]
    return attract + apart.sum() / max(1, apart.numel())


def base_regulariser(bases: Tensor, power: int = 2, usable: Tensor | None = None) -> Tensor:
    """Mean over pairs i < j of how alike two base crops look: those of one volume are different places.

    Power 2: ReLU(cos(q_i, sg[q_j]))^2, as released. Power 1: |cos(q_i, q_j)|, as in the paper.

    Args:
        bases: student embeddings of the base crops, (B, n, d).
        power: 1 or 2.
        usable: which base crops count, (B, n) bool; by default all.
    """
    cosines = cosine(bases, bases.detach()).relu().square() if power == 2 else cosine(bases, bases).abs()
    return mean_of_pairs(cosines, usable)


def mean_of_pairs(cosines: Tensor, usable: Tensor | None = None) -> Tensor:
    """Mean over pairs i < j of (B, n, n), both of them `usable` (B, n) bool; 0 where there is none."""
    if usable is None:
        return cosines[:, above_diagonal(cosines)].mean()
    pairs = above_diagonal(cosines) & usable[:, :, None] & usable[:, None]
    return cosines[pairs].sum() / pairs.sum().clamp(min=1)


def above_diagonal(square: Tensor) -> Tensor:
    """True where i < j, in the shape (n, n) of the last two axes."""
    return torch.ones(square.shape[-2:], dtype=torch.bool, device=square.device).triu(diagonal=1)


def next_volume(volume: Tensor) -> tuple[Tensor, Tensor]:
    """The next row, cyclically, that shows another volume.

    Args:
        volume: number of each row's volume, (B,).

    Returns:
        Its index (B,), and whether there is one (B,).
    """
    rows = torch.arange(len(volume), device=volume.device)
    later = (rows[:, None] + rows + 1) % len(volume)
    other = volume[later] != volume[:, None]
    return later.gather(1, other.int().argmax(1, keepdim=True))[:, 0], other.any(1)


def inter_volume_loss(
    variant: Variant, student: Tensor, teacher: Tensor, k: int, volume: Tensor, usable: Tensor | None = None
) -> Tensor:
    """The random crops of a volume against the base crops of the next one: the student sees what the teacher sees.

    Target sg[ReLU cos(p_teacher_i, q_teacher_j)], prediction ReLU cos(p_student_i, q_student_j). The release takes the
    next row; here it is the next row of another volume, and a row without one is left out.

    Args:
        student, teacher: embeddings, random crops first, (B, K + n, d).
        k: random crops a volume.
        volume: number of each row's volume, (B,).
        usable: which base crops count, (B, n) bool; by default all.
    """
    following, exists = next_volume(volume)
    i, j = exists.nonzero().flatten(), following[exists]
    target = similarities(teacher[i, :k], teacher[j, k:]).detach()
    predicted = similarities(student[i, :k], student[j, k:])
    pairs = None if usable is None else usable[j][:, None]
    return prediction_loss(predicted, target, variant.positive_weighting, variant.negative, pairs)


def voco_loss(
    variant: Variant, student: Tensor, teacher: Tensor | None, labels: Tensor, volume: Tensor, regulariser: float = 1.0,
    usable: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The whole objective of a variant: prediction + inter-volume term + regulariser.

    The prediction is l = ReLU cos(p_student, sg[q]), with q of the teacher, or of the student where there is none. A
    symmetric variant takes its mean with ReLU cos(sg[p_teacher], q_student).

    Args:
        variant: one of `VARIANTS`.
        student: embeddings, random crops first, (B, K + n, d).
        teacher: the same of the teacher, or None for a variant without one.
        labels: overlap shares, (B, K, n).
        volume: number of each row's volume, (B,).
        regulariser: weight of the regulariser.
        usable: which base crops hold data, (B, n) bool; the others count nowhere. By default all do.

    Returns:
        `loss` and its parts, and mean similarities, by which a collapse shows first: predictions on pairs that overlap
        and on those that do not, and cosines of base crops.
    """
    k = labels.shape[1]
    target = student if teacher is None else teacher
    pairs = torch.ones_like(labels, dtype=torch.bool) if usable is None else usable[:, None].expand_as(labels)
    predicted = similarities(student[:, :k], target[:, k:].detach())
    if variant.symmetric:
        predicted = 0.5 * (predicted + similarities(target[:, :k].detach(), student[:, k:]))
    parts = {
        "predict": prediction_loss(predicted, labels, variant.positive_weighting, variant.negative, pairs),
        "regularise": base_regulariser(student[:, k:], variant.regulariser_power, usable),
    }
    loss = parts["predict"] + regulariser * parts["regularise"]
    if variant.inter and teacher is not None:
        parts["inter"] = inter_volume_loss(variant, student, teacher, k, volume, usable)
        loss = loss + parts["inter"]
    with torch.no_grad():
        overlaps = (labels > 0) & pairs
        apart = ~overlaps & pairs
        parts["similarity_pos"] = predicted[overlaps].mean()
        parts["similarity_neg"] = predicted[apart].sum() / apart.sum().clamp(min=1)
        parts["similarity_bases"] = mean_of_pairs(cosine(student[:, k:], student[:, k:]), usable)
    return {"loss": loss, **parts}
