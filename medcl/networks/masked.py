"""Backbones on images with hidden voxels: encoding without a leak, and reconstruction through the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.networks.backbones import Backbone, SwinUNETRBackbone

TOKEN_STD = 0.02  # of a new mask token, as transformers initialise their embeddings


def token_size(backbone: Backbone) -> int:
    """Voxels along an axis that enter the network as one token: 1 for convolutional ones."""
    return int(backbone.net.patch_size) if isinstance(backbone, SwinUNETRBackbone) else 1


class MaskedEncoder(nn.Module):
    """`encode` of an image of which some voxels are hidden.

    Hidden voxels enter every convolution as 0, the mean of a prepared MRI's foreground and the middle of the CT window.
    In `swin_unetr` the tokens whose voxels are all hidden are replaced by a learned one after the patch embedding, as
    in SimMIM (Xie et al., CVPR 2022, section 3.2); its first skip convolution looks at the image itself, so the image
    is masked there too.

    Args:
        backbone: whose encoder is run; not registered as a part of this module.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: the weights belong to the task, once
        self.token: nn.Parameter | None = None
        if isinstance(backbone, SwinUNETRBackbone):
            self.token = nn.Parameter(TOKEN_STD * torch.randn(backbone.width))

    def forward(self, image: Tensor, seen: Tensor) -> list[Tensor]:
        """Feature maps of `image` (B, C, D, H, W), whose voxels outside `seen` (B, 1, D, H, W) bool are not looked at.

        They may even be NaN.
        """
        (backbone,) = self._backbone
        masked = image.masked_fill(~seen, 0.0)
        if not isinstance(backbone, SwinUNETRBackbone):
            return backbone.encode(masked)
        size = token_size(backbone)
        hidden = F.max_pool3d(seen.to(masked.dtype), size) == 0
        return backbone.encode(masked, hidden, token=self.token)


class ReconstructionHead(nn.Module):
    """Voxels from what the backbone's own output layer is given: decoder and skips are trained, that layer is not.

    One linear layer, a transposed convolution whose kernel is its stride. `dynunet` and `swin_unetr` decode to full
    resolution and it is a 1x1x1 convolution. In `unet` the last decoder block is the output layer itself: there the
    head reads the finest skip beside the map below that block, both at the first level's stride, and every position
    predicts the voxels it covers. A copy of that block would not do: it normalises its single output channel, which
    takes away the level of the image.

    Args:
        backbone: to which it is fitted; not registered as a part of this module.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        stride = backbone.reductions[0]
        self._backbone = (backbone,)
        self.layer = nn.ConvTranspose3d(backbone.feature_channels, backbone.spec.in_channels, stride, stride)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The reconstruction (B, in_channels, D, H, W), float32, of the maps that `encode` gave."""
        (backbone,) = self._backbone
        last = backbone.decode_features(features)
        with torch.autocast(last.device.type, enabled=False):
            return self.layer(last.float())
