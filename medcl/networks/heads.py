"""Heads that pretext tasks put on a backbone and drop afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pooled_pyramid(features: Sequence[Tensor]) -> Tensor:
    """Global average of every map of the pyramid, side by side: (B, sum of channels).

    All levels, not only the coarsest: the released VoCo pools the skip encoders as well, and so gradient reaches each
    level directly.
    """
    return torch.cat([feature.flatten(2).mean(2) for feature in features], dim=1)


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
                nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
                nn.ReLU(inplace=True),
            ]
            width = hidden
        super().__init__(*steps, nn.Linear(width, out_features))
