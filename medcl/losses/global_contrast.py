"""Which pairs the global strategies of Chaitanya et al. draw together, and which they push apart.

"Contrastive learning of global and local features for medical image segmentation with limited annotations", NeurIPS
2020, section 3.1. Every strategy is a pair of masks for `medcl.losses.contrastive.contrast`.
"""

from __future__ import annotations

from torch import Tensor

STRATEGIES = ("GR", "GD-", "GD")
# versions of a read in a step: two random ones; the read itself and two; the read itself and one
VERSIONS = {"GR": 2, "GD-": 3, "GD": 2}


def global_masks(strategy: str, read: Tensor, volume: Tensor, partition: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs, (n, n) bool each, symmetric and without the diagonal. The rest is ignored.

    GR: versions of one read are positive, those of all other reads negative. GD-: versions of one read are positive,
    everything in other partitions is negative, and what other volumes show in the same partition is neither. GD: these
    are positive too.

    Args:
        strategy: one of `STRATEGIES`.
        read: which read a row is a version of, (n,).
        volume: its volume, (n,).
        partition: its partition, (n,).
    """
    same_read = read[:, None] == read
    itself = same_read.clone().fill_diagonal_(False)
    elsewhere = partition[:, None] != partition
    if strategy == "GR":
        return itself, ~same_read
    if strategy == "GD-":
        return itself, elsewhere
    # two places of one volume's partition are no pair of the paper's, which pairs distinct volumes
    across = ~elsewhere & (volume[:, None] != volume)
    return itself | across, elsewhere
