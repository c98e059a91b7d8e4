"""Nystrom's approximation of self-attention (Xiong et al., "Nystromformer", AAAI 2021): linear in the number of tokens.

    softmax(q k') v  is about  softmax(q kl') pinv(softmax(ql kl')) softmax(ql k') v

with landmarks ql and kl, means of queries and of keys over runs of tokens. No matrix of tokens x landmarks is kept:
both outer factors are attentions of their own, computed in blocks. The release takes runs of the listed order; here
tokens are ordered by where they lie, or else by what they are, so that the listed order changes nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 6  # as in the paper
BITS = 20  # of a coordinate


def order_of(tokens: Tensor, cells: Tensor | None = None) -> Tensor:
    """Numbers of tokens (K, d) along a Z-order curve through their cells (K, 2 or 3), so that neighbours stay close.

    Tokens of one cell, and all where cells are unknown, are ordered by the sum of their features.
    """
    order = tokens.detach().float().sum(1).argsort()
    if cells is None:
        return order
    cells = cells.long() - cells.long().amin(0)
    bits = min(BITS, max(1, int(cells.max()).bit_length()))
    dims = cells.shape[1]
    code = torch.zeros_like(cells[:, 0])
    for bit in range(bits):
        for axis in range(dims):
            code |= ((cells[:, axis] >> bit) & 1) << (bit * dims + axis)
    return order[code[order].argsort(stable=True)]


def runs_of(order: Tensor, landmarks: int) -> Tensor:
    """Which run, 0 to landmarks, each of 1 + K tokens belongs to: the class token is a run of its own, the first."""
    count = len(order)
    run = torch.empty_like(order)
    run[order] = torch.arange(count, device=order.device) * min(landmarks, count) // count
    return F.pad(run + 1, (1, 0))


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, runs: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Approximate attention.

    Args:
        q, k, v: (B, heads, T, d).
        runs: (T,) the run of every token; each number from 0 to the largest occurs.
        iterations: for the pseudo-inverse.

    Returns:
        (B, heads, T, d).
    """
    kept = int(runs.max()) + 1
    size = torch.bincount(runs, minlength=kept).to(q.dtype)[:, None]
    queries, keys = (torch.zeros_like(x[:, :, :kept]).index_add(2, runs, x) / size for x in (q, k))
    middle = (queries.float() @ keys.float().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    summary = F.scaled_dot_product_attention(queries, k, v)
    return F.scaled_dot_product_attention(q, keys, (pseudo_inverse(middle, iterations) @ summary.float()).to(v.dtype))


def pseudo_inverse(a: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Moore-Penrose inverse of matrices (..., n, n) by the third-order iteration of Razavi et al., as in the paper."""
    z = a.transpose(-1, -2) / (a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1))[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
