"""Global contrast: what lies at the same height of two bodies is alike.

Chaitanya et al., NeurIPS 2020, section 3.1. There a partition is a range of axial slices, and a network sees one slice.
In 3D it is a slab, or a cell of a grid over the volume; with `spatial_dims: 2` networks see slices as in the paper. The
volumes must cover about the same part of the body along the axes that are partitioned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from medcl.errors import MedclError
from medcl.losses.contrastive import contrast
from medcl.losses.global_contrast import STRATEGIES, VERSIONS, global_masks
from medcl.networks.backbones import Backbone
from medcl.networks.heads import POOLS, ProjectionHead, pooled_pyramid
from medcl.pretext.base import Pairs, PretextTask, Tensors
from medcl.pretext.checks import Checks
from medcl.pretext.sizes import enlarged, network_input, view_size
from medcl.store.crops import Partitions
from medcl.store.plan import Plan
from medcl.transforms.compose import INTENSITY
from medcl.transforms.views import RandomView

ROOM = 4 / 3  # a read is this much longer than a view along axes that are not partitioned


@dataclass(frozen=True)
class GlobalContrastOptions:
    """Settings of global contrast.

    Attributes:
        strategy: `GR`, `GD-` or `GD`.
        partitions: cells along each axis; the default cuts four slabs along the body. Their product is the reads a
            volume, and with the batch size the rows of a step.
        size: voxels of a view; by default what a cell holds, and the fine-tuning patch along the other axes.
        temperature: of the similarities.
        rotate_deg: largest rotation of a view about each axis.
        scale: range of the growth of what a view shows.
        intensity: random intensity changes of a view: none, weak or strong.
        pool: what of a map the head is given: mean, or mean_deviation.
        hidden, embedding: widths of the projection head.
    """

    strategy: str = "GD"
    partitions: tuple[int, int, int] = (1, 1, 4)
    size: tuple[int, int, int] | None = None
    temperature: float = 0.1
    rotate_deg: float = 15.0
    scale: tuple[float, float] = (0.8, 1.25)
    intensity: str = "strong"
    pool: str = "mean_deviation"
    hidden: int = 512
    embedding: int = 128


class GlobalContrast(PretextTask):
    """Contrast of partitions over volumes."""

    Options = GlobalContrastOptions
    before: ClassVar[dict[str, Any]] = {"pool": "mean"}

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: GlobalContrastOptions = self.options
        check_options(chosen)
        x, y, z = chosen.partitions
        self.partitions = (x, y, z)
        check_partitions(self.partitions, plan)
        several = math.prod(self.partitions) > 1
        self.needs_volumes = 1 if chosen.strategy != "GD" and several else 2
        flat = backbone.spec.spatial_dims == 2
        a, b, c = chosen.size or view_size(plan, self.partitions)
        self.size = (a, b, 1 if flat and not chosen.size else c)
        self.input_size = network_input(self.size, backbone.multiple)
        self.read_size = self._read_size()
        self.places = Partitions(self.partitions)
        check_reads(self.places, self.read_size, plan)
        self.view = RandomView(
            self.size, plan.spacing, plan.modality, INTENSITY[chosen.intensity],
            (0.0, 0.0, chosen.rotate_deg) if flat else chosen.rotate_deg, chosen.scale,
        )  # fmt: skip
        self.plain = RandomView(self.size, plan.spacing, plan.modality, None)
        width = POOLS[chosen.pool] * sum(backbone.channels)
        self.projection_head = ProjectionHead(width, chosen.hidden, chosen.embedding, layers=2)

    def _read_size(self) -> tuple[int, int, int]:
        x, y, z = (
            n if parts > 1 else max(n, min(round(n * ROOM), extent))
            for n, extent, parts in zip(self.size, self.plan.volume_size, self.partitions, strict=True)
        )
        return x, y, z

    def describe(self) -> str:
        grid, size = (" x ".join(map(str, n)) for n in (self.partitions, self.size))
        return f"{self.options.strategy} on {grid} partitions, views of {size} voxels"

    def views(self, batch: Tensors) -> Tensors:
        """Versions of N reads, and where they come from.

        Returns:
            `view` (N, V, 1, *size), `inside`, which of its voxels hold data, and `volume` and `partition` (N,).
        """
        original = self.options.strategy != "GR"  # is one of the versions
        shown = [
            (self.plain if original and number == 0 else self.view).of_reads(batch, number)
            for number in range(VERSIONS[self.options.strategy])
        ]
        images, _, inside = (torch.stack(each, dim=1) for each in zip(*shown, strict=True))
        return {"view": images, "inside": inside, "volume": batch["volume"], "partition": batch["place"]}

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        n, versions = views["view"].shape[:2]
        pixels = enlarged(views["view"].flatten(0, 1), self.input_size)
        features = pooled_pyramid(self.backbone.encode(pixels), views["inside"].flatten(0, 1), self.options.pool)
        z = self.projection_head(features).float()
        marks = {"volume": views["volume"], "partition": views["partition"], "features": features.float()}
        return {"z": z.view(n, versions, -1)}, marks

    def masks(self, z: Tensors, marks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Positive and negative pairs of the V versions of N reads, (N * V, N * V) bool each; see `global_masks`."""
        n, versions = z["z"].shape[:2]
        read = torch.arange(n, device=z["z"].device)
        rows = (each.repeat_interleave(versions) for each in (read, marks["volume"], marks["partition"]))
        return global_masks(self.options.strategy, *rows)

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        rows = z["z"].flatten(0, 1)
        return {"loss": contrast(rows, rows, *self.masks(z, marks), self.options.temperature)}

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        return Pairs(z["z"].flatten(0, 1), *self.masks(z, marks), marks["features"])


def check_partitions(partitions: tuple[int, int, int], plan: Plan) -> None:
    """Refuses a grid that the volumes cannot fill.

    Raises:
        MedclError: more partitions along an axis than the median volume has voxels.
    """
    for axis, (parts, extent) in enumerate(zip(partitions, plan.volume_size, strict=True)):
        if parts > extent:
            raise MedclError(
                f"{parts} partitions along axis {axis}, where the median volume has {extent} voxels",
                "--options.partitions", f"Give at most {extent}.",
            )  # fmt: skip


def check_reads(places: Partitions, read: tuple[int, int, int], plan: Plan) -> None:
    """Refuses reads so long that partitions, which are to be discriminated, show the same voxels.

    Raises:
        MedclError: in the median volume two partitions are read at one place.
    """
    if not places.distinct(plan.volume_size, read):
        grid, size, whole = (" x ".join(map(str, n)) for n in (places.grid, read, plan.volume_size))
        raise MedclError(
            f"reads of {size} voxels show the same in several of {grid} partitions of a volume of {whole}",
            "--options.size", "Give a smaller one along the axes that are divided, or fewer --options.partitions.",
        )  # fmt: skip


def check_options(options: GlobalContrastOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: a name is unknown, a number out of its range, or a single partition where several are contrasted.
    """
    checks = Checks(options, "global_contrast")
    checks.one_of("strategy", STRATEGIES)
    checks.one_of("intensity", INTENSITY)
    checks.one_of("pool", POOLS)
    if options.partitions is None:
        checks.refuse("partitions", "Give three positive numbers.")
    checks.triples("partitions", "size")
    if options.strategy != "GR" and max(options.partitions) == 1:
        checks.refuse(
            "partitions", "A single one has no negatives: give 2 or more along an axis, or --options.strategy GR."
        )
    checks.between("temperature", 0, above=True)
    checks.between("rotate_deg", 0, 180)
    checks.growth("scale")
    checks.counts("hidden", "embedding")
