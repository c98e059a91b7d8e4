"""The main job on synthetic subjects: pretrain, fine-tune with 2 labels, the same from scratch, compare.

    python pipelines/demo.py [--out runs/demo]

Needs no data and no GPU; a few minutes on two CPU cores. Three draws of the two labelled subjects, one pretraining.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import medcl
from medcl import CompareConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, ReportConfig
from medcl.errors import exit_on_error

# subjects of one protocol, as a clinic has them; slices of every third are two or three times thicker
SUBJECTS, SHAPE, T1 = 120, (40, 36, 36), 0.15
LABELS, DRAWS = "2", 3


def one_run(config: FinetuneConfig) -> str:
    """Fine-tunes, scores the test subjects, writes the report; its log goes to the run folder alone."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        medcl.finetune(config)
        medcl.evaluate(EvaluateConfig(config.out))
        medcl.write_report(ReportConfig(config.out))
    return config.out


def main(out: Path) -> None:
    from medcl.dataset.phantom import write_phantoms
    from medcl.evaluation.compare import print_comparison
    from medcl.report.html import write_comparison_report

    began = time.monotonic()
    if out.exists() and not (out / "scans" / "dataset.json").exists():
        raise SystemExit(f"{out} exists and is not an earlier demo. Choose another --out.")
    shutil.rmtree(out, ignore_errors=True)  # a demo starts over
    scans = str(write_phantoms(out / "scans", SUBJECTS, shape=SHAPE, weighting=T1))
    store, encoder = str(out / "store"), str(out / "pretrained")
    medcl.pretrain(PretrainConfig(scans, encoder, steps=500, store=store))

    # short, so that all of it takes minutes; the same for both arms
    jobs = [
        FinetuneConfig(
            scans, str(out / f"{arm}-{draw}"), init=init, labels=LABELS, draw=draw, steps=300, batch_size=2,
            val_every=100, store=store,
        )
        for draw in range(DRAWS)
        for arm, init in (("pretrained", encoder), ("scratch", "none"))
    ]  # fmt: skip
    print(f"Fine-tuning {len(jobs)} times, two at a time, with {LABELS} labelled subjects each.", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for run in pool.map(one_run, jobs):
            print(f"  {run} done after {time.monotonic() - began:.0f} s", flush=True)

    arms = {arm: [job.out for job in jobs if Path(job.out).name.startswith(arm)] for arm in ("pretrained", "scratch")}
    comparison = out / "comparison"
    result = medcl.compare(CompareConfig(arms["pretrained"], arms["scratch"], str(comparison)))
    print_comparison(result)
    page = write_comparison_report(comparison, result, *([Path(run) for run in runs] for runs in arms.values()))
    print(f"\nDone in {time.monotonic() - began:.0f} s. Report: {page}")
    print("Next, with your own scans:")
    print("  medcl scan SCANS")
    print("  medcl pretrain SCANS --out runs/mine")
    print("  medcl finetune LABELLED --init runs/mine --labels 2 --out runs/mine-2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    with exit_on_error():
        main(parser.parse_args().out)
