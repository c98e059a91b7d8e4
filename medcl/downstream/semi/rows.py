"""The batch that the student sees: labelled rows first, then unlabelled ones with what the teacher says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medcl.transforms.mixing import draw_shares, mixed, partners


@dataclass(frozen=True)
class Rows:
    """Augmented patches and what is to be learnt from them.

    Attributes:
        image: (N, 1, D, H, W).
        target: share of every class, (N, K, D, H, W).
        weight: of every voxel, (N, 1, D, H, W).
        seed: (N,) int64 on the CPU.
        labelled: how many of the rows, the first ones, are labelled; the others are not.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    seed: Tensor
    labelled: int

    def with_unlabelled(self, other: Rows) -> Rows:
        """These rows, then those of `other`."""
        names = ("image", "target", "weight", "seed")
        joined: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        return replace(self, **joined)

    def mix(self, kind: str, trust: float = 1.0) -> Rows:
        """Every row mixed with its partner by `mixup` or `cutmix`; see `medcl.transforms.mixing`.

        Mixup keeps to the labelled rows: an average of two pseudo-labels is confident of nothing.

        Args:
            kind: which of the two.
            trust: what unlabelled voxels weigh where they come into a labelled row, whose loss does not ramp up.
        """
        n = len(self.image) if kind == "cutmix" else self.labelled
        share = draw_shares(self.seed[:n], kind, self.image.shape[2:])
        partner = partners(self.labelled, n - self.labelled)
        tensors = {"image": self.image, "target": self.target, "weight": self.weight}
        new: dict[str, Any] = {k: torch.cat([mixed(t[:n], share, partner), t[n:]]) for k, t in tensors.items()}
        believed = torch.cat([self.weight[: self.labelled], trust * self.weight[self.labelled :]])
        new["weight"][: self.labelled] = mixed(believed[:n], share, partner)[: self.labelled]
        return replace(self, **new)
