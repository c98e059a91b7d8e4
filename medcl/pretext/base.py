"""What a pretext task is.

A step runs `views` (data), `embed` (networks) and `objective` (mathematics), in that order. The split is what lets the
toolkit ask of any task what its loss would be at a trivial solution, and join the batches of several ranks.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medcl.config import from_mapping
from medcl.errors import MedclError
from medcl.losses.coding_rate import unused_rate
from medcl.networks.backbones import Backbone
from medcl.networks.ranks import gather_rows, world_size
from medcl.store.crops import Anywhere, Places
from medcl.store.plan import Plan

Triple = tuple[int, int, int]
Tensors = dict[str, Tensor]

REMEDIES = {
    "constant": "All views look the same to it: try a lower --lr, a longer --warmup, or a larger --batch_size.",
    "orthogonal": "It tells views apart and recognises none: try weaker intensity changes (--options.intensity weak), "
    "smaller rotations, or more --steps.",
    "collapsed": "All views look the same to it: raise --options.momentum, or lower --lr.",
    "interpolated": "It continues what is visible and knows no anatomy yet: try more --steps, a higher "
    "--options.ratio or a larger --options.block.",
    "rank": "Fewer and fewer directions are used: raise --rank_weight (0.1 to 1), lower --lr, or raise --batch_size.",
}


@dataclass(frozen=True)
class Pairs:
    """Embeddings of a step, and which pairs of them the task draws together or pushes apart.

    Attributes:
        z: embeddings (n, d), not normalised.
        positive: (n, n) bool, symmetric, the diagonal False.
        negative: (n, n) bool, symmetric, the diagonal False.
        features: what the heads were given, (m, D): the representation that is kept. None where `z` is that.
    """

    z: Tensor
    positive: Tensor
    negative: Tensor
    features: Tensor | None = None


MOST_AXES = 4096  # a matrix of 64 MB


def unrelated(rows: int, device: torch.device) -> Tensor:
    """Unit vectors of random direction, nearly orthogonal (cosines of about 0.02), where true ones would not fit."""
    axes = torch.randn(rows, MOST_AXES // 2, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(axes, dim=1).to(device)


class PretextTask(nn.Module, ABC):
    """A way to learn from unlabelled volumes: the views it needs, the heads it adds and its loss.

    A subclass sets `Options`, builds its heads in `__init__`, and sets `read_size`. It never touches files, optimisers
    or Lightning.

    Attributes:
        Options: frozen dataclass of the task's own settings.
        trains: the parts of the backbone whose weights are worth keeping: `encoder`, `decoder`.
        remedies: what to try where the loss stands at a trivial solution, by its name, or where the `rank` falls.
        gathers: whether the objective looks at the joined batch of all ranks. A mean over a rank's own voxels need not.
        before: defaults of options that were other ones in runs begun before a run kept its options (November 2026).
        needs_volumes: the fewest different volumes it can learn from.
        backbone: the student.
        read_size: voxels of a read.
        places: where the reads of a volume lie.
    """

    Options: ClassVar[type]
    remedies: ClassVar[dict[str, str]] = REMEDIES
    trains: tuple[str, ...] = ("encoder",)
    gathers: ClassVar[bool] = True
    before: ClassVar[dict[str, Any]] = {}
    needs_volumes: int = 1
    read_size: Triple

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.plan = plan
        self.options: Any = from_mapping(self.Options, options, "options of the task")
        self.places: Places = Anywhere()

    @abstractmethod
    def views(self, batch: Tensors) -> Tensors:
        """Views of a batch of reads, every tensor with leading dimension N, or a multiple of it.

        Args:
            batch: `image` (N, 1, *read_size), `seed` (N,) on the CPU, `volume` and `place` (N,), `start` and `extent`
                (N, 3) as `medcl.store.crops.ReadDataset` gives them. A pure function of these.
        """

    @abstractmethod
    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        """What the networks make of the views.

        Returns:
            Embeddings, (rows, ..., d) each, and marks: whatever else the objective needs (ids, labels, coordinates),
            (rows, ...) each. Rows of several ranks are joined along the first dimension of each tensor. The mark
            `features` (rows, D) is what the heads were given, with its gradient: the representation that is kept.
        """

    @abstractmethod
    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        """`loss`, and further scalars to log, of embeddings and marks. Knows no network and draws no random number."""

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs | None:
        """Which embeddings of this step belong together: for diagnostics. None where a task has no such thing."""
        return None

    def joined(self, views: Tensors) -> tuple[Tensors, Tensors]:
        """`embed`, with the rows of all ranks."""
        z, marks = self.embed(views)
        if self.gathers and world_size() > 1:
            z, marks = ({k: gather_rows(v) for k, v in tensors.items()} for tensors in (z, marks))
        return z, marks

    def loss(self, views: Tensors) -> Tensors:
        """`loss` of a step, and further scalars to log."""
        return self.objective(*self.joined(views))

    def unused_rate(self, marks: Tensors) -> Tensor:
        """Share of the features' coding rate that is not used, of all ranks' rows; see `medcl.losses.coding_rate`."""
        rows = [r if self.gathers else gather_rows(r) for r in features_among(marks)]
        return torch.stack([unused_rate(r) for r in rows]).mean() if rows else torch.zeros(())

    @torch.no_grad()
    def trivial(self, z: Tensors, marks: Tensors) -> dict[str, float]:
        """The loss at solutions that need no anatomy: every embedding the same, and all embeddings orthogonal.

        By substitution into the task's own objective, on this step's own marks; embeddings in the same row of two
        tensors (a student's and its teacher's) are those of the same input.
        """
        rows = max(t[..., 0].numel() for t in z.values())
        device = next(iter(z.values())).device
        axes = torch.eye(rows, device=device) if rows <= MOST_AXES else unrelated(rows, device)
        constant, orthogonal = {}, {}
        for name, tensor in z.items():
            count = tensor[..., 0].numel()
            same = torch.zeros_like(tensor)
            same[..., 0] = 1
            constant[name] = same
            orthogonal[name] = axes[:count].view(*tensor.shape[:-1], -1)
        return {
            "constant": float(self.objective(constant, marks)["loss"]),
            "orthogonal": float(self.objective(orthogonal, marks)["loss"]),
        }

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the share of the training done; a momentum teacher follows here."""

    def check(self, volumes: int, batch_size: int) -> None:
        """Refuses data it cannot learn from.

        Args:
            volumes: different volumes that there are.
            batch_size: volumes a step.

        Raises:
            MedclError: too few of them.
        """
        if volumes < self.needs_volumes:
            raise MedclError(
                f"needs {self.needs_volumes} different volumes, and there is {volumes}",
                type(self).__name__, "Give it more scans, or choose another --task.",
            )  # fmt: skip
        if batch_size < self.needs_volumes:
            raise MedclError(
                f"needs {self.needs_volumes} volumes a step, not {batch_size}", "--batch_size", "Give it more."
            )

    def describe(self) -> str:
        """One line for the log: what a step looks at."""
        return f"reads {' x '.join(map(str, self.read_size))} voxels a volume"

    def resolved(self) -> dict[str, Any]:
        """The options with every default filled in."""
        return dataclasses.asdict(self.options)


def features_among(marks: Tensors) -> list[Tensor]:
    """The marks named `features`, those of the parts of a task included."""
    return [rows for name, rows in marks.items() if name.split(".")[-1] == "features"]
