"""Masked autoencoder: hide blocks of a crop, and predict them from the rest.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. There a transformer encodes the visible blocks
alone. Convolutions cannot leave voxels out, so here the whole crop enters with its hidden voxels blanked, and the
segmentation network's own decoder reconstructs: encoder and decoder are both worth keeping. `swin_unetr` gets a learned
mask token, as in SimMIM (Xie et al., CVPR 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medcl.errors import MedclError
from medcl.losses.masked import (
    block_normalised,
    chosen_blocks,
    hidden_blocks,
    hidden_voxels,
    interpolated,
    level_of,
    reconstruction_loss,
)
from medcl.networks.backbones import Backbone
from medcl.networks.heads import pooled_pyramid
from medcl.networks.masked import MaskedEncoder, ReconstructionHead, token_size
from medcl.pretext.base import Pairs, PretextTask, Tensors, Triple
from medcl.pretext.checks import Checks
from medcl.store.plan import Plan
from medcl.transforms.compose import ViewIntensity, view_intensity
from medcl.transforms.inside import with_data
from medcl.transforms.random import uniform

CHOICES = {"loss": ("mse", "l1"), "normalise": ("none", "block"), "intensity": ("none", "weak")}
FEWEST_FEATURES = 8  # voxels of the coarsest map: instance norm needs some to speak of


@dataclass(frozen=True)
class MAEOptions:
    """Settings of the masked autoencoder.

    Attributes:
        ratio: share of the blocks that are hidden, exactly the nearest whole number of them in every crop.
        block: voxels of a block along the finest axis; the other axes follow, so that a block is near to a cube in mm
            and divides the crop. Three numbers are taken as they are.
        size: voxels of a crop; by default the fine-tuning patch, no larger than the median volume.
        loss: `mse`, or `l1`.
        normalise: `none` predicts the prepared intensities, which is what a segmentation network reads; `block` scales
            every block to mean 0 and standard deviation 1 first, which makes air as important as tissue.
        flip: probability of mirroring a crop along each axis.
        intensity: random intensity changes of the crop, target included: none, or weak.
    """

    ratio: float = 0.75
    block: int | tuple[int, int, int] = 8
    size: tuple[int, int, int] | None = None
    loss: str = "mse"
    normalise: str = "none"
    flip: float = 0.0
    intensity: str = "none"


class MAE(PretextTask):
    """Masked autoencoder through the backbone's own decoder."""

    Options = MAEOptions
    trains = ("encoder", "decoder")
    gathers = False  # a mean over samples, and every rank has equally many

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: MAEOptions = self.options
        check_options(chosen)
        token = token_size(backbone)
        self.read_size = read_size(plan, backbone.multiple, chosen.size)
        self.block = block_size(self.read_size, plan.spacing, chosen.block, token)
        self.blocks = math.prod(n // b for n, b in zip(self.read_size, self.block, strict=True))
        if self.blocks < 2:
            raise MedclError(
                f"a crop of {self.read_size} voxels is a single block of {self.block}", "mae",
                "Give a smaller --options.block.",
            )  # fmt: skip
        self.hidden = min(max(1, round(chosen.ratio * self.blocks)), self.blocks - 1)
        self.encoder = MaskedEncoder(backbone)
        self.head = ReconstructionHead(backbone)
        self._intensity = (
            view_intensity(plan.modality, plan.spacing, ViewIntensity()) if chosen.intensity == "weak" else None
        )

    def describe(self) -> str:
        block, size = (" x ".join(map(str, n)) for n in (self.block, self.read_size))
        return f"hides {self.hidden} of the {self.blocks} blocks of {block} voxels in a crop of {size}"

    def views(self, batch: Tensors) -> Tensors:
        """Crops (B, 1, *size), which voxels lie in the volume (B, 1, *size), hidden blocks (B, K) and others (B, K)."""
        seeds = batch["seed"]
        image, inside = with_data(batch)
        flips = uniform(seeds, "mae.flip", 3).to(image.device) < self.options.flip
        for axis in range(3):
            mirrored = flips[:, axis].view(-1, 1, 1, 1, 1)
            image = torch.where(mirrored, image.flip(axis + 2), image)
            inside = torch.where(mirrored, inside.flip(axis + 2), inside)
        if self._intensity is not None:
            image = self._intensity(image, seeds)
        masks = [
            hidden_blocks(uniform(seeds, name, self.blocks), self.hidden).to(image.device)
            for name in ("mae.mask", "mae.other")
        ]
        return {"image": image, "inside": inside, "hidden": masks[0], "other": masks[1]}

    def _seen(self, views: Tensors, hidden: Tensor) -> Tensor:
        # padding repeats the volume's edge, so a hidden voxel there could be read off it
        return views["inside"] & ~hidden_voxels(hidden, self.block, self.read_size)

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        image, hidden = views["image"], views["hidden"]
        seen = self._seen(views, hidden)
        features = self.encoder(image, seen)
        prediction = chosen_blocks(self.head(features), self.block, hidden)
        marks = {
            "target": chosen_blocks(image, self.block, hidden),
            "inside": chosen_blocks(views["inside"], self.block, hidden),
            "hidden": hidden,
            "image": image,
            "seen": seen,
            "features": pooled_pyramid(features, views["inside"]).float(),
        }
        return {"prediction": prediction}, marks

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        """Error of the predicted blocks (B, K, V); see `reconstruction_loss`."""
        chosen: MAEOptions = self.options
        target, inside = marks["target"], marks["inside"]
        return {"loss": reconstruction_loss(z["prediction"], target, inside, chosen.loss, chosen.normalise)}

    @torch.no_grad()
    def trivial(self, z: Tensors, marks: Tensors) -> dict[str, float]:
        """The loss of solutions that know no anatomy.

        `constant` predicts the grey level of what a crop shows; `interpolated` continues the visible voxels into the
        hidden blocks. A network that ends above the second has learned less than to look around.
        """
        chosen: MAEOptions = self.options
        image, seen, inside = marks["image"], marks["seen"], marks["inside"]
        if chosen.normalise == "block":
            constant = torch.zeros_like(marks["target"])
        else:
            constant = level_of(image, seen, chosen.loss).view(-1, 1, 1).expand_as(marks["target"])
        around = chosen_blocks(interpolated(image, seen), self.block, marks["hidden"])
        if chosen.normalise == "block":
            around = block_normalised(around, inside)
        return {
            name: float(self.objective({"prediction": blocks}, marks)["loss"])
            for name, blocks in (("constant", constant), ("interpolated", around))
        }

    @torch.no_grad()
    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        """Pooled features of the same crop under two masks are positive, those of other crops negative.

        Training compares none; the second mask is encoded here, which only a logged step pays for.
        """
        features = self.encoder(views["image"], self._seen(views, views["other"]))
        other = pooled_pyramid(features, views["inside"]).float()
        both = torch.cat([marks["features"], other])
        same = torch.eye(len(other), dtype=torch.bool, device=other.device).repeat(2, 2)
        return Pairs(both, same & ~torch.eye(len(both), dtype=torch.bool, device=other.device), ~same)


def read_size(plan: Plan, multiple: Triple, size: Triple | None = None) -> Triple:
    """Voxels of a crop: the fine-tuning patch as far as the median volume fills it, in multiples of the total stride.

    Enlarged where the network would be left with less than 8 voxels at its bottom; what lies outside a volume is
    hidden and not scored.

    Raises:
        MedclError: a given size that the network cannot take.
    """
    if size is not None:
        counts = [n / m for n, m in zip(size, multiple, strict=True)]
        if any(c % 1 for c in counts) or math.prod(counts) < 2:
            raise MedclError(
                f"size {tuple(size)} does not suit a network with a total stride of {multiple}", "options of mae",
                "Give multiples of it, and twice it along one axis at least.",
            )  # fmt: skip
        return size[0], size[1], size[2]
    wish = [min(p, v) for p, v in zip(plan.patch_size, plan.volume_size, strict=True)]
    # to the nearest multiple: rounding up would fill much of a small crop with padding
    counted = [max(1, math.ceil(n / m - 0.5)) for n, m in zip(wish, multiple, strict=True)]
    while math.prod(counted) < FEWEST_FEATURES:
        short = [n / (c * m) for n, c, m in zip(wish, counted, multiple, strict=True)]
        counted[short.index(max(short))] *= 2
    x, y, z = (c * m for c, m in zip(counted, multiple, strict=True))
    return x, y, z


def block_size(size: Triple, spacing: tuple[float, float, float], block: int | Triple, token: int = 1) -> Triple:
    """Voxels of a block that divides a crop of `size`, of whole tokens.

    Args:
        size: voxels of a crop.
        spacing: mm along its axes.
        block: voxels along the finest axis, from which the others follow in mm; or all three.
        token: voxels along an axis that the network takes as one.

    Raises:
        MedclError: three given numbers that do not divide the crop.
    """
    if not isinstance(block, int):
        if any(n % b or b % token for n, b in zip(size, block, strict=True)):
            raise MedclError(
                f"block {tuple(block)} does not divide a crop of {size} voxels"
                + (f" into whole tokens of {token}" if token > 1 else ""),
                "options of mae", "Give divisors of it, or one number.",
            )  # fmt: skip
        return block[0], block[1], block[2]
    side = block * min(spacing)
    sizes = []
    for n, step in zip(size, spacing, strict=True):
        # at least two blocks along an axis, where that leaves one a token
        able = [d for d in range(token, n + 1, token) if n % d == 0 and d <= max(token, n // 2)]
        sizes.append(min(able, key=lambda d: (abs(math.log(d * step / side)), d)))
    return sizes[0], sizes[1], sizes[2]


def check_options(options: MAEOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: an unknown name, a count that is not a positive number, or a share out of its range.
    """
    checks = Checks(options, "mae")
    for name, known in CHOICES.items():
        checks.one_of(name, known)
    checks.between("ratio", 0, 1, above=True, below=True)
    checks.between("flip", 0, 1)
    checks.triples("size")
    if isinstance(options.block, int):
        checks.counts("block")
    else:
        if options.block is None:
            checks.refuse("block", "Give a number, or three.")
        checks.triples("block")
