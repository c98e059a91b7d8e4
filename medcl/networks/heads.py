"""Heads that pretext tasks put on a backbone and drop afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.networks.ranks import sum_over_ranks, world_size


def shares_inside(inside: Tensor, size: Sequence[int]) -> Tensor:
    """Share of every voxel of a coarser map, (B, 1, *size) float32, that holds data, (B, 1, D, H, W)."""
    depth, height, width = size
    return F.adaptive_avg_pool3d(inside.float(), (depth, height, width))


POOLS = {"mean": 1, "mean_deviation": 2}  # numbers a channel


def pooled_pyramid(features: Sequence[Tensor], inside: Tensor | None = None, pool: str = "mean") -> Tensor:
    """Every map of the pyramid pooled over space, side by side: (B, numbers a channel * sum of channels).

    All levels, not only the coarsest: the released VoCo pools the skip encoders as well, and so gradient reaches each
    level directly.

    Args:
        features: maps (B, C_i, D_i, H_i, W_i).
        inside: which voxels of the network's input hold data, (B, 1, D, H, W): a voxel of a map counts by the share of
            it that does. By default all hold data.
        pool: `mean`; or `mean_deviation`, all means and then all standard deviations. Instance norm takes most of what
            differs between volumes out of the mean (`benchmarks/pooled_embeddings.py`).
    """
    weights = [None if inside is None else shares_inside(inside, feature.shape[2:]) for feature in features]
    means = [_mean(feature, weight) for feature, weight in zip(features, weights, strict=True)]
    if pool == "mean":
        return torch.cat(means, dim=1)
    deviations = [_deviation(*each) for each in zip(features, means, weights, strict=True)]
    return torch.cat([*means, *deviations], dim=1)


def _mean(feature: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over space of (B, C, ...) under weights (B, 1, ...): (B, C); 0 where all weights are 0."""
    if weight is None:
        return feature.flatten(2).mean(2)
    with torch.autocast(feature.device.type, enabled=False):
        rows, column = feature.flatten(2), weight.flatten(2).to(feature.dtype).mT
        return (rows @ column).squeeze(2) / weight.flatten(1).sum(1, keepdim=True).clamp(min=1e-6).to(feature.dtype)


def _deviation(feature: Tensor, mean: Tensor, weight: Tensor | None) -> Tensor:
    """Standard deviation about `mean` (B, C), weighted as in `_mean`; in float32 under any autocast."""
    with torch.autocast(feature.device.type, enabled=False):
        centred = feature.float() - mean.float().view(*mean.shape, 1, 1, 1)
        return (_mean(centred.square(), weight) + 1e-6).sqrt()  # a root has no gradient at 0


def some_voxels(feature: Tensor, count: int = 8, inside: Tensor | None = None) -> Tensor:
    """Features (B * count, C) at voxels spread evenly over the numbering of a map (B, C, D, H, W).

    Args:
        feature: the map.
        count: voxels of every row.
        inside: which voxels of the map may be taken, (B, voxels) bool; by default all. A row without any takes all.
    """
    rows = feature.flatten(2)
    if inside is None:
        inside = torch.ones(len(rows), rows.shape[2], dtype=torch.bool, device=rows.device)
    inside = inside | ~inside.any(1, keepdim=True)
    order = (~inside).to(torch.uint8).argsort(dim=1, stable=True)  # those that may be taken first
    share = torch.linspace(0, 1, count + 2, device=rows.device)[1:-1]
    places = order.gather(1, (share * (inside.sum(1, keepdim=True) - 1)).round().long())
    return rows.gather(2, places[:, None].expand(-1, rows.shape[1], -1)).mT.flatten(0, 1).float()


class JoinedBatchNorm(nn.Module):
    """Batch norm (N, d) by the statistics of all ranks' rows together; no affine part and no running statistics.

    It behaves the same in training and evaluation, and on two ranks as on one with the joined batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if world_size() == 1:
            return F.batch_norm(x, None, None, training=True)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float()
            count = sum_over_ranks(rows.new_tensor(float(len(rows))))
            mean = sum_over_ranks(rows.sum(0)) / count
            spread = sum_over_ranks((rows - mean).square().sum(0)) / count
            return ((rows - mean) * torch.rsqrt(spread + 1e-5)).to(x.dtype)


class ProjectionHead(nn.Sequential):
    """MLP projector (N, in) to (N, out): Linear, batch norm without affine, ReLU, `layers - 1` times, then Linear.

    Args:
        in_features: width of the pooled features.
        hidden: width of the hidden layers.
        out_features: width of the embedding.
        layers: number of linear layers.
        dropout: share of input features dropped per sample ("channel" dropout).

    The normalisation uses the statistics of all crops of the batch together and keeps no running ones, so it behaves
    the same in training and evaluation, and needs at least two rows.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, layers: int = 3, dropout: float = 0.0):
        steps: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        width = in_features
        for _ in range(layers - 1):
            steps += [
                nn.Linear(width, hidden, bias=False),
                JoinedBatchNorm(),
                nn.ReLU(inplace=True),
            ]
            width = hidden
        super().__init__(*steps, nn.Linear(width, out_features))


class PointwiseHead(nn.Module):
    """Two 1x1x1 convolutions on a map (N, C, D, H, W), batch norm and ReLU between them; the same at every voxel.

    The local head of Chaitanya et al. (NeurIPS 2020): widths as the map's, without bias.

    Args:
        channels: of the map.
        out_channels: of the result, by default the same.
        hidden: between the two, by default the same.
    """

    def __init__(self, channels: int, out_channels: int | None = None, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.first = nn.Linear(channels, hidden, bias=False)
        self.norm = JoinedBatchNorm()
        self.last = nn.Linear(hidden, out_channels or channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        hidden = self.first(rows)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.last(F.relu(hidden)).movedim(-1, 1)
