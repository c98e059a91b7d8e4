"""Whether volumes are CT in Hounsfield units: what headers and names say, held against what the voxels say.

An HU window saturates any other volume or makes it a constant. So CT is told by its voxels: air near -1000 HU, soft
tissue near 0, little between. One rule serves a scan that reads all voxels and one that samples a few volumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from medcl.dataset.body import thinned
from medcl.dataset.case import Case, Manifest, Problem
from medcl.errors import MedclError
from medcl.io.volumes import read_volume

SAMPLED = 5  # volumes read, of those that are named CT and of those that nothing is known of
DEEP = -1500.0  # HU; no noise of air reaches down there
NARROW = 50.0  # HU; even the soft tissue of one organ spreads further
BONE = 1500.0  # HU; where there is bone so dense, there is also fat
LOWEST = -1050.0  # HU of air, with noise; what lies below is padding
OFFSET = 1024.0  # often missing where a CT was stored without negative numbers

Units = Literal["HU", "possible", "positive", "offset", "other"]


@dataclass(frozen=True)
class Evidence:
    """What the voxels of a volume say.

    Attributes:
        units: `HU` where air and soft tissue are seen; `possible` where nothing speaks against HU, as in a CT of one
            organ; `positive` where nothing but the lack of fat and air does; `offset` for a CT stored 1024 too high;
            `other` for what cannot be HU.
        low, high: least and largest voxel.
    """

    units: Units
    low: float
    high: float

    @property
    def can_be_hu(self) -> bool:
        """Whether an HU window may be laid over the volume."""
        return self.units in ("HU", "possible", "positive")


def evidence_of(array: np.ndarray) -> Evidence:
    """Looks for Hounsfield units in the voxels of a volume (X, Y, Z)."""
    few = thinned(array).astype(np.float64).ravel()
    few = few[np.isfinite(few)]
    if not few.size:
        return Evidence("other", np.nan, np.nan)
    return Evidence(_units(few), float(few.min()), float(few.max()))


def _units(few: np.ndarray) -> Units:
    def share(low: float, high: float) -> float:
        return float(np.count_nonzero((few >= low) & (few <= high))) / few.size

    low, high = (float(value) for value in np.percentile(few, (0.1, 99.9)))
    if low >= 0:  # fat and air are negative
        air, tissue, between = share(0, 100), share(OFFSET - 150, OFFSET + 150), share(300, 700)
        looks = air > 0.05 and tissue > 0.5 * share(500, high) and between / 400 < 0.3 * tissue / 300
        if looks and OFFSET + 250 < high <= 4 * OFFSET:
            return "offset"
        return "positive" if 255 < high < BONE and high - low >= NARROW and share(0, 300) >= 0.02 else "other"
    if high - low < NARROW or (share(-250, 300) < 0.02 and not -1100 <= low <= -500):  # neither tissue nor air
        return "other"
    floor = max(low, LOWEST)
    if floor > -500:  # a CT of one organ, or one clipped to a window
        return "possible"
    gap = max(floor + 150, -650.0)
    air, tissue, between = share(floor, floor + 100) / 100, share(-150, 150) / 300, share(gap, -300) / (-300 - gap)
    seen = (air >= 1e-4 and tissue >= 1e-4) or (air >= 5e-6 and tissue >= 1e-3)
    # padding is one value; phase images and the like go on below
    padding = share(-np.inf, DEEP) - float(np.count_nonzero(few == few.min())) / few.size
    return "HU" if seen and min(air, tissue) >= 0.8 * between and padding < 0.005 else "possible"


def check_hounsfield(array: np.ndarray, where: object = None) -> None:
    """Checks that an HU window may be laid over a volume.

    Raises:
        MedclError: the voxels cannot be HU.
    """
    found = evidence_of(array)
    if not found.can_be_hu:
        raise MedclError(
            f"voxels from {found.low:g} to {found.high:g} are not in HU, but the plan scales by an HU window", where,
            'Convert it to HU, or leave it out; or set "normalise" to "robust" in a plan, and pass that with --plan.',
        )  # fmt: skip


def settled(manifest: Manifest, evidence: Mapping[str, Evidence] | None = None) -> Manifest:
    """The manifest with the modality of every case, and a question where a CT is not in HU.

    Args:
        manifest: its cases say `CT` where a header, a layout or a name does.
        evidence: of the cases by their id, where all voxels were read. Without, a few volumes are read here; where
            these agree the others are taken alike, and where they do not all are read.
    """
    named = [case for case in manifest.cases if case.modality == "CT"]
    # DICOM says its modality: what it calls neither is none of them, whatever its intensities
    unknown = [case for case in manifest.cases if case.modality == "unknown" and case.format != "dicom"]
    read = dict(evidence) if evidence is not None else {}
    units: dict[str, Units] = {}
    for group in (named, unknown):
        if evidence is None:
            read |= _read(manifest, _spread(group))
        found = {read[case.id].units for case in group if case.id in read}
        if evidence is None and len(found) > 1:
            read |= _read(manifest, [case for case in group if case.id not in read])
        alike = next(iter(found)) if len(found) == 1 else None
        for case in group:
            unit = read[case.id].units if case.id in read else alike
            if unit is not None:
                units[case.id] = unit
    asked = {case.id for case in (*named, *unknown)}
    any_ct = any(units.get(case.id) not in ("offset", "other") for case in named) or "HU" in units.values()
    cases = tuple(
        replace(case, modality=_modality(case, units.get(case.id), any_ct)) if case.id in asked else case
        for case in manifest.cases
    )
    doubts = tuple(
        _doubt(case, read[case.id])
        for case in (*named, *unknown)
        if case.id in read
        and (read[case.id].units == "offset" or (case.modality == "CT" and not read[case.id].can_be_hu))
    )
    return manifest.with_cases(cases, doubts)


def _modality(case: Case, units: Units | None, any_ct: bool) -> str:
    if case.modality == "CT":
        return "unknown" if units in ("offset", "other") else "CT"
    return "CT" if units == "HU" or (units in ("possible", None) and any_ct) else "unknown"


def _doubt(case: Case, found: Evidence) -> Problem:
    looks = "is a CT by its header or name" if case.modality == "CT" else "looks like a CT stored 1024 too high"
    return Problem(
        case.image[0],
        f"{looks}, but its voxels, {found.low:g} to {found.high:g}, are not in HU: it would be scaled by its own range",
        "Convert it to HU, or say another modality in a table.",
        aside=False,
        question=True,
    )


def _spread(cases: Sequence[Case]) -> list[Case]:
    """Up to `SAMPLED` of the cases, evenly spaced."""
    return [cases[i] for i in sorted({int((k + 0.5) * len(cases) / SAMPLED) for k in range(SAMPLED)})] if cases else []


def _read(manifest: Manifest, cases: Sequence[Case]) -> dict[str, Evidence]:
    found = {}
    for case in cases:
        try:
            found[case.id] = evidence_of(read_volume(manifest.image_paths(case), channel=case.channel).array)
        except MedclError:
            continue  # reported when the volume is prepared
    return found
