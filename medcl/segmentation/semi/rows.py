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
        weight: of every voxel, (N, 1, D, H, W); 0 where it holds no data.
        seed: (N,) int64 on the CPU.
        labelled: how many of the rows, the first ones, are labelled; the others are not.
        inside: 1 where a voxel holds data of which something could be learnt, else 0, (N, 1, D, H, W); by default 1
            everywhere.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    seed: Tensor
    labelled: int
    inside: Tensor = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.inside is None:
            object.__setattr__(self, "inside", torch.ones_like(self.weight))

    def with_unlabelled(self, other: Rows) -> Rows:
        """These rows, then those of `other`."""
        names = ("image", "target", "weight", "seed", "inside")
        joined: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        return replace(self, **joined)

    def mix(self, kind: str, trust: float = 1.0) -> Rows:
        """Every row mixed with its partner by `mixup` or `cutmix`; see `medcl.transforms.mixing`.

        Mixup keeps to the labelled rows: an average of two pseudo-labels is confident of nothing. What holds no data is
        not mixed in: there a row stays as it is, or takes its partner's voxel whole.

        Args:
            kind: which of the two.
            trust: what unlabelled voxels weigh where they come into a labelled row, whose loss does not ramp up.
        """
        n = len(self.image) if kind == "cutmix" else self.labelled
        share = draw_shares(self.seed[:n], kind, self.image.shape[2:])
        partner = partners(self.labelled, n - self.labelled)
        own, other = self.inside[:n], self.inside[:n][partner.to(self.inside.device)]
        share = share.to(own.device, own.dtype)
        share = torch.where(other == 0, 0.0, torch.where((own == 0) & (share > 0), 1.0, share))
        tensors = {"image": self.image, "target": self.target, "weight": self.weight, "inside": self.inside}
        new: dict[str, Any] = {k: torch.cat([mixed(t[:n], share, partner), t[n:]]) for k, t in tensors.items()}
        believed = torch.cat([self.weight[: self.labelled], trust * self.weight[self.labelled :]])
        new["weight"][: self.labelled] = mixed(believed[:n], share, partner)[: self.labelled]
        return replace(self, **new)
