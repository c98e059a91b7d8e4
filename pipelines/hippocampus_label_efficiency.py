"""Label efficiency on the Decathlon's hippocampus: pretraining against scratch at 1, 2, 4, 8 and all labelled subjects.

    python pipelines/hippocampus_label_efficiency.py Task04_Hippocampus [--out runs/hippocampus] [--on val]

Pretraining sees the images of the training subjects only; all arms get the same draws, augmentation, schedule and
selection. `--on val` scores the validation subjects, for choosing recipes; test subjects are scored without it. What is
done is kept: run it again after a kill, or with more arms in the config.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medcl
from medcl.errors import exit_on_error

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "benchmark_hippocampus.yaml"


def main(scans: str, out: str, recipe: Path, on: str) -> None:
    from medcl.config.parsing import parse
    from medcl.efficiency.table import print_benchmark
    from medcl.report.benchmark import write_benchmark_report

    flags = [str(recipe), scans, f"--out={out}", f"--subjects={on}"]
    result = medcl.benchmark(parse("benchmark", ("config", "source"), "BenchmarkConfig", flags))
    print_benchmark(result)
    print(f"Report: {write_benchmark_report(Path(out), result)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", help="folder with dataset.json")
    parser.add_argument("--out", default="runs/hippocampus")
    parser.add_argument("--config", type=Path, default=CONFIG, help="arms, numbers of labels, schedule")
    parser.add_argument("--on", choices=("test", "val"), default="test", help="whom to score")
    args = parser.parse_args()
    with exit_on_error():
        main(args.scans, args.out, args.config, args.on)
