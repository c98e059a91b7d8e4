"""Units of length that headers name, in mm."""

from __future__ import annotations

import math

_IN_MM = {
    "m": 1000.0, "meter": 1000.0, "metre": 1000.0, "cm": 10.0, "centimeter": 10.0, "centimetre": 10.0,
    "mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "inch": 25.4, "in": 25.4,
    "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "micron": 1e-3, "micrometer": 1e-3, "micrometre": 1e-3,
    "nm": 1e-6, "nanometer": 1e-6, "nanometre": 1e-6, "å": 1e-7, "angstrom": 1e-7, "pm": 1e-9,
}  # fmt: skip


def in_mm(unit: str) -> float | None:
    """The mm of a unit such as `um`, `micron` or `nanometers`; None for a unit that is not known."""
    name = unit.lower()
    return _IN_MM.get(name, _IN_MM.get(name.removesuffix("s")))


def converted(unit: str) -> tuple[float, str]:
    """The mm of a unit that a header names, and the note to tell: empty for mm."""
    unit = unit.strip().strip('"')
    scale = in_mm(unit)
    if scale is None:
        return 1.0, f"the header's unit of length, {unit!r}, is not known: mm is supposed"
    name = unit.removesuffix("s")
    return scale, "" if scale == 1 else f"header is in {name}{'s' if len(name) > 3 else ''}: converted to mm"


def rounded(mm: float, decimals: int) -> float:
    """A length to so many decimals, or to as many significant digits where it is below 0.1 mm.

    A voxel of 4 nm is 0.000004 mm: a fixed number of decimals would leave nothing of it.
    """
    size = abs(mm)
    if size == 0 or not math.isfinite(size):
        return mm
    return round(mm, max(decimals, decimals - 1 - math.floor(math.log10(size))))


def shown(mm: float, decimals: int) -> str:
    """A length as text: so many decimals, or three significant digits where it is below 0.1 mm."""
    return f"{mm:.{decimals}f}" if mm == 0 or abs(mm) >= 0.1 else f"{mm:.3g}"
