"""VoCo: predict from appearance where in the body a crop lies.

Wu, Zhuang, Chen, CVPR 2024 (see `medcl.losses.voco` for the objective). Base crops tile a canvas; a random crop's
similarity to each base crop should equal the share of it that lies inside that base crop. The published networks tile
the axial plane only, because their crops are as deep as the volume; here the grid is three-dimensional.

The releases hold a few accidents that are not repeated here. Their teacher starts at random weights of its own and
follows before the optimiser's step with a constant momentum of 0.9; here it starts as a copy of the student, follows
after the step, and its momentum rises from `momentum` to 1. The second release drops "features" by a `Dropout1d` on a
matrix (N, C), which torch takes for one unbatched sample: it zeroes whole crops, in evaluation as well. Here pooled
channels are dropped, in training only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.losses.voco import VARIANTS, above_diagonal, bases_with_data, overlap_labels, voco_loss
from medcl.networks.backbones import Backbone
from medcl.networks.ema import MomentumTeacher, cosine_momentum
from medcl.networks.heads import POOLS, ProjectionHead, pooled_pyramid
from medcl.pretext.base import REMEDIES, Pairs, PretextTask, Tensors, Triple
from medcl.pretext.checks import Checks
from medcl.pretext.sizes import enlarged, network_input
from medcl.store.plan import THICK, Plan
from medcl.transforms.compose import INTENSITY, view_intensity
from medcl.transforms.inside import box_mask, data_box, repeat_edge, starts_within
from medcl.transforms.random import mix_seeds, uniform

LARGEST_CROP = 64


@dataclass(frozen=True)
class VoCoOptions:
    """Settings of VoCo.

    Attributes:
        variant: `paper` is one network and an unweighted loss, as the CVPR paper describes it; `teacher` is its
            release, with a momentum teacher of the whole network; `v2` is the extension, with a momentum teacher of
            the projection head alone and a term between volumes. See `medcl.losses.voco.VARIANTS`.
        crops: random crops a volume.
        crop_size: voxels of a crop; by default half the volume along its axes, at most 64.
        grid: base crops along each axis; by default as many as fit, at most `max_bases` in all.
        max_bases: the most base crops.
        momentum: of the teacher at the start; it rises to 1. The paper's form has no teacher.
        regulariser: weight of the term that keeps the base crops of a volume apart.
        feature_dropout: share of pooled channels dropped before the projection.
        pool: what of a map the head is given: mean, or mean_deviation.
        hidden, embedding: widths of the projection head.
        flip: probability of mirroring a crop along each axis. The label knows places only, so mirroring teaches
            invariance to it; 0 keeps left and right apart.
        intensity: random intensity changes of every crop: none, weak or strong. Strong ones keep crops from being
            matched by their grey values and noise.
    """

    variant: str = "teacher"
    crops: int = 4
    crop_size: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    max_bases: int = 16
    momentum: float = 0.9
    regulariser: float = 1.0
    feature_dropout: float = 0.2
    pool: str = "mean_deviation"
    hidden: int = 512
    embedding: int = 256
    flip: float = 0.2
    intensity: str = "weak"


class VoCo(PretextTask):
    """VoCo in one of its three published forms."""

    Options = VoCoOptions
    before: ClassVar[dict[str, Any]] = {"pool": "mean"}
    remedies = REMEDIES | {
        "constant": "Every crop looks like every base crop: use --options.variant teacher (the paper's single network "
        "is known to stay here), a lower --lr, and --options.crops and grid that leave most pairs apart.",
        "orthogonal": "No crop is recognised in any base crop: use --options.variant teacher, weaker intensity changes "
        "(--options.intensity weak), --options.flip 0, or larger crops, which overlap their base crops more.",
    }

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: VoCoOptions = self.options
        check_options(chosen)
        self.variant = VARIANTS[chosen.variant]
        self.needs_volumes = 2 if self.variant.inter else 1
        self.crop_size, self.grid = base_grid(plan, chosen.crop_size, chosen.grid, chosen.max_bases)
        self.input_size = network_input(self.crop_size, backbone.multiple)
        x, y, z = (n * g for n, g in zip(self.crop_size, self.grid, strict=True))
        self.read_size = (x, y, z)
        width = POOLS[chosen.pool] * sum(backbone.channels)
        self.projection_head = ProjectionHead(width, chosen.hidden, chosen.embedding, dropout=chosen.feature_dropout)
        self.teacher = None if self.variant.teacher == "none" else MomentumTeacher(self._taught())
        preset = INTENSITY[chosen.intensity]
        self._intensity = view_intensity(plan.modality, plan.spacing, preset) if preset else None

    def _taught(self) -> nn.ModuleDict:
        """The networks that the teacher follows."""
        shared = self.variant.teacher == "projector"
        return nn.ModuleDict({**({} if shared else {"backbone": self.backbone}), "head": self.projection_head})

    def describe(self) -> str:
        size = " x ".join(map(str, self.crop_size))
        scaled = "" if self.input_size == self.crop_size else f", enlarged to {' x '.join(map(str, self.input_size))}"
        grid = " x ".join(map(str, self.grid))
        return f"{grid} base crops and {self.options.crops} random crops of {size} voxels{scaled}"

    def views(self, batch: Tensors) -> Tensors:
        """Random crops (B, K, 1, *crop) and base crops (B, n, 1, *crop), and of each which voxels hold data.

        Also overlap shares (B, K, n), the base crops that hold any data, `usable` (B, n), and volumes (B,).
        """
        volume, seeds = batch["image"], batch["seed"]
        device = volume.device
        box = data_box(batch)
        inside = box_mask(box, self.read_size, device)
        both = torch.cat([repeat_edge(volume, box), inside.to(volume.dtype)], dim=1)
        crop = torch.tensor(self.crop_size, device=device).float()
        starts = starts_within(uniform(seeds, "voco.start", self.options.crops, 3), box, self.crop_size, self.read_size)
        crops = torch.cat([cut(both, starts.to(device), self.crop_size), tile(both, self.grid)], dim=1)
        rows, count = crops.shape[:2]
        crop_seeds = mix_seeds(seeds.repeat_interleave(count), torch.arange(count).repeat(rows))
        flat, inside = self._augment(crops.flatten(0, 1), crop_seeds)
        pixels, real = (tensor.view(rows, count, *tensor.shape[1:]) for tensor in (flat, inside))
        k = self.options.crops
        return {
            "crops": pixels[:, :k],
            "bases": pixels[:, k:],
            "crops_inside": real[:, :k],
            "bases_inside": real[:, k:],
            "labels": overlap_labels(starts.to(device).float(), crop, self.grid, box),
            "usable": bases_with_data(crop, self.grid, box),
            "volume": batch["volume"],
        }

    def _augment(self, crops: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (N, 1, *crop) and which of their voxels hold data, from both as channels of one tensor."""
        flips = uniform(seeds, "voco.flip", 3) < self.options.flip
        for axis in range(3):
            chosen = flips[:, axis].nonzero().flatten().to(crops.device)
            if len(chosen):
                crops[chosen] = crops[chosen].flip(axis + 2)
        pixels, inside = crops[:, :-1].contiguous(), crops[:, -1:] > 0
        return (pixels if self._intensity is None else self._intensity(pixels, seeds)), inside

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        batch = len(views["crops"])
        pixels = enlarged(torch.cat([views["crops"], views["bases"]], dim=1).flatten(0, 1), self.input_size)
        inside = torch.cat([views["crops_inside"], views["bases_inside"]], dim=1).flatten(0, 1)
        pool = self.options.pool
        features = pooled_pyramid(self.backbone.encode(pixels), inside, pool)
        z = {"student": self.projection_head(features)}
        if self.teacher is not None:
            nets: Any = self.teacher.module
            with torch.no_grad():
                seen = pooled_pyramid(nets["backbone"].encode(pixels), inside, pool) if "backbone" in nets else features
                z["teacher"] = nets["head"](seen)
        z = {name: rows.float().view(batch, -1, rows.shape[-1]) for name, rows in z.items()}
        marks = {"labels": views["labels"], "usable": views["usable"], "volume": views["volume"]}
        return z, {**marks, "features": features.float()}

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        return voco_loss(
            self.variant, z["student"], z.get("teacher"), marks["labels"], marks["volume"], self.options.regulariser,
            marks["usable"],
        )  # fmt: skip

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        """A crop and the base crops it lies in are positive, those it does not touch and other base crops negative."""
        labels, usable = marks["labels"], marks["usable"]
        volumes, k, n = labels.shape
        positive = labels.new_zeros((volumes, k + n, k + n), dtype=torch.bool)
        negative = positive.clone()
        positive[:, :k, k:] = labels > 0
        negative[:, :k, k:] = (labels == 0) & usable[:, None]
        negative[:, k:, k:] = above_diagonal(negative[:, k:, k:]) & usable[:, :, None] & usable[:, None]
        blocks = [torch.block_diag(*(mask | mask.mT)) for mask in (positive, negative)]
        return Pairs(z["student"].flatten(0, 1), blocks[0], blocks[1], marks["features"])

    def after_step(self, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.update(self._taught(), cosine_momentum(self.options.momentum, progress))


def check_options(options: VoCoOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: a name is unknown, a count is not a positive number, or a share not between 0 and 1.
    """
    checks = Checks(options, "voco")
    checks.one_of("variant", VARIANTS)
    checks.one_of("intensity", INTENSITY)
    checks.one_of("pool", POOLS)
    checks.counts("crops", "max_bases", "hidden", "embedding")
    checks.between("momentum", 0, 1)
    checks.between("feature_dropout", 0, 0.9)
    checks.between("flip", 0, 1)
    checks.between("regulariser", 0)
    checks.triples("crop_size", "grid")


def base_grid(
    plan: Plan, crop_size: Triple | None = None, grid: Triple | None = None, max_bases: int = 16
) -> tuple[Triple, Triple]:
    """Crop size and base grid for the plan's volumes.

    A crop spans half of the shortest axis that can be halved, at most 64 voxels and an eighth of a fine-tuning patch,
    and all of a thick axis with too few slices to share; the grid is what then fits into the median volume.

    Raises:
        MedclError: only one base crop fits, so there is no position to tell.
    """
    multiple, volume = plan.total_stride, plan.volume_size
    crop_size = None if crop_size is None else (crop_size[0], crop_size[1], crop_size[2])
    grid = None if grid is None else (grid[0], grid[1], grid[2])
    if crop_size is None:
        finest = min(plan.spacing)
        halves = [(n // 2) // m * m for n, m in zip(volume, multiple, strict=True)]
        able = [
            half >= 2 * m and step < THICK * finest
            for half, m, step in zip(halves, multiple, plan.spacing, strict=True)
        ]
        # a crop as near to a cube in mm as the axes allow
        side = min((h * s for h, s, ok in zip(halves, plan.spacing, able, strict=True) if ok), default=0.0)
        side = min(side, LARGEST_CROP * finest)

        def sizes_for(side: float) -> list[int]:
            return [
                max(2 * m, round(side / step / m) * m) if ok else -(-n // m) * m
                for step, m, n, ok in zip(plan.spacing, multiple, volume, able, strict=True)
            ]

        # a step looks at a dozen or two of crops twice: an eighth of a fine-tuning patch each is what fits beside it
        while math.prod(sizes_for(side)) > math.prod(plan.patch_size) / 8 and sizes_for(0.9 * side) != sizes_for(0):
            side *= 0.9
        sizes = sizes_for(side)
        crop_size = (sizes[0], sizes[1], sizes[2])
    if grid is None:
        counts = [max(1, n // c) for n, c in zip(volume, crop_size, strict=True)]
        while math.prod(counts) > max_bases:
            counts[counts.index(max(counts))] -= 1
        grid = (counts[0], counts[1], counts[2])
    if math.prod(grid) < 2:
        raise MedclError(
            f"a single base crop of {crop_size} voxels fits into the median volume of {volume}",
            "voco", "Give a smaller --options.crop_size, or a finer spacing in plan.json.",
        )  # fmt: skip
    return crop_size, grid


def cut(volume: Tensor, starts: Tensor, size: Triple) -> Tensor:
    """Crops (B, K, C, *size) of a batch (B, C, X, Y, Z) at `starts` (B, K, 3), in one indexing operation."""
    x, y, z = (
        starts[..., axis, None] + torch.arange(n, device=volume.device) for axis, n in enumerate(size)
    )  # (B, K, n) each
    batch = torch.arange(len(volume), device=volume.device).view(-1, 1, 1, 1, 1)
    picked = volume.movedim(1, -1)[
        batch, x[:, :, :, None, None], y[:, :, None, :, None], z[:, :, None, None, :]
    ]  # (B, K, *size, C)
    return picked.movedim(-1, 2)


def tile(volume: Tensor, grid: Triple) -> Tensor:
    """Non-overlapping base crops (B, n, C, *crop) of a batch (B, C, X, Y, Z), the last axis of the grid fastest."""
    b, c, *size = volume.shape
    gx, gy, gz = grid
    cx, cy, cz = (n // g for n, g in zip(size, grid, strict=True))
    pieces = volume.view(b, c, gx, cx, gy, cy, gz, cz).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return pieces.reshape(b, gx * gy * gz, c, cx, cy, cz)
