"""Mean teacher: the student's probabilities follow those of its own moving average.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from medcl.losses.segmentation import consistency
from medcl.segmentation.semi.base import SemiMethod, SemiOptions, Tensors
from medcl.segmentation.semi.rows import Rows


@dataclass(frozen=True)
class MeanTeacherOptions(SemiOptions):
    """Settings of all methods, with a larger weight: squared differences are small."""

    weight: float = 5.0


class MeanTeacher(SemiMethod):
    """Squared difference of probabilities, with a weight that ramps up."""

    Options: ClassVar[type[SemiOptions]] = MeanTeacherOptions

    def targets(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities."""
        return probabilities, torch.ones_like(probabilities[:, :1])

    def loss(self, logits: Tensor, features: Tensor | None, rows: Rows) -> Tensors:
        """`loss` over the unlabelled rows."""
        n = rows.labelled
        return {"loss": consistency(logits[n:], rows.target[n:], rows.weight[n:])}
