"""Planted overlaps in real volumes and in phantoms of one template: how many are found, and who is falsely named.

    python benchmarks/audit_planted.py DATA --out runs/audit [--sets Task04_Hippocampus ACDC inbred] [--every 5]

DATA holds the folders `Task04_Hippocampus` and `ACDC`; `inbred` is made here. Every volume is changed in every way,
saved as a file, read by the audit's own reader, signed, and held out under another name beside all volumes of its set.
Writes a row a set and change to `OUT/table.csv`, the counts of all scores to `OUT/histogram.csv`, and what the audit
says of each set by itself and of its halves to `OUT/sets.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter1d, zoom

from medcl.dataset.case import Case, Manifest
from medcl.dataset.scan import scan
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume
from medcl.leakage.audit import compared
from medcl.leakage.matching import ORIENTATIONS, THRESHOLD, scores
from medcl.leakage.overlap import compare
from medcl.leakage.seen import Seen, SeenVolume
from medcl.runtime.files import write_json, write_rows
from medcl.store.signature import sign

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inbred import animal, template

ANIMALS = 60
BINS = np.linspace(0.3, 1.0, 36)
Image = tuple[np.ndarray, np.ndarray]  # voxels and affine
Change = Callable[[Image, np.random.Generator], Image]


def values(function: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda image, rng: (function(image[0]), image[1])


def header(image: Image, rng: np.random.Generator) -> Image:
    """Another spacing, origin and orientation in the header; the voxels stay."""
    affine = np.diag([*rng.uniform(0.5, 4, 3) * rng.choice([-1, 1], 3), 1.0])
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return image[0], affine[:, [*rng.permutation(3), 3]]


def spacing(factor: float) -> Change:
    """Linear resampling, behind the usual blur where it makes voxels larger."""

    def change(image: Image, rng: np.random.Generator) -> Image:
        array = image[0].astype(np.float32)
        shape = np.maximum(np.rint(np.array(array.shape) / factor), 2)
        if factor > 1:
            for axis in range(3):
                array = gaussian_filter1d(array, 0.4 * factor, axis=axis)
        return zoom(array, shape / array.shape, order=1), image[1] @ np.diag([factor] * 3 + [1.0])

    return change


def cropped(share: float, sides: str) -> Change:
    """Margins cut off at both faces of every axis, at one of them, or by an amount drawn for each face."""

    def change(image: Image, rng: np.random.Generator) -> Image:
        cut = []
        for n in image[0].shape:
            most = max(1, round(share * n))
            ends = {"both": (most, most), "one": rng.permutation([most, 0]), "drawn": rng.integers(0, most + 1, 2)}[
                sides
            ]
            cut.append(slice(int(ends[0]), n - int(ends[1])))
        return image[0][tuple(cut)], image[1]

    return change


def oriented(flips: bool, axes: bool) -> Change:
    """Another of the 48 orientations; the header does not tell."""

    def change(image: Image, rng: np.random.Generator) -> Image:
        order, signs = ORIENTATIONS[rng.integers(1, len(ORIENTATIONS))]
        signs = signs if any(sign < 0 for sign in signs) else (-1, 1, 1)
        array = image[0].transpose(order if axes else (0, 1, 2))
        return array[tuple(slice(None, None, sign) for sign in signs)] if flips else array, image[1]

    return change


def permuted(image: Image, rng: np.random.Generator) -> Image:
    order = [(1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)][rng.integers(5)]
    return image[0].transpose(order), image[1]


def chain(*changes: Change) -> Change:
    def change(image: Image, rng: np.random.Generator) -> Image:
        for each in changes:
            image = each(image, rng)
        return image

    return change


def gamma(array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    return ((array - low) / (high - low)) ** 0.7


CHANGES: dict[str, Change] = {
    "copy": values(lambda a: a),
    "other header": header,
    "other type (float64)": values(lambda a: a.astype(np.float64)),
    "other type (rounded to 8 bits)": values(lambda a: np.rint((a - a.min()) / np.ptp(a) * 255.0).astype(np.uint8)),
    "other gzip level": values(lambda a: a),
    "intensity x 37 + 1000": values(lambda a: a * np.float64(37) + 1000),
    "intensity x 0.003 - 4": values(lambda a: a * np.float64(0.003) - 4),
    "gamma 0.7": values(gamma),
    "spacing x 0.7": spacing(0.7),
    "spacing x 1.4": spacing(1.4),
    "cropped by 10% at both faces": cropped(0.1, "both"),
    "cropped by 10% at one face": cropped(0.1, "one"),
    "cropped by up to 10%, drawn": cropped(0.1, "drawn"),
    "flipped": oriented(True, False),
    "axes permuted": permuted,
    "cropped, spacing x 1.4, any orientation, scaled": chain(
        cropped(0.1, "both"), spacing(1.4), oriented(True, True), values(lambda a: a * 3.0 + 5)
    ),
    "cropped at one face, spacing x 0.7, any orientation, gamma": chain(
        cropped(0.1, "one"), spacing(0.7), oriented(True, True), values(gamma)
    ),
    "cropped as drawn, other header, rounded to 8 bits": chain(
        cropped(0.1, "drawn"), header, values(lambda a: np.rint((a - a.min()) / np.ptp(a) * 255.0).astype(np.uint8))
    ),
}


def cases_of_set(manifest: Manifest, root: Path) -> list[Case]:
    """Every volume, the twins that a scan sets aside among them."""
    aside = [p.file for p in manifest.problems if p.what.startswith("holds the same image")]
    twins = [
        dataclasses.replace(manifest.cases[0], id=Path(f).name.split(".")[0], subject=Path(f).name.split("_")[0],
                            image=(f,), label=None)
        for f in aside
    ]  # fmt: skip
    return [*manifest.cases, *twins]


def signed(path: Path, name: str = "", subject: str = "") -> SeenVolume:
    one = sign(to_canonical(read_volume([path])).array)
    return SeenVolume(one.voxels, one.values, subject, picture=lambda: one.thumbnail, name=name)


def thumbnail_of(volume: SeenVolume) -> np.ndarray:
    assert volume.thumbnail is not None
    return volume.thumbnail


def save_animals(folder: Path) -> Path:
    """Phantoms of one template, once."""
    folder.mkdir(parents=True, exist_ok=True)
    strain = template(0)
    for number in range(ANIMALS):
        path = folder / f"animal{number:03d}.nii.gz"
        if not path.exists():
            nib.save(nib.Nifti1Image(animal(strain, number), np.eye(4)), path)
    return folder


def main(data: Path, out: Path, sets: list[str], only: list[str], every: int = 1) -> None:
    lines, bins, told = [], [], []
    store = str(out / "store")
    for name in sets:
        folder = save_animals(out / name) if name == "inbred" else data / name
        manifest = scan(folder, voxels=False)
        cases = cases_of_set(manifest, folder)
        paths = [Path(manifest.root) / case.image[0] for case in cases]
        began = time.process_time()
        known = [signed(path, case.id, case.subject) for case, path in zip(cases, paths, strict=True)]
        signing = (time.process_time() - began) / len(cases)
        pictures = [thumbnail_of(volume) for volume in known]
        began = time.process_time()
        found = scores(pictures, pictures)
        took = time.process_time() - began
        others = [m.score for m in found if cases[m.known].subject != cases[m.new].subject]
        frames = [m.score for m in found if cases[m.known].subject == cases[m.new].subject and m.known != m.new]
        alone = compared(Seen(tuple(known)), Seen(tuple(known)), True, store)
        subjects = sorted({case.subject for case in cases})
        first = set(np.random.default_rng(0).permutation(subjects)[: len(subjects) // 2].tolist())
        halves = [Seen(tuple(v for v in known if (v.subject in first) == side)) for side in (True, False)]
        began = time.process_time()
        halved = compared(*halves, store=store)
        told.append({
            "set": name, "volumes": len(cases), "ms to read and sign one": round(1000 * signing),
            "s to compare all with all": round(took, 1), "s to audit a half": round(time.process_time() - began, 1),
            "highest of other subjects": round(max(s for s in others if s < 0.9999), 3),
            "pairs of other subjects from the threshold": sum(s >= THRESHOLD for s in others),
            "frames of one subject": [round(min(frames, default=0), 3), round(max(frames, default=0), 3)],
            **{how: {key: each[key] for key in ("sentence", "question", "false_alarms")} | {
                "overlaps": [[one["case"], one["seen"]] for one in each["overlaps"]]}
               for how, each in (("by itself", alone), ("halves", halved))},
        })  # fmt: skip
        print(told[-1], flush=True)
        write_json(out / "sets.json", told)
        bins += counted(name, "strangers", [s for s in others if s < 0.9999])
        subject = {case.id: case.subject for case in cases}
        twins = {frozenset((subject[case], subject[other])) for case, other in told[-1]["by itself"]["overlaps"]}
        planted_scores: list[float] = []
        chosen = range(0, len(cases), every)
        for number, (what, change) in enumerate(CHANGES.items()):
            if only and what not in only:
                continue
            new = []
            with tempfile.TemporaryDirectory() as temporary:
                for i in chosen:
                    volume = read_volume([paths[i]])
                    array, affine = change((volume.array, volume.affine), np.random.default_rng([number, i]))
                    file = Path(temporary) / "planted.nii.gz"
                    nib.openers.Opener.default_compresslevel = 9 if what == "other gzip level" else 1
                    nib.save(nib.Nifti1Image(np.ascontiguousarray(array), affine), file)
                    planted = signed(file, cases[i].id, f"planted {cases[i].subject}")
                    new.append(planted)
            result = compare(Seen(tuple(known)), Seen(tuple(new)), store=store)
            own = {each.case: each for each in (*result.similar, *result.overlaps) if each.case == each.seen}
            by_hash = sum(each.kind == "exact" for each in own.values())
            by_picture = [each.score for each in own.values() if each.score is not None]
            pairs = [frozenset((subject[each.case], subject[each.seen])) for each in result.overlaps]
            wrong = {pair for pair in pairs if len(pair) == 2 and pair not in twins}
            planted_scores += by_picture
            lines.append({
                "set": name, "change": what, "volumes": len(new),
                "found": sum(each.kind != "similar" for each in own.values()), "by hash": by_hash,
                "looks alike": len({each.case for each in result.similar}),
                "lowest score": f"{min(by_picture):.3f}" if by_picture else "",
                "median score": f"{np.median(by_picture):.3f}" if by_picture else "", "strangers named": len(wrong),
            })  # fmt: skip
            print(lines[-1], flush=True)
            write_rows(out / "table.csv", lines)
        bins += counted(name, "planted", planted_scores)
        write_rows(out / "histogram.csv", bins)


def counted(name: str, kind: str, found: list[float]) -> list[dict[str, object]]:
    counts, _ = np.histogram(np.clip(found, BINS[0], BINS[-1]), BINS)
    return [
        {"set": name, "pairs": kind, "from": f"{low:.2f}", "count": int(count)}
        for low, count in zip(BINS[:-1], counts, strict=True)
        if count
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/audit"))
    parser.add_argument("--sets", nargs="*", default=["Task04_Hippocampus", "ACDC", "inbred"])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--every", type=int, default=1, help="plant in every n-th volume only")
    arguments = parser.parse_args()
    main(arguments.data, arguments.out, arguments.sets, arguments.only, arguments.every)
