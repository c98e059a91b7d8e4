"""Where a classifier of bags has looked: a heat map and GeoJSON for slides, a NIfTI on a volume's own grid."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.mil.bags import read_features
from medcl.runtime.files import atomic_path, write_text
from medcl.runtime.run import log

LONGEST = 1200  # pixels of a heat map


def draw_attention(out: Path) -> Path:
    """Draws the attention of every bag of `medcl mil predict` whose file says where its instances lie.

    Args:
        out: folder with `attention/BAG.csv` and `sources.json`.

    Returns:
        `out`, with `attention/BAG.png` and `BAG.geojson` for slides, `BAG.nii.gz` for volumes.
    """
    sources: dict[str, str] = json.loads((out / "sources.json").read_text())
    drawn = 0
    for bag, path in sources.items():
        table = out / "attention" / f"{bag}.csv"
        try:
            found = read_features(Path(path)) if Path(path).suffix in (".h5", ".hdf5") else None
            meta = (found.meta if found else None) or {}
            if found is None or found.coordinates is None or not Path(str(meta.get("source", ""))).exists():
                continue
            attention = read_attention(table, len(found.h))
            if "slices" in meta:
                slices_map(table.with_suffix(".nii.gz"), found.coordinates, attention, meta)
            elif "plan" in meta:
                volume_map(table.with_suffix(".nii.gz"), found.coordinates, attention, meta)
            elif "patch_size_level0" in meta:
                slide_maps(table.with_suffix(""), found.coordinates, attention, meta)
            else:
                continue
            drawn += 1
        except MedclError as error:
            log.warning("no map: %s", error)
    if drawn:
        log.info("%d maps of attention in %s.", drawn, out / "attention")
    return out


def read_attention(path: Path, count: int) -> np.ndarray:
    """Attention (K,) in the order of the instances."""
    values = np.zeros(count)
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            values[int(row["instance"])] = float(row["attention"])
    return values


def rank_share(attention: np.ndarray) -> np.ndarray:
    """Attention as a share of instances that are attended less, 0 to 1: a few large values would hide all others."""
    from scipy.stats import rankdata

    return (rankdata(attention, method="average") - 1) / max(1, len(attention) - 1)


def slide_maps(stem: Path, corners: np.ndarray, attention: np.ndarray, meta: dict[str, Any]) -> None:
    """`stem`.png, ranks of attention over a thumbnail with a colour bar, and `stem`.geojson for QuPath."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from medcl.mil.slides import Slide

    slide, side = Slide(meta["source"]), float(meta["patch_size_level0"])
    thumbnail = slide.thumbnail(LONGEST)
    ratio = slide.size[0] / thumbnail.shape[1]
    share = rank_share(attention)
    heat = np.zeros(thumbnail.shape[:2])
    count = np.zeros(thumbnail.shape[:2])
    for (x, y), value in zip(corners, share, strict=True):
        a, b, c, d = (max(0, round(v / ratio)) for v in (y, y + side, x, x + side))
        heat[a:b, c:d] += value
        count[a:b, c:d] += 1
    height, width = thumbnail.shape[:2]
    figure = Figure(figsize=(12, 6 * height / width + 0.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(thumbnail)
    right.imshow(thumbnail)
    shown = right.imshow(
        np.where(count > 0, heat / np.maximum(count, 1), np.nan), cmap="inferno", alpha=0.6, vmin=0, vmax=1
    )
    for axes in (left, right):
        axes.set_axis_off()
    figure.colorbar(shown, ax=right, shrink=0.8, label="share of tiles attended less")
    with atomic_path(stem.with_suffix(".png")) as part:
        figure.savefig(part, format="png", dpi=100)
    colours = (colormaps["inferno"](share)[:, :3] * 255).astype(int)
    write_text(stem.with_suffix(".geojson"), json.dumps(geojson(corners, side, attention, share, colours)))


def geojson(
    corners: np.ndarray, side: float, attention: np.ndarray, share: np.ndarray, colours: np.ndarray
) -> dict[str, Any]:
    """Tiles as QuPath's detections, in pixels of the finest level, with their attention as measurements."""
    features = []
    for (x, y), value, rank, colour in zip(corners.tolist(), attention, share, colours.tolist(), strict=True):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        features.append({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "objectType": "detection",
                "classification": {"name": "attention", "color": colour},
                "measurements": {"attention": float(value), "share attended less": float(rank)},
            },
        })  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def slices_map(path: Path, corners: np.ndarray, attention: np.ndarray, meta: dict[str, Any]) -> None:
    """Attention of the axial slices, times their number, on the scan's own grid."""
    from medcl.io.geometry import from_canonical, to_canonical
    from medcl.io.nifti import write_nifti
    from medcl.io.volumes import read_volume

    volume = read_volume([meta["source"]])
    heat = np.zeros(to_canonical(volume).array.shape, np.float32)
    heat[:, :, corners[:, 2]] = attention * len(attention)
    write_nifti(path, from_canonical(heat, volume.affine), volume.affine)


def volume_map(path: Path, corners: np.ndarray, attention: np.ndarray, meta: dict[str, Any]) -> None:
    """Greatest attention of the sub-volumes over every voxel, times their number: 1 where nothing stands out.

    Not the mean: that of overlapping ones is highest where they overlap most, and not in the most attended.
    """
    from medcl.io.geometry import from_canonical, to_canonical
    from medcl.io.nifti import write_nifti
    from medcl.io.resample import resample_linear
    from medcl.io.volumes import read_volume
    from medcl.store.image import prepare_image
    from medcl.store.plan import Plan

    volume = read_volume([meta["source"]])
    plan = Plan.from_dict(json.loads(meta["plan"]), meta["source"])
    prepared = prepare_image(to_canonical(volume), plan)
    heat = np.zeros(prepared.image.shape, np.float32)
    for corner, value in zip(corners, attention * len(attention), strict=True):
        box = tuple(slice(int(c), int(c) + int(n)) for c, n in zip(corner, meta["size"], strict=True))
        heat[box] = np.maximum(heat[box], value)
    heat = resample_linear(heat, prepared.crop_shape)
    whole = np.zeros(prepared.canonical_shape, np.float32)
    whole[tuple(slice(s, s + n) for s, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))] = heat
    write_nifti(path, from_canonical(whole, volume.affine), volume.affine)
