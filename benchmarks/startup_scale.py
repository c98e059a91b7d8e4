"""Start-up, and what grows with the number of volumes: scans, indices and the memory of pretraining.

    python benchmarks/startup_scale.py [--files 5000] [--counts 100 10000]

The volumes of a large set are simulated: many cases of a manifest, each with a folder of the store that links to the
voxels of one of a few prepared volumes. Pretraining is the real stage, for two steps, in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from sidebyside import alone, begin, peak_mb, rounds_of, spread, verdict

REAL = 4  # different volumes behind the simulated ones


def seconds_of(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - began


def scan_many(folder: Path, files: int) -> tuple[float, float]:
    """Seconds of `medcl scan --quick` and of reading every voxel, over small files that all differ."""
    import nibabel as nib

    from medcl import ScanConfig, scan

    rng = np.random.default_rng(0)
    for number in range(files):
        voxels = rng.integers(0, 999, (4, 4, 4)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"s{number:06d}.nii")
    spent = []
    for quick in (True, False):
        began = time.perf_counter()
        scan(ScanConfig(str(folder), str(folder.parent / "scan.json"), quick=quick, json=True))
        spent.append(time.perf_counter() - began)
    return spent[0], spent[1]


def simulate(folder: Path, count: int) -> Path:
    """A manifest of `count` cases over a few files, all in the store already."""
    from medcl import PrepareConfig, ScanConfig, prepare, scan
    from medcl.dataset.phantom import write_phantoms
    from medcl.store.prepare import ContentKeys, case_key
    from medcl.store.volumes import read_meta

    scans = folder / "scans"
    if not scans.exists():
        write_phantoms(scans, REAL, shape=(40, 36, 36))
    source = scan(ScanConfig(str(scans), str(folder / "few.json"), quick=True))
    cases = tuple(
        replace(source.cases[number % REAL], id=f"c{number:06d}", subject=f"p{number:06d}", label=None)
        for number in range(count)
    )
    manifest = replace(source, cases=cases)
    manifest.save(folder / f"{count}.json")
    store = folder / f"store-{count}"
    few = replace(source, cases=cases[:REAL])
    few.save(folder / "few.json")
    stored, plan = prepare(PrepareConfig(str(folder / "few.json"), store=str(store), workers=1))
    contents, metas = ContentKeys(store), [{**read_meta(item.path), "labelled": False} for item in stored]
    for number, case in enumerate(cases[REAL:]):
        key = case_key(manifest, case, plan, contents)
        path = store / key[:2] / key
        path.mkdir(parents=True)
        (path / "meta.json").write_text(json.dumps({**metas[number % REAL], "voxel_hash": key}))
        os.symlink(stored[number % REAL].path.resolve() / "image.b2nd", path / "image.b2nd")
    return folder / f"{count}.json"


def pretraining_memory(manifest: Path, count: int) -> tuple[float, float]:
    """Seconds, and MB at the height, of two steps of pretraining."""
    from medcl import PretrainConfig, pretrain

    began = time.perf_counter()
    out = manifest.parent / f"run-{count}"
    config = PretrainConfig(
        str(manifest), str(out), task="voco", steps=2, width=8, subjects="all", options={"hidden": 64},
        accelerator="cpu", precision="32", store=str(manifest.parent / f"store-{count}"),
    )  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        pretrain(config)
    return time.perf_counter() - began, peak_mb()


def main() -> None:
    args = begin(
        __doc__,
        ("--files", {"type": int, "default": 3000, "help": "files to scan; 100000 takes minutes"}),
        ("--counts", {"type": int, "nargs": "+", "default": [100, 10_000]}),
    )
    arms = {
        "medcl --help": lambda: seconds_of("-m", "medcl.cli", "--help"),
        "import medcl": lambda: seconds_of("-c", "import medcl"),
        "python alone": lambda: seconds_of("-c", "pass"),
    }
    spent = rounds_of(arms, args.rounds)
    print("\nstart-up")
    for name, values in spent.items():
        print(f"  {name:<16} {spread(values)} s")
    verdict("medcl --help, s", sorted(spent["medcl --help"])[args.rounds // 2], 0.5, least=False)
    verdict("import medcl, s", sorted(spent["import medcl"])[args.rounds // 2], 0.3, least=False)
    with tempfile.TemporaryDirectory(prefix="medcl-bench-") as name:
        folder = Path(name)
        (folder / "many").mkdir()
        quick, full = scan_many(folder / "many", args.files)
        print(f"\nmedcl scan of {args.files} files: {full:.1f} s ({1e3 * full / args.files:.2f} ms a file), "
              f"with --quick {quick:.1f} s", flush=True)  # fmt: skip
        print("\nwhat grows with the number of volumes (two steps of pretraining)")
        heights = []
        for count in args.counts:
            manifest = simulate(folder, count)
            whole, height = alone(pretraining_memory, manifest, count)
            heights.append(height)
            index = manifest.stat().st_size / 1e6
            print(f"  {count:>7} volumes: manifest {index:.1f} MB, peak memory {height:.0f} MB, {whole:.1f} s in all",
                  flush=True)  # fmt: skip
        if len(heights) > 1:
            verdict(
                f"memory at {args.counts[-1]} against {args.counts[0]}, times", heights[-1] / heights[0], 1.1, False
            )


if __name__ == "__main__":
    main()
