"""Few-label hippocampus segmentation: VoCo pretraining against scratch on the Decathlon's Task04.

    python pipelines/hippocampus_few_labels.py SCANS [--out runs/hippocampus] [--labels 2] [--draws 3]

SCANS is the folder with `dataset.json`. Pretraining sees the images of the training subjects only; both arms get the
same draws, augmentation, schedule and selection. Test subjects are looked at once, at the end.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

import medcl
from medcl import CompareConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, ReportConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def recipe(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def main(scans: str, out: Path, labels: str, draws: int) -> None:
    from medcl.evaluation.compare import print_comparison
    from medcl.report.html import write_comparison_report

    encoder = str(out / "pretrained")
    medcl.pretrain(PretrainConfig(scans, encoder, **recipe("pretrain_voco")))
    schedule = FinetuneConfig(scans, "", labels=labels, **recipe("finetune_few_labels"))
    arms: dict[str, list[str]] = {"pretrained": [], "scratch": []}
    for draw in range(draws):
        for arm, init in (("pretrained", encoder), ("scratch", "none")):
            run = str(out / f"{arm}-{labels}-{draw}")
            medcl.finetune(replace(schedule, out=run, init=init, draw=draw))
            arms[arm].append(run)
    for run in (*arms["pretrained"], *arms["scratch"]):
        medcl.evaluate(EvaluateConfig(run))
        medcl.write_report(ReportConfig(run))
    comparison = out / f"comparison-{labels}"
    result = medcl.compare(CompareConfig(arms["pretrained"], arms["scratch"], str(comparison)))
    print_comparison(result)
    paths = [[Path(run) for run in arms[arm]] for arm in ("pretrained", "scratch")]
    print(f"Report: {write_comparison_report(comparison, result, *paths)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", help="folder with dataset.json")
    parser.add_argument("--out", type=Path, default=Path("runs/hippocampus"))
    parser.add_argument("--labels", default="2")
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    main(args.scans, args.out, args.labels, args.draws)
