"""What a backbone is: a MONAI network behind one pyramid interface, `encode` to feature maps, `decode` back to voxels.

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
# `dynunet`: 0.55 to 0.75 of the squared gradient, by strides and level (tests/networks/test_map_places.py)
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
        """Channels of the map that the output layer reads."""
        convolutions = (nn.Conv3d, nn.ConvTranspose3d)
        return next(m.in_channels for m in self.head_modules()[0].modules() if isinstance(m, convolutions))

    @property
    def feature_offset(self) -> Place:
        """As `offsets`, for the map that the output layer reads: in all networks its labels are those of this place."""
        return (0.0, 0.0, 0.0)

    @property
    def width(self) -> int:
        """Channels of the first level: `spec.width`, or the backbone's default where that is 0."""
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
        """Parameters of the modules that `encode` runs through, each once."""
        seen: dict[int, nn.Parameter] = {}
        for module in self.encoder_modules():
            seen.update((id(p), p) for p in module.parameters())
        return list(seen.values())


def _names_below(net: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    """State-dict names of the tensors these modules own, under every alias they have in `net`."""
    wanted = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return {name for name, tensor in net.state_dict(keep_vars=True).items() if id(tensor) in wanted}


def widths(width: int, levels: int) -> list[int]:
    """Channels of every level: doubled from level to level, up to `MAX_CHANNELS`."""
    return [min(width * 2**level, MAX_CHANNELS) for level in range(levels)]


NORMS: dict[str, Any] = {
    "instance": ("INSTANCE", {"affine": True}),
    "layer": ("GROUP", {"num_groups": 1}),  # over all channels: keeps their means apart, which instance norm removes
    "batch": "BATCH",
}


def norm_of(spec: BackboneSpec) -> Any:
    """MONAI's name and arguments of a network's normalisation.

    Raises:
        MedclError: an unknown name.
    """
    if spec.norm not in NORMS:
        raise MedclError(f"unknown normalisation {spec.norm!r}", "--norm", f"Use one of {', '.join(NORMS)}.")
    return NORMS[spec.norm]


def cumulative(strides: Sequence[Triple]) -> tuple[Triple, ...]:
    """Voxels of the input per voxel of every level, from the strides between levels."""
    total, out = (1, 1, 1), []
    for stride in strides:
        total = (total[0] * stride[0], total[1] * stride[1], total[2] * stride[2])
        out.append(total)
    return tuple(out)


def run_block(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Runs a block; on a CPU in float32 where its maps are only a few planes deep.

    The bf16 weight gradient of a 3D convolution whose input is exactly two planes deep is garbage on CPUs (torch 2.13
    with oneDNN: up to 1e32). Maps that small cost next to nothing in float32.
    """
    x = inputs[0]
    if x.device.type != "cpu" or x.shape[2] > 4 or not torch.is_autocast_enabled("cpu"):
        return module(*inputs)
    with torch.autocast("cpu", enabled=False):
        return module(*(tensor.float() for tensor in inputs))
