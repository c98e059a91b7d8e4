"""Multiple-instance aggregators: the instances of a bag, (B, K, M) with a mask, to class logits of the bag.

A bag's label says nothing about which instance it comes from. Every aggregator here ignores padding exactly and gives
the same answer for any order of the instances.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.mil.bagged import Aggregator, Bagged, masked_softmax
from medcl.mil.transmil import TransMIL


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
    Dropout acts on both factors, as in the release of CLAM; the paper has none.
    """

    def __init__(self, features: int, hidden: int, heads: int = 1, gated: bool = True, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.tanh = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden) if gated else None
        self.score = nn.Linear(hidden, heads)

    def forward(self, h: Tensor) -> Tensor:
        a = self.dropout(torch.tanh(self.tanh(h)))
        if self.gate is not None:
            a = a * self.dropout(torch.sigmoid(self.gate(h)))
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
        dropout: in the embedding, and in both factors of the gated attention, as in the release.
    """

    def __init__(
        self, features: int, classes: int = 2, hidden: int = 256, attention: int = 128, multi_branch: bool = False,
        k: int = 8, bag_weight: float = 0.7, subtyping: bool = False, dropout: float = 0.25,
    ):  # fmt: skip
        super().__init__(features, classes)
        self.embed = _mlp(features, hidden, dropout)
        self.pool = AttentionPool(hidden, attention, classes if multi_branch else 1, dropout=dropout)
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
        return self.bag_weight * bag + (1 - self.bag_weight) * self.instance_loss(bagged, labels, mask, weight)

    def instance_loss(self, bagged: Bagged, labels: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over bags of the cross-entropy of the k most attended instances as 1 and the k least attended as 0.

        With class weights (C,) a bag counts by the weight of its label.
        """
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
        each = torch.stack(terms)
        return each.mean() if weight is None else (each * weight[labels]).sum() / weight[labels].sum()


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
        # by their mean, for a weighted mean over bags as of `F.cross_entropy`, which a batch in parts adds up to
        share = None if weight is None else (weight[labels] / weight[labels].mean())[:, None]
        streams = (bagged.logits, bagged.extra["best"])
        return sum(F.binary_cross_entropy_with_logits(s.float(), target, share) for s in streams) / 2  # type: ignore[return-value]

    def probabilities(self, bagged: Bagged) -> Tensor:
        both = (bagged.logits.float().sigmoid() + bagged.extra["best"].float().sigmoid()) / 2
        return both / both.sum(1, keepdim=True)


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
