"""Few-label segmentation: the training module, and validation by sliding window."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor

from medcl.config import FinetuneConfig
from medcl.dataset.checks import LARGEST_LABEL
from medcl.losses.segmentation import dice_ce, shares
from medcl.networks.backbones import Backbone
from medcl.runtime.memory import RetrySmaller
from medcl.runtime.optimizer import adamw, layer_shares
from medcl.runtime.precision import autocast
from medcl.segmentation.core_tuning import CoreTuning
from medcl.segmentation.semi.base import SemiMethod
from medcl.segmentation.semi.rows import Rows
from medcl.store.crops import CropDataset, StepBatches, crop_loader
from medcl.store.volumes import open_volume
from medcl.transforms.compose import Compose
from medcl.transforms.inside import with_data

Batch = dict[str, dict[str, Tensor]]


class SegmentationModule(RetrySmaller):
    """Dice and cross-entropy on augmented patches, and what a semi-supervised method makes of unlabelled ones.

    Args:
        backbone: network with one output channel a class, background first.
        dataset: labelled patches.
        config: schedule.
        augmentation: batched transforms of image and label, or None.
        label_values: label value of every output channel but the first.
        spacing: mm per voxel of the patches, so that rotations are rigid in mm.
        given: parameters that come from a pretraining.
        semi: the method, or None.
        unlabelled: patches for it.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: CropDataset,
        config: FinetuneConfig,
        augmentation: Compose | None,
        label_values: Sequence[int],
        spacing: Sequence[float],
        given: Collection[torch.nn.Parameter] = (),
        semi: SemiMethod | None = None,
        unlabelled: CropDataset | None = None,
    ):
        super().__init__()
        self._given = tuple(given)
        self.backbone, self.dataset, self.config = backbone, dataset, config
        self.augmentation, self.spacing = augmentation, tuple(spacing)
        self.semi, self.unlabelled = semi, unlabelled
        self.core = CoreTuning(backbone) if config.core_tuning else None
        self.last_dice: float | None = None
        self.register_buffer("channel_of", channel_table(label_values), persistent=False)

    @property
    def final_backbone(self) -> Backbone:
        """The network that is validated and saved: the teacher where there is one."""
        return self.semi.teacher.module if self.semi else self.backbone  # type: ignore[return-value]

    def train_dataloader(self) -> Any:
        sets = {"labelled": (self.dataset, self.config.batch_size)}
        if self.semi:
            assert self.unlabelled is not None
            sets["unlabelled"] = (self.unlabelled, self.semi.patches(self.config.batch_size))
        return CombinedLoader({name: self._loader(*pair) for name, pair in sets.items()}, "min_size")

    def _loader(self, dataset: CropDataset, size: int) -> Any:
        trainer, config = self.trainer, self.config
        batches = StepBatches(size, trainer.global_step, config.steps, self.global_rank, trainer.world_size)
        return crop_loader(dataset, batches, config.workers, pin=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        # these stay on the CPU: augmentation draws its parameters there, and which reads stick out is decided there
        here = ("seed", "start", "extent")
        return {
            part: {k: v if k in here else v.to(device, non_blocking=True) for k, v in tensors.items()}
            for part, tensors in batch.items()
        }

    @torch.no_grad()
    def labelled_rows(self, batch: dict[str, Tensor]) -> Rows:
        """Labelled patches as the network is to see them; voxels that hold no data have weight 0."""
        image, inside = with_data(batch)
        # 0 where there is no data, as a label moves to where nothing is
        marks = (self.channel_of[batch["label"].long()] + 1) * inside  # type: ignore[index]
        if self.augmentation is not None:
            with torch.autocast(self.device.type, enabled=False):
                image, marks = self.augmentation(image, batch["seed"], marks, spacing=self.spacing)
        counts = (marks > 0).float()
        target = shares((marks - 1).clamp(min=0), self.backbone.spec.out_channels)
        return Rows(image, target, counts, batch["seed"], len(image), counts)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        rows = self.labelled_rows(batch["labelled"])
        n = rows.labelled
        progress = self.trainer.global_step / self.config.steps
        weight = self.semi.weight(progress) if self.semi else None
        if self.semi and weight is not None:
            assert self.augmentation is not None
            more = batch["unlabelled"]
            image, inside = with_data(more)
            rows = rows.with_unlabelled(
                self.semi.rows(image, more["seed"], self.augmentation, self.spacing, inside)
            )  # fmt: skip
        if self.config.mix != "none":
            rows = rows.mix(self.config.mix, self.semi.trust(progress) if self.semi and weight is not None else 1.0)
        if self.core or (self.semi and weight is not None and self.semi.reads_features):
            logits, features = self.backbone.forward_with_features(rows.image)
        else:
            logits, features = self.backbone(rows.image), None
        loss = dice_ce(logits[:n], rows.target[:n], rows.weight[:n], rows.inside[:n])
        losses = {}
        if self.semi and weight is not None:
            losses = self.semi.loss(logits, features, rows)
            loss = loss + weight * losses.pop("loss")
        if self.core:
            losses["core"] = self.core(features, rows)
            loss = loss + self.config.core_tuning * losses["core"]
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({"loss": loss.detach(), "lr": rate, **{k: v.detach() for k, v in losses.items()}}, batch_size=n)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # here and not in `on_train_batch_end`, which runs after the callbacks: a checkpoint must hold the new teacher
        if self.semi:
            self.semi.after_step(self.backbone, self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        config = self.config
        return adamw(
            self, config.lr, config.weight_decay, config.steps, config.warmup,
            self._given, config.pretrained_lr, config.frozen,
            layer_shares(self.backbone.stages(), self._given, config.layer_decay),
        )  # fmt: skip


def channel_table(label_values: Sequence[int]) -> Tensor:
    """Output channel of every label value; values that are no class count as background.

    A network has a channel for each class that occurs, however large its value: classes of 205 and 850 are channels 1
    and 2.
    """
    table = torch.zeros(LARGEST_LABEL + 1, dtype=torch.long)
    for channel, value in enumerate(label_values, 1):
        table[value] = channel
    return table


def _windows(patch: Sequence[int], accelerator: str) -> int:
    """Windows that go through the network at a time: four, and fewer large ones on a CPU, where they gain nothing.

    A small one alone takes torch's slowest convolution on a CPU: 2.5 times the time at 48 voxels a side.
    """
    return 4 if accelerator == "gpu" else max(1, min(4, 4 * 64**3 // math.prod(patch)))


@torch.inference_mode()
def class_scores(
    backbone: Backbone,
    image: np.ndarray,
    patch: Sequence[int],
    *,
    precision: str,
    accelerator: str,
    overlap: float = 0.5,
    mirror: bool = False,
) -> np.ndarray:
    """Class probabilities (K, X, Y, Z), float32, of a prepared image (X, Y, Z) by Gaussian-weighted sliding window.

    Args:
        backbone: network in evaluation mode, on its device.
        image: prepared image; one smaller than the patch is padded with its edge, as patches are in training.
        patch: voxels of a window.
        precision, accelerator: as in training.
        overlap: share by which neighbouring windows overlap.
        mirror: average the probabilities over all eight mirrored inputs.
    """
    from monai.inferers import sliding_window_inference

    device = next(backbone.parameters()).device
    volume = torch.from_numpy(np.ascontiguousarray(image))[None, None].to(device)
    short = [max(0, n - m) for n, m in zip(patch, image.shape, strict=True)]
    pads = [(s // 2, s - s // 2) for s in short]
    if any(short):
        volume = F.pad(volume, [p for pair in reversed(pads) for p in pair], mode="replicate")
    axes: list[tuple[int, ...]] = [()]
    if mirror:
        axes = [tuple(a for a in (2, 3, 4) if bits >> (a - 2) & 1) for bits in range(8)]
    total: Tensor | None = None
    for flips in axes:
        with autocast(precision, accelerator):
            logits = sliding_window_inference(
                volume.flip(flips) if flips else volume,  # flipping no axis would copy
                tuple(patch),
                _windows(patch, accelerator),
                backbone,
                overlap=overlap,
                mode="gaussian",
            )
        scores = torch.softmax(logits.float(), dim=1)  # type: ignore[union-attr]
        scores = scores.flip(flips) if flips else scores
        total = scores if total is None else total.add_(scores)
    assert total is not None
    x, y, z = (slice(a, a + n) for (a, _), n in zip(pads, image.shape, strict=True))
    return (total if len(axes) == 1 else total.div_(len(axes)))[0, :, x, y, z].cpu().numpy()


class Validate(Callback):
    """Mean Dice of the validation volumes every so many steps; keeps the weights of the best.

    Args:
        volumes: prepared labelled validation volumes by subject.
        patch: sliding window.
        every: steps between validations.
        precision, accelerator: as in training.
        keep: called with the step whenever the weights are the best so far.
    """

    def __init__(
        self,
        volumes: Sequence[tuple[str, Path]],
        patch: Sequence[int],
        every: int,
        precision: str,
        accelerator: str,
        keep: Any,
    ):
        self.volumes, self.patch, self.every, self.keep = volumes, patch, every, keep
        self.precision, self.accelerator = precision, accelerator
        self.best, self.best_step = -1.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every and step < trainer.max_steps:
            return
        assert isinstance(module, SegmentationModule)
        score = self.mean_dice(module) if self.volumes else float(step)  # nothing to choose by: the last weights stay
        if self.volumes:
            module.last_dice = score
            assert trainer.logger is not None
            trainer.logger.log_metrics({"val_dice": score}, step - 1)
        if score >= self.best:
            self.best, self.best_step = score, step
            self.keep(step)

    def mean_dice(self, module: SegmentationModule) -> float:
        """Foreground Dice on the prepared grid: mean over classes, then cases, then subjects."""
        module.eval()
        by_subject: dict[str, list[float]] = {}
        for subject, path in self.volumes:
            volume = open_volume(path)
            scores = class_scores(module.final_backbone, volume.image(), self.patch, precision=self.precision,
                                  accelerator=self.accelerator)  # fmt: skip
            found, truth = scores.argmax(0), module.channel_of.cpu().numpy()[volume.label()]  # type: ignore[operator]
            by_subject.setdefault(subject, []).append(mean_dice(found, truth, len(scores)))
        module.train()
        means = [np.mean(known) for values in by_subject.values() if (known := [v for v in values if not np.isnan(v)])]
        return float(np.mean(means)) if means else 0.0


def mean_dice(found: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Mean Dice over the foreground classes that occur in either map; NaN where none does."""
    values = []
    for channel in range(1, classes):
        a, b = found == channel, truth == channel
        total = int(a.sum()) + int(b.sum())
        if total:
            values.append(2 * int((a & b).sum()) / total)
    return float(np.mean(values)) if values else float("nan")
