"""INS: a classifier of instances, trained from the labels of bags alone.

Qu et al., "Rethinking Multiple Instance Learning for Whole Slide Image Classification: A Good Instance Classifier is
All You Need", IEEE TCSVT 2024. The instances here are rows of features, so the two views of an instance are two draws
of noise, and a momentum encoder follows the embedding. Where this differs from the released code:

- The label of an instance is never read, there is no place to give it. The release hands the ground truth of patches to
  the negative instances of positive slides.
- The bag head is a classifier of C classes on the mean of the instances, weighted by how positive the instance
  classifier says they are. (The release takes a softmax over the 512 channels of the mean feature and trains on two.)
- A batch holds whole bags, and in a positive bag the likeliest instance counts as positive.
- The first prototype is that of instances known to be negative.
- An instance is not contrasted with its own earlier embeddings: small sets are met again before the queue is full.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medcl.mil.bagged import Aggregator, Bagged


class INS(Aggregator):
    """An instance classifier and a bag head on it; class 0 is the one whose bags hold nothing else.

    Args:
        features, classes: see `Aggregator`.
        hidden: width of the embedding.
        projection: width of the embedding that is contrasted.
        dropout: in the embedding.
        noise: standard deviation of what is added to the standardised features to make a view.
        momentum: of the momentum encoder.
        queue: earlier instances to contrast with.
        anchors: most instances of a step that are contrasted, drawn at random.
        temperature: of the contrast.
        warmup: share of the training without prototypes; instances are discriminated from one another instead.
        contrast_weight: of the contrast in the total.
        bag_weight: of the bag head's cross-entropy in the total.
    """

    def __init__(
        self, features: int, classes: int = 2, hidden: int = 256, projection: int = 128, dropout: float = 0.25,
        noise: float = 0.3, momentum: float = 0.99, queue: int = 2048, anchors: int = 512, temperature: float = 0.07,
        warmup: float = 0.1, contrast_weight: float = 0.5, bag_weight: float = 1.0,
    ):  # fmt: skip
        super().__init__(features, classes)
        self.noise, self.momentum, self.queue, self.anchors = noise, momentum, queue, anchors
        self.temperature, self.warmup = temperature, warmup
        self.contrast_weight, self.bag_weight = contrast_weight, bag_weight
        self.embed = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.project = nn.Linear(hidden, projection)
        self.instance = nn.Linear(hidden, classes)
        self.bag = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        embedded = self.embed(h)
        instance = self.instance(embedded).float()
        # the logarithm of how positive an instance is: their softmax is the share of the bag's positives
        positive = instance.log_softmax(2)[:, :, 1:].logsumexp(2)
        attention = positive.masked_fill(~mask, -torch.inf).softmax(1)
        z = torch.einsum("bk,bkm->bm", attention.to(embedded.dtype), embedded)
        return Bagged(self.bag(z), attention, z, {"embedded": embedded, "instance": instance})
