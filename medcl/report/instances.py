"""Pictures of the instances that a classifier of bags has attended most and least."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.mil.bags import Features
from medcl.mil.slides import IMAGES, Slide
from medcl.report.figures import ORANGE, literal, new_figure, to_uri

SHOWN = 6  # from either end
SIDE = 128  # pixels of a thumbnail
Picture = Callable[[int], np.ndarray]


def pictures_of(features: Features) -> tuple[Picture, str] | None:
    """A function from an instance's number to its picture, and what it shows; None where the pixels are not at hand.

    Raises:
        MedclError: the source is there and cannot be read.
    """
    meta = features.meta or {}
    source = Path(str(meta.get("source", "")))
    if not meta.get("source") or not source.exists():
        return None
    if "slices" in meta and features.coordinates is not None:
        return _of_slices(source, features.coordinates), "Axial slices, front up, the patient's right on the left."
    if "plan" in meta and features.coordinates is not None:
        return _of_volume(source, features.coordinates, meta), "The slice through the middle of a sub-volume, outlined."
    if "patch_size_level0" in meta and features.coordinates is not None:
        slide, side, where = Slide(source), float(meta["patch_size_level0"]), features.coordinates
        return lambda i: slide.read(int(where[i][0]), int(where[i][1]), side, SIDE), "Tiles as the encoder sees them."
    if "patches" in meta and source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGES)
        if len(files) == len(features.h):
            return lambda i: Slide(files[i]).thumbnail(SIDE), "Patches of the folder."
    return None


def _of_slices(source: Path, corners: np.ndarray) -> Picture:
    from medcl.io.geometry import to_canonical
    from medcl.io.volumes import read_volume
    from medcl.mil.instances import slices

    blocks = np.concatenate(list(slices(np.asarray(to_canonical(read_volume([source])).array), SIDE).read()))
    return lambda i: blocks[i].transpose(1, 2, 0)


def _of_volume(source: Path, corners: np.ndarray, meta: dict[str, Any]) -> Picture:
    """Axial slices of the prepared volume, front up, the patient's right on the left, the sub-volume outlined."""
    from medcl.io.geometry import to_canonical
    from medcl.io.volumes import read_volume
    from medcl.store.image import prepare_image
    from medcl.store.plan import Plan

    plan = Plan.from_dict(json.loads(meta["plan"]), str(source))
    image = prepare_image(to_canonical(read_volume([source])), plan).image
    low, high = np.percentile(image, (1, 99.5))
    grey = (np.clip((image - low) / max(float(high - low), 1e-6), 0, 1) * 255).astype(np.uint8)
    size = [int(n) for n in meta["size"]]
    enlarge = max(1, round(2 * SIDE / max(image.shape[:2])))  # so that the outline is thinner than a voxel
    colour = [int(ORANGE[i : i + 2], 16) for i in (1, 3, 5)]

    def picture(i: int) -> np.ndarray:
        x, y, z = (int(c) for c in corners[i])
        plane = grey[:, :, min(z + size[2] // 2, grey.shape[2] - 1)]
        shown = np.kron(plane, np.ones((enlarge, enlarge), np.uint8))[..., None].repeat(3, axis=2)
        a, b = x * enlarge, min((x + size[0]) * enlarge, shown.shape[0]) - 1
        c, d = y * enlarge, min((y + size[1]) * enlarge, shown.shape[1]) - 1
        for line in (np.s_[a : b + 1, [c, d]], np.s_[[a, b], c : d + 1]):
            shown[line] = colour
        return np.flip(shown.transpose(1, 0, 2), axis=(0, 1))

    return picture


def chosen_instances(attention: np.ndarray, shown: int = SHOWN) -> tuple[list[int], list[int]]:
    """Numbers of the most and of the least attended instances, the extremes first; none is in both."""
    order = np.argsort(-attention, kind="stable").tolist()
    most = order[: min(shown, -(-len(order) // 2))]
    return most, order[len(most) :][::-1][:shown]


def instance_figure(attention: np.ndarray, picture: Picture) -> str:
    """Two rows of pictures, most and least attended; the titles say how many times the mean attention it is."""
    rows = [each for each in chosen_instances(attention) if each]
    figure = new_figure(7.2, 0.2 + 1.45 * len(rows))
    panels = figure.subplots(len(rows), SHOWN, squeeze=False)
    for name, line, some in zip(("most", "least"), panels, rows, strict=False):
        for axes in line:
            axes.set_axis_off()
        for axes, i in zip(line, some, strict=False):
            axes.imshow(picture(i))
            axes.set_title(_times(attention[i] * len(attention)), fontsize=8)
        line[0].text(-0.12, 0.5, literal(name), transform=line[0].transAxes, rotation=90, fontsize=9, va="center")
    return to_uri(figure, "png", dpi=120)


def instance_rows(attention: np.ndarray, coordinates: np.ndarray | None) -> list[Sequence[str]]:
    """The same as rows of a table: which end, instance, place, times the mean attention."""
    most, least = chosen_instances(attention)
    rows: list[Sequence[str]] = []
    for name, some in (("most", most), ("least", least)):
        for i in some:
            place = "" if coordinates is None else ", ".join(str(int(c)) for c in coordinates[i])
            rows.append((name, str(i), place, _times(attention[i] * len(attention))))
    return rows


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 0.095 else f"{value:.2g}x"
