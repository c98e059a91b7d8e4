"""Views of crops: MONAI's dictionary transforms on CPU workers against medcl's batched ones, the same augmentations.

    python benchmarks/view_building.py [--batch 8] [--size 64] [--device cuda]

Flips, affine map, noise, blur and gamma, each applied to every view. On one core both run in this process; on all cores
MONAI has a worker process a core, and medcl that many threads. All keep freed memory as `medcl pretrain` does. Without
MONAI, medcl's own rate alone is told.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from sidebyside import begin, rounds_of, tell, verdict
from torch.utils.data import DataLoader, Dataset

from medcl.runtime.memory import keep_memory
from medcl.transforms import Compose, RandomBlur, RandomGamma, RandomNoise, RandomSpatial

DEGREES, SCALE, NOISE, BLUR, GAMMA = 15.0, 0.2, 0.1, (0.5, 1.0), (0.7, 1.5)
MEDCL = "medcl"


def ours(batch: int, size: int, device: str) -> Callable[[], Any]:
    """Makes a batch of views at every call."""
    chain = Compose([
        RandomSpatial(DEGREES, (1 - SCALE, 1 + SCALE), flip=(0.5, 0.5, 0.5)), RandomNoise((0.0, NOISE)),
        RandomBlur(BLUR), RandomGamma(GAMMA),
    ])  # fmt: skip
    image = torch.randn(batch, 1, size, size, size, device=device)
    seeds = torch.arange(batch)

    def call() -> None:
        nonlocal seeds
        seeds = seeds + batch
        chain(image, seeds)
        if device != "cpu":
            torch.cuda.synchronize()

    return call


def monai_chain(size: int) -> Any:
    from monai import transforms as t

    angle = DEGREES * torch.pi / 180
    return t.Compose([
        t.RandAffined("image", prob=1.0, rotate_range=(angle,) * 3, scale_range=(SCALE,) * 3, mode="bilinear",
                      padding_mode="border"),
        *(t.RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)),
        t.RandGaussianNoised("image", prob=1.0, std=NOISE),
        t.RandGaussianSmoothd("image", prob=1.0, sigma_x=BLUR, sigma_y=BLUR, sigma_z=BLUR),
        t.RandAdjustContrastd("image", prob=1.0, gamma=GAMMA),
    ])  # fmt: skip


class MonaiViews(Dataset):
    """Endlessly many views of one crop, as plain tensors."""

    def __init__(self, size: int):
        self.chain, self.crop = monai_chain(size), torch.randn(1, size, size, size)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.as_tensor(self.chain({"image": self.crop})["image"])


def settle(worker: int) -> None:
    keep_memory()


def theirs(batch: int, size: int, workers: int) -> Callable[[], Any]:
    views = MonaiViews(size)
    if not workers:
        return lambda: torch.stack([views[0] for _ in range(batch)])
    loader = iter(DataLoader(views, batch, num_workers=workers, prefetch_factor=1, multiprocessing_context="spawn",
                             worker_init_fn=settle))  # fmt: skip

    def call() -> float:
        for _ in range(2 * workers):  # made while the other side had its turn
            next(loader)
        began = time.perf_counter()
        for _ in range(workers):
            next(loader)
        spent = time.perf_counter() - began
        time.sleep(2 * spent)  # the workers go on until their queue is full, and would take the other side's cores
        return spent

    return call


def main() -> None:
    args = begin(
        __doc__,
        ("--batch", {"type": int, "default": 8}),
        ("--size", {"type": int, "default": 64}),
        ("--device", {"default": "cuda" if torch.cuda.is_available() else "cpu", "help": "cpu or cuda"}),
    )
    keep_memory()
    there = importlib.util.find_spec("monai") is not None
    views = f"views of {args.size}³ in batches of {args.batch}"
    if args.device != "cpu":
        arms: dict[str, Callable[[], Any]] = {MEDCL: ours(args.batch, args.size, args.device)}
        amount = args.batch
        if there:
            theirs_too, amount = theirs(args.batch, args.size, args.threads), args.batch * args.threads
            arms = {f"MONAI, {args.threads} workers": theirs_too,
                    MEDCL: lambda call=arms[MEDCL]: [call() for _ in range(args.threads)]}  # fmt: skip
        for name, ratio in tell(f"{views}, on {args.device}", rounds_of(arms, args.rounds), amount, "views/s",
                                MEDCL).items():  # fmt: skip
            verdict(f"against {name}, times", ratio, 10)
        return
    torch.set_num_threads(1)
    arms = {"MONAI": theirs(args.batch, args.size, 0)} if there else {}
    arms |= {MEDCL: ours(args.batch, args.size, "cpu")}
    spent = rounds_of(arms, args.rounds, clock=args.clock)
    for name, ratio in tell(f"{views}, one core", spent, args.batch, "views/s", MEDCL).items():
        verdict(f"against {name}, times", ratio, 2)
    if there and args.threads > 1:
        torch.set_num_threads(args.threads)
        call = ours(args.batch, args.size, "cpu")
        arms = {f"MONAI, {args.threads} workers": theirs(args.batch, args.size, args.threads),
                MEDCL: lambda: [call() for _ in range(args.threads)]}  # fmt: skip
        spent = rounds_of(arms, args.rounds)
        for name, ratio in tell(f"{views}, {args.threads} cores", spent, args.batch * args.threads, "views/s",
                                MEDCL).items():  # fmt: skip
            verdict(f"against {name}, times", ratio, 2)


if __name__ == "__main__":
    main()
