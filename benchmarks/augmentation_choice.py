"""How often patches are turned and zoomed, and how far: few-label fine-tuning scored on validation subjects.

    python benchmarks/augmentation_choice.py SCANS --out runs/augmentation [--draws 0 1] [--steps 800]

Every choice is trained from random weights on the same labelled subjects, with the same schedule. The score is the best
validation Dice of a run, by which its weights are kept too; no test subject is looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

CHOICES: dict[str, dict[str, Any]] = {
    "p 1.0, scale 0.7 to 1.4": {},
    "p 0.5, scale 0.7 to 1.4": {"p_affine": 0.5},
    "p 1.0, scale 0.8 to 1.25": {"scale": (0.8, 1.25)},
    "p 0.5, scale 0.8 to 1.25": {"p_affine": 0.5, "scale": (0.8, 1.25)},
    "p 1.0, scale 0.7 to 1.4, no margin": {"covered": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans")
    parser.add_argument("--out", type=Path, default=Path("runs/augmentation"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--plan", default="")
    parser.add_argument("--choices", type=int, nargs="+", default=list(range(len(CHOICES))))
    args = parser.parse_args()

    import medcl
    import medcl.downstream.stage as stage
    from medcl.files import read_json
    from medcl.run import commit
    from medcl.transforms.compose import StrongAugmentation
    from medcl.transforms.margin import margin_for

    print(f"commit {commit()}, {args.steps} steps, draws {args.draws}", flush=True)
    for number, draw in itertools.product(args.choices, args.draws):
        name, settings = list(CHOICES.items())[number]
        fields = {k: v for k, v in settings.items() if k != "covered"}

        def preset(fields: dict[str, Any] = fields, **flips: Any) -> StrongAugmentation:
            return dataclasses.replace(StrongAugmentation(**flips), **fields)

        def margin(*given: Any, settings: dict[str, Any] = settings) -> tuple[int, int, int]:
            return margin_for(*given, **({"covered": settings["covered"]} if "covered" in settings else {}))

        stage.StrongAugmentation, stage.margin_for = preset, margin  # type: ignore[assignment, misc]
        out = args.out / f"{number}-{draw}"
        if not (out / "provenance.json").exists():
            config = medcl.FinetuneConfig(
                args.scans, str(out), labels="2", draw=draw, steps=args.steps, val_every=args.steps // 8,
                resume=(out / "checkpoints" / "last.ckpt").exists(), plan=args.plan, precision="32",
            )  # fmt: skip
            medcl.finetune(config)
        print(f"{name}: draw {draw}: {read_json(out / 'provenance.json')['val_dice']:.4f}", flush=True)


if __name__ == "__main__":
    main()
