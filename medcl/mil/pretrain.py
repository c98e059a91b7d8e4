"""The stage `medcl mil pretrain`: a 2D patch encoder by SimCLR or decoupled contrast.

The objective is that of `medcl.pretext.simclr`; views are those of stained tissue.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from medcl.config.mil import MILPretrainConfig
from medcl.errors import MedclError
from medcl.leakage.seen import Seen, SeenVolume, save_seen
from medcl.losses.contrastive import contrast
from medcl.mil.bags import Bag, read_bags
from medcl.mil.instances import content_of, kind_of, patches_of
from medcl.mil.patch_encoders import PatchResNet, save_patch_encoder
from medcl.mil.slides import Tiling
from medcl.networks.heads import ProjectionHead
from medcl.pretext.base import REMEDIES, Pairs, PretextTask, Tensors
from medcl.pretext.simclr import masks
from medcl.pretext.watch import Watch
from medcl.runtime.optimizer import adamw
from medcl.runtime.precision import choose_precision, keep_precision
from medcl.runtime.run import log, open_run, write_provenance
from medcl.runtime.training import choose_accelerator, fit, hours, resume_step, trainer_for
from medcl.store.crops import StepBatches
from medcl.store.signature import subject_hash
from medcl.transforms.patches import random_patch_view
from medcl.transforms.random import mix_seeds


class PatchContrast(nn.Module):
    """Two views of a patch are alike, those of other patches are not."""

    remedies = REMEDIES
    trivial = PretextTask.trivial

    def __init__(self, encoder: PatchResNet, method: str, temperature: float):
        super().__init__()
        self.encoder, self.method, self.temperature = encoder, method, temperature
        self.projection_head = ProjectionHead(encoder.features, 512, 128, layers=2)

    def embed(self, views: Tensor) -> tuple[Tensors, Tensors]:
        """Embeddings (N, 2, d) of views (N, 2, 3, H, W)."""
        n = len(views)
        features = self.encoder(views.flatten(0, 1)).float()
        z = self.projection_head(features).float().view(n, 2, -1)
        return {"z": z}, {"patch": torch.arange(n, device=z.device), "features": features.detach()}

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        """`loss`: the contrastive loss over the 2N views of a batch, decoupled where `method` is `dcl`."""
        rows = z["z"].flatten(0, 1)
        positive, negative = masks(marks["patch"])
        return {"loss": contrast(rows, rows, positive, negative, self.temperature, decoupled=self.method == "dcl")}

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs:
        """Embeddings of the 2N views of a batch, with the positive and negative pairs among them: for diagnostics."""
        return Pairs(z["z"].flatten(0, 1), *masks(marks["patch"]), marks["features"])


class PatchModule(pl.LightningModule):
    """Lightning's view of it. A batch is a function of seed and step: a permutation of the tiles an epoch."""

    def __init__(self, task: PatchContrast, tiles: np.ndarray, config: MILPretrainConfig):
        super().__init__()
        self.task, self.tiles, self.config = task, tiles, config
        self.seen: dict[str, Any] = {}

    def train_dataloader(self) -> Any:
        config = self.config
        return _Batches(self.tiles, config, StepBatches(config.batch_size, self.trainer.global_step, config.steps))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            images = batch["image"].to(self.device).float() / 255
            seeds = batch["seed"].cpu()
            views = torch.stack([random_patch_view(images, mix_seeds(seeds, view)) for view in range(2)], dim=1)
        z, marks = self.task.embed(views)
        self.seen = {"views": {}, "z": {name: rows.detach() for name, rows in z.items()}, "marks": marks}
        loss = self.task.objective(z, marks)["loss"]
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({"loss": loss.detach(), "lr": rate}, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        config = self.config
        return adamw(self.task, config.lr, config.weight_decay, config.steps, config.warmup)


class _Batches:
    """An iterable of batches from tiles in memory."""

    def __init__(self, tiles: np.ndarray, config: MILPretrainConfig, numbers: StepBatches):
        self.tiles, self.config, self.numbers = tiles, config, numbers

    def __iter__(self) -> Any:
        seed, count = self.config.seed, len(self.tiles)
        epoch, order = -1, np.empty(0, dtype=int)
        for numbers in self.numbers:
            chosen = []
            for number in numbers:
                if number // count != epoch:
                    epoch = number // count
                    order = np.random.default_rng([seed, 1, epoch]).permutation(count)
                chosen.append(order[number % count])
            seeds = torch.tensor([[seed, number] for number in numbers])
            yield {
                "image": torch.from_numpy(self.tiles[np.array(chosen)]),
                "seed": mix_seeds(seeds[:, 0], seeds[:, 1]),
            }


def pretrain_patches(config: MILPretrainConfig) -> Path:
    """Pretrains a patch encoder.

    Returns:
        The run folder; `--encoder` of `medcl mil prepare` takes it.

    Raises:
        MedclError: a setting cannot work, or there are too few patches; raised before any training.
    """
    began = time.monotonic()
    accelerator = choose_accelerator(config.accelerator)
    precision = choose_precision(config.precision, accelerator, config.out if config.resume else "")
    bags = read_bags(config.bags)
    torch.manual_seed(config.seed)
    task = PatchContrast(PatchResNet(config.encoder, config.width), config.method, config.temperature)
    run = open_run(config.out, config, "mil pretrain", config.resume)
    keep_precision(run, precision, accelerator)
    tiles, used = gather_tiles(bags, config)
    if len(tiles) < config.batch_size:
        raise MedclError(f"there are {len(tiles)} tiles", "--batch_size", "Give less, or smaller tiles.")
    log.info("%d tiles of %d pixels from %d bags; %s by %s on %s, %s.", len(tiles), config.tile, len(bags),
             config.encoder, config.method, accelerator, precision)  # fmt: skip
    first = resume_step(run) if config.resume else 0
    watch = Watch(task, config.steps, config.stop_on_collapse)  # type: ignore[arg-type]
    trainer = trainer_for(
        run, steps=config.steps, accelerator=accelerator, precision=precision, seed=config.seed,
        every=config.checkpoint_every, title="mil pretrain", resume_step=first, callbacks=(watch,),
    )  # fmt: skip
    fit(trainer, PatchModule(task, tiles, config), run if first else None)
    if summary := watch.summary():
        log.info(summary)
    facts = {"tile": config.tile, "mpp": config.mpp, "method": config.method, "groups": sorted({b.group for b in bags})}
    marks = (SeenVolume(content_of(b), subject=subject_hash(b.group), stage="pretraining", run=run.name) for b in used)
    save_seen(run, Seen(tuple(marks)))
    save_patch_encoder(run, task.encoder, config.width, facts)
    write_provenance(run, began, accelerator=accelerator, precision=precision, seed=config.seed, resumed_at=first)
    log.info("Encoder in %s after %s.", run / "weights", hours(time.monotonic() - began))
    return run


def gather_tiles(bags: tuple[Bag, ...], config: MILPretrainConfig) -> tuple[np.ndarray, list[Bag]]:
    """Tiles (K, 3, H, W) uint8, of every bag its share of `most_tiles`, and these bags; bad ones are left out."""
    tiling = Tiling(config.tile, config.mpp, config.overlap, config.tissue)
    most = max(1, config.most_tiles // len(bags))
    rng = np.random.default_rng([config.seed, 3])
    kept, used = [], []
    for bag in bags:
        try:
            if kind_of(bag) not in ("slide", "patches"):
                raise MedclError("holds no patches", bag.path, "Give slides, images or folders of patches.")
            found = patches_of(bag, tiling, config.slide_mpp)
            blocks = np.concatenate(list(found.read()))
            kept.append(blocks[np.sort(rng.permutation(len(blocks))[:most])])
            used.append(bag)
        except MedclError as error:
            log.warning("set aside: %s", error)
    if not kept:
        raise MedclError("no bag can be used", config.bags, "Mend what is listed above.")
    return np.concatenate(kept), used
