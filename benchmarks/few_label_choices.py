"""Few-label fine-tuning on phantoms made for choosing: how far patches are moved, how much is read, what is kept.

    python benchmarks/few_label_choices.py --out runs/choices [--choices always half ...] [--draws 0 1 2 3]
    python benchmarks/few_label_choices.py --source SCANS --steps 1200 --val_every 100 ...   # on scans of your own

Every choice is trained from random weights on the same two labelled subjects, with the same schedule. All held-out
subjects of this set are scored; they serve for choosing alone and stand in no table of results. Of every run the
weights of several steps and moving averages of them are scored too, so that rules by which weights are kept can be
compared: the best by k validation subjects (mean over random choices of them), the last, an average. On your own scans
only validation subjects are scored, by the run itself; its test subjects stay unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CHOICES: dict[str, dict[str, Any]] = {
    "always": {"p_affine": 1.0},
    "half": {"p_affine": 0.5},
    "always mild": {"p_affine": 1.0, "scale": (0.8, 1.25)},
    "half mild": {"p_affine": 0.5, "scale": (0.8, 1.25)},
    "half wide": {"p_affine": 0.5, "covered": 0.985},
    "half without margin": {"p_affine": 0.5, "covered": 0.0},
}
AVERAGES = (0.98, 0.99, 0.995)
VALIDATING = (1, 2, 4, 8, 14)  # subjects
EVERY = 50  # steps between the weights that are compared
SEED, SUBJECTS, PATCH = 12, 48, (32, 32, 32)


def prepared(out: Path) -> Path:
    """The phantoms, and the plan with small patches."""
    from medcl.dataset.phantom import write_phantoms
    from medcl.store.stage import load_source, plan_for

    scans = out / "scans"
    if not (out / "plan.json").exists():
        write_phantoms(scans, SUBJECTS, SEED)
        plan = plan_for(load_source(str(scans)), "", device="cpu", store=str(out / "store"))
        dataclasses.replace(plan, patch_size=PATCH, strides=((2, 2, 2),) * 3).save(out / "plan.json")
    return scans


@contextlib.contextmanager
def chosen(choice: str) -> Iterator[None]:
    """Fine-tuning augments as this choice says."""
    import medcl.segmentation.stage as stage
    from medcl.transforms.compose import StrongAugmentation
    from medcl.transforms.margin import margin_for

    settings = dict(CHOICES[choice])
    covered = settings.pop("covered", None)
    kept = stage.StrongAugmentation, stage.margin_for
    stage.StrongAugmentation = lambda **flips: dataclasses.replace(  # type: ignore[assignment, misc]
        StrongAugmentation(**flips), **settings
    )
    if covered is not None:
        stage.margin_for = lambda *given: margin_for(*given, covered)  # type: ignore[assignment]
    try:
        yield
    finally:
        stage.StrongAugmentation, stage.margin_for = kept  # type: ignore[misc]


def validated(source: str, out: Path, choice: str, draw: int, more: dict[str, Any]) -> dict[str, float]:
    """Mean Dice of the validation subjects of scans of one's own: the best and the last, as the run says."""
    import medcl
    from medcl.runtime.run import read_metrics

    folder = out / f"{choice.replace(' ', '-')}-{draw}"
    if not (folder / "provenance.json").exists():
        with chosen(choice):
            medcl.finetune(medcl.FinetuneConfig(
                source, str(folder), labels="2", draw=draw, resume=(folder / "config.yaml").exists(), **more
            ))  # fmt: skip
    rows = [row["val_dice"] for row in read_metrics(folder) if "val_dice" in row]
    return {"best": max(rows), "last": rows[-1]}


def run(out: Path, choice: str, draw: int, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Mean Dice of every held-out subject, by weights and part of the split; kept in a file."""
    import medcl
    import medcl.segmentation.module as segmentation
    import medcl.segmentation.stage as stage
    from medcl.networks.ema import MomentumTeacher
    from medcl.runtime.files import read_json, write_json

    name = f"{choice.replace(' ', '-')}-{draw}"
    if (out / f"{name}.json").exists():
        return dict(read_json(out / f"{name}.json"))
    scans = prepared(out)
    watched: dict[str, Any] = {}

    class Watched(segmentation.SegmentationModule):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            watched["module"], watched["weights"] = self, {}
            watched["averages"] = {share: MomentumTeacher(self.backbone) for share in AVERAGES}

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            step = self.trainer.global_step
            for share, average in watched["averages"].items():
                average.update(self.backbone, min(1 - 1 / (step + 1), share))
            if step % EVERY == 0 and step >= steps // 3:
                watched["weights"][f"step {step}"] = copy.deepcopy(self.backbone.state_dict())

    kept = stage.SegmentationModule
    stage.SegmentationModule = Watched  # type: ignore[misc]
    try:
        with chosen(choice):
            medcl.finetune(medcl.FinetuneConfig(
                str(scans), str(out / name), labels="2", draw=draw, steps=steps, val_every=steps, test_fraction=0.5,
                val_fraction=0.3, plan=str(out / "plan.json"), precision="32", store=str(out / "store"),
            ))  # fmt: skip
    finally:
        stage.SegmentationModule = kept  # type: ignore[misc]
    watched["weights"] |= {f"average {k}": v.module.state_dict() for k, v in watched["averages"].items()}
    found = scored(out / name, scans, out / "store", watched["module"], watched["weights"])
    write_json(out / f"{name}.json", found)
    return found


def scored(
    run: Path, scans: Path, store: Path, module: Any, weights: dict[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
    from medcl.dataset.splits import Split, cases_of
    from medcl.segmentation.module import class_scores, mean_dice
    from medcl.store.plan import Plan
    from medcl.store.prepare import prepare
    from medcl.store.stage import load_source
    from medcl.store.volumes import open_volume

    manifest, plan, split = load_source(str(scans)), Plan.load(run), Split.load(run / "split.json")
    found: dict[str, dict[str, dict[str, float]]] = {name: {"val": {}, "test": {}} for name in weights}
    for part in ("val", "test"):
        chosen = manifest.with_cases(cases_of(manifest, getattr(split, part), labelled=True))
        stored, _ = prepare(chosen, plan, store=store, workers=1)
        for (name, state), item in itertools.product(weights.items(), stored):
            module.backbone.load_state_dict(state)
            volume = open_volume(item.path)
            scores = class_scores(module.backbone.eval(), volume.image(), plan.patch_size, precision="32",
                                  accelerator="cpu")  # fmt: skip
            truth = module.channel_of.numpy()[volume.label()]
            found[name][part][item.case.subject] = mean_dice(scores.argmax(0), truth, len(scores))
    return found


def rules(found: dict[str, dict[str, dict[str, float]]], seed: int = 0) -> dict[str, float]:
    """Mean Dice of the subjects not validated on, by the rule that keeps the weights."""
    rng = np.random.default_rng(seed)
    test = {name: float(np.mean(list(parts["test"].values()))) for name, parts in found.items()}
    val = {name: np.array(list(parts["val"].values())) for name, parts in found.items()}
    steps = [name for name in found if name.startswith("step")]
    out = {"last": test[steps[-1]]}
    for k in VALIDATING:
        draws = [rng.permutation(len(val[steps[0]]))[:k] for _ in range(300)]
        best = [max(steps, key=lambda name: (val[name][some].mean(), steps.index(name))) for some in draws]
        out[f"best by {k}"] = float(np.mean([test[name] for name in best]))
    return out | {name: value for name, value in test.items() if name.startswith("average")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/choices"))
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--source", default="", help="labelled scans of your own instead of phantoms")
    parser.add_argument("--val_every", type=int, default=100, help="steps, on scans of your own")
    parser.add_argument("--finetune", default="{}", help="further options of `medcl finetune` for them, as YAML")
    args = parser.parse_args()
    from medcl.runtime.run import commit

    print(f"commit {commit()}, {args.steps} steps, draws {args.draws}", flush=True)
    for choice in args.choices:
        if args.source:
            more = {**yaml.safe_load(args.finetune), "steps": args.steps, "val_every": args.val_every}
            each = [validated(args.source, args.out, choice, draw, more) for draw in args.draws]
        else:
            each = [rules(run(args.out, choice, draw, args.steps)) for draw in args.draws]
        for rule in each[0]:
            values = [100 * one[rule] for one in each]
            told = " ".join(f"{value:.1f}" for value in values)
            print(f"{choice:<20} {rule:<14} {np.mean(values):5.1f}   {told}", flush=True)


if __name__ == "__main__":
    main()
