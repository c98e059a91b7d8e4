"""Attention by landmarks: against exact attention, and the order of its landmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medcl.mil.nystrom import nystrom_attention, order_of, pseudo_inverse, runs_of


def tokens(count: int = 40, heads: int = 2, width: int = 8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, heads, count, width, generator=generator, dtype=torch.float64)


def test_a_landmark_for_every_token_is_exact_attention():
    q, k, v = tokens(12)
    found = nystrom_attention(q, k, v, torch.arange(12), iterations=40)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), atol=1e-4, rtol=1e-4)


def test_formula_is_that_of_three_softmax_matrices():
    q, k, v = tokens(12)
    runs = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    ql, kl = (torch.stack([x[0, 1, runs == r].mean(0) for r in range(3)]) for x in (q, k))
    first, middle, last = ((a @ b.T / 8**0.5).softmax(-1) for a, b in ((q[0, 1], kl), (ql, kl), (ql, k[0, 1])))
    slow = first @ torch.linalg.pinv(middle) @ last @ v[0, 1]
    torch.testing.assert_close(nystrom_attention(q, k, v, runs, 40)[0, 1], slow, atol=1e-4, rtol=1e-4)


def test_tokens_of_few_kinds_are_attended_to_exactly_by_as_many_landmarks():
    q, k, v = tokens(4)
    q, k, v = (x.repeat_interleave(10, dim=2) for x in (q, k, v))
    found = nystrom_attention(q, k, v, torch.arange(40) // 10, iterations=40)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), atol=1e-4, rtol=1e-4)


def test_pseudo_inverse_inverts():
    a = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
    one = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    torch.testing.assert_close(pseudo_inverse(a, 40) @ a, one, atol=1e-5, rtol=1e-5)


def test_neighbouring_cells_share_a_run():
    cells = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(-1, 2)
    order = order_of(torch.zeros(64, 3), cells)
    runs = runs_of(order, 4)
    assert runs[0] == 0 and runs.bincount().tolist() == [1, 16, 16, 16, 16]
    for run in range(1, 5):
        assert (cells[runs[1:] == run].amax(0) - cells[runs[1:] == run].amin(0)).tolist() == [3, 3]  # a square


def test_fewer_tokens_than_landmarks_are_a_run_each():
    assert sorted(runs_of(order_of(torch.randn(3, 2)), 10).tolist()) == [0, 1, 2, 3]
