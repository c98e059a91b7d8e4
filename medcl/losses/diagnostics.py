"""What the embeddings of a step look like: whether a task learns, as opposed to whether its loss is small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medcl.losses.contrastive import cosine

UNIFORMITY_T = 2.0
MOST_ROWS = 512  # of embeddings compared pair by pair
ROWS = 256  # behind the effective rank before and after training
MEANING = {  # of the trivial solutions
    "constant": "with equal embeddings",
    "orthogonal": "with unrelated embeddings",
    "interpolated": "by interpolation",
    "collapsed": "with equal embeddings, its optimum",
}


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of rows (n, d) on the unit sphere: 1 if all are the same.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, as RankMe (Garrido et al., ICML 2023) applies it: not centred,
    so that embeddings which differ by a little noise count as equal. At most min(n, d); compare equal numbers of rows.
    """
    values = torch.linalg.svdvals(F.normalize(rows.double(), dim=1))
    p = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def alignment(z: Tensor, positive: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere, 0 at best (Wang and Isola, ICML 2020, section 4.1).

    Args:
        z: embeddings (n, d).
        positive: (n, n) bool.
    """
    return float((2 - 2 * cosine(z, z))[positive].mean()) if positive.any() else float("nan")


def uniformity(z: Tensor, t: float = UNIFORMITY_T) -> float:
    """log of the mean over pairs of exp(-t |z_i - z_j|^2) on the unit sphere: 0 if all are the same, near -2t spread.

    Wang and Isola, ICML 2020, section 4.1, with t = 2.
    """
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return float((-t * (2 - 2 * cosine(z, z)))[apart].exp().mean().log())


def spread(z: Tensor) -> float:
    """Standard deviation of the normalised embeddings, mean over dimensions, times sqrt(d): 0 collapsed, 1 uniform.

    Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1.
    """
    return float(F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5)


def similarity_gap(z: Tensor, positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Mean cosine of positive pairs, and of negative ones; NaN where there is none."""
    similar = cosine(z, z)
    one, other = (
        float(similar[mask].mean()) if mask.any() else float("nan") for mask in (positive, negative)
    )  # fmt: skip
    return one, other


def describe_pairs(z: Tensor, positive: Tensor, negative: Tensor) -> dict[str, float]:
    """All of the above but the rank, of the first 512 rows."""
    n = min(len(z), MOST_ROWS)
    z, positive, negative = z[:n].detach().float(), positive[:n, :n], negative[:n, :n]
    pos, neg = similarity_gap(z, positive, negative)
    return {
        "alignment": alignment(z, positive),
        "uniformity": uniformity(z),
        "spread": spread(z),
        "cosine_positive": pos,
        "cosine_negative": neg,
        "cosine_gap": pos - neg,
    }


class RankMemory:
    """Effective rank of the last rows seen: one small batch says little about a rank.

    Args:
        size: rows kept. The rank is computed once there are so many, so that all values compare.
    """

    def __init__(self, size: int = 256):
        self.size = size
        self._rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Rows (n, d) of a step; at most a sixteenth of the memory of them, so that it spans many volumes."""
        most = max(1, self.size // 16)
        chosen = torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).round().long()
        self._rows.append(rows[chosen].detach().float())
        while self._rows and sum(map(len, self._rows[1:])) >= self.size:
            self._rows.pop(0)

    def rank(self) -> float | None:
        """Effective rank of the last `size` rows; None while there are fewer."""
        rows = torch.cat(self._rows) if self._rows else torch.empty(0, 1)
        return effective_rank(rows[-self.size :].cpu()) if len(rows) >= self.size else None
