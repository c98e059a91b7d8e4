"""What pooling and norm make of a volume's embedding: how alike all are, and how well a view finds its other view.

    python benchmarks/pooled_embeddings.py Task04_Hippocampus --steps 0 --seeds 0 1 2
    python benchmarks/pooled_embeddings.py Task04_Hippocampus --steps 60 --pools mean "mean, deviation"

For every norm and pooling, at random weights and after a short SimCLR run: the mean cosine of different volumes'
embeddings; the share of volumes whose second view is nearest to their first, by cosine of the embeddings as they are,
of standardised ones, and of what the projection head makes of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medcl.losses.contrastive import cosine
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.heads import ProjectionHead, pooled_pyramid
from medcl.pretext.simclr import SimCLR
from medcl.pretext.sizes import enlarged
from medcl.runtime.optimizer import adamw
from medcl.store.crops import ReadDataset, join_reads
from medcl.store.stage import load_source, plan_for, prepare_all

HELD_OUT = 32  # volumes that no step sees
Pool = Callable[[Sequence[Tensor]], Tensor]


def with_deviation(features: Sequence[Tensor]) -> Tensor:
    return torch.cat([pooled_pyramid(features), *(f.flatten(2).std(2) for f in features)], dim=1)


def with_maximum(features: Sequence[Tensor]) -> Tensor:
    return torch.cat([pooled_pyramid(features), *(f.flatten(2).amax(2) for f in features)], dim=1)


POOLS: dict[str, tuple[Pool, int]] = {
    "mean": (pooled_pyramid, 1), "mean, deviation": (with_deviation, 2), "mean, maximum": (with_maximum, 2)
}  # fmt: skip


class Pooled(SimCLR):
    """SimCLR on embeddings pooled in another way."""

    def pooled(self, view: Tensor) -> Tensor:
        return self.pool(self.backbone.encode(enlarged(view, self.input_size)))

    def set_pool(self, pool: Pool, times: int) -> None:
        self.pool = pool
        width = times * sum(self.backbone.channels)
        self.projection_head = ProjectionHead(width, self.options.hidden, self.options.embedding)

    def embed(self, views):  # type: ignore[no-untyped-def]
        features = self.pooled(views["view"])
        n = len(features) // 2
        z = self.projection_head(features).float()
        return {"z": torch.stack([z[:n], z[n:]], dim=1)}, {"volume": views["volume"][:n]}


@torch.no_grad()
def measured(task: Pooled, batch: dict[str, Tensor]) -> list[float]:
    """Cosine of different volumes, and shares of volumes found: as they are, standardised, and after the head."""
    task.eval()
    rows = torch.cat([task.pooled(view) for view in task.views(batch)["view"].split(8)])
    head = task.projection_head(rows)
    task.train()
    n = len(rows) // 2
    apart = ~torch.eye(n, dtype=torch.bool)
    alike = float(cosine(rows[:n], rows[:n])[apart].mean())
    standard = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-6)
    found = [float((cosine(x[:n], x[n:]).argmax(1) == torch.arange(n)).float().mean()) for x in (rows, standard, head)]
    return [alike, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("source")
    parser.add_argument("--backbone", default="unet")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--volumes", type=int, default=64)
    parser.add_argument("--norms", nargs="+", default=["instance", "layer", "batch"])
    parser.add_argument("--pools", nargs="+", default=list(POOLS), choices=list(POOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    manifest = load_source(args.source)
    manifest = manifest.with_cases(manifest.cases[: args.volumes])
    plan = plan_for(manifest, "", device="cpu")
    names = ["norm", "pooling", "cosine", "found", "standardised", "head"]
    names += [f"{name} after" for name in names[2:]] if args.steps else []
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    with tempfile.TemporaryDirectory() as store:
        paths = [item.path for item in prepare_all(manifest, plan, store)[0]]
        for norm in args.norms:
            for name in args.pools:
                rows = [run(args, plan, paths, norm, *POOLS[name], seed) for seed in args.seeds]
                means = [statistics.mean(column) for column in zip(*rows, strict=True)]
                print(f"| {norm} | {name} | " + " | ".join(f"{value:.3f}" for value in means) + " |", flush=True)


def run(args, plan, paths, norm: str, pool: Pool, times: int, seed: int) -> list[float]:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    task = Pooled(build_backbone(BackboneSpec(args.backbone, strides=plan.strides, width=args.width, norm=norm)), plan,
                  {"intensity": "weak"})  # fmt: skip
    task.set_pool(pool, times)
    kept = ReadDataset(paths[:HELD_OUT], task.read_size, 1000)
    unseen = join_reads([kept[i] for i in range(HELD_OUT)])
    before = measured(task, unseen)
    if not args.steps:
        return before
    made = adamw(task, 1e-3, 0.01, args.steps, 0.1)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    reads = ReadDataset(paths[HELD_OUT:], task.read_size, seed)
    for step in range(args.steps):
        batch = join_reads([reads[8 * step + i] for i in range(8)])
        optimizer.zero_grad()
        task.loss(task.views(batch))["loss"].backward()
        optimizer.step()
        schedule.step()
    return [*before, *measured(task, unseen)]


if __name__ == "__main__":
    main()
