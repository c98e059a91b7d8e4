"""Fingerprint of a data set to a plan: spacing, intensity scale, patch and strides. Readable, editable JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medcl.config.kinds import Count, Positive, kind_of, kinds_of, nearest
from medcl.dataset.case import Case, Manifest
from medcl.errors import MedclError
from medcl.io.units import rounded
from medcl.runtime.files import read_json, write_json

PLAN_VERSION = 1
THICK = 3.0  # an axis this many times coarser than the finest counts as thick (nnU-Net's rule)
SMALLEST_EDGE = 8  # an axis is halved while it has at least this many voxels
MAX_STRIDES = 4
FEWEST_STRIDES = 2  # so that a decoder has a block before its output layer, which dense pretext tasks train
SOFT_TISSUE = (-175.0, 250.0)  # HU; the window of the abdominal CT literature
PATCH_VOXELS = {"cpu": 160_000, "gpu": 96**3}

Triple = tuple[int, int, int]
Voxels = tuple[Count, Count, Count]


@dataclass(frozen=True)
class Plan:
    """How volumes are prepared and cut for a data set. All axes are those of RAS orientation.

    Attributes:
        modality: `MR`, `CT` or `unknown`.
        spacing: voxel size after resampling, mm.
        normalise: `ct` clips to `window` and scales it to [-1, 1]; `robust` clips to the volume's own 0.5 and 99.5
            percentiles and scales its foreground to mean 0 and standard deviation 1.
        window: lower and upper HU of the `ct` normalisation.
        n4: whether the MRI bias field is corrected first.
        volume_size: median voxels of the volumes after cropping and resampling.
        patch_size: voxels of a fine-tuning patch, a multiple of the total stride.
        strides: down-sampling factors of the network, finest level first.
        labels: name of every foreground label.
        nan: `zero` takes voxels that are NaN or infinite as 0; `reject` leaves such volumes out.
    """

    modality: Literal["MR", "CT", "unknown"] = "MR"
    spacing: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)
    normalise: Literal["ct", "robust"] = "robust"
    window: tuple[float, float] = SOFT_TISSUE
    n4: bool = False
    volume_size: Voxels = (64, 64, 64)
    patch_size: Voxels = (64, 64, 64)
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 3
    labels: dict[int, str] = field(default_factory=dict)
    nan: Literal["reject", "zero"] = "reject"

    def preparation(self) -> dict[str, Any]:
        """The part that decides what a prepared volume looks like: the store is keyed by it."""
        kept = {key: getattr(self, key) for key in ("spacing", "normalise", "window", "n4")}
        return kept if self.nan == "reject" else {**kept, "nan": self.nan}

    @property
    def total_stride(self) -> Triple:
        """Product of the strides of all levels along each axis."""
        a, b, c = (math.prod(stride[axis] for stride in self.strides) for axis in range(3))
        return a, b, c

    def slicewise(self) -> Plan:
        """The plan of a network that sees every slice along the last axis by itself: nothing strides there."""
        strides = tuple((a, b, 1) for a, b, _ in self.strides if max(a, b) > 1)
        return dataclasses.replace(self, strides=deep_enough(strides))

    def save(self, path: str | Path) -> None:
        """Writes the plan to a JSON file that `load` reads."""
        write_json(path, {"medcl_plan": PLAN_VERSION, **json.loads(json.dumps(asdict(self)))})

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads plan.json, or the one in a run folder, and checks what a person may have edited.

        Raises:
            MedclError: not a plan, or a value that cannot work.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("medcl_plan", None) != PLAN_VERSION:
            raise MedclError("is not a plan of this version", path, "Delete it to derive a new one.")
        return Plan.from_dict(data, path)

    @staticmethod
    def from_dict(data: dict[str, Any], where: object = "plan") -> Plan:
        """Builds a plan from the content of plan.json and checks it.

        Args:
            data: the attributes of the plan, by name; `strides` and `labels` must be among them.
            where: the file, for error messages.

        Raises:
            MedclError: an unknown key, or a value that cannot work.
        """
        known = {f.name for f in dataclasses.fields(Plan)}
        for key in data:
            if key not in known:
                raise MedclError(f"unknown key {key!r}", where, nearest(key, known))
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            values["strides"] = tuple(tuple(int(s) for s in stride) for stride in data["strides"])
            values["labels"] = {int(value): str(name) for value, name in data["labels"].items()}
            plan = Plan(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MedclError(f"cannot be understood ({error!r})", where, "Delete it to derive a new one.") from None
        plan.check(where)
        return plan

    def check(self, where: object = "plan") -> None:
        """Refuses values that cannot work.

        Args:
            where: the file, for error messages.

        Raises:
            MedclError: a value of another kind than its field's, strides that are not three positive numbers each, an
                empty window, or a patch size that is not a multiple of the total stride.
        """

        def refuse(what: str, remedy: str) -> None:
            raise MedclError(what, where, remedy)

        for name, kind in kinds_of(Plan).items():
            value = getattr(self, name)
            if name not in ("strides", "labels") and not kind.fits(value):
                refuse(f"{name} {value!r} cannot be used", f"Give {kind.describe()}.")
        if not self.strides or not all(kind_of(Voxels).fits(stride) for stride in self.strides):
            refuse(f"strides {self.strides!r} cannot be used", f"Give {kind_of(Voxels).describe()}, for every level.")
        if self.normalise == "ct" and not self.window[0] < self.window[1]:
            refuse(f"window {self.window} is empty", "Give the lower HU first.")
        for size, stride in zip(self.patch_size, self.total_stride, strict=True):
            if size % stride:
                refuse(f"patch_size {self.patch_size} is not a multiple of the strides' product {self.total_stride}",
                       "Round it up.")  # fmt: skip


def canonical_axes(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Shape and spacing (mm) of a case along R, A and S, from its affine."""
    affine = np.asarray(case.affine, dtype=float)
    import nibabel

    order = nibabel.orientations.io_orientation(affine)[:, 0].astype(int)
    shape, spacing = np.empty(3), np.empty(3)
    shape[order], spacing[order] = case.shape[:3], case.spacing[:3]
    return shape, spacing


def target_spacing(spacings: np.ndarray) -> np.ndarray:
    """Median spacing (mm); a thick axis takes the 10th percentile, so that the finer scans are not thrown away.

    Isensee et al., nnU-Net, Nature Methods 2021, supplementary note on the target spacing.
    """
    target = np.median(spacings, axis=0)
    worst = int(np.argmax(target))
    if target[worst] / target.min() >= THICK:
        others = np.delete(target, worst)
        target[worst] = max(np.percentile(spacings[:, worst], 10), others.max())
    return target


def patch_for(volume: Sequence[float], spacing: Sequence[float], budget: int) -> list[int]:
    """The patch nearest to a cube in mm, no larger than the volume, of at most `budget` voxels."""
    extent, step = np.asarray(volume, float), np.asarray(spacing, float)
    low, high = 0.0, float((extent * step).max())
    for _ in range(50):
        side = (low + high) / 2
        low, high = (side, high) if np.minimum(extent, side / step).prod() <= budget else (low, side)
    return [max(4, round(n)) for n in np.minimum(extent, high / step)]


def strides_for(patch: Sequence[int], spacing: Sequence[float]) -> tuple[Triple, ...]:
    """Halves, level by level, the axes that still have voxels to halve and are not coarser than the finest by 2."""
    size, step = list(patch), list(spacing)
    strides: list[Triple] = []
    while len(strides) < MAX_STRIDES:
        able = [n >= SMALLEST_EDGE for n in size]
        if not any(able):
            break
        finest = min(s for s, ok in zip(step, able, strict=True) if ok)
        stride = [2 if ok and s < 2 * finest else 1 for s, ok in zip(step, able, strict=True)]
        size = [math.ceil(n / f) for n, f in zip(size, stride, strict=True)]
        step = [s * f for s, f in zip(step, stride, strict=True)]
        strides.append((stride[0], stride[1], stride[2]))
    return tuple(strides) or ((1, 1, 1),)


def deep_enough(strides: tuple[Triple, ...]) -> tuple[Triple, ...]:
    """The strides, with levels that halve nothing added where a small volume leaves fewer than two."""
    return strides + ((1, 1, 1),) * (FEWEST_STRIDES - len(strides))


def round_up(size: Sequence[int], multiple: Sequence[int]) -> Triple:
    """The size rounded up to a multiple along every axis."""
    a, b, c = (max(1, math.ceil(n / m)) * m for n, m in zip(size, multiple, strict=True))
    return a, b, c


def derive_plan(
    manifest: Manifest, *, spacing: Sequence[float] | None = None, n4: bool = False, device: str = "cpu"
) -> Plan:
    """Derives a plan from the headers of a manifest's cases.

    Its sizes are those of whole volumes, air included: `medcl.store.stage.plan_for` measures what cropping leaves.

    Args:
        manifest: what to plan for; only headers are used, so no label or test intensity enters.
        spacing: voxel size in mm to use instead of the derived one.
        n4: correct the bias field of MRI.
        device: `cpu` or `gpu`: how many voxels a patch may have.

    Raises:
        MedclError: the manifest has no cases, or mixes CT with others.
    """
    if not manifest.cases:
        first = f"{manifest.problems[0]} " if manifest.problems else ""
        raise MedclError("no usable volume", manifest.root, f"{first}`medcl scan` tells all.")
    others = [case for case in manifest.cases if case.modality != "CT"]
    if others and len(others) < len(manifest.cases):
        kind = "MR volumes" if others[0].modality == "MR" else f"others ({others[0].modality}, {others[0].image[0]})"
        raise MedclError(
            f"CT and {kind} mixed",
            manifest.root,
            "Scan them as two folders, or edit manifest.json: one plan fits one, and only CT takes an HU window.",
        )
    modality: Any = "MR" if any(case.modality == "MR" for case in others) else "unknown" if others else "CT"
    axes = [canonical_axes(case) for case in manifest.cases]
    shapes, spacings = np.array([a[0] for a in axes]), np.array([a[1] for a in axes])
    target = np.asarray(spacing, float) if spacing else target_spacing(spacings)
    mm = [rounded(float(s), 4) for s in target]
    plan = Plan(
        modality=modality,
        spacing=(mm[0], mm[1], mm[2]),
        normalise="ct" if modality == "CT" else "robust",
        n4=n4 and modality != "CT",
        labels={value: name for value, name in manifest.label_names.items() if value},
    )
    return sized(plan, shapes * spacings / target, device)


def growth(manifest: Manifest, plan: Plan) -> tuple[tuple[float, ...], float]:
    """The median spacing of the cases (mm, along R, A and S), and by how much a plan multiplies their voxels."""
    if not manifest.cases:
        return plan.spacing, 1.0
    own = np.median([canonical_axes(case)[1] for case in manifest.cases], axis=0)
    return tuple(float(mm) for mm in own), float(np.prod(own) / np.prod(plan.spacing))


def sized(plan: Plan, shapes: np.ndarray, device: str) -> Plan:
    """The plan with volume, patch and strides for volumes of these voxels, (n, 3), at its spacing.

    Args:
        plan: of which spacing and preparation are kept.
        shapes: of the volumes after cropping, as far as they are known.
        device: `cpu` or `gpu`: how many voxels a patch may have.
    """
    volume = np.maximum(np.round(np.median(shapes, axis=0)), 1).astype(int).tolist()
    patch = patch_for(volume, plan.spacing, PATCH_VOXELS[device])
    plan = replace(plan, volume_size=tuple(volume), strides=deep_enough(strides_for(patch, plan.spacing)))
    plan = replace(plan, patch_size=round_up(patch, plan.total_stride))
    plan.check()
    return plan
