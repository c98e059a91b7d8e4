"""TransMIL: a transformer over the instances of a bag (Shao et al., NeurIPS 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.mil.bagged import Aggregator, Bagged, masked_softmax
from medcl.mil.nystrom import nystrom_attention, order_of, runs_of

BLOCK = 16  # cells of a side of the blocks in which a map is computed
REACH = 3  # cells that the largest kernel sees around its middle


class TransMIL(Aggregator):
    """Transformer over instances (Shao et al., NeurIPS 2021).

    Three differences from the release, for the answer not to depend on the order in which instances are listed.
    Attention is exact up to `exact` instances; in larger bags it is Nystrom's, whose landmarks are means over runs of
    instances in an order of their own (`order_of`) instead of the listed one. The convolutional position encoding works
    on the instances' true cells instead of a square filled in the listed order; where coordinates are unknown there is
    none. And values have no convolution along the list.

    Args:
        features, classes: see `Aggregator`.
        hidden: width of a token.
        heads: of the attention.
        dropout: after the attention.
        exact: most instances of a bag whose attention is exact.
        landmarks: of larger bags.
    """

    def __init__(
        self, features: int, classes: int = 2, hidden: int = 256, heads: int = 8, dropout: float = 0.1,
        exact: int = 4096, landmarks: int = 256,
    ):  # fmt: skip
        super().__init__(features, classes)
        self.exact, self.landmarks = exact, landmarks
        self.embed = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.first, self.second = _SelfAttention(hidden, heads, dropout), _SelfAttention(hidden, heads, dropout)
        self.position = PositionEncoding(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        if h.shape[1] <= self.exact:
            return self._together(h, mask, coordinates)
        found, attention = [], torch.zeros(mask.shape, device=h.device)
        for b, inside in enumerate(mask):  # without padding, so that a bag's own size decides
            some = slice(None) if bool(inside.all()) else inside
            where = None if coordinates is None else coordinates[b : b + 1, some]
            found.append(self._together(h[b : b + 1, some], mask[b : b + 1, some], where))
            attention[b, some] = found[-1].attention[0]
        return Bagged(torch.cat([one.logits for one in found]), attention, torch.cat([one.embedding for one in found]))

    def _together(self, h: Tensor, mask: Tensor, coordinates: Tensor | None) -> Bagged:
        embedded, runs = self.embed(h), None
        if h.shape[1] > self.exact:
            order = order_of(embedded[0], None if coordinates is None else coordinates[0])
            runs = runs_of(order, self.landmarks)
        x = torch.cat([self.token.expand(len(h), -1, -1), embedded], dim=1)
        seen = F.pad(mask, (1, 0), value=True)
        x, _ = self.first(x, seen, runs)
        if coordinates is not None:
            x = torch.cat([x[:, :1], self.position(x[:, 1:], mask, coordinates)], dim=1)
        x, attention = self.second(x, seen, runs)
        z, attention = self.norm(x[:, 0]), attention[:, 1:]
        attention = attention / attention.sum(1, keepdim=True).clamp(min=1e-12)
        return Bagged(self.classifier(z), attention, z)


class _SelfAttention(nn.Module):
    """x + attention(norm(x)) over tokens (B, T, d), padding left out; with `runs` by landmarks, for a bag unpadded."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor, runs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, d), and what the first of them attends to, mean over heads, exact: (B, T)."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if runs is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        else:
            y = nystrom_attention(q, k, v, runs)
        scores = (q[:, :, :1] @ k.transpose(-1, -2)).detach().squeeze(2) / math.sqrt(q.shape[-1])
        return x + self.out(y.transpose(1, 2).flatten(2)), masked_softmax(scores, mask[:, None]).mean(1)


class PositionEncoding(nn.Module):
    """Depth-wise convolutions of 7, 5 and 3 cells over the instances' map, added to them; in 2D or 3D.

    In a volume they act within each plane (the last coordinate is the plane). The map is computed in blocks, and only
    where instances are: however far apart they lie, there are at most 484 cells an instance.
    """

    def __init__(self, width: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, n, padding=n // 2, groups=width) for n in (7, 5, 3))

    def forward(self, x: Tensor, mask: Tensor, coordinates: Tensor) -> Tensor:
        """Tokens (B, K, d) at cells (B, K, 2 or 3); instances in one cell share their mean."""
        rows = []
        for tokens, inside, cells in zip(x, mask, coordinates.long(), strict=True):
            encoded = self._encoded(tokens[inside], cells[inside] - cells[inside].amin(0))
            rows.append(tokens.index_add(0, inside.nonzero().squeeze(1), encoded.to(tokens.dtype)))
        return torch.stack(rows)

    def _encoded(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """What the convolutions make of tokens (K, d) at cells (K, 2 or 3) from 0, read back at each: (K, d)."""
        plane = cells[:, 2] if cells.shape[1] == 3 else torch.zeros_like(cells[:, 0])
        # a number for every cell, with as much room around a plane as kernels and blocks may reach beyond it
        height, width = (int(n.max()) + 2 * BLOCK + 2 * REACH for n in (cells[:, 0], cells[:, 1]))

        def number(rows: Tensor, columns: Tensor) -> Tensor:
            return (plane * height + rows + REACH) * width + columns + REACH

        places, at = number(cells[:, 0], cells[:, 1]).unique(return_inverse=True)
        total = tokens.new_zeros(len(places), tokens.shape[1]).index_add_(0, at, tokens)
        mean = total / at.bincount()[:, None].to(tokens.dtype)
        row, column = cells[:, 0] % BLOCK, cells[:, 1] % BLOCK
        corners, block = number(cells[:, 0] - row, cells[:, 1] - column).unique(return_inverse=True)
        reach = torch.arange(-REACH, BLOCK + REACH, device=cells.device)
        wanted = corners[:, None, None] + reach[:, None] * width + reach
        found = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
        empty = len(places)  # a row of zeros
        grid = F.pad(mean, (0, 0, 0, 1))[torch.where(places[found] == wanted, found, empty)].permute(0, 3, 1, 2)
        encoded = sum(convolution(grid) for convolution in self.convolutions)
        assert isinstance(encoded, Tensor)
        return encoded[block, :, row + REACH, column + REACH]
