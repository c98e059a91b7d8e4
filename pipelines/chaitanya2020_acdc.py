"""The protocol of Chaitanya et al. (NeurIPS 2020) on ACDC: slice-wise networks, 1, 2 and 8 labelled volumes.

    python pipelines/chaitanya2020_acdc.py ACDC [--out runs/acdc] [--spacing 1.367] [--patch 192] [--on val]

ACDC is the folder with `training/patientNNN`. As in the paper: the end-diastolic volume of every patient, a 2D network
over axial slices at 1.367 mm, a split by patient with the paper's 20 test patients (those there, filled up to 20
with others drawn by a seed), pretraining on the images of the training patients alone, and Dice at the original
resolution. Not as in the paper: the schedule, the augmentation and the number of validation patients are those of
configs/benchmark_acdc.yaml; every arm has the same. A coarser --spacing and a smaller --patch are the reduced protocol
for a CPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import medcl
from medcl.dataset.case import Manifest
from medcl.dataset.splits import ranked
from medcl.errors import exit_on_error
from medcl.store.plan import derive_plan

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "benchmark_acdc.yaml"
TEST = {f"patient{decade:02d}{unit}" for decade, units in
        ((0, (7, 8, 9)), (1, (0,)), (2, (7, 8, 9)), (3, (0,)), (4, (7, 8, 9)), (5, (0,)), (6, (7, 8, 9)), (7, (0,)),
         (8, (7, 8, 9)), (9, (0,))) for unit in units}  # fmt: skip
TESTED = 20


def protocol(manifest: Manifest) -> Manifest:
    """One end-diastolic case a patient (its first frame), the test patients marked."""
    first = {case.subject: case for case in sorted(manifest.cases, key=lambda case: case.id, reverse=True)}
    kept = sorted(TEST & set(first))
    test = {*kept, *ranked(set(first) - TEST, "test")[: TESTED - len(kept)]}
    cases = (replace(case, split="test" if case.subject in test else "train") for _, case in sorted(first.items()))
    return manifest.with_cases(tuple(cases))


def main(scans: str, out: Path, spacing: float, side: int, recipe: Path, on: str) -> None:
    from medcl.config.parsing import parse
    from medcl.efficiency.table import print_benchmark
    from medcl.report.benchmark import write_benchmark_report
    from medcl.store.stage import load_source, plan_for

    manifest = protocol(load_source(scans))
    manifest.save(out / "protocol.json")
    thickness = derive_plan(manifest).spacing[2]
    plan = plan_for(manifest, "", device="cpu", spacing=(spacing, spacing, thickness))
    side = min(side, min(plan.volume_size[:2])) // 16 * 16  # a multiple of the network's stride
    patch = (side, side, plan.patch_size[2])
    replace(plan.slicewise(), patch_size=patch).save(out / "slices.json")
    files = [str(recipe), str(out / "protocol.json"), f"--out={out}", f"--plan={out / 'slices.json'}"]
    config = parse("benchmark", ("config", "source"), "BenchmarkConfig", [*files, f"--subjects={on}"])
    result = medcl.benchmark(config)
    print_benchmark(result)
    print(f"Report: {write_benchmark_report(out, result)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", help="folder with training/patientNNN")
    parser.add_argument("--out", type=Path, default=Path("runs/acdc"))
    parser.add_argument("--spacing", type=float, default=1.367, help="mm within a slice")
    parser.add_argument("--patch", type=int, default=192, help="voxels of a patch's side within a slice")
    parser.add_argument("--config", type=Path, default=CONFIG, help="arms, numbers of labels, schedule")
    parser.add_argument("--on", choices=("test", "val"), default="test", help="whom to score")
    args = parser.parse_args()
    with exit_on_error():
        main(args.scans, args.out, args.spacing, args.patch, args.config, args.on)
