"""Pseudo-label pixel-wise contrast, beside the supervised loss and, if wanted, beside self-training.

Chaitanya et al., Medical Image Analysis 2023. There, volumes are pseudo-labelled whole, refined by a random field, and
again in three rounds; here the moving average labels every patch anew, and what it is not sure of is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from medcl.errors import MedclError
from medcl.losses.pixel_contrast import pixel_contrast, voxel_classes
from medcl.networks.backbones import Backbone
from medcl.networks.heads import PointwiseHead
from medcl.segmentation.semi.base import SemiOptions, Tensors
from medcl.segmentation.semi.rows import Rows
from medcl.segmentation.semi.self_training import SelfTraining, SelfTrainingOptions
from medcl.transforms.random import uniform


@dataclass(frozen=True)
class PixelContrastOptions(SelfTrainingOptions):
    """Further settings.

    Attributes:
        contrast: weight of the contrast.
        pseudo: weight of Dice and cross-entropy against the pseudo-labels; none in the paper.
        temperature: of the contrast.
        anchors: voxels drawn of every class in every patch.
        least: voxels of the map that a class needs in a patch to take part there.
        embedding: width of the embedding.
        background: whether the background takes part as a class.
    """

    contrast: float = 0.1
    pseudo: float = 0.0
    temperature: float = 0.1
    anchors: int = 3
    least: int = 8
    embedding: int = 16
    background: bool = False


class PixelContrast(SelfTraining):
    """Voxels of labelled and unlabelled rows against class means, on the map that the output layer reads."""

    Options: ClassVar[type[SemiOptions]] = PixelContrastOptions
    reads_features: ClassVar[bool] = True

    def __init__(self, backbone: Backbone, options: dict[str, Any]):
        super().__init__(backbone, options)
        self.classes = list(range(0 if self.options.background else 1, backbone.spec.out_channels))
        if len(self.classes) < 2:
            raise MedclError(
                "a single class has no other to be contrasted with",
                "--semi pixel_contrast",
                "Add --semi_options.background true.",
            )
        self.offset = backbone.feature_offset
        self.head = PointwiseHead(backbone.feature_channels, self.options.embedding, 16)

    def check(self) -> None:
        super().check()
        self.need("contrast", self.options.contrast >= 0, "0 or more")
        self.need("pseudo", self.options.pseudo >= 0, "0 or more")
        self.need("temperature", self.options.temperature > 0, "a positive number")
        for name in ("anchors", "least", "embedding"):
            self.need(name, getattr(self.options, name) >= 1, "at least 1")

    def loss(self, logits: Tensor, features: Tensor | None, rows: Rows) -> Tensors:
        """`loss`, its part `contrast` over all rows, and `trusted` as in self-training."""
        assert features is not None
        options = self.options
        depth, height, width = features.shape[2:]
        size = (depth, height, width)
        label = voxel_classes(rows.target, rows.weight, size, self.offset)
        keys = uniform(rows.seed, "pixel.anchors", *size).to(label.device)
        drawn = pixel_contrast(
            self.head(features), label, keys, self.classes, options.anchors, options.least, options.temperature
        )
        losses = super().loss(logits, features, rows)
        return {**losses, "loss": options.contrast * drawn + options.pseudo * losses["loss"], "contrast": drawn}
