"""What a pretext task is, and the one training loop all of them share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from medcl.config import from_mapping
from medcl.data.plan import Plan
from medcl.networks.backbones import Backbone

Triple = tuple[int, int, int]


class PretextTask(nn.Module, ABC):
    """A way to learn from unlabelled volumes: the views it needs, the heads it adds and its loss.

    A subclass sets `Options`, builds its heads in `__init__`, and sets `read_size`. It never touches files, optimisers
    or Lightning.

    Attributes:
        Options: frozen dataclass of the task's own settings.
        trains: the parts of the backbone whose weights are worth keeping: `encoder`, `decoder`.
        backbone: the student.
        read_size: voxels that are read of every volume for a step.
    """

    Options: ClassVar[type]
    trains: ClassVar[tuple[str, ...]] = ("encoder",)
    read_size: Triple

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.plan = plan
        self.options: Any = from_mapping(self.Options, options, "options of the task")

    @abstractmethod
    def views(self, volume: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """Views of a batch of read volumes (B, 1, *read_size); a pure function of them and of the seeds (B,)."""

    @abstractmethod
    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, and further scalars to log."""

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the share of the training done; a momentum teacher follows here."""

    def describe(self) -> str:
        """One line for the log: what a step looks at."""
        return f"reads {' x '.join(map(str, self.read_size))} voxels a volume"

    def resolved(self) -> dict[str, Any]:
        """The options with every default filled in."""
        return dataclasses.asdict(self.options)
