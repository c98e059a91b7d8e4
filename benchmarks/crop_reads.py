"""Random crops: medcl's store against MONAI's PersistentDataset and CacheDataset over the same volumes.

    python benchmarks/crop_reads.py [--volumes 24] [--sides 128 256] [--crops 64 96]

One process reads batches of four crops. CacheDataset comes twice: as it is by default, copying the whole volume before
every crop, and with `copy_cache=False`, which is the most that a user can get out of it. Memory is what each way holds
beyond its imports after reading every volume, in a process of its own.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sidebyside import alone, begin, peak_mb, rounds_of, tell, verdict

MEDCL, CACHE, BEST_CACHE = "medcl store", "CacheDataset", "CacheDataset, copy_cache=False"
BATCH = 4


def make(folder: Path, volumes: int, side: int) -> tuple[list[str], list[Path]]:
    """The same volumes as NIfTI (int16) and in the store. Three anatomies, shifted: what compression makes of them."""
    import nibabel as nib
    from scipy.ndimage import zoom

    from medcl.store.volumes import write_volume

    rng = np.random.default_rng(0)
    files, stored = [], []
    bases = []
    for _ in range(3):
        smooth = zoom(rng.standard_normal((side // 8,) * 3).astype(np.float32), 8, order=1)
        air = zoom(rng.standard_normal((4,) * 3).astype(np.float32), side / 4, order=1) < -0.2
        noisy = 300 * smooth + 20 * rng.standard_normal(smooth.shape, dtype=np.float32)
        bases.append(np.where(air, 0, noisy + 1000).astype(np.int16))
    for number in range(volumes):
        voxels = np.roll(bases[number % 3], 7 * number, axis=number % 3)
        files.append(str(folder / f"{number}.nii"))
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), files[-1])
        stored.append(folder / "store" / str(number))
        meta = {"case": str(number), "subject": str(number), "foreground": {}, "voxel_hash": str(number)}
        write_volume(stored[-1], (voxels - 500) / np.float32(500), None, meta)
    return files, stored


def monai_set(kind: str, files: list[str], crop: int, folder: Path) -> Any:
    from monai import data, transforms

    chain = transforms.Compose([
        transforms.LoadImaged("image", reader="NibabelReader"), transforms.EnsureChannelFirstd("image"),
        transforms.ScaleIntensityRanged("image", 0, 1000, -1, 1),
        transforms.RandSpatialCropd("image", (crop,) * 3, random_size=False),
    ])  # fmt: skip
    items = [{"image": name} for name in files]
    if kind != "PersistentDataset":
        return data.CacheDataset(items, chain, progress=False, num_workers=1, copy_cache=kind == CACHE)
    return data.PersistentDataset(items, chain, cache_dir=folder / "persistent")


def medcl_set(stored: list[Path], crop: int) -> Any:
    from medcl.store.crops import ReadDataset

    return ReadDataset(stored, (crop,) * 3, seed=0)


def batch_of(kind: str, dataset: Any, numbers: range, volumes: int) -> Any:
    """A batch as a loader would hand it over: voxels copied together."""
    if kind == MEDCL:
        from medcl.store.crops import join_reads

        return join_reads([dataset[number] for number in numbers])["image"]
    from monai.data import list_data_collate

    return list_data_collate([dataset[number % volumes] for number in numbers])["image"]


def memory(kind: str, files: list[str], stored: list[Path], crop: int, folder: Path) -> float:
    """MB held at most beyond the imports, after one crop of every volume."""
    small = medcl_set(stored[:1], crop) if kind == MEDCL else monai_set("PersistentDataset", files[:1], crop, folder)
    small[0]
    before = peak_mb()
    dataset = medcl_set(stored, crop) if kind == MEDCL else monai_set(kind, files, crop, folder)
    for number in range(len(stored)):
        dataset[number]
    return peak_mb() - before


def main() -> None:
    args = begin(
        __doc__,
        ("--volumes", {"type": int, "default": 24}),
        ("--sides", {"type": int, "nargs": "+", "default": [128, 256]}),
        ("--crops", {"type": int, "nargs": "+", "default": [64, 96]}),
        ("--batches", {"type": int, "default": 3, "help": "batches of four crops a round"}),
    )
    for side in args.sides:
        folder = Path(tempfile.mkdtemp(prefix="medcl-bench-"))
        try:
            files, stored = make(folder, args.volumes, side)
            for crop in args.crops:
                sets = {
                    "PersistentDataset": monai_set("PersistentDataset", files, crop, folder),
                    CACHE: monai_set(CACHE, files, crop, folder),
                    BEST_CACHE: monai_set(BEST_CACHE, files, crop, folder),
                    MEDCL: medcl_set(stored, crop),
                }
                for number in range(args.volumes):  # PersistentDataset fills its folder, all files are in memory
                    sets["PersistentDataset"][number], sets[MEDCL][number]
                at = dict.fromkeys(sets, 0)

                def read(name: str, sets: Any = sets, at: Any = at) -> None:
                    for _ in range(args.batches):
                        batch_of(name, sets[name], range(at[name], at[name] + BATCH), args.volumes)
                        at[name] += BATCH

                spent = rounds_of({name: lambda name=name: read(name) for name in sets}, args.rounds, clock=args.clock)
                title = f"{args.volumes} volumes of {side}³, crops of {crop}³"
                times = tell(title, spent, args.batches * BATCH, "crops/s", MEDCL)
                del sets
                held = {name: alone(memory, name, files, stored, crop, folder) for name in (CACHE, MEDCL)}
                print("  memory: " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in held.items()))
                if (side, crop) == (256, 64):
                    verdict("crops/s against PersistentDataset, times", times["PersistentDataset"], 20)
                    verdict("crops/s against CacheDataset at its best, times", times[BEST_CACHE], 0.5)
                    verdict("memory against CacheDataset, share", held[MEDCL] / held[CACHE], 0.05, False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
