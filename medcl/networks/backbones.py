"""The backbones by name: MONAI's UNet, DynUNet and SwinUNETR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.networks.backbone import Backbone, BackboneSpec, Place, cumulative, norm_of, run_block, widths
from medcl.networks.parts import in_parts

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSpec",
    "DynUNetBackbone",
    "SwinUNETRBackbone",
    "UNetBackbone",
    "build_backbone",
]


class UNetBackbone(Backbone):
    """MONAI's residual `UNet`. It strides from its first level on, which makes it by far the cheapest on a CPU."""

    default_width = 16

    def __init__(self, spec: BackboneSpec):
        self.channels = tuple(widths(spec.width or self.default_width, len(spec.strides) + 1))
        reductions = cumulative(spec.strides)
        self.reductions = (*reductions, reductions[-1])  # the bottom layer does not stride
        # a kernel of three is centred on every stride-th voxel, the first among them
        self.offsets = ((0.0, 0.0, 0.0),) * len(self.reductions)
        super().__init__(spec)

    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        spec = self.spec
        return "UNet", {
            "spatial_dims": 3,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "channels": list(self.channels),
            "strides": [list(stride) for stride in spec.strides],
            "num_res_units": 2,
            **({"kernel_size": [3, 3, 1], "up_kernel_size": [3, 3, 1]} if spec.spatial_dims == 2 else {}),
            "norm": norm_of(spec),
        }

    @property
    def decoder_levels(self) -> tuple[int, ...]:
        # the bottom layer does not stride, and the last block is the output layer
        return tuple(range(len(self.channels) - 3, -1, -1))

    @property
    def decoder_offsets(self) -> tuple[Place, ...]:
        # a transposed kernel of three is centred too: a coarse voxel goes to the fine one at its place and both beside
        return tuple(self.offsets[level] for level in self.decoder_levels)

    def _output(self, features: Tensor) -> Tensor:
        return run_block(self.head_modules()[0], features)

    def decode_features(self, features: Sequence[Tensor]) -> Tensor:
        below = self.decode(features, len(features) - 2)
        return torch.cat([features[0], below.to(features[0].dtype)], dim=1)

    def _levels(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Down layers (bottom included) and up layers, both fine to coarse, out of MONAI's nested blocks."""
        downs, ups, block = [], [], self.net.model
        while isinstance(block, nn.Sequential) and len(block) == 3:
            downs.append(block[0])
            ups.append(block[2])
            block = block[1].submodule
        return [*downs, block], ups

    def encoder_modules(self) -> list[nn.Module]:
        return self._levels()[0]

    def head_modules(self) -> list[nn.Module]:
        return self._levels()[1][:1]

    def decoder_modules(self) -> list[nn.Module]:
        return self._levels()[1][:0:-1]

    @in_parts
    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for down in self._levels()[0]:
            x = run_block(down, x)
            features.append(x)
        return features

    @in_parts
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        ups = self._levels()[1][::-1]
        x = features[-1]
        for up, skip in list(zip(ups, reversed(features[:-1]), strict=True))[:blocks]:
            x = run_block(up, torch.cat([skip, x.to(skip.dtype)], dim=1))
        return x


class DynUNetBackbone(Backbone):
    """MONAI's `DynUNet` with residual blocks: the nnU-Net family."""

    default_width = 16

    def __init__(self, spec: BackboneSpec):
        self.channels = tuple(widths(spec.width or self.default_width, len(spec.strides) + 1))
        self.reductions = ((1, 1, 1), *cumulative(spec.strides))
        self.offsets = ((0.0, 0.0, 0.0),) * len(self.reductions)  # as in `unet`
        super().__init__(spec)

    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        spec = self.spec
        # an axis that is not strided yet is still thick: nnU-Net gives it a kernel of 1 up to its first stride
        kernels, halved = [], [False] * 3
        for stride in spec.strides:
            halved = [done or step > 1 for done, step in zip(halved, stride, strict=True)]
            kernels.append([3 if done else 1 for done in halved])
        return "DynUNet", {
            "spatial_dims": 3,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "kernel_size": [kernels[0], *kernels],
            "strides": [[1, 1, 1], *(list(stride) for stride in spec.strides)],
            "upsample_kernel_size": [list(stride) for stride in spec.strides],
            "filters": list(self.channels),
            "norm_name": norm_of(spec),
            "res_block": True,
        }

    def encoder_modules(self) -> list[nn.Module]:
        return [self.net.input_block, *self.net.downsamples, self.net.bottleneck]

    def head_modules(self) -> list[nn.Module]:
        return [self.net.output_block]

    def decoder_modules(self) -> list[nn.Module]:
        return list(self.net.upsamples)

    @in_parts
    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for block in self.encoder_modules():
            x = run_block(block, x)
            features.append(x)
        return features

    @in_parts
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        x = features[-1]
        for up, skip in list(zip(self.net.upsamples, reversed(features[:-1]), strict=True))[:blocks]:
            x = run_block(up, x, skip)
        return x if blocks is not None else self._output(x)


class SwinUNETRBackbone(Backbone):
    """MONAI's `SwinUNETR`. Every axis must be a multiple of 32, and 64 voxels are the least it learns from."""

    default_width = 24

    def __init__(self, spec: BackboneSpec):
        width = spec.width or self.default_width
        self.channels = (width, width, 2 * width, 4 * width, 8 * width, 16 * width)
        self.reductions = tuple((2**i, 2**i, 2**i) for i in range(6))
        # patches are cut and merged side by side: a voxel lies amid those it covers
        self.offsets = tuple(((2**i - 1) / 2,) * 3 for i in range(6))
        super().__init__(spec)

    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        spec = self.spec
        return "SwinUNETR", {
            "spatial_dims": 3,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "feature_size": self.width,
            "use_v2": True,
            "norm_name": norm_of(spec),
        }

    def encoder_modules(self) -> list[nn.Module]:
        net = self.net
        return [net.swinViT, net.encoder1, net.encoder2, net.encoder3, net.encoder4, net.encoder10]

    def head_modules(self) -> list[nn.Module]:
        return [self.net.out]

    def decoder_modules(self) -> list[nn.Module]:
        net = self.net
        return [net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1]

    def stages(self) -> list[list[nn.Module]]:
        net, vit = self.net, self.net.swinViT
        levels = [[vit.layers1, vit.layers1c], [vit.layers2, vit.layers2c], [vit.layers3, vit.layers3c],
                  [vit.layers4, vit.layers4c]]  # fmt: skip
        beside = [[net.encoder3], [net.encoder4], [], [net.encoder10]]  # what reads the maps of these levels
        encoder = [[vit.patch_embed, net.encoder1, net.encoder2]]
        encoder += [level + more for level, more in zip(levels, beside, strict=True)]
        return encoder + [[module] for module in self.decoder_modules()]

    @in_parts
    def encode(self, x: Tensor, hidden: Tensor | None = None, *, token: Tensor | None = None) -> list[Tensor]:
        """As every backbone's; of an image whose `hidden` tokens (B, 1, ...) bool are replaced by `token` (width,)."""
        net = self.net
        net._check_input_size(x.shape[2:])
        levels = self._levels(x, hidden, token)
        return [
            net.encoder1(x),
            net.encoder2(levels[0]),
            net.encoder3(levels[1]),
            run_block(net.encoder4, levels[2]),
            levels[3],
            run_block(net.encoder10, levels[4]),
        ]

    def _levels(self, x: Tensor, hidden: Tensor | None, token: Tensor | None) -> list[Tensor]:
        """MONAI's `SwinTransformer.forward`, with tokens replaced between the embedding and the first level."""
        vit, normalize = self.net.swinViT, self.net.normalize
        tokens = vit.patch_embed(x)
        if hidden is not None and token is not None:
            tokens = torch.where(hidden, token.view(1, -1, 1, 1, 1).to(tokens.dtype), tokens)
        tokens = vit.pos_drop(tokens)
        levels = [vit.proj_out(tokens, normalize)]
        before = (vit.layers1c, vit.layers2c, vit.layers3c, vit.layers4c)
        for convolution, layer in zip(before, (vit.layers1, vit.layers2, vit.layers3, vit.layers4), strict=True):
            tokens = layer[0](convolution[0](tokens.contiguous()).contiguous())
            levels.append(vit.proj_out(tokens, normalize))
        return levels

    @in_parts
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        net, x = self.net, features[-1]
        ups = (net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
        for up, skip in list(zip(ups, reversed(features[:-1]), strict=True))[:blocks]:
            x = run_block(up, x, skip)
        return x if blocks is not None else self._output(x)


BACKBONES: dict[str, type[Backbone]] = {
    "unet": UNetBackbone,
    "dynunet": DynUNetBackbone,
    "swin_unetr": SwinUNETRBackbone,
}


def build_backbone(spec: BackboneSpec) -> Backbone:
    """Builds a backbone.

    Raises:
        MedclError: no backbone has that name, or MONAI refuses the arguments.
    """
    if spec.name not in BACKBONES:
        raise MedclError(f"unknown backbone {spec.name!r}", "--backbone", f"Use one of {', '.join(BACKBONES)}.")
    if spec.spatial_dims not in (2, 3):
        raise MedclError(f"{spec.spatial_dims} is neither 2 nor 3", "--spatial_dims", "Give 2 for slices, or 3.")
    if spec.spatial_dims == 2 and (spec.name == "swin_unetr" or any(stride[2] > 1 for stride in spec.strides)):
        raise MedclError(f"{spec.name} cannot see slices by themselves", "--backbone", "Use unet or dynunet.")
    try:
        return BACKBONES[spec.name](spec)
    except ValueError as error:
        raise MedclError(f"{spec.name} cannot be built ({error})", "--backbone", "Check strides and width.") from error
