"""How many directions a batch of features uses, as a term that training can raise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISION = 0.5  # epsilon of the coding rate


def unused_rate(features: Tensor, precision: float = PRECISION) -> Tensor:
    """1 - R / R_max of features on the unit sphere: 0 where they fill all directions evenly, near 1 where all agree.

    R = 1/2 log det(I + d / (n precision^2) Z^T Z) is the total coding rate (Yu et al., "Learning Diverse and
    Discriminative Representations via the Principle of Maximal Coding Rate Reduction", NeurIPS 2020), which
    Tong et al. ("EMP-SSL", 2023) maximise beside an invariance term to keep representations from collapsing. R_max is
    its largest value for n rows of d channels: min(n, d) equal eigenvalues. Computed on the smaller of the two Gram
    matrices, in float32 under any autocast.

    Args:
        features: (n, d); need not be normalised.
        precision: epsilon, positive; a smaller one weighs weak directions more.

    Returns:
        A scalar; 0 for fewer than two rows.
    """
    n, d = features.shape
    if n < 2:
        return features.new_zeros((), dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(features.float(), dim=1)
        gram = z @ z.T if n <= d else z.T @ z
        fewest = min(n, d)
        scale = d / (n * precision**2)
        identity = torch.eye(fewest, device=z.device)
        rate = 2 * torch.linalg.cholesky(identity + scale * gram).diagonal().log().sum()
        most = fewest * torch.log1p(torch.tensor(scale * n / fewest))
        return 1 - rate / most
