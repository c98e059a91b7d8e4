"""PixPro: voxels that show the same place in two views have the same embedding.

Xie et al., CVPR 2021 (see `medcl.losses.dense`). Places are compared in mm, by coordinates that travel with the views,
so rotated, scaled and mirrored views keep their exact correspondence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.losses.dense import close_pairs, dense_contrast, propagate, propagation_loss
from medcl.networks.backbones import Backbone
from medcl.networks.ema import MomentumTeacher, cosine_momentum
from medcl.networks.heads import PointwiseHead, some_voxels
from medcl.pretext.base import Pairs, PretextTask, Tensors
from medcl.pretext.checks import Checks
from medcl.pretext.sizes import enlarged, network_input, view_size
from medcl.store.plan import Plan
from medcl.transforms.compose import INTENSITY
from medcl.transforms.correspondence import affine_of, first_place, grid_points, map_to_view
from medcl.transforms.inside import data_box, inside_at
from medcl.transforms.views import RandomView

MOST_VOXELS = 512  # of a map by default: pairs of voxels are compared
SHOWN = 200  # voxels of a view that diagnostics look at
ROOM = 5 / 4  # a read is this much longer than a view along each axis


@dataclass(frozen=True)
class PixProOptions:
    """Settings of PixPro.

    Attributes:
        form: `propagation` is PixPro itself, `contrast` is PixContrast.
        blocks: decoder blocks before the map that is compared, 0 for the encoder's coarsest map; by default as many as
            leave it at most 512 voxels.
        distance: pairs closer than this share of a map voxel's diagonal show the same place.
        gamma: sharpness of the propagation.
        temperature: of the contrast.
        momentum: of the teacher at the start; it rises to 1.
        size: voxels of a view; by default the fine-tuning patch, no larger than the median volume.
        rotate_deg: largest rotation of a view about each axis.
        scale: range of the growth of what a view shows.
        flip: probability of mirroring a view along each axis.
        intensity: random intensity changes of a view: none, weak or strong.
        hidden, embedding: widths of the head.
    """

    form: str = "propagation"
    blocks: int | None = None
    distance: float = 0.7
    gamma: float = 2.0
    temperature: float = 0.3
    momentum: float = 0.99
    size: tuple[int, int, int] | None = None
    rotate_deg: float = 15.0
    scale: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.0
    intensity: str = "strong"
    hidden: int = 256
    embedding: int = 128


class PixPro(PretextTask):
    """Dense consistency of two views."""

    Options = PixProOptions

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: PixProOptions = self.options
        check_options(chosen)
        a, b, c = chosen.size or view_size(plan)
        self.size = (a, b, c)
        self.input_size = network_input(self.size, backbone.multiple)
        x, y, z = (max(n, min(round(n * ROOM), v)) for n, v in zip(self.size, plan.volume_size, strict=True))
        self.read_size = (x, y, z)
        self.blocks, level, self.map_size = choose_map(backbone, self.input_size, chosen.blocks)
        self.trains = ("encoder", "decoder") if self.blocks else ("encoder",)
        self.view = RandomView(
            self.size, plan.spacing, plan.modality, INTENSITY[chosen.intensity], chosen.rotate_deg, chosen.scale,
            (chosen.flip,) * 3,
        )  # fmt: skip
        self.head = PointwiseHead(backbone.channels[level], chosen.embedding, chosen.hidden)
        self.transform = nn.Linear(chosen.embedding, chosen.embedding) if chosen.form == "propagation" else None
        self.teacher = MomentumTeacher(self._taught())
        step = [n / m for n, m in zip(self.size, self.map_size, strict=True)]
        offset = backbone.decoder_offsets[self.blocks - 1] if self.blocks else backbone.offsets[level]
        self.step: Tensor
        self.first: Tensor
        self.spacing: Tensor
        self.register_buffer("step", torch.tensor(step), persistent=False)
        first = torch.tensor(first_place(offset, backbone.reductions[level], step))
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("spacing", torch.tensor(plan.spacing, dtype=torch.float32), persistent=False)

    def _taught(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def describe(self) -> str:
        place = f"after {self.blocks} decoder blocks" if self.blocks else "of the encoder"
        size, view = (" x ".join(map(str, n)) for n in (self.map_size, self.size))
        return f"{self.options.form} on a map of {size} voxels {place}, two views of {view} voxels a volume"

    def views(self, batch: Tensors) -> Tensors:
        """Two views of N reads, and where the voxels of their maps lie.

        Returns:
            `view` (N, 2, 1, *size), the map voxels' centres `mm` (N, 2, P, 3), `inside` (N, 2, P), which of them show
            data, and a map voxel's `diagonal` (N, 2) in mm.
        """
        shown = [self.view.of_reads(batch, number) for number in range(2)]
        points = map_to_view(grid_points(self.map_size, self.step.device), self.step, self.first)
        box = data_box(batch)
        centres, diagonals, inside = [], [], []
        for _, where, _ in shown:
            matrix, origin = affine_of(where)
            places = points @ matrix.mT + origin[:, None]
            inside.append(inside_at(places.mT, box)[:, 0])
            centres.append(places * self.spacing)
            diagonals.append((matrix @ torch.diag(self.step) * self.spacing[:, None]).square().sum((1, 2)).sqrt())
        return {
            "view": torch.stack([image for image, _, _ in shown], dim=1),
            "inside": torch.stack(inside, dim=1),
            "mm": torch.stack(centres, dim=1),
            "diagonal": torch.stack(diagonals, dim=1),
        }

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        pixels = enlarged(views["view"].flatten(0, 1), self.input_size)
        taught: Any = self.teacher.module
        inside = views["inside"]
        x, dense = self._dense(self.backbone, self.head, pixels)
        z = {"student": x}  # first: diagnostics look at it
        if self.transform is not None:
            rows = x.flatten(0, 1)
            z["student"] = propagate(rows, self.transform(rows), self.options.gamma, inside.flatten(0, 1)).view_as(x)
        with torch.no_grad():
            z["teacher"] = self._dense(taught["backbone"], taught["head"], pixels)[0]
        diagonal = views["diagonal"].amax(1)
        close = close_pairs(views["mm"][:, 0], views["mm"][:, 1], diagonal, self.options.distance)
        both = inside[:, 0, :, None] & inside[:, 1, None]
        features = some_voxels(dense, inside=inside.flatten(0, 1))
        return z, {"close": close & both, "apart": ~close & both, "features": features}

    def _dense(self, backbone: Backbone, head: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, 2, P, d) of views (2 N, 1, *input_size), and the map that they come from."""
        features = backbone.encode(pixels)
        dense = backbone.decode(features, self.blocks) if self.blocks else features[-1]
        return head(dense).flatten(2).mT.float().unflatten(0, (-1, 2)), dense

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        student, teacher, close = z["student"], z["teacher"], marks["close"]
        if self.options.form == "contrast":
            return {"loss": dense_contrast(student, teacher, close, self.options.temperature, marks["apart"])}
        return {"loss": propagation_loss(student, teacher, close)}

    @torch.no_grad()
    def trivial(self, z: Tensors, marks: Tensors) -> dict[str, float]:
        """As for every task; but without negatives equal embeddings are the optimum itself: a floor, named so."""
        values = super().trivial(z, marks)
        if self.options.form == "propagation":
            values["collapsed"] = values.pop("constant")
        return values

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        """Some voxels of the first read's first view, and for each one of the second view that shows its place."""
        close, apart = marks["close"][0], marks["apart"][0]
        rows = torch.linspace(0, len(close) - 1, min(SHOWN, len(close)), device=close.device).round().long()
        rows = rows[close[rows].any(1)] if close.any() else rows
        columns = close[rows].float().argmax(1)
        between, others, n = close[rows][:, columns], apart[rows][:, columns], len(rows)
        positive = close.new_zeros((2 * n, 2 * n))
        positive[:n, n:], positive[n:, :n] = between, between.mT
        negative = close.new_zeros((2 * n, 2 * n))
        negative[:n, n:], negative[n:, :n] = others, others.mT
        x = z["student"][0]
        return Pairs(torch.cat([x[0, rows], x[1, columns]]), positive, negative, marks["features"])

    def after_step(self, progress: float) -> None:
        self.teacher.update(self._taught(), cosine_momentum(self.options.momentum, progress))


def choose_map(
    backbone: Backbone, input_size: tuple[int, int, int], blocks: int | None
) -> tuple[int, int, tuple[int, ...]]:
    """Decoder blocks before the map to compare, the map's level and its voxels.

    Raises:
        MedclError: more decoder blocks than there are before the output layer.
    """
    levels = [len(backbone.channels) - 1, *backbone.decoder_levels]
    sizes = [tuple(n // r for n, r in zip(input_size, backbone.reductions[i], strict=True)) for i in levels]
    if blocks is None:
        blocks = max((i for i, size in enumerate(sizes) if math.prod(size) <= MOST_VOXELS), default=0)
    if blocks >= len(levels):
        raise MedclError(
            f"{blocks} decoder blocks, and {backbone.spec.name} has {len(levels) - 1} before its output layer",
            "--options.blocks", f"Give at most {len(levels) - 1}.",
        )  # fmt: skip
    return blocks, levels[blocks], sizes[blocks]


@dataclass(frozen=True)
class PixContrastOptions(PixProOptions):
    """Those of PixPro, with the defaults of its contrastive form.

    Attributes:
        form: `contrast`.
        temperature: of the contrast.
        blocks: decoder blocks before the map that is compared.
    """

    form: str = "contrast"
    temperature: float = 0.1
    blocks: int | None = 1


class PixContrast(PixPro):
    """PixPro's contrastive form by a name of its own: a voxel against all others of the other view."""

    Options = PixContrastOptions


def check_options(options: PixProOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: a name is unknown, or a number out of its range.
    """
    checks = Checks(options, "pixpro")
    checks.one_of("form", ("propagation", "contrast"))
    checks.one_of("intensity", INTENSITY)
    if options.blocks is not None and options.blocks != 0:
        checks.counts("blocks")
    for name in ("distance", "gamma", "temperature"):
        checks.between(name, 0, above=True)
    for name in ("momentum", "flip"):
        checks.between(name, 0, 1)
    checks.triples("size")
    checks.between("rotate_deg", 0, 180)
    checks.growth("scale")
    checks.counts("hidden", "embedding")
