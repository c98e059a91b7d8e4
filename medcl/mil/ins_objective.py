"""What INS is trained by: pseudo-labels from prototypes, contrast of instances, labels of bags; see `medcl.mil.ins`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.config.mil import MILFitConfig
from medcl.losses.bags import supervised_contrast
from medcl.losses.contrastive import contrast
from medcl.losses.instances import (
    candidates,
    first_pseudo_labels,
    predicted_classes,
    soft_cross_entropy,
    updated_prototypes,
    updated_pseudo_labels,
)
from medcl.mil.classifier import BagClassifier
from medcl.mil.ins import INS
from medcl.mil.objectives import Batch, Plain
from medcl.networks.ema import MomentumTeacher

KEEP = (0.95, 0.80)  # share of a pseudo-label that stays, at the start and at the end of training
PROTOTYPE_MOMENTUM = 0.9


class InstanceContrast(Plain):
    """The objective: pseudo-labels by prototypes, contrast within predicted classes, and the bag's own label."""

    divisible = False

    def __init__(self, model: BagClassifier, config: MILFitConfig, sizes: Sequence[int], labels: Tensor):
        super().__init__(model, config, sizes, labels)
        net, device = model.aggregator, labels.device
        assert isinstance(net, INS)
        self.net = net
        self.teacher = MomentumTeacher(nn.Sequential(net.embed, net.project))
        can = candidates(labels, net.classes)
        self.pseudo = [first_pseudo_labels(each[None].expand(n, -1)) for each, n in zip(can, sizes, strict=True)]
        width = net.project.out_features
        self.prototypes = torch.zeros(net.classes, width, device=device)
        self.queue = torch.empty(0, width, device=device)
        self.queue_classes = torch.empty(0, dtype=torch.long, device=device)
        self.queue_numbers = torch.empty(0, dtype=torch.long, device=device)
        self.first = np.concatenate([[0], np.cumsum(sizes)])  # number of the first instance of every bag

    def loss(self, batch: Batch) -> Tensor:
        net, mask = self.net, batch.mask
        h = self.model.standardised(batch.h)
        noises = [torch.randn_like(h) * net.noise for _ in range(2)]
        out = net(h + noises[0], mask, batch.where)
        bag = mask.nonzero()[:, 0]
        logits = out.extra["instance"][mask]
        q = F.normalize(net.project(out.extra["embedded"][mask]).float(), dim=1)
        with torch.no_grad():
            k = F.normalize(self.teacher.module((h + noises[1])[mask]).float(), dim=1)
            can = candidates(batch.labels[bag], net.classes)
            classes = predicted_classes(logits, can, bag, batch.labels)
            certain = can.sum(1) == 1
            pseudo = torch.cat(
                [self.pseudo[b][torch.from_numpy(r)] for b, r in zip(batch.bags, batch.rows, strict=True)]
            )
            if batch.progress >= net.warmup:
                self.prototypes = updated_prototypes(
                    self.prototypes, q.detach(), classes, certain | (classes > 0), PROTOTYPE_MOMENTUM
                )
                keep = KEEP[0] + (KEEP[1] - KEEP[0]) * batch.progress
                pseudo = updated_pseudo_labels(pseudo, q.detach(), self.prototypes, can, keep)
                self._remember(batch, pseudo)
        total = soft_cross_entropy(logits, pseudo)
        total = total + net.bag_weight * net.loss(out, batch.labels, mask, self.weight)
        rows = np.concatenate([self.first[b] + rows for b, rows in zip(batch.bags, batch.rows, strict=True)])
        numbers = torch.from_numpy(rows).to(q.device)
        return total + net.contrast_weight * self._contrast(q, k, classes, numbers, batch.progress < net.warmup)

    def _remember(self, batch: Batch, pseudo: Tensor) -> None:
        parts = pseudo.split([len(rows) for rows in batch.rows])
        for number, rows, part in zip(batch.bags, batch.rows, parts, strict=True):
            self.pseudo[number] = self.pseudo[number].clone()
            self.pseudo[number][torch.from_numpy(rows)] = part

    def _contrast(self, q: Tensor, k: Tensor, classes: Tensor, numbers: Tensor, by_itself: bool) -> Tensor:
        """Contrast of some instances with their own views and the queue, which takes them up afterwards."""
        chosen = torch.randperm(len(q))[: self.net.anchors].to(q.device)
        q, k, classes, numbers = q[chosen], k[chosen], classes[chosen], numbers[chosen]
        others, other_classes = torch.cat([k, self.queue]), torch.cat([classes, self.queue_classes])
        other_numbers = torch.cat([numbers, self.queue_numbers])
        own = torch.eye(len(q), len(others), dtype=torch.bool, device=q.device)
        same = numbers[:, None] == other_numbers  # the same instance, of this step or of an earlier one
        if by_itself:  # momentum contrast: an instance is like its own view only
            value = contrast(q, others, own, ~same, self.net.temperature)
        else:
            left_out = torch.cat([same[:, : len(q)], same & ~own], dim=1)
            value = supervised_contrast(q, classes, self.net.temperature, others, other_classes, left_out)
        self.queue, self.queue_classes = others[: self.net.queue], other_classes[: self.net.queue]
        self.queue_numbers = other_numbers[: self.net.queue]
        return value

    def after_step(self) -> None:
        self.teacher.update(nn.Sequential(self.net.embed, self.net.project), self.net.momentum)
