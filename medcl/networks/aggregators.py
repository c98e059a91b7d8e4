"""Multiple-instance aggregators: the instances of a bag, (B, K, M) with a mask, to class logits of the bag.

A bag's label says nothing about which instance it comes from. Every aggregator here ignores padding exactly and gives
the same answer for any order of the instances.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Bagged:
    """What an aggregator makes of a batch of bags.

    Attributes:
        logits: (B, C).
        attention: how much each instance counts, (B, K), 0 at padding; rows sum to 1.
        embedding: (B, E), what the classifier is given.
        extra: further tensors that the aggregator's own loss needs.
    """

    logits: Tensor
    attention: Tensor
    embedding: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Aggregator(nn.Module, ABC):
    """Maps bags to class logits.

    Args:
        features: width M of an instance.
        classes: number C of bag classes, at least 2.
    """

    def __init__(self, features: int, classes: int = 2):
        super().__init__()
        self.features, self.classes = features, classes

    @abstractmethod
    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        """Logits of bags.

        Args:
            h: instances (B, K, M).
            mask: (B, K) bool, True at instances, False at padding; every bag has at least one instance.
            coordinates: (B, K, 2 or 3) whole numbers, the instance's cell in the slide or volume; None if unknown.
        """

    def loss(self, bagged: Bagged, labels: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of the bags (B,), with class weights (C,)."""
        return F.cross_entropy(bagged.logits.float(), labels, weight)

    def probabilities(self, bagged: Bagged) -> Tensor:
        """(B, C), rows sum to 1."""
        return bagged.logits.float().softmax(1)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax along the last dimension in float32, exactly 0 where the mask is False."""
    return scores.float().masked_fill(~mask, -torch.inf).softmax(-1)


def _mlp(features: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout))


class Mean(Aggregator):
    """Mean of the instances' embeddings."""

    def __init__(self, features: int, classes: int = 2, hidden: int = 256, dropout: float = 0.25):
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        attention = mask / mask.sum(1, keepdim=True)
        z = torch.einsum("bk,bkm->bm", attention.to(h.dtype), self.embed(h))
        return Bagged(self.classifier(z), attention, z)


class Max(Aggregator):
    """Largest value of every feature over the instances; an instance counts by the features it gave."""

    def __init__(self, features: int, classes: int = 2, hidden: int = 256, dropout: float = 0.25):
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        z, chosen = self.embed(h).masked_fill(~mask[:, :, None], -torch.inf).max(dim=1)
        attention = torch.zeros(mask.shape, device=h.device).scatter_add_(
            1, chosen, torch.full(chosen.shape, 1 / chosen.shape[1], device=h.device)
        )
        return Bagged(self.classifier(z), attention, z)


class AttentionPool(nn.Module):
    """Attention scores of instances (B, K, M) to (B, n, K).

    Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018, equations 8 (plain) and 9 (gated).
    """

    def __init__(self, features: int, hidden: int, heads: int = 1, gated: bool = True):
        super().__init__()
        self.tanh = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden) if gated else None
        self.score = nn.Linear(hidden, heads)

    def forward(self, h: Tensor) -> Tensor:
        a = torch.tanh(self.tanh(h))
        if self.gate is not None:
            a = a * torch.sigmoid(self.gate(h))
        return self.score(a).transpose(1, 2)


class ABMIL(Aggregator):
    """Attention-based pooling of Ilse et al. 2018, plain or gated."""

    def __init__(
        self, features: int, classes: int = 2, hidden: int = 256, attention: int = 128, gated: bool = False,
        dropout: float = 0.25,
    ):  # fmt: skip
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.pool = AttentionPool(hidden, attention, gated=gated)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        embedded = self.embed(h)
        attention = masked_softmax(self.pool(embedded)[:, 0], mask)
        z = torch.einsum("bk,bkm->bm", attention.to(embedded.dtype), embedded)
        return Bagged(self.classifier(z), attention, z)


class GatedABMIL(ABMIL):
    """ABMIL with the gating mechanism."""

    def __init__(self, features: int, classes: int = 2, **more: Any):
        super().__init__(features, classes, gated=True, **more)


class CLAM(Aggregator):
    """Clustering-constrained attention (Lu et al., Nature Biomedical Engineering 2021).

    Beside the bag loss, the most and least attended instances of the true class are told apart by an instance
    classifier of that class. One attention branch for all classes (CLAM-SB) or one for each (CLAM-MB).

    Args:
        features, classes: see `Aggregator`.
        hidden: width of the embedding.
        attention: width of the attention network.
        multi_branch: an attention branch for each class.
        k: instances drawn from each end; fewer where a bag is smaller (the release fails there).
        bag_weight: share of the bag loss in the total.
        subtyping: classes exclude one another, so the most attended instances of the other classes are negative.
        dropout: in embedding and attention.
    """

    def __init__(
        self, features: int, classes: int = 2, hidden: int = 256, attention: int = 128, multi_branch: bool = False,
        k: int = 8, bag_weight: float = 0.7, subtyping: bool = False, dropout: float = 0.25,
    ):  # fmt: skip
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.pool = AttentionPool(hidden, attention, classes if multi_branch else 1)
        self.multi_branch, self.k, self.bag_weight, self.subtyping = multi_branch, k, bag_weight, subtyping
        self.bag_weights = nn.Parameter(torch.empty(classes, hidden))
        self.bag_bias = nn.Parameter(torch.zeros(classes))
        nn.init.xavier_uniform_(self.bag_weights)
        self.instance = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(classes))

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        embedded = self.embed(h)
        attention = masked_softmax(self.pool(embedded), mask[:, None])  # (B, 1 or C, K)
        z = torch.einsum("bnk,bkm->bnm", attention.to(embedded.dtype), embedded)
        logits = (z * self.bag_weights).sum(-1) + self.bag_bias
        shown = attention[:, 0]
        if self.multi_branch:  # the branch of the predicted class
            shown = attention[torch.arange(len(h), device=h.device), logits.argmax(1)]
        return Bagged(logits, shown, z.mean(1), {"attention": attention, "embedded": embedded})

    def loss(self, bagged: Bagged, labels: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        bag = super().loss(bagged, labels, mask, weight)
        return self.bag_weight * bag + (1 - self.bag_weight) * self.instance_loss(bagged, labels, mask)

    def instance_loss(self, bagged: Bagged, labels: Tensor, mask: Tensor) -> Tensor:
        """Mean over bags of the cross-entropy of the k most attended instances as 1 and the k least attended as 0."""
        attention, embedded = bagged.extra["attention"].detach(), bagged.extra["embedded"]
        terms = []
        for b, label in enumerate(labels.tolist()):
            inside = mask[b].nonzero().squeeze(1)
            k = min(self.k, len(inside))
            losses = []
            for c, classifier in enumerate(self.instance):
                if c != label and not self.subtyping:
                    continue
                branch = attention[b, c if self.multi_branch else 0, inside]
                top = inside[branch.topk(k).indices]
                if c == label:
                    low = inside[branch.topk(k, largest=False).indices]
                    chosen = torch.cat([top, low])
                    target = torch.cat([torch.ones(k), torch.zeros(k)]).long().to(labels.device)
                else:
                    chosen, target = top, torch.zeros(k, dtype=torch.long, device=labels.device)
                losses.append(F.cross_entropy(classifier(embedded[b, chosen]).float(), target))
            terms.append(torch.stack(losses).mean())
        return torch.stack(terms).mean()


class DSMIL(Aggregator):
    """Dual-stream aggregation (Li et al., CVPR 2021): a max-pooled instance stream and attention to its best instance.

    The loss is the mean of both streams' binary cross-entropies over one-hot classes; a prediction is the mean of both.
    """

    def __init__(self, features: int, classes: int = 2, hidden: int = 256, query: int = 128, dropout: float = 0.25):
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.instance = nn.Linear(hidden, classes)
        self.query = nn.Sequential(nn.Linear(hidden, query), nn.ReLU(), nn.Linear(query, query), nn.Tanh())
        self.bag = nn.Conv1d(classes, classes, kernel_size=hidden)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        embedded = self.embed(h)
        scores = self.instance(embedded).masked_fill(~mask[:, :, None], -torch.inf)  # (B, K, C)
        best, critical = scores.max(dim=1)
        query = self.query(embedded)
        wanted = query.gather(1, critical[:, :, None].expand(-1, -1, query.shape[-1]))  # (B, C, q)
        similarity = wanted @ query.transpose(1, 2) / math.sqrt(query.shape[-1])
        attention = masked_softmax(similarity, mask[:, None])
        z = torch.einsum("bck,bkm->bcm", attention.to(embedded.dtype), embedded)
        logits = self.bag(z).squeeze(-1)
        shown = attention[torch.arange(len(h), device=h.device), logits.argmax(1)]
        return Bagged(logits, shown, z.flatten(1), {"best": best})

    def loss(self, bagged: Bagged, labels: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        target = F.one_hot(labels, self.classes).float()
        share = None if weight is None else weight[labels][:, None]
        streams = (bagged.logits, bagged.extra["best"])
        return sum(F.binary_cross_entropy_with_logits(s.float(), target, share) for s in streams) / 2  # type: ignore[return-value]

    def probabilities(self, bagged: Bagged) -> Tensor:
        both = (bagged.logits.float().sigmoid() + bagged.extra["best"].float().sigmoid()) / 2
        return both / both.sum(1, keepdim=True)


class TransMIL(Aggregator):
    """Transformer over instances (Shao et al., NeurIPS 2021).

    Two differences from the release, both for the answer not to depend on the order in which instances are listed:
    attention is exact instead of Nystrom's approximation, whose landmarks are means over neighbours in that order; and
    the convolutional position encoding works on the instances' true cells instead of a square filled in that order.
    Where coordinates are unknown there is no position encoding.
    """

    def __init__(self, features: int, classes: int = 2, hidden: int = 256, heads: int = 8, dropout: float = 0.1):
        super().__init__(features, classes)
        self.embed = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.first, self.second = _SelfAttention(hidden, heads, dropout), _SelfAttention(hidden, heads, dropout)
        self.position = PositionEncoding(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        x = torch.cat([self.token.expand(len(h), -1, -1), self.embed(h)], dim=1)
        seen = F.pad(mask, (1, 0), value=True)
        x = self.first(x, seen)
        if coordinates is not None:
            x = torch.cat([x[:, :1], self.position(x[:, 1:], mask, coordinates)], dim=1)
        attention = self.second.of_first_token(x, seen)[:, 1:]
        z = self.norm(self.second(x, seen)[:, 0])
        attention = attention / attention.sum(1, keepdim=True).clamp(min=1e-12)
        return Bagged(self.classifier(z), attention, z)


class _SelfAttention(nn.Module):
    """x + attention(norm(x)) over tokens (B, T, d), padding left out."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._split(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return x + self.out(y.transpose(1, 2).flatten(2))

    def of_first_token(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the first token attends to, mean over heads: (B, T)."""
        q, k, _ = self._split(x)
        scores = (q[:, :, :1] @ k.transpose(-1, -2)).squeeze(2) / math.sqrt(q.shape[-1])
        return masked_softmax(scores, mask[:, None]).mean(1)


class PositionEncoding(nn.Module):
    """Depth-wise convolutions of 7, 5 and 3 cells over the instances' map, added to them; in 2D or 3D.

    In a volume they act within each plane (the last coordinate is the plane).
    """

    def __init__(self, width: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, n, padding=n // 2, groups=width) for n in (7, 5, 3))

    def forward(self, x: Tensor, mask: Tensor, coordinates: Tensor) -> Tensor:
        """Tokens (B, K, d) at cells (B, K, 2 or 3); instances in one cell share their mean."""
        rows = []
        for tokens, inside, cells in zip(x, mask, coordinates.long(), strict=True):
            cells = cells[inside] - cells[inside].amin(0)
            plane = cells[:, 2] if cells.shape[1] == 3 else torch.zeros_like(cells[:, 0])
            planes, height, width = (int(n.max()) + 1 for n in (plane, cells[:, 0], cells[:, 1]))
            index = (plane * height + cells[:, 0]) * width + cells[:, 1]
            total = tokens.new_zeros(planes * height * width, tokens.shape[1]).index_add_(0, index, tokens[inside])
            count = tokens.new_zeros(len(total)).index_add_(0, index, torch.ones_like(index, dtype=tokens.dtype))
            grid = (total / count.clamp(min=1)[:, None]).view(planes, height, width, -1).permute(0, 3, 1, 2)
            encoded = sum(convolution(grid) for convolution in self.convolutions)
            assert isinstance(encoded, Tensor)
            flat = encoded.permute(0, 2, 3, 1).flatten(0, 2)
            rows.append(tokens.index_add(0, inside.nonzero().squeeze(1), flat[index].to(tokens.dtype)))
        return torch.stack(rows)


AGGREGATORS: dict[str, Any] = {
    "mean": Mean,
    "max": Max,
    "abmil": ABMIL,
    "gated_abmil": GatedABMIL,
    "clam_sb": CLAM,
    "clam_mb": lambda features, classes=2, **more: CLAM(features, classes, multi_branch=True, **more),
    "dsmil": DSMIL,
    "transmil": TransMIL,
}
