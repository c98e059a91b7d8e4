"""Volumes whose voxels lie in files of their own, beside a header: which files belong together."""

from __future__ import annotations

import re
from pathlib import Path

from medcl.io.formats import volume_suffix

# the header's suffix, and those that the voxels' file may have
PAIRS = {".hdr": (".img",), ".hdr.gz": (".img.gz",), ".par": (".rec",), ".head": (".brik", ".brik.gz", ".brik.bz2")}
_NAMED_INSIDE = {
    ".mhd": re.compile(r"^ElementDataFile\s*=\s*(.*)$", re.M),
    ".nhdr": re.compile(r"^data ?file:\s*(.*)$", re.M | re.I),
}
_HEADER_BYTES = 1 << 20


def volume_files(path: str | Path) -> tuple[Path, ...]:
    """A volume's own file first, then the files beside it that hold its voxels, as far as they are there."""
    path = Path(path)
    suffix = volume_suffix(path.name)
    if suffix in PAIRS:
        stem = path.name[: -len(suffix)]
        names = [stem + ending for lower in PAIRS[suffix] for ending in _spellings(lower)]
        found = [path.with_name(name) for name in names if path.with_name(name).is_file()][:1]
    elif suffix in _NAMED_INSIDE and path.is_file():
        found = [path.parent / name for name in _named(path, _NAMED_INSIDE[suffix])]
    else:
        return (path,)
    return (path, *(file for file in found if file.is_file()))


def header_file(path: str | Path) -> Path:
    """The header of a volume of two files whose voxels' file is given (`.img`, `.rec`, `.brik`); else the path."""
    path = Path(path)
    for suffix, endings in PAIRS.items():
        for ending in endings:
            if path.name.lower().endswith(ending):
                stem = path.name[: -len(ending)]
                found = [path.with_name(stem + name) for name in _spellings(suffix)]
                return next((header for header in found if header.is_file()), path)
    return path


def _spellings(ending: str) -> list[str]:
    """`.brik.gz`, `.BRIK.GZ` and `.BRIK.gz`, which is AFNI's own."""
    _, kind, *packed = ending.split(".")
    return [ending, ending.upper(), ".".join(["", kind.upper(), *packed])]


def _named(path: Path, pattern: re.Pattern[str]) -> list[str]:
    """The files of voxels that a header names: one, a list of them, or numbered ones."""
    with open(path, "rb") as stream:
        text = stream.read(_HEADER_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    match = pattern.search(text)
    value = match[1].strip() if match else "LOCAL"
    if match and value.split(" ")[0] == "LIST":
        return [line.strip() for line in text[match.end() :].splitlines() if line.strip()]
    numbered = re.fullmatch(r"(\S*%0?\d*d\S*) (\d+) (\d+) (\d+)( \d+)?", value)
    if numbered:
        first, last, step = (int(numbered[i]) for i in (2, 3, 4))
        return [numbered[1] % number for number in range(first, last + 1, max(1, step))]
    return [] if value.upper() == "LOCAL" else [value]
