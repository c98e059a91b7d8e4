"""Core-tuning of a segmentation network: its rows are voxels drawn from every class of the labelled patches.

Zhang et al., NeurIPS 2021. There a row is an image. The output layer of a segmentation network is not pointwise, so the
mixed features are classified by a linear layer of their own, which is dropped afterwards as the projection is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medcl.losses.core_tuning import core_tuning
from medcl.losses.pixel_contrast import draw_voxels, voxel_classes
from medcl.networks.backbones import Backbone
from medcl.segmentation.semi.rows import Rows
from medcl.transforms.random import uniform

VOXELS = 8  # of every class in every patch
BLEND = 0.8  # least share of the hardest negative in a semi-hard one


class CoreTuning(nn.Module):
    """Adds projection and linear classifier to a network, and gives the loss of its labelled rows.

    Args:
        backbone: network to be tuned.
        width: of the embedding.
    """

    def __init__(self, backbone: Backbone, width: int = 32):
        super().__init__()
        channels = backbone.feature_channels
        self.classes, self.offset = backbone.spec.out_channels, backbone.feature_offset
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, width))
        self.classifier = nn.Linear(channels, self.classes)

    def forward(self, features: Tensor, rows: Rows) -> Tensor:
        """Contrast and mixed classification of drawn voxels.

        Args:
            features: of the rows, what the output layer read, (N, C, ...).
            rows: what the network saw; only labelled ones are used.
        """
        n = rows.labelled
        depth, height, width = features.shape[2:]
        size = (depth, height, width)
        label = voxel_classes(rows.target[:n], rows.weight[:n], size, self.offset).flatten(1)
        seeds = rows.seed[:n]
        keys = uniform(seeds, "core.voxels", *size).flatten(1).to(label.device)
        index, drawn = draw_voxels(label, keys, list(range(self.classes)), VOXELS)
        flat = features[:n].flatten(2).transpose(1, 2)  # (N, V, C)
        chosen = flat[torch.arange(n, device=flat.device)[:, None], index.flatten(1)][drawn.flatten(1)]
        kind = torch.arange(self.classes, device=flat.device)[:, None].expand_as(drawn[0])[None].expand_as(drawn)[drawn]
        count = len(kind)
        if count < 2:
            return features.sum() * 0
        share, blend = uniform(seeds[:1], "core.share", 2, count)[0].to(flat.device)
        shuffle = uniform(seeds[:1], "core.shuffle", count, count)[0].to(flat.device)
        with torch.autocast(flat.device.type, enabled=False):
            chosen = chosen.float()
            return core_tuning(
                chosen, self.head(chosen), kind, share, BLEND + (1 - BLEND) * blend, shuffle, self.head, self.classifier
            )
