"""What a semi-supervised method is.

A step has labelled rows and unlabelled rows. The teacher, a moving average of the student, sees the unlabelled patch as
it was read; the student sees it strongly augmented, and what the teacher said moves along with the voxels. Voxels that
hold no data, or of which it said nothing, do not count. A method says what to make of the teacher's probabilities
(`targets`) and what to add to the supervised loss (`loss`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.config import from_mapping
from medcl.errors import MedclError
from medcl.losses.segmentation import ramp_up, shares
from medcl.networks.backbones import Backbone
from medcl.networks.ema import MomentumTeacher
from medcl.segmentation.semi.rows import Rows
from medcl.transforms.compose import Compose
from medcl.transforms.spatial import cut_margin

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SemiOptions:
    """Settings that every method has.

    Attributes:
        weight: of the unlabelled loss.
        momentum: of the teacher, which is also what is validated and kept.
        start: share of the steps that are supervised only.
        ramp: share of the steps, from `start` on, over which the weight rises.
        patches: unlabelled patches a step; 0 takes half as many as labelled ones.
    """

    weight: float = 1.0
    momentum: float = 0.99
    start: float = 0.0
    ramp: float = 0.4
    patches: int = 0


class SemiMethod(nn.Module, ABC):
    """A way to learn from unlabelled patches.

    Attributes:
        Options: frozen dataclass of the method's settings.
        reads_features: whether `loss` wants the map that the output layer reads.
        teacher: moving average of the student.
    """

    Options: ClassVar[type[SemiOptions]] = SemiOptions
    reads_features: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, options: dict[str, Any]):
        super().__init__()
        self.options: Any = from_mapping(self.Options, options, "--semi_options")
        self.check()
        self.teacher = MomentumTeacher(backbone)

    def check(self) -> None:
        """Refuses options that cannot work."""
        self.need("weight", self.options.weight >= 0, "0 or more")
        self.need("momentum", 0 <= self.options.momentum < 1, "0 or more, below 1")
        self.need("start", 0 <= self.options.start < 1, "a share of the steps below 1")
        self.need("ramp", 0 <= self.options.ramp <= 1, "a share of the steps")
        self.need("patches", self.options.patches >= 0, "0 or more")

    def need(self, name: str, fine: bool, wanted: str) -> None:
        """Refuses the value of an option unless it is `fine`.

        Args:
            name: of the option.
            fine: whether its value can be used.
            wanted: which values can be, for the error message.

        Raises:
            MedclError: the value cannot be used.
        """
        if not fine:
            raise MedclError(
                f"{getattr(self.options, name)} cannot be used", f"--semi_options.{name}", f"Give {wanted}."
            )

    def patches(self, labelled: int) -> int:
        """Unlabelled patches a step beside so many labelled ones."""
        return self.options.patches or max(1, labelled // 2)

    @torch.no_grad()
    def rows(
        self, image: Tensor, seed: Tensor, augmentation: Compose, spacing: Sequence[float], inside: Tensor | None = None
    ) -> Rows:
        """Unlabelled patches as the student is to see them, with what the teacher says of them.

        Args:
            image: reads (N, 1, D, H, W), with the margin of `augmentation`. The teacher sees their middle.
            seed: (N,) int64.
            augmentation: of the student's patches.
            spacing: mm along D, H, W.
            inside: which voxels hold data, (N, 1, D, H, W) bool; by default all.
        """
        margin = augmentation.margin
        said = torch.ones_like(image[:, :1], dtype=torch.bool) if inside is None else inside
        patch = cut_margin(image, margin)
        target, weight = self.targets(torch.softmax(self.teacher.module(patch).float(), dim=1))
        around = [beyond for beyond in reversed(margin) for _ in range(2)]
        said = F.pad(cut_margin(said, margin), around)  # nothing is said of the margin
        with torch.autocast(image.device.type, enabled=False):
            params = augmentation.draw(seed, image.shape, spacing)
            if self.hard:
                # as true labels move. Interpolated shares, made into labels afterwards, would lose a little of every
                # convex end; the teacher learns from its own labels again, and structures wear off
                labels = F.pad(target.argmax(1, keepdim=True) + 1, around)
                # 0 holds no data, 1 is not trusted, from 2 on the classes
                marks = (1 + labels * F.pad(weight, around).long()) * said
                image, marks = augmentation.apply_both(image, marks, params)
                target = shares((marks - 2).clamp(min=0), target.shape[1])
                weight, counts = (marks > 1).float(), (marks > 0).float()
            else:
                soft = F.pad(torch.cat([target, weight], dim=1), around, mode="replicate")
                image, both, found = augmentation.apply_soft(image, soft, params, said)
                target, weight = both.split([target.shape[1], 1], dim=1)
                counts = found.float()
                weight = weight * counts
        return Rows(image, target, weight, seed, 0, counts)

    def weight(self, progress: float) -> float | None:
        """Weight of the unlabelled loss after this share of the steps; None before `start`, when nothing is read."""
        if progress < self.options.start:
            return None
        return self.options.weight * self.trust(progress)

    def trust(self, progress: float) -> float:
        """From 0 to 1: how far the weight has risen. A pseudo-label pasted into a labelled patch counts as much."""
        return ramp_up(progress - self.options.start, self.options.ramp)

    @property
    def hard(self) -> bool:
        """Whether shares and weights are 0 or 1, and move as labels do; else they are interpolated."""
        return False

    @abstractmethod
    def targets(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """What the student is to learn: shares of classes (N, K, D, H, W) and weights of voxels (N, 1, D, H, W).

        Args:
            probabilities: of the teacher, for the patch as it was read.
        """

    @abstractmethod
    def loss(self, logits: Tensor, features: Tensor | None, rows: Rows) -> Tensors:
        """`loss`, not yet weighted, and further scalars to log.

        Args:
            logits: of all rows, (N, K, D, H, W).
            features: of all rows, what the output layer read, where `reads_features`.
            rows: what the student saw.
        """

    def after_step(self, student: nn.Module, step: int) -> None:
        """The teacher follows: a plain average at first, so that random beginnings are forgotten soon.

        min(1 - 1 / (step + 1), momentum), as in the code of Tarvainen and Valpola (NeurIPS 2017).
        """
        self.teacher.update(student, min(1 - 1 / (step + 1), self.options.momentum))
