"""Lightning's view of a pretext task, and how long and large one of its steps is."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medcl.checkpoint import transfer
from medcl.config import PretrainConfig
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.sharding import is_sharded, shard
from medcl.pretext.base import PretextTask
from medcl.pretext.fitting import fit_to_memory
from medcl.runtime.memory import RetrySmaller, make_room, out_of_memory
from medcl.runtime.optimizer import adamw
from medcl.runtime.precision import autocast
from medcl.runtime.scale import local_rank
from medcl.runtime.training import preserved
from medcl.store.crops import ReadDataset, StepBatches, crop_loader, join_reads
from medcl.store.plan import Plan

TIMED_STEPS = 3
UNSEEN = 2**40  # a read of this number or above is of no training step


def without_gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, detached."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


class PretextModule(RetrySmaller):
    """Lightning's view of a pretext task."""

    def __init__(self, task: PretextTask, dataset: ReadDataset, config: PretrainConfig):
        super().__init__()
        self.task, self.dataset, self.config = task, dataset, config
        self.seen: dict[str, dict[str, Tensor]] = {}  # of the last step, for diagnostics

    def train_dataloader(self) -> Any:
        batches = StepBatches(
            self.config.batch_size,
            self.trainer.global_step,
            self.config.steps,
            self.global_rank,
            self.trainer.world_size,
        )
        return crop_loader(self.dataset, batches, self.config.workers, pin=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, index: int) -> dict[str, Tensor]:
        # these stay on the CPU: augmentation draws its parameters there, and which reads stick out is decided there
        here = ("seed", "start", "extent")
        return {k: v if k in here else v.to(device, non_blocking=True) for k, v in batch.items()}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of reads; its views, embeddings and marks are kept in `seen`.

        Returns:
            What the task's `objective` returns, and `unused_rate` where `rank_weight` is not 0.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            views = self.task.views(batch)
        z, marks = self.task.joined(views)
        self.seen = {"views": views, "z": without_gradient(z), "marks": without_gradient(marks)}
        losses = self.task.objective(z, marks)
        if self.config.rank_weight:
            losses["unused_rate"] = self.task.unused_rate(marks)
        return losses

    def cost(self, losses: dict[str, Tensor]) -> Tensor:
        """What is minimised: the task's loss, and the term that keeps the features' rank."""
        return losses["loss"] + self.config.rank_weight * losses.get("unused_rate", 0.0)

    def rows_of(self, number: int) -> dict[str, Tensor]:
        """Marks of one step's reads that training does not draw, as the task stands: for diagnostics."""
        first = UNSEEN + number * self.config.batch_size
        batch = join_reads([self.dataset[first + i] for i in range(self.config.batch_size)])
        with torch.no_grad():
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            with torch.autocast(self.device.type, enabled=False):
                views = self.task.views(batch)
            return self.task.embed(views)[1]

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        losses = self.losses(batch)
        loss = losses["loss"].detach()
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({**{k: v.detach() for k, v in losses.items()}, "lr": rate}, batch_size=len(batch["image"]))
        return {"loss": self.cost(losses), "objective": loss}

    def trial(self, volumes: int, accelerator: str, precision: str) -> None:
        """Forward and backward pass of the first `volumes` samples; gradients stay."""
        device = torch.device("cuda", local_rank()) if accelerator == "gpu" else torch.device("cpu")
        self.to(device)
        batch = join_reads([self.dataset[number] for number in range(volumes)])
        with autocast(precision, accelerator):
            losses = self.losses(self.transfer_batch_to_device(batch, device, 0))
        self.cost(losses).backward()
        if accelerator == "gpu":
            torch.cuda.synchronize()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # here and not in `on_train_batch_end`, which runs after the callbacks: a checkpoint must hold the new teacher
        self.task.after_step((self.trainer.global_step + 1) / self.config.steps)

    def configure_model(self) -> None:
        """Where Lightning's strategy divides a network: see `medcl.networks.sharding`."""
        if self.config.strategy == "fsdp" and not is_sharded(self):
            shard(self, self.device_mesh["data_parallel"])  # type: ignore[index]
            self.strict_loading = False  # a part that no step has touched has no optimiser state to go on from

    def configure_optimizers(self) -> Any:
        config = self.config
        return adamw(self.task, config.lr, config.weight_decay, config.steps, config.warmup)


def timed_step(module: PretextModule, accelerator: str, precision: str) -> float:
    """Seconds of one training step: the last of a few trial ones, which leave no trace."""
    spent = 0.0
    with preserved(module):
        left = TIMED_STEPS
        while left:
            began = time.perf_counter()
            try:
                module.trial(module.config.batch_size, accelerator, precision)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                make_room(module.task.backbone, "A trial step", error)
                continue
            spent, left = time.perf_counter() - began, left - 1
    return spent


def fitted(
    config: PretrainConfig, kind: Any, options: dict[str, Any], spec: BackboneSpec, plan: Plan, pretrained: Any,
    paths: list[Path], accelerator: str, precision: str,
) -> tuple[PretextTask, Plan, PretrainConfig]:  # fmt: skip
    """The task, plan and config of the largest batch that fits into memory."""

    class Trial(PretextModule):
        def trial(self, volumes: int, accelerator: str, precision: str = precision) -> None:
            with preserved(self):
                super().trial(volumes, accelerator, precision)

    def build(plan: Plan) -> PretextModule:
        torch.manual_seed(config.seed)  # the weights of a run do not depend on how often it was measured
        backbone = build_backbone(replace(spec, strides=plan.strides))
        if pretrained:
            contract, state = pretrained
            transfer(contract, state, backbone, config.init)
        task = kind(backbone, plan, options)
        backbone.parts = config.parts
        return Trial(task, ReadDataset(paths, task.read_size, config.seed, task.places), config)

    module, plan, batch = fit_to_memory(build, plan, len(paths), accelerator)
    return module.task, plan, replace(config, batch_size=batch, parts=module.task.backbone.parts)
