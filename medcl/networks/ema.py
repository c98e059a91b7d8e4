"""A momentum teacher: a copy of the student that follows it slowly and takes no gradient."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from medcl.networks.sharding import own


class MomentumTeacher(nn.Module):
    """Exponential moving average of a module, always in evaluation mode.

    It starts as a copy of the student. (The released VoCo starts it at other random weights and updates it before the
    optimiser's step; neither is intended by the method.)

    Args:
        student: module to follow.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumTeacher:
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; buffers are copied."""
        mine = [own(p) for p in self.module.parameters()]
        theirs = [own(p) for p in student.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        for kept, new in zip(self.module.buffers(), student.buffers(), strict=True):
            kept.copy_(new)


def cosine_momentum(start: float, progress: float) -> float:
    """Momentum rising from `start` to 1 along half a cosine, as in BYOL (Grill et al. 2020, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(max(progress, 0.0), 1.0)) + 1) / 2
