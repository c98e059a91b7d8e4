"""Local contrast: a decoder that tells the places of a volume apart.

Chaitanya et al., NeurIPS 2020, section 3.2: two views of a read, and on the map of the first decoder blocks regions
that show the same place are drawn together and their neighbours pushed apart. The encoder is frozen, as in the paper,
where it has been pretrained by global contrast before (`--init`, or the task `global_local`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.losses.local_contrast import STRATEGIES, local_loss, local_masks, nearest_disjoint, region_corners
from medcl.networks.backbones import Backbone
from medcl.networks.heads import PointwiseHead, shares_inside, some_voxels
from medcl.pretext.base import Pairs, PretextTask, Tensors, Triple
from medcl.pretext.checks import Checks
from medcl.pretext.global_contrast import check_partitions, check_reads
from medcl.pretext.sizes import enlarged, network_input, view_size
from medcl.store.crops import Anywhere, Partitions, Places
from medcl.store.plan import Plan
from medcl.transforms.compose import INTENSITY
from medcl.transforms.correspondence import (
    affine_of,
    first_place,
    grid_points,
    into,
    map_to_view,
    sample_at,
    view_to_map,
)
from medcl.transforms.inside import data_box, inside_at
from medcl.transforms.views import RandomView


@dataclass(frozen=True)
class LocalContrastOptions:
    """Settings of local contrast.

    Attributes:
        strategy: `LR`, or `LD` with the same regions of other volumes as further positives.
        blocks: decoder blocks that are trained; by default three, or as many as there are before the output layer.
        freeze_encoder: train the decoder alone.
        region: voxels of a region of the map along each axis.
        regions: regions along each axis.
        negatives: of every region, in each view.
        partitions: of LD, cells along each axis; the same cell of other volumes is read beside.
        size: voxels of a view; by default the fine-tuning patch, with LD what a cell holds.
        temperature: of the similarities.
        rotate_deg: largest rotation of a view about each axis. 0 and a `scale` of 1 are the paper's form.
        scale: range of the growth of what a view shows.
        intensity: random intensity changes of a view: none, weak or strong.
        embedding: width of a region's embedding.
    """

    strategy: str = "LR"
    blocks: int | None = None
    freeze_encoder: bool = True
    region: int = 3
    regions: int = 3
    negatives: int = 5
    partitions: tuple[int, int, int] = (1, 1, 4)
    size: tuple[int, int, int] | None = None
    temperature: float = 0.1
    rotate_deg: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    intensity: str = "strong"
    embedding: int = 128


class LocalContrast(PretextTask):
    """Contrast of the regions of a decoder map."""

    Options = LocalContrastOptions

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: LocalContrastOptions = self.options
        check_options(chosen)
        self.trains = ("decoder",) if chosen.freeze_encoder else ("encoder", "decoder")
        self.blocks = decoder_depth(backbone, chosen.blocks)
        self.places, cell = self._places()
        flat = backbone.spec.spatial_dims == 2
        a, b, c = chosen.size or view_size(plan, cell)
        self.size: Triple = (a, b, 1 if flat and not chosen.size else c)
        self.read_size = self.size
        if isinstance(self.places, Partitions):
            check_reads(self.places, self.read_size, plan)
        self.input_size = network_input(self.size, backbone.multiple)
        self.view = RandomView(
            self.size, plan.spacing, plan.modality, INTENSITY[chosen.intensity],
            (0.0, 0.0, chosen.rotate_deg) if flat else chosen.rotate_deg, chosen.scale,
        )  # fmt: skip
        level = backbone.decoder_levels[self.blocks - 1]
        channels, reduction = backbone.channels[level], backbone.reductions[level]
        self.map_size = tuple(n // r for n, r in zip(self.input_size, reduction, strict=True))
        step = [n / m for n, m in zip(self.size, self.map_size, strict=True)]  # view voxels in a voxel of the map
        first = first_place(backbone.decoder_offsets[self.blocks - 1], reduction, step)
        corners, extent = region_corners(self.map_size, chosen.region, chosen.regions)
        mm = [s * r for s, r in zip(plan.spacing, step, strict=True)]
        near = nearest_disjoint(corners, extent, mm, chosen.negatives)
        if not near.any():
            raise MedclError(
                f"a decoder map of {self.map_size} voxels holds no two regions of {extent} apart",
                "local_contrast", "Give a smaller --options.region, or more --options.blocks.",
            )  # fmt: skip
        points = corners[:, None] + grid_points(extent)  # (R, voxels of a region, 3)
        self.near: Tensor
        self.points: Tensor
        self.step: Tensor
        self.first: Tensor
        self.register_buffer("near", near, persistent=False)
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("step", torch.tensor(step), persistent=False)
        self.register_buffer("first", torch.tensor(first), persistent=False)
        self.head = PointwiseHead(channels)
        self.region = nn.Linear(channels * points.shape[1], chosen.embedding, bias=False)

    def _places(self) -> tuple[Places, Triple]:
        if self.options.strategy == "LR":
            return Anywhere(), (1, 1, 1)
        self.needs_volumes = 2
        x, y, z = self.options.partitions
        check_partitions((x, y, z), self.plan)
        return Partitions((x, y, z)), (x, y, z)

    def train(self, mode: bool = True) -> LocalContrast:
        super().train(mode)
        if self.options.freeze_encoder:
            for module in self.backbone.encoder_modules():
                module.eval()  # running statistics stay too
        return self

    def describe(self) -> str:
        size = " x ".join(map(str, self.map_size))
        frozen = ", encoder frozen" if self.options.freeze_encoder else ""
        return (
            f"{self.options.strategy} on {len(self.points)} regions of a map of {size} voxels after {self.blocks} "
            f"decoder blocks{frozen}"
        )

    def views(self, batch: Tensors) -> Tensors:
        """`view` (N, 2, 1, *size), and its affine map to the read: `matrix` (N, 2, 3, 3) and `origin` (N, 2, 3).

        Also where the read holds data, `low` and `high` (N, 3), and which voxels of the views do, `inside`.
        """
        shown = [self.view.of_reads(batch, number) for number in range(2)]
        maps = [affine_of(where) for _, where, _ in shown]
        low, high = (edge.to(batch["image"].device) for edge in data_box(batch))
        return {
            "low": low,
            "high": high,
            "view": torch.stack([image for image, _, _ in shown], dim=1),
            "inside": torch.stack([inside for _, _, inside in shown], dim=1),
            "matrix": torch.stack([matrix for matrix, _ in maps], dim=1),
            "origin": torch.stack([origin for _, origin in maps], dim=1),
            "volume": batch["volume"],
            "partition": batch["place"],
        }

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        n = len(views["view"])
        pixels = enlarged(views["view"].flatten(0, 1), self.input_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.options.freeze_encoder):
            features = self.backbone.encode(pixels)
        dense = self.backbone.decode(features, self.blocks)
        decoded = self.head(dense)
        decoded = decoded.view(n, 2, *decoded.shape[1:])
        points, inside = self.corresponding(views["matrix"], views["origin"])
        z = torch.stack([self._regions(decoded[:, view], points[:, view]) for view in range(2)], dim=1)
        marks = {
            "valid": inside, "inside": self.with_data(views), "volume": views["volume"],
            "partition": views["partition"],
        }  # fmt: skip
        some = shares_inside(views["inside"].flatten(0, 1), dense.shape[2:]).flatten(1) > 0.5
        return {"z": z}, {**marks, "features": some_voxels(dense, inside=some)}

    def with_data(self, views: Tensors) -> Tensor:
        """Whether all voxels of a region of the first view show data, (N, R)."""
        n, (r, v) = len(views["low"]), self.points.shape[:2]
        points = map_to_view(self.points.view(r * v, 3), self.step, self.first)
        places = points @ views["matrix"][:, 0].float().mT + views["origin"][:, 0, None].float()
        return inside_at(places.mT, (views["low"], views["high"])).view(n, r, v).all(-1)

    def corresponding(self, matrix: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Where the voxels of the first view's regions lie on both maps (N, 2, R, V, 3); inside the second? (N, R)."""
        n, (r, v) = len(matrix), self.points.shape[:2]
        first = self.points.view(1, r * v, 3).expand(n, -1, -1)
        maps = [(matrix[:, view].float(), origin[:, view].float()) for view in range(2)]
        place = into(map_to_view(first, self.step, self.first), *maps)
        second = view_to_map(place, self.step, self.first)
        second = torch.where(second.sub(second.round()).abs() < 1e-3, second.round(), second)
        last = torch.tensor(self.map_size, device=second.device) - 0.5
        shown = (place > -0.51) & (place < torch.tensor(self.size, device=place.device) - 0.49)
        inside = (shown & (second >= -0.5) & (second <= last)).all(-1).view(n, r, v).all(-1)
        return torch.stack([first, second], dim=1).view(n, 2, r, v, 3), inside

    def _regions(self, decoded: Tensor, points: Tensor) -> Tensor:
        """Embeddings (N, R, d) of the regions whose voxels lie at points (N, R, V, 3) of maps (N, C, ...)."""
        n, r, v, _ = points.shape
        with torch.autocast(decoded.device.type, enabled=False):
            values = sample_at(decoded.float(), points.reshape(n, r * v, 3)).reshape(n, r, -1)
            return self.region(values)

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        chosen: LocalContrastOptions = self.options
        return {
            "loss": local_loss(
                chosen.strategy, z["z"], self.near, marks["valid"], marks["volume"], marks["partition"],
                chosen.temperature, marks["inside"],
            )
        }  # fmt: skip

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        masks = local_masks(
            self.options.strategy, self.near, marks["valid"], marks["volume"], marks["partition"], marks["inside"]
        )
        positive, negative = (mask | mask.mT for mask in masks)
        return Pairs(z["z"].flatten(0, 2), positive, negative, marks["features"])


def decoder_depth(backbone: Backbone, blocks: int | None, default: int = 3) -> int:
    """Decoder blocks to use: those asked for, or `default` as far as the backbone has them before its output layer.

    Raises:
        MedclError: more than there are.
    """
    there = len(backbone.decoder_levels)
    if blocks is None and there:
        return min(default, there)
    if blocks is None or blocks > there:
        raise MedclError(
            f"{blocks or 1} decoder blocks, and {backbone.spec.name} with {len(backbone.spec.strides)} strides has "
            f"{there} before its output layer",
            "--options.blocks", f"Give at most {there}." if there else "Use --backbone dynunet.",
        )  # fmt: skip
    return blocks


def check_options(options: LocalContrastOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: a name is unknown, or a number out of its range.
    """
    checks = Checks(options, "local_contrast")
    checks.one_of("strategy", STRATEGIES)
    checks.one_of("intensity", INTENSITY)
    checks.counts("region", "regions", "negatives", "embedding", *(["blocks"] if options.blocks is not None else []))
    checks.triples("partitions", "size")
    if options.partitions is None:
        checks.refuse("partitions", "Give three positive numbers.")
    if not isinstance(options.freeze_encoder, bool):
        checks.refuse("freeze_encoder", "Give true or false.")
    checks.between("temperature", 0, above=True)
    checks.between("rotate_deg", 0, 180)
    checks.growth("scale")
