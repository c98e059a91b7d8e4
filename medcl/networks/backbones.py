"""MONAI networks behind one pyramid interface: `encode` to feature maps, `decode` back to voxels.

The MONAI module stays whole inside the wrapper, so its state dict is the one plain MONAI code loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.networks.parts import in_parts

Triple = tuple[int, int, int]
Place = tuple[float, float, float]
MAX_CHANNELS = 320  # nnU-Net's cap for 3D networks
# share of a decoder map's sensitivity that reaches it from below, not by the skip; measured at random weights of
# `dynunet`: 0.55 to 0.75 of the squared gradient, by strides and level (tests/test_map_places.py)
FROM_BELOW = 2 / 3


@dataclass(frozen=True)
class BackboneSpec:
    """Everything needed to rebuild a backbone: saved in every checkpoint.

    Attributes:
        name: a key of `BACKBONES`.
        in_channels: image channels.
        out_channels: channels of the output layer (classes, background included).
        strides: one triple per down-sampling, finest first. `swin_unetr` halves every axis five times regardless.
        width: channels of the first level, 0 for the backbone's default.
        norm: a key of `NORMS`.
        spatial_dims: 3; or 2 for a network that sees every slice along the last axis by itself: its kernels are one
            voxel thick there, and nothing strides. It takes volumes all the same.
    """

    name: str = "unet"
    in_channels: int = 1
    out_channels: int = 2
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 3
    width: int = 0
    norm: str = "instance"
    spatial_dims: int = 3


class Backbone(nn.Module, ABC):
    """A MONAI segmentation network with its encoder and decoder reachable apart.

    Attributes:
        net: the MONAI module, intact.
        spec: what it was built from.
        channels: channels of every map that `encode` returns, fine to coarse.
        reductions: voxels of the input per voxel of every such map, one triple each.
        offsets: where the first voxel of every such map lies, in voxels of the input: voxel m of map i lies at
            m * reductions[i] + offsets[i]. That is the centre of what it is sensitive to; see `decoder_offsets`.
        parts: in how many parts `encode` and `decode` go through the rows of a batch; see `medcl.networks.parts`.
    """

    parts = 1
    default_width: int
    channels: tuple[int, ...]
    reductions: tuple[Triple, ...]
    offsets: tuple[Place, ...]

    def __init__(self, spec: BackboneSpec):
        super().__init__()
        self.spec = spec
        self.net: Any = self._build()

    @abstractmethod
    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        """The MONAI class name and the keyword arguments that build `net`."""

    @abstractmethod
    def encoder_modules(self) -> list[nn.Module]:
        """The modules `encode` runs through."""

    @abstractmethod
    def head_modules(self) -> list[nn.Module]:
        """The output layer: the only modules whose shapes depend on `out_channels`."""

    @abstractmethod
    def decoder_modules(self) -> list[nn.Module]:
        """The decoder's blocks without the output layer, coarse to fine."""

    def stages(self) -> list[list[nn.Module]]:
        """Modules in the order in which an image passes them, the output layer left out."""
        return [[module] for module in (*self.encoder_modules(), *self.decoder_modules())]

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """Feature maps (B, C_i, D_i, H_i, W_i), fine to coarse, of an image (B, C, D, H, W)."""

    @abstractmethod
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        """The map after the first `blocks` decoder blocks; None runs all of them and the output layer: logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, out_channels, D, H, W): exactly what `net(x)` gives."""
        return self.decode(self.encode(x))

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the map that the output layer reads, (B, `feature_channels`, ...), at its own resolution."""
        features = self.decode_features(self.encode(x))
        return self.read_out(features), features

    def decode_features(self, features: Sequence[Tensor]) -> Tensor:
        """The map that the output layer reads, of the maps that `encode` gave."""
        return self.decode(features, len(features) - 1)

    @in_parts
    def read_out(self, features: Tensor) -> Tensor:
        """Logits of the map that the output layer reads."""
        return self._output(features)

    def _output(self, features: Tensor) -> Tensor:
        return self.head_modules()[0](features)

    @property
    def feature_channels(self) -> int:
        convolutions = (nn.Conv3d, nn.ConvTranspose3d)
        return next(m.in_channels for m in self.head_modules()[0].modules() if isinstance(m, convolutions))

    @property
    def feature_offset(self) -> Place:
        """As `offsets`, for the map that the output layer reads: in all networks its labels are those of this place."""
        return (0.0, 0.0, 0.0)

    @property
    def width(self) -> int:
        return self.spec.width or self.default_width

    @property
    def decoder_levels(self) -> tuple[int, ...]:
        """For each decoder block, the level of `channels` and `reductions` that its map shares, first block first."""
        return tuple(range(len(self.channels) - 2, -1, -1))

    @property
    def decoder_offsets(self) -> tuple[Place, ...]:
        """As `offsets`, for the map after each decoder block, first block first.

        A block that repeats a coarse voxel s times lays the copies (s - 1) / 2 fine voxels before it on average, in
        voxels that start where it starts. Its map has two sources, that and the skip, and lies between them.
        """
        places, below, coarse = [], self.offsets[-1], self.reductions[-1]
        for level in self.decoder_levels:
            fine, skip = self.reductions[level], self.offsets[level]
            lifted = [o - (c - f) / 2 for o, c, f in zip(below, coarse, fine, strict=True)]
            x, y, z = (o + FROM_BELOW * (b - o) for o, b in zip(skip, lifted, strict=True))
            below, coarse = (x, y, z), fine
            places.append(below)
        return tuple(places)

    @property
    def multiple(self) -> Triple:
        """Every axis of the input must be a multiple of this."""
        return self.reductions[-1]

    def _build(self) -> nn.Module:
        import monai.networks.nets as nets

        name, arguments = self.monai_arguments()
        return getattr(nets, name)(**arguments)

    def tensor_names(self, part: str) -> set[str]:
        """Names in `net.state_dict()` that belong to the `encoder`, the `head` or the `decoder` (all the rest)."""
        encoder = _names_below(self.net, self.encoder_modules())
        head = _names_below(self.net, self.head_modules())
        everything = set(self.net.state_dict(keep_vars=True))
        return {"encoder": encoder, "head": head, "decoder": everything - encoder - head}[part]

    def encoder_parameters(self) -> list[nn.Parameter]:
        seen: dict[int, nn.Parameter] = {}
        for module in self.encoder_modules():
            seen.update((id(p), p) for p in module.parameters())
        return list(seen.values())


def _names_below(net: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    """State-dict names of the tensors these modules own, under every alias they have in `net`."""
    wanted = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return {name for name, tensor in net.state_dict(keep_vars=True).items() if id(tensor) in wanted}


def _widths(width: int, levels: int) -> list[int]:
    return [min(width * 2**level, MAX_CHANNELS) for level in range(levels)]


NORMS: dict[str, Any] = {
    "instance": ("INSTANCE", {"affine": True}),
    "layer": ("GROUP", {"num_groups": 1}),  # over all channels: keeps their means apart, which instance norm removes
    "batch": "BATCH",
}


def _norm(spec: BackboneSpec) -> Any:
    if spec.norm not in NORMS:
        raise MedclError(f"unknown normalisation {spec.norm!r}", "--norm", f"Use one of {', '.join(NORMS)}.")
    return NORMS[spec.norm]


def _cumulative(strides: Sequence[Triple]) -> tuple[Triple, ...]:
    total, out = (1, 1, 1), []
    for stride in strides:
        total = (total[0] * stride[0], total[1] * stride[1], total[2] * stride[2])
        out.append(total)
    return tuple(out)


def _run(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Runs a block; on a CPU in float32 where its maps are only a few planes deep.

    The bf16 weight gradient of a 3D convolution whose input is exactly two planes deep is garbage on CPUs (torch 2.13
    with oneDNN: up to 1e32). Maps that small cost next to nothing in float32.
    """
    x = inputs[0]
    if x.device.type != "cpu" or x.shape[2] > 4 or not torch.is_autocast_enabled("cpu"):
        return module(*inputs)
    with torch.autocast("cpu", enabled=False):
        return module(*(tensor.float() for tensor in inputs))


class UNetBackbone(Backbone):
    """MONAI's residual `UNet`. It strides from its first level on, which makes it by far the cheapest on a CPU."""

    default_width = 16

    def __init__(self, spec: BackboneSpec):
        self.channels = tuple(_widths(spec.width or self.default_width, len(spec.strides) + 1))
        reductions = _cumulative(spec.strides)
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
            "norm": _norm(spec),
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
        return _run(self.head_modules()[0], features)

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
            x = _run(down, x)
            features.append(x)
        return features

    @in_parts
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        ups = self._levels()[1][::-1]
        x = features[-1]
        for up, skip in zip(ups[:blocks], reversed(features[:-1]), strict=False):
            x = _run(up, torch.cat([skip, x.to(skip.dtype)], dim=1))
        return x


class DynUNetBackbone(Backbone):
    """MONAI's `DynUNet` with residual blocks: the nnU-Net family."""

    default_width = 16

    def __init__(self, spec: BackboneSpec):
        self.channels = tuple(_widths(spec.width or self.default_width, len(spec.strides) + 1))
        self.reductions = ((1, 1, 1), *_cumulative(spec.strides))
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
            "norm_name": _norm(spec),
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
            x = _run(block, x)
            features.append(x)
        return features

    @in_parts
    def decode(self, features: Sequence[Tensor], blocks: int | None = None) -> Tensor:
        x = features[-1]
        for up, skip in zip(list(self.net.upsamples)[:blocks], reversed(features[:-1]), strict=False):
            x = _run(up, x, skip)
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
            "norm_name": _norm(spec),
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
            _run(net.encoder4, levels[2]),
            levels[3],
            _run(net.encoder10, levels[4]),
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
        for up, skip in zip(ups[:blocks], reversed(features[:-1]), strict=False):
            x = _run(up, x, skip)
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
