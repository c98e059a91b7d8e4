"""Prediction: medcl's class scores against MONAI's `sliding_window_inference`, at equal overlap, blending and Dice.

    python benchmarks/prediction.py [--side 96] [--patch 48] [--classes 7]

Both run the same network with random weights: speed does not depend on what it has learnt, and the agreement of the two
label maps is told as a Dice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sidebyside import begin, rounds_of, tell, verdict

from medcl.evaluation.metrics import dice
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.runtime.memory import keep_memory
from medcl.runtime.precision import autocast, choose_precision
from medcl.segmentation.module import class_scores

MEDCL = "medcl"


def main() -> None:
    args = begin(
        __doc__,
        ("--backbone", {"default": "unet"}),
        ("--side", {"type": int, "default": 96}),
        ("--patch", {"type": int, "default": 48}),
        ("--classes", {"type": int, "default": 7}),
        ("--overlap", {"type": float, "default": 0.5}),
        ("--precision", {"default": "32", "choices": ("auto", "32", "bf16", "16")}),
        ("--device", {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
    )
    from monai.inferers import sliding_window_inference

    keep_memory()
    accelerator = "gpu" if args.device == "cuda" else "cpu"
    precision = choose_precision(args.precision, accelerator)
    torch.manual_seed(0)
    spec = BackboneSpec(args.backbone, out_channels=args.classes, strides=((2, 2, 2),) * 4)
    network = build_backbone(spec).to(args.device).eval()
    image = np.random.default_rng(0).standard_normal((args.side,) * 3, dtype=np.float32)
    patch, found = (args.patch,) * 3, {}

    def theirs(name: str, windows: int) -> None:
        volume = torch.from_numpy(image)[None, None].to(args.device)
        with torch.no_grad(), autocast(precision, accelerator):
            logits: Any = sliding_window_inference(volume, patch, windows, network, args.overlap, mode="gaussian")
        found[name] = torch.softmax(logits.float(), 1)[0].cpu().numpy().argmax(0)

    def ours() -> None:
        scores = class_scores(network, image, patch, precision=precision, accelerator=accelerator, overlap=args.overlap)
        found[MEDCL] = scores.argmax(0)

    arms: dict[str, Any] = {f"MONAI, {n} windows at a time": lambda n=n: theirs(f"MONAI, {n} windows at a time", n)
                            for n in (1, 4)}  # fmt: skip
    arms[MEDCL] = ours
    spent = rounds_of(arms, args.rounds, clock=args.clock)
    title = f"{args.backbone}, {args.side}³ by windows of {args.patch}³, overlap {args.overlap}, {args.device}"
    times = tell(title, spent, 1, "volumes/s", MEDCL)
    for name, ratio in times.items():
        agree = np.nanmean([dice(found[name] == k, found[MEDCL] == k) for k in range(1, args.classes)])
        print(f"  Dice between the label maps of {name} and {MEDCL}: {agree:.5f}")
        verdict(f"against {name}, times", ratio, 1.0 if accelerator == "cpu" else 1.3)


if __name__ == "__main__":
    main()
