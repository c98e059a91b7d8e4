"""The main job on synthetic subjects: pretrain, fine-tune with 2 labels, the same from scratch, compare.

    python pipelines/demo.py [--out runs/demo]

Needs no data and no GPU; a few minutes on two CPU cores. Three draws of the two labelled subjects, one pretraining.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import medcl
from medcl import CompareConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, ReportConfig

VOCO = {"flip": 0.0}
SUBJECTS, SHAPE, LABELS, DRAWS = 120, (40, 36, 36), "2", 3


def main(out: Path) -> None:
    from medcl.data.phantom import write_phantoms
    from medcl.evaluation.compare import print_comparison
    from medcl.report.html import write_comparison_report

    began = time.monotonic()
    if out.exists() and not (out / "scans" / "dataset.json").exists():
        raise SystemExit(f"{out} exists and is not an earlier demo. Choose another --out.")
    shutil.rmtree(out, ignore_errors=True)  # a demo starts over
    scans = str(write_phantoms(out / "scans", SUBJECTS, shape=SHAPE))
    store = str(out / "store")
    encoder = str(out / "pretrained")
    # left and right kidney differ in place only, so crops are not mirrored
    medcl.pretrain(PretrainConfig(scans, encoder, steps=500, options=VOCO, store=store))

    # short, so that all of it takes minutes; the same for both arms
    schedule = FinetuneConfig(scans, "", labels=LABELS, steps=200, batch_size=2, val_every=50, store=store)
    arms: dict[str, list[str]] = {"pretrained": [], "scratch": []}
    for draw in range(DRAWS):
        for arm, init in (("pretrained", encoder), ("scratch", "none")):
            run = str(out / f"{arm}-{draw}")
            medcl.finetune(replace(schedule, out=run, init=init, draw=draw))
            medcl.evaluate(EvaluateConfig(run))
            medcl.write_report(ReportConfig(run))
            arms[arm].append(run)

    comparison = out / "comparison"
    result = medcl.compare(CompareConfig(arms["pretrained"], arms["scratch"], str(comparison)))
    print_comparison(result)
    page = write_comparison_report(
        comparison, result, [Path(run) for run in arms["pretrained"]], [Path(run) for run in arms["scratch"]]
    )
    print(f"\nDone in {time.monotonic() - began:.0f} s. Report: {page}")
    print("Next, with your own scans:")
    print("  medcl scan SCANS")
    print("  medcl pretrain SCANS --out runs/mine")
    print("  medcl finetune LABELLED --init runs/mine --labels 2 --out runs/mine-2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    main(parser.parse_args().out)
