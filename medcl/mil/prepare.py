"""The stage `medcl mil prepare`: bags of anything to one HDF5 each, with features, coordinates and encoder.

Features are extracted once. What is there already is left alone, as long as the encoder, the tiling and the input are
the same; a change of any of them extracts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from medcl.checkpoint import load_weights
from medcl.config.mil import MILPrepareConfig
from medcl.dataset.checks import check_image, without_nan
from medcl.dataset.modality import check_hounsfield
from medcl.errors import MedclError
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume
from medcl.mil.audit import record_encoder, volume_marks
from medcl.mil.bags import Bag, Features, read_bags, read_features, write_features
from medcl.mil.instances import Instances, content_of, kind_of, patches_of, slices, sub_volumes, table_of
from medcl.mil.patch_encoders import InstanceEncoder, VolumeEncoder, instance_encoder
from medcl.mil.slides import Tiling
from medcl.runtime.files import write_json, write_rows
from medcl.runtime.run import log
from medcl.runtime.training import choose_accelerator, hours
from medcl.store.image import prepare_image
from medcl.store.plan import Plan, round_up


def prepare_bags(config: MILPrepareConfig) -> Path:
    """Extracts the features of every bag of a table.

    Returns:
        The folder: `bags.csv` that `medcl mil fit` reads, `features/BAG.h5`, `encoder/` with what the encoder has
        seen, and `aside.json` with what was set aside.

    Raises:
        MedclError: a setting cannot work, or no bag can be used.
    """
    began = time.monotonic()
    bags, out = read_bags(config.bags), Path(config.out)
    device = "cuda" if choose_accelerator(config.accelerator) == "gpu" else "cpu"
    encoder = instance_encoder(config.encoder, config.seed).to(device)
    tiling = Tiling(config.tile, config.mpp, config.overlap, config.tissue)
    plan = load_weights(config.encoder)[0].plan if isinstance(encoder, VolumeEncoder) else None
    done: list[tuple[Bag, Path]] = []
    aside: dict[str, str] = {}
    fresh, logged = 0, time.monotonic()
    for number, bag in enumerate(bags, 1):
        path = out / "features" / f"{bag.id}.h5"
        try:
            kind = kind_of(bag)
            if kind == "features":
                read_features(bag.path)
                done.append((bag, bag.path.resolve()))
                continue
            recipe = recipe_of(bag, encoder, tiling, config)
            features, meta = current(path, recipe), {"source": str(bag.path.resolve()), "recipe": recipe}
            extracted = features is not None
            if features is None and kind == "volume":
                features = volume_features(bag, encoder, plan, config, device)
            elif features is None:
                found = patches_of(bag, tiling, config.slide_mpp)
                features = Features(encode(found, encoder, device), found.coordinates, encoder.identity, found.meta)
            if not extracted or "content" not in (features.meta or {}):  # as before medcl kept it
                features.meta = {**(features.meta or {}), **marks_of(bag, kind), **meta}
                write_features(path, features)
            fresh += not extracted
            done.append((bag, Path("features") / path.name))
        except MedclError as error:
            aside[bag.id] = str(error)
            log.warning("set aside: %s", error)
        if time.monotonic() - logged > 10 or number == len(bags):
            logged = time.monotonic()
            log.info("%d of %d bags after %s.", number, len(bags), hours(logged - began))
    write_json(out / "aside.json", aside)
    if not done:
        raise MedclError(f"none of {len(bags)} bags can be used", config.bags, "Mend what is listed above.")
    record_encoder(out, config.encoder, encoder.identity)
    write_rows(out / "bags.csv", table_of(done))
    log.info("%d bags in %s, %d of them extracted now by %s; %d set aside.",
             len(done), out, fresh, encoder.identity, len(aside))  # fmt: skip
    return out


def recipe_of(bag: Bag, encoder: InstanceEncoder, tiling: Tiling, config: MILPrepareConfig) -> str:
    """A digest of all that the features depend on; of the input its size and time of change."""
    stat = bag.path.stat()
    facts: list[Any] = [
        encoder.identity,
        vars(tiling),
        config.slide_mpp,
        config.instances,
        config.sub_volume,
        config.maps,
        config.pool,
        str(bag.path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
    ]
    if config.instances == "cells" and placed(encoder):
        facts.append("placed")
    if bag.path.is_dir():
        facts.append(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in bag.path.iterdir()))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def placed(encoder: InstanceEncoder) -> bool:
    """Whether cells read coarse maps at other places than if every voxel lay amid those it covers, as they once did."""
    if not isinstance(encoder, VolumeEncoder):
        return False
    net = encoder.backbone
    amid = tuple(tuple((n - 1) / 2 for n in reduction) for reduction in net.reductions)
    return net.offsets != amid


def current(path: Path, recipe: str) -> Features | None:
    """The features of a file that this recipe has made; None where there is no such file."""
    if not path.exists():
        return None
    try:
        features = read_features(path)
    except MedclError:
        return None
    return features if (features.meta or {}).get("recipe") == recipe else None


def marks_of(bag: Bag, kind: str) -> dict[str, Any]:
    """What tells a bag's source from others, under whatever name and group."""
    if kind != "volume":
        return {"content": content_of(bag)}
    return volume_marks(np.asarray(to_canonical(read_volume([bag.path])).array))


@torch.no_grad()
def encode(found: Instances, encoder: InstanceEncoder, device: str) -> np.ndarray:
    """Features (K, M) of all instances."""
    rows = []
    for block in found.read():
        x = torch.from_numpy(np.ascontiguousarray(block)).to(device)
        rows.append(encoder(x.float() / 255 if x.dtype == torch.uint8 else x).float().cpu().numpy())
    return np.concatenate(rows)


def volume_features(
    bag: Bag, encoder: InstanceEncoder, plan: Plan | None, config: MILPrepareConfig, device: str
) -> Features:
    """Features of a scan's sub-volumes, slices or cells, prepared as the encoder has seen its own scans.

    Raises:
        MedclError: the encoder is none of volumes, or the scan cannot be used.
    """
    if (plan is None or not isinstance(encoder, VolumeEncoder)) and config.instances != "slices":
        raise MedclError(
            "is a volume", bag.path, "Give --encoder the run folder of `medcl pretrain`, or --instances slices."
        )
    volume = read_volume([bag.path])
    volume = without_nan(volume) if plan is not None and plan.nan == "zero" else volume
    check_image(volume.array, where=str(bag.path))
    canonical = to_canonical(volume)
    if plan is None or not isinstance(encoder, VolumeEncoder):
        found = slices(np.asarray(canonical.array, dtype=np.float32), config.tile)
        return Features(encode(found, encoder, device), found.coordinates, encoder.identity, found.meta)
    if plan.normalise == "ct":
        check_hounsfield(volume.array, str(bag.path))
    image = prepare_image(canonical, plan).image
    multiple, meta = encoder.backbone.multiple, {"plan": json.dumps(dataclasses.asdict(plan))}
    if config.instances == "cells":
        size = config.sub_volume or encoder.backbone.reductions[min(1, len(encoder.backbone.reductions) - 1)]
        whole = prepare_image(canonical, plan, clip=False).image
        step = step_of(size, config.overlap)
        h, corners = cells_of_volume(image, whole, encoder, size, device, config.maps, step, config.pool)
        name = f"{encoder.identity}:cells-{'x'.join(map(str, size))}" + (f"-{config.maps}" if config.maps else "")
        name += "" if config.pool == "mean-max" else f"-{config.pool}"
        name += "-placed" if placed(encoder) else ""
        return Features(h, corners, name, {**meta, "size": list(size), "step": list(step)})
    if config.instances == "slices":  # as thin as the encoder can see: one voxel for a slice-wise one
        size = round_up((image.shape[0], image.shape[1], 1), multiple)
    else:
        # half a fine-tuning patch: small enough to say where, large enough to show what
        wish = config.sub_volume or [max(m, p // 2) for p, m in zip(plan.patch_size, multiple, strict=True)]
        size = round_up(wish, multiple)
    found = sub_volumes(image, size)
    return Features(encode(found, encoder, device), found.coordinates, encoder.identity, {**found.meta, **meta})


@torch.no_grad()
def cells_of_volume(
    image: np.ndarray, intensity: np.ndarray, encoder: VolumeEncoder, size: tuple[int, int, int], device: str,
    maps: int = 0, step: tuple[int, int, int] | None = None, pool: str = "mean-max",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Features (K, M) of a prepared volume's cells, and their corners (K, 3); cells without contrast are left out.

    Args:
        image, intensity: (X, Y, Z) prepared, and without its intensities clipped.
        encoder, size, maps, step, pool: see `VolumeEncoder.cells`.
        device: of the encoder.
    """
    step = step or size
    whole = [math.lcm(m, s) for m, s in zip(encoder.backbone.multiple, size, strict=True)]
    pad = [(0, -n % w) for n, w in zip(image.shape, whole, strict=True)]
    padded, raw = (
        torch.from_numpy(np.pad(each, pad, mode="edge").astype(np.float32))[None, None].to(device)
        for each in (image, intensity)
    )
    h, grid = encoder.cells(padded, size, raw, maps, step, pool)
    corners = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3) * np.array(step)
    spread = F.max_pool3d(padded, size, step) + F.max_pool3d(-padded, size, step)
    within = (corners + np.array(size) - np.array(step) < np.array(image.shape)).all(1)
    kept = (spread.flatten().cpu().numpy() > 0) & within
    kept = kept if kept.any() else np.arange(len(kept)) == 0
    return h.cpu().numpy()[kept], corners[kept]


def step_of(size: Sequence[int], overlap: float) -> tuple[int, int, int]:
    """Voxels from one cell to the next.

    Raises:
        MedclError: not a whole part of the cell.
    """
    step = [round(n * (1 - overlap)) for n in size]
    if any(s < 1 or n % s or abs(n * (1 - overlap) - s) > 1e-3 for n, s in zip(size, step, strict=True)):
        raise MedclError(
            f"{overlap:g} of a cell of {' x '.join(map(str, size))} voxels cannot work", "--overlap",
            "Give 0, or 0.5 for cells of even voxels, or 0.75 for multiples of four.",
        )  # fmt: skip
    return step[0], step[1], step[2]
