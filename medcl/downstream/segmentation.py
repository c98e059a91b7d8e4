"""Few-label segmentation: the training module, and validation by sliding window."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from medcl.config import FinetuneConfig
from medcl.data.crops import CropDataset, StepBatches, crop_loader
from medcl.data.store import open_volume
from medcl.networks.backbones import Backbone
from medcl.training import adamw, autocast
from medcl.transforms.compose import Compose


class SegmentationModule(pl.LightningModule):
    """Dice and cross-entropy on augmented patches.

    Args:
        backbone: network with one output channel a class, background first.
        dataset: labelled patches.
        config: schedule.
        augmentation: batched transforms of image and label, or None.
        label_values: label value of every output channel but the first.
        spacing: mm per voxel of the patches, so that rotations are rigid in mm.
        given: parameters that come from a pretraining.
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
    ):
        super().__init__()
        self._given = tuple(given)
        self.backbone, self.dataset, self.config = backbone, dataset, config
        self.augmentation, self.spacing = augmentation, tuple(spacing)
        self.last_dice: float | None = None
        self.register_buffer("channel_of", channel_table(label_values), persistent=False)
        # the Dice of a class is taken over the whole batch: single patches often lack small structures
        self.criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def train_dataloader(self) -> Any:
        config = self.config
        batches = StepBatches(
            config.batch_size, self.trainer.global_step, config.steps, self.global_rank, self.trainer.world_size
        )
        return crop_loader(self.dataset, batches, config.workers, pin=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, index: int) -> dict[str, Tensor]:
        return {k: v if k == "seed" else v.to(device, non_blocking=True) for k, v in batch.items()}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        image, label = batch["image"], self.channel_of[batch["label"].long()]  # type: ignore[index]
        if self.augmentation is not None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                image, label = self.augmentation(image, batch["seed"], label, spacing=self.spacing)
        logits = self.backbone(image)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.criterion(logits.float(), label)
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({"loss": loss.detach(), "lr": rate}, batch_size=len(image))
        return loss

    def configure_optimizers(self) -> Any:
        config = self.config
        return adamw(
            self.backbone, config.lr, config.weight_decay, config.steps, config.warmup,
            self._given, config.pretrained_lr, config.frozen,
        )  # fmt: skip


def channel_table(label_values: Sequence[int]) -> Tensor:
    """Output channel of every uint8 label value; values that are no class count as background."""
    table = torch.zeros(256, dtype=torch.long)
    for channel, value in enumerate(label_values, 1):
        table[value] = channel
    return table


@torch.no_grad()
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
                volume.flip(flips),
                tuple(patch),
                4 if accelerator == "gpu" else 1,
                backbone,
                overlap=overlap,
                mode="gaussian",
            )
        scores = torch.softmax(logits.float(), dim=1).flip(flips)  # type: ignore[union-attr]
        total = scores if total is None else total + scores
    assert total is not None
    x, y, z = (slice(a, a + n) for (a, _), n in zip(pads, image.shape, strict=True))
    return (total / len(axes))[0, :, x, y, z].cpu().numpy()


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
            scores = class_scores(
                module.backbone, volume.image(), self.patch, precision=self.precision, accelerator=self.accelerator
            )
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
