"""Core-tuning: fine-tuning with a contrast of hard pairs, each pair weighted by how hard it is.

Zhang et al., "Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning",
NeurIPS 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medcl.losses.contrastive import cosine


def hard_pairs(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least alike row of an anchor's own class, and the most alike of the others.

    Args:
        z: embeddings (n, d).
        label: (n,).

    Returns:
        Index of the hardest positive (n,), of the hardest negative (n,), and whether an anchor has both (n,) bool.
        (The release takes the least of the masked similarities, where pairs of other classes stand as 0 and often win.)
    """
    s = cosine(z, z)
    same = label[:, None] == label
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    hardest = s.masked_fill(~positive, torch.inf).argmin(1)
    nearest = s.masked_fill(same, -torch.inf).argmax(1)
    return hardest, nearest, positive.any(1) & (~same).any(1)


def focal_contrast(
    anchors: Tensor, others: Tensor, positive: Tensor, negative: Tensor, temperature: float, focus: float = 1.0
) -> Tensor:
    """Mean over positive pairs (i, p) of -(1 - q_ip)^focus log q_ip.

    q_ip is the softmax of the similarity over all of the anchor's positives and negatives (equation 6).

    Args:
        anchors: (n, d).
        others: (m, d).
        positive, negative: (n, m) bool.
        temperature: 0.07 in the paper.
        focus: 1 in the paper; 0 gives the supervised contrastive loss of Khosla et al. (NeurIPS 2020).

    Returns:
        A scalar; 0 where there is no positive pair.
    """
    s = cosine(anchors, others) / temperature
    either = positive | negative
    some = either.any(1, keepdim=True)
    total = torch.logsumexp(s.masked_fill(~either & some, -torch.inf), dim=1, keepdim=True)
    log_q = torch.where(positive, s - total, 0.0)
    # a pair of q = 1 has no loss; 1 - q is kept off 0, where a power below 1 has no gradient
    weight = (-torch.expm1(log_q)).clamp(min=1e-6) ** focus if focus else torch.ones_like(log_q)
    return torch.where(positive, -weight * log_q, 0.0).sum() / positive.sum().clamp(min=1)


def core_tuning(
    features: Tensor, z: Tensor, label: Tensor, share: Tensor, blend: Tensor, shuffle: Tensor, head, classifier,
    temperature: float = 0.07,
) -> Tensor:  # fmt: skip
    """The focal contrast of rows with generated hard positives and semi-hard negatives, plus cross-entropy of mixtures.

    The hard positive of an anchor is share * hardest positive + (1 - share) * hardest negative; it is classified as
    that mixture of classes. The semi-hard negative is blend * hardest negative + (1 - blend) * a random row of another
    class.

    Args:
        features: (n, C).
        z: head(features), (n, d).
        label: class of every row, (n,) int64.
        share: (n,) in [0, 1], from Beta(1, 1) in the paper.
        blend: (n,) in [0.8, 1].
        shuffle: random numbers (n, n), which row of another class is blended in.
        head: features to embeddings.
        classifier: features to logits.
        temperature: of the contrast.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, z = features.float(), z.float()
        hardest, nearest, usable = hard_pairs(z.detach(), label)
        if not bool(usable.any()):
            return z.sum() * 0
        other = label[:, None] != label
        far = shuffle.masked_fill(~other, -1.0).argmax(1)
        share, blend = share[:, None], blend[:, None]
        near = features[nearest]
        hard = share * features[hardest] + (1 - share) * near
        semi = blend * near + (1 - blend) * features[far]
        made = head(torch.cat([hard, semi]))
        n = len(z)
        own = torch.eye(n, dtype=torch.bool, device=z.device) & usable[:, None]
        positive = torch.cat([(~other & ~torch.eye(n, dtype=torch.bool, device=z.device)), own, own & False], dim=1)
        negative = torch.cat([other, own & False, own], dim=1)
        pulled = focal_contrast(z, torch.cat([z, made]), positive & usable[:, None], negative, temperature)
        log_p = torch.log_softmax(classifier(hard), dim=1)
        truth, wrong = (log_p.gather(1, label[index, None]) for index in (hardest, nearest))
        mixture = -(share * truth + (1 - share) * wrong)
        return pulled + mixture[usable].mean()
