"""Pseudo-labels of instances from the labels of their bags, as INS makes them.

Qu et al., "Rethinking Multiple Instance Learning for Whole Slide Image Classification: A Good Instance Classifier is
All You Need", IEEE TCSVT 2024. Class 0 is the one whose bags hold nothing else; a bag of class c holds instances of
class 0 and of class c. Nothing here is given the label of an instance: the released code reads them, and so its numbers
cannot be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def candidates(labels: Tensor, classes: int) -> Tensor:
    """What an instance can be, by the label of its bag: (n, C) bool.

    Class 0 always can; the bag's own class as well. So an instance of a negative bag is certain.

    Args:
        labels: of the instances' bags (n,).
        classes: number C.
    """
    can = F.one_hot(labels, classes).bool()
    can[:, 0] = True
    return can


def first_pseudo_labels(can: Tensor) -> Tensor:
    """Uniform over what an instance can be: (n, C), rows sum to 1."""
    return can.float() / can.sum(1, keepdim=True)


def predicted_classes(logits: Tensor, can: Tensor, bag: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class that an instance can be, (n,); of every positive bag at least one instance is of its class.

    The second half is what the label of a bag says for certain, and keeps the classifier from calling everything
    negative.

    Args:
        logits: of the instances (n, C).
        can: (n, C) bool.
        bag: number of every instance's bag (n,), 0 .. B-1, each with an instance.
        labels: of the bags (B,).
    """
    share = logits.float().softmax(1)
    classes = share.masked_fill(~can, -1.0).argmax(1)
    own = share.gather(1, labels[bag][:, None])[:, 0]
    for number, label in enumerate(labels.tolist()):
        if label:
            inside = (bag == number).nonzero()[:, 0]
            classes[inside[own[inside].argmax()]] = label
    return classes


def updated_prototypes(prototypes: Tensor, q: Tensor, classes: Tensor, usable: Tensor, momentum: float) -> Tensor:
    """Prototypes (C, d) moved towards the mean embedding of each class, and normalised again.

    Args:
        prototypes: (C, d); a row of zeros has not been met yet and takes the mean as it is.
        q: normalised embeddings (n, d).
        classes: of the instances (n,), as predicted.
        usable: (n,) bool: which instances count.
        momentum: share that a prototype keeps.
    """
    rows = []
    for c, old in enumerate(prototypes):
        mine = q[(classes == c) & usable]
        if not len(mine):
            rows.append(old)
            continue
        keep = momentum if bool(old.any()) else 0.0
        rows.append(F.normalize(keep * old + (1 - keep) * mine.mean(0), dim=0))
    return torch.stack(rows)


def updated_pseudo_labels(pseudo: Tensor, q: Tensor, prototypes: Tensor, can: Tensor, keep: float) -> Tensor:
    """phi y + (1 - phi) onehot(the nearest prototype that the instance can be): (n, C).

    An instance that can be of one class only stays of that class. A prototype not met yet attracts nothing.
    """
    met = prototypes.any(1)
    near = (q @ prototypes.T).masked_fill(~(can & met), -torch.inf)
    assigned = F.one_hot(near.argmax(1), pseudo.shape[1]).to(pseudo.dtype)
    known = torch.isfinite(near).any(1, keepdim=True)
    return torch.where(known, keep * pseudo + (1 - keep) * assigned, pseudo)


def soft_cross_entropy(logits: Tensor, pseudo: Tensor) -> Tensor:
    """-mean over instances of sum_c y_c log softmax(f)_c."""
    return -(pseudo * logits.float().log_softmax(1)).sum(1).mean()
