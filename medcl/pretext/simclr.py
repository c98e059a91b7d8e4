"""SimCLR and decoupled contrast: two views of a crop are alike, those of other crops are not.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020; Yeh et al., "Decoupled
Contrastive Learning", ECCV 2022, which leaves the positive out of the denominator and depends less on large batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from medcl.losses.contrastive import contrast, cosine
from medcl.networks.backbones import Backbone
from medcl.networks.heads import POOLS, ProjectionHead, pooled_pyramid
from medcl.pretext.base import Pairs, PretextTask, Tensors
from medcl.pretext.checks import Checks
from medcl.pretext.sizes import enlarged, network_input, view_size
from medcl.store.plan import Plan
from medcl.transforms.compose import INTENSITY
from medcl.transforms.views import RandomView

LOSSES = ("simclr", "dcl", "dclw")
SIGMA = 0.5  # of the von Mises-Fisher weights of DCLW, as in its release
ROOM = 4 / 3  # a read is this much longer than a view along each axis, so that views differ in place


@dataclass(frozen=True)
class SimCLROptions:
    """Settings of SimCLR.

    Attributes:
        loss: `simclr`; `dcl` without the positive in the denominator; `dclw`, which besides weighs positives by how far
            apart they are.
        size: voxels of a view; by default the fine-tuning patch, no larger than the median volume.
        temperature: of the similarities.
        rotate_deg: largest rotation of a view about each axis.
        scale: range of the growth of what a view shows.
        flip: probability of mirroring a view along each axis.
        intensity: random intensity changes of a view: none, weak or strong.
        pool: what of a map the head is given: mean, or mean_deviation.
        hidden, embedding: widths of the projection head.
    """

    loss: str = "simclr"
    size: tuple[int, int, int] | None = None
    temperature: float = 0.1
    rotate_deg: float = 15.0
    scale: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.0
    intensity: str = "strong"
    pool: str = "mean_deviation"
    hidden: int = 512
    embedding: int = 128


class SimCLR(PretextTask):
    """Contrast of whole crops; every other crop of the batch is a negative."""

    Options = SimCLROptions
    needs_volumes = 2
    before: ClassVar[dict[str, Any]] = {"pool": "mean"}

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: SimCLROptions = self.options
        check_options(chosen)
        a, b, c = chosen.size or view_size(plan)
        self.size = (a, b, c)
        self.input_size = network_input(self.size, backbone.multiple)
        x, y, z = (max(n, min(round(n * ROOM), v)) for n, v in zip(self.size, plan.volume_size, strict=True))
        self.read_size = (x, y, z)
        self.view = RandomView(
            self.size, plan.spacing, plan.modality, INTENSITY[chosen.intensity], chosen.rotate_deg, chosen.scale,
            (chosen.flip,) * 3,
        )  # fmt: skip
        width = POOLS[chosen.pool] * sum(backbone.channels)
        self.projection_head = ProjectionHead(width, chosen.hidden, chosen.embedding)

    def describe(self) -> str:
        return f"two views of {' x '.join(map(str, self.size))} voxels a volume, {self.options.loss}"

    def views(self, batch: Tensors) -> Tensors:
        """Two views of N reads.

        Returns:
            `view` (2N, 1, *size), all first views before all second ones, `inside`, which of its voxels hold data, and
            the `volume` (2N,) that each is of.
        """
        images, _, inside = zip(*(self.view.of_reads(batch, number) for number in range(2)), strict=True)
        return {"view": torch.cat(images), "inside": torch.cat(inside), "volume": batch["volume"].repeat(2)}

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        maps = self.backbone.encode(enlarged(views["view"], self.input_size))
        features = pooled_pyramid(maps, views["inside"], self.options.pool)
        n = len(features) // 2
        z = self.projection_head(features).float()
        # a row of both tensors belongs to one read, so that rows of several ranks can be joined
        marks = {"volume": views["volume"][:n], "features": features.float()}
        return {"z": torch.stack([z[:n], z[n:]], dim=1)}, marks

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        """The loss over embeddings (N, 2, d) of N reads."""
        rows = z["z"].flatten(0, 1)
        positive, negative = masks(marks["volume"])
        chosen: SimCLROptions = self.options
        weights = concentration_weights(rows, positive) if chosen.loss == "dclw" else None
        return {
            "loss": contrast(
                rows, rows, positive, negative, chosen.temperature, decoupled=chosen.loss != "simclr", weights=weights
            )
        }

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        return Pairs(z["z"].flatten(0, 1), *masks(marks["volume"]), marks["features"])


class DCL(SimCLR):
    """SimCLR with the positive left out of the denominator, for small batches."""

    @dataclass(frozen=True)
    class Options(SimCLROptions):
        """Settings of decoupled contrast, those of SimCLR.

        Attributes:
            loss: see `SimCLROptions`.
        """

        loss: str = "dcl"


def masks(volume: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs among 2N views in the order of their N reads.

    The two views of a read are positive, views of other volumes negative. Another read of the same volume is neither.
    """
    read = torch.arange(len(volume), device=volume.device).repeat_interleave(2)
    owner = volume.repeat_interleave(2)
    itself = torch.eye(len(read), dtype=torch.bool, device=volume.device)
    return (read[:, None] == read) & ~itself, owner[:, None] != owner


def concentration_weights(z: Tensor, positive: Tensor, sigma: float = SIGMA) -> Tensor:
    """DCLW's weight of every positive pair, 2 - n * softmax over the n positive pairs of cos / sigma; without gradient.

    Yeh et al. 2022, equation 8. Their mean is 1; pairs that are alike already count less.

    Args:
        z: embeddings (N, d).
        positive: (N, N) bool.
    """
    with torch.no_grad():
        share = (cosine(z, z) / sigma).masked_fill(~positive, -torch.inf).flatten().softmax(0).view_as(positive)
        return 2 - positive.sum() * share


def check_options(options: SimCLROptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: a name is unknown or a number out of its range.
    """
    checks = Checks(options, "simclr")
    checks.one_of("loss", LOSSES)
    checks.one_of("intensity", INTENSITY)
    checks.one_of("pool", POOLS)
    checks.triples("size")
    checks.between("temperature", 0, above=True)
    checks.between("rotate_deg", 0, 180)
    checks.growth("scale")
    checks.between("flip", 0, 1)
    checks.counts("hidden", "embedding")
