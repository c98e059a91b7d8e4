"""Formats that ITK reads: NRRD and MetaImage. ITK turns whatever space a file names into LPS, but knows no units."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from medcl.io.formats import format_of
from medcl.io.geometry import LPS_TO_RAS, Header
from medcl.io.units import converted

_HEADER_BYTES = 1 << 16


def open_by_itk(path: Path) -> tuple[Header, Any]:
    """The header of a file, and a function of the channel that reads its voxels `(X, Y, Z)`."""
    import SimpleITK as sitk

    sitk.ProcessObject_SetGlobalWarningDisplay(False)  # one line for the user, and it is ours
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, n, components = reader.GetSize(), reader.GetDimension(), reader.GetNumberOfComponents()
    dtype = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in dtype:
        name = "complex"
    elif components == 3 and "8-bit unsigned" in dtype:
        name = "rgb"
    else:
        name = dtype.removeprefix("vector of ").replace("-bit ", " ")
        bits, _, kind = name.partition(" ")
        name = {"unsigned integer": "uint", "signed integer": "int", "float": "float"}.get(kind, "rgb") + bits
    affine = np.eye(4)
    if n >= 3:
        direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
        affine[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
        affine[:3, 3] = reader.GetOrigin()[:3]
    affine, notes = (_nrrd_units if format_of(path) == "nrrd" else _meta_units)(_fields(path), affine)
    shape = (*size, components) if components > 1 else tuple(size)

    def load(channel: int | None) -> np.ndarray:
        array = sitk.GetArrayFromImage(reader.Execute())
        if channel is not None:  # numpy sees (..., Z, Y, X), and the components of a vector image last
            array = array[..., channel] if components > 1 else array.reshape(-1, *array.shape[-3:])[channel]
        return array.reshape(array.shape[-3:]).transpose(2, 1, 0)

    return Header(shape, LPS_TO_RAS @ affine, name, tuple(notes)), load


def _fields(path: Path) -> dict[str, str]:
    """The fields of the text that a NRRD (`key: value`) or a MetaImage (`Key = value`) begins with, in lower case."""
    with open(path, "rb") as stream:
        text = stream.read(_HEADER_BYTES).replace(b"\r\n", b"\n")
    end = re.search(rb"\n\n|^ElementDataFile.*$", text, re.M)
    lines = text[: end.start() if end else None].decode("utf-8", "replace").splitlines()
    pairs = (re.match(r"([A-Za-z][A-Za-z ]*?)\s*(?::(?!=)|=)\s*(.*)", line) for line in lines)
    return {pair[1].lower(): pair[2].strip() for pair in pairs if pair}


def _nrrd_units(fields: dict[str, str], affine: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """In mm: `space units` hold for the axes of the world, `units` for those of the array that are in space."""
    notes = []
    world, own = (re.findall(r'"[^"]*"|\S+', fields.get(name, "")) for name in ("space units", "units"))
    kinds = fields.get("kinds", "").split()
    if len(kinds) == len(own):
        own = [unit for unit, kind in zip(own, kinds, strict=True) if kind in ("space", "domain", "???", "none")]
    by_world = bool(world) or "space directions" in fields
    for axis, unit in enumerate((world if by_world else own)[:3]):
        if not unit.strip('"?'):
            continue
        scale, note = converted(unit)
        affine[(axis, slice(4)) if by_world else (slice(3), axis)] *= scale
        notes += [note] if note and note not in notes else []
    if not {"space directions", "spacings"} & set(fields):
        notes.append("header holds no spacing: 1 mm is supposed")
    if not re.search("right|left|ras|las|lps", fields.get("space", "").lower()):
        notes.append("header holds no orientation (no anatomical space): left and right are a guess")
    return affine, notes


def _meta_units(fields: dict[str, str], affine: np.ndarray) -> tuple[np.ndarray, list[str]]:
    unit = fields.get("distanceunits", "").strip('"?')
    scale, note = converted(unit) if unit else (1.0, "")
    affine[:3] *= scale
    notes = [note] if note else []
    if not {"elementspacing", "elementsize"} & set(fields):
        notes.append("header holds no spacing: 1 mm is supposed")
    return affine, notes
