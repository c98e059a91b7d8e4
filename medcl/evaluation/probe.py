"""How much anatomy can be read off frozen features by the simplest means: a linear map, and the nearest neighbours.

Features are the encoder's whole pyramid. Every subject is predicted from the others (leave one out), so nothing is
fitted to what is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcl.networks.backbones import Backbone
from medcl.networks.heads import pooled_pyramid
from medcl.store.crops import CropDataset
from medcl.store.volumes import open_volume
from medcl.transforms.correspondence import sample_at, view_to_map
from medcl.transforms.inside import box_mask, data_box

NEIGHBOURS = 10
RIDGE = 1e-2  # of the number of rows: features have unit variance
VOXELS = 100  # a class and patch
PATCHES = 4  # a volume


@dataclass(frozen=True)
class ProbeData:
    """Patches of a few labelled volumes, and the voxels of them whose class is to be predicted.

    Attributes:
        images: (P, 1, D, H, W).
        voxels: of every patch, (n, 3) coordinates.
        classes: of these voxels, (n,).
        shares: share of every patch that a class fills, (P, classes).
        subject: whose patch it is, (P,).
    """

    images: Tensor
    voxels: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    shares: Tensor
    subject: Tensor


def probe_data(
    volumes: Sequence[tuple[str, Path]], values: Sequence[int], size: Sequence[int], seed: int = 0
) -> ProbeData:
    """Draws patches, half of them around labelled voxels, and in each as many voxels of every class, background too.

    Only voxels of the volume are predicted: where a patch reaches beyond it, there is no class.

    Args:
        volumes: subject and folder in the store.
        values: label value of every class but the background.
        size: voxels of a patch.
        seed: of the draw.
    """
    names = sorted({subject for subject, _ in volumes})
    images, voxels, classes, shares, owners = [], [], [], [], []
    rng = np.random.default_rng([seed, 7])
    for subject, path in volumes:
        patches = CropDataset([path], size, seed, labelled=True, foreground=0.5)
        extent = open_volume(path).shape
        for number in range(PATCHES if math.prod(extent) > math.prod(size) else 1):
            patch = patches[number]
            label = patch["label"][0].numpy()
            inside = box_mask(data_box({k: v[None] for k, v in patch.items()}), size)[0, 0].numpy()
            channels = np.where(inside, 0, -1)
            for channel, value in enumerate(values, 1):
                channels[label == value] = channel
            places, kinds = [], []
            for kind in np.unique(channels[inside]):
                found = np.argwhere(channels == kind)
                some = found[rng.permutation(len(found))[:VOXELS]]
                places.append(some)
                kinds.append(np.full(len(some), kind))
            images.append(patch["image"])
            voxels.append(torch.from_numpy(np.concatenate(places)).float())
            classes.append(torch.from_numpy(np.concatenate(kinds)))
            counts = np.bincount(channels[inside], minlength=len(values) + 1)
            shares.append(torch.from_numpy(counts / counts.sum()).float())
            owners.append(names.index(subject))
    return ProbeData(torch.stack(images), tuple(voxels), tuple(classes), torch.stack(shares), torch.tensor(owners))


@torch.no_grad()
def probe(backbone: Backbone, data: ProbeData, device: torch.device | str = "cpu") -> dict[str, float]:
    """Scores of frozen features.

    Returns:
        `probe_voxel_linear` and `probe_voxel_knn`: balanced accuracy of a voxel's class, by ridge regression on the
        classes and by the 10 nearest neighbours; `probe_volume_linear` and `probe_volume_knn`: R^2 of the share of a
        patch that each class fills, from its pooled features. All are means over left-out subjects' rows. The volume
        scores need three subjects.
    """
    modes = {module: module.training for module in backbone.modules()}  # a task may hold parts of it in eval
    backbone.eval()
    voxel, volume = [], []
    for image, places in zip(data.images, data.voxels, strict=True):
        features = backbone.encode(image[None].to(device))
        rows = [
            sample_at(f.float(), view_to_map(places.to(device), *torch.tensor([step, first], device=device))[None])[0]
            for f, step, first in zip(features, backbone.reductions, backbone.offsets, strict=True)
        ]
        voxel.append(torch.cat(rows, dim=1).cpu())
        volume.append(pooled_pyramid(features)[0].float().cpu())
    for module, training in modes.items():
        module.training = training
    owner = torch.cat([torch.full((len(c),), int(s)) for c, s in zip(data.classes, data.subject, strict=True)])
    x, y = torch.cat(voxel), torch.cat(data.classes)
    hits: dict[str, Tensor] = {}
    for name, predict in (("linear", ridge), ("knn", neighbours)):
        votes = left_out(predict, x, F.one_hot(y).float(), owner)
        hits[f"probe_voxel_{name}"] = (votes.argmax(1) == y).float()
    out = {
        name: float(torch.stack([right[y == kind].mean() for kind in y.unique()]).mean())
        for name, right in hits.items()
    }
    if len(data.subject.unique()) >= 3:
        pooled, shares = torch.stack(volume), data.shares
        wanted = shares.var(0) > 1e-8
        for name, predict in (("linear", ridge), ("knn", neighbours)):
            predicted = left_out(predict, pooled, shares, data.subject)
            error = (predicted - shares).square().mean(0) / shares.var(0, unbiased=False).clamp(min=1e-12)
            out[f"probe_volume_{name}"] = float(1 - error[wanted].mean())
    return out


def left_out(predict, x: Tensor, y: Tensor, owner: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Predictions of every row by the rows of the other owners: `predict(x, y, queries)`."""
    predicted = torch.zeros_like(y)
    for each in owner.unique():
        mine = owner == each
        predicted[mine] = predict(x[~mine], y[~mine], x[mine])
    return predicted


def ridge(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """Ridge regression of y (n, c) on standardised x (n, d), predicted for queries (m, d)."""
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    a = ((x - mean) / spread).double()
    centre = y.double().mean(0)
    gram = a.T @ a + RIDGE * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, a.T @ (y.double() - centre))
    return (((queries - mean) / spread).double() @ weights + centre).float()


def neighbours(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """Mean y (n, c) of the 10 rows of x (n, d) nearest to each query (m, d) by cosine, on standardised features."""
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    a, b = (F.normalize((rows - mean) / spread, dim=1) for rows in (x, queries))
    nearest = (b @ a.T).topk(min(NEIGHBOURS, len(x)), dim=1).indices
    return y[nearest].mean(1)
