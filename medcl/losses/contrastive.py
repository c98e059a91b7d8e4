"""The one primitive behind the contrastive family: pairs are positive, negative, or left out of both.

The global strategies of Chaitanya et al. (NeurIPS 2020), their local ones, SimCLR, decoupled contrast and PixContrast
differ in their masks alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between the rows of `a` (..., n, d) and of `b` (..., m, d): (..., n, m), in float32 under any autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)


def contrast(
    a: Tensor,
    b: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean over positive pairs (i, p) of -log( e^s_ip / (e^s_ip + sum over negatives n of e^s_in) ), s = cos / t.

    The denominator of a pair holds that positive and the anchor's negatives, not its other positives (Chaitanya et al.
    2020, equation 1). Pairs in neither mask are ignored. Computed as softplus of a log-sum-exp in float32: finite for
    temperatures of 0.01 and below, and where an anchor has no negative (the term is then 0).

    Args:
        a: anchors (..., n, d); need not be normalised.
        b: what they are compared with (..., m, d); may be `a` itself.
        positive: (..., n, m) bool.
        negative: (..., n, m) bool.
        temperature: of the similarities, positive.
        decoupled: leave the positive out of the denominator: -s_ip + log sum_n e^s_in (Yeh et al., "Decoupled
            Contrastive Learning", ECCV 2022, equation 6). Anchors without a negative are left out.
        weights: of every pair's -s_ip in the decoupled form (DCLW, equation 8), (..., n, m).

    Returns:
        A scalar; 0 where there is no positive pair.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    s = cosine(a, b) / temperature
    others = torch.logsumexp(s.masked_fill(~negative, -torch.inf), dim=-1, keepdim=True)
    if decoupled:
        usable = positive & negative.any(-1, keepdim=True)
        attract = s if weights is None else weights * s
        # an anchor without negatives is not usable; its -inf must not reach the gradient as 0 * inf
        terms = torch.where(usable, others.masked_fill(~negative.any(-1, keepdim=True), 0.0) - attract, 0.0)
    else:
        usable = positive
        has = negative.any(-1, keepdim=True)
        terms = torch.where(usable & has, F.softplus(others.masked_fill(~has, 0.0) - s), 0.0)
    return terms.sum() / usable.sum().clamp(min=1)
