"""Self-training: what the teacher says is taken for a label.

Pseudo-labels (Lee 2013) in the online form of FixMatch (Sohn et al., NeurIPS 2020): hard labels of the unaugmented
patch teach the strongly augmented one; if wanted, voxels below a confidence count nothing. Here a moving average of the
student gives them, and Dice joins the cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from medcl.losses.segmentation import dice_ce, shares
from medcl.segmentation.semi.base import SemiMethod, SemiOptions, Tensors
from medcl.segmentation.semi.rows import Rows


@dataclass(frozen=True)
class SelfTrainingOptions(SemiOptions):
    """Further settings, and a teacher that follows fast: an average over some 20 steps.

    Where the first pseudo-labels are good already and the schedule is long, threshold 0 and momentum 0.99 do better
    (docs/results/semi.md).

    Attributes:
        threshold: least probability of the likeliest class for a voxel to count; 0 counts all. The higher, the more
            of the structures is left out, and little of the background: in time they shrink.
        hard: take the likeliest class for the label; else the probabilities.
    """

    momentum: float = 0.95
    start: float = 0.25
    ramp: float = 0.25
    threshold: float = 0.8
    hard: bool = True


class SelfTraining(SemiMethod):
    """Dice and cross-entropy against pseudo-labels."""

    Options: ClassVar[type[SemiOptions]] = SelfTrainingOptions

    def check(self) -> None:
        super().check()
        self.need("threshold", 0 <= self.options.threshold < 1, "0 or more, below 1")

    @property
    def hard(self) -> bool:
        return bool(self.options.hard)

    def targets(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels, and weight 1 where they are confident."""
        best, label = probabilities.max(dim=1, keepdim=True)
        weight = (best >= self.options.threshold).float()
        return (shares(label, probabilities.shape[1]) if self.hard else probabilities), weight

    def loss(self, logits: Tensor, features: Tensor | None, rows: Rows) -> Tensors:
        """`loss` over the unlabelled rows, and `trusted`: the share of their voxels that count, of those with data."""
        n = rows.labelled
        weight, inside = rows.weight[n:], rows.inside[n:]
        trusted = weight.sum() / inside.sum().clamp(min=1)
        return {"loss": dice_ce(logits[n:], rows.target[n:], weight, inside), "trusted": trusted}
