"""The files below a folder that may hold scans."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from medcl.dataset.case import Problem
from medcl.errors import MedclError
from medcl.io.detached import header_file
from medcl.io.dicom import is_dicom, may_be_dicom
from medcl.io.formats import volume_suffix


@dataclass
class Found:
    """What lies below a folder: volume files with their bytes, files that may be DICOM, all others, what went wrong."""

    volumes: dict[str, int] = field(default_factory=dict)
    dicom: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find(source: Path) -> tuple[Path, Found]:
    """The absolute root, and what is below it."""
    found = Found()
    if not source.exists():
        raise MedclError("no such folder", source, "Check the path.")
    if source.is_file():
        source = header_file(source)
        if volume_suffix(source.name):
            found.volumes[source.name] = source.stat().st_size
        elif is_dicom(source):
            found.dicom.append(source.name)
        else:
            found.others.append(source.name)
        return source.parent.resolve(), found
    root = source.resolve()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise MedclError(f"the folder cannot be read ({error.strerror})", source, "Mend its permissions.") from None
    for path, entry in _walk(root, found.problems):
        if volume_suffix(entry.name):
            found.volumes[path] = entry.stat().st_size
        elif may_be_dicom(entry.name):
            found.dicom.append(path)
        else:
            found.others.append(path)
    return root, found


def choose(found: Found, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Leaves out what the patterns do not want, and says how much that is."""
    every = [*found.volumes, *found.dicom]
    wanted = {path for path in (*every, *found.others) if not include or _fits(path, include)}
    wanted = {path for path in wanted if not _fits(path, exclude)}
    found.others = [path for path in found.others if path in wanted]
    found.volumes = {path: size for path, size in found.volumes.items() if path in wanted}
    found.dicom = [path for path in found.dicom if path in wanted]
    left = sorted(set(every) - wanted)
    if left:
        what = f"is left out by --include or --exclude, as {len(left)} files are"
        found.problems.append(Problem(left[0], what, "Nothing is to be done if that is meant.", aside=False))


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, form) for each in patterns for form in (each, f"*/{each}", f"{each}/*", f"*/{each}/*"))


def _walk(root: Path, problems: list[Problem]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file with its path relative to the root. Links to folders are followed, once; hidden names are not."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        try:
            place = os.stat(root / folder)
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    try:
                        if entry.is_dir():
                            folders.append(path)
                        elif entry.is_file():
                            yield path, entry
                        elif entry.is_symlink():
                            problems.append(Problem(path, "is a link to nothing", "Restore its target or remove it."))
                    except OSError as error:
                        problems.append(Problem(path, f"cannot be read ({error.strerror})", "Mend its permissions."))
        except OSError as error:
            what = f"the folder cannot be read ({error.strerror})"
            problems.append(Problem(folder, what, "Mend its permissions; it was passed over."))
