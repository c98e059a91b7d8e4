"""Which files are label maps, by what they hold: few whole values that lie in patches.

Files of one template (equal in all words of their path) have one role, so a few of each template are read, and all of
them where the few disagree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np

from medcl.dataset.checks import INTEGER_TOLERANCE
from medcl.dataset.structure import template
from medcl.errors import MedclError
from medcl.io.volumes import read_volume

SAMPLED = 3  # files read of each template
FEW = 12  # values; images have more
MANY = 1024  # values; label maps have fewer
PATCHY = 0.75  # of neighbours in the foreground are equal in a label map of many values; noise leaves few in an image
ALONE = 50  # files that are each alone with their template: above, a few of each folder are read


def looks_like_labels(array: np.ndarray) -> bool | None:
    """Whether an array holds a label map: few whole values from 0 up, in patches. None where it is constant.

    Args:
        array: the voxels, of any shape and type.
    """
    if array.size == 0 or not np.isfinite(array).all():
        return False
    low, high = float(array.min()), float(array.max())
    if low == high:
        return None
    if low < 0 or high > np.iinfo(np.uint16).max:
        return False
    whole = np.rint(array)
    if array.dtype.kind == "f" and np.abs(array - whole).max() > INTEGER_TOLERANCE:
        return False
    values, counts = np.unique(whole, return_counts=True)
    if len(values) <= FEW:
        return True
    if len(values) > MANY:
        return False
    background = values[counts.argmax()]
    equal = pairs = 0
    for axis in range(whole.ndim):
        one, other = (np.delete(whole, place, axis) for place in (-1, 0))
        inside = (one != background) | (other != background)
        pairs += int(inside.sum())
        equal += int(((one == other) & inside).sum())
    return equal >= PATCHY * pairs


class Contents:
    """What files hold, each read once.

    Args:
        root: the folder that paths are relative to.
    """

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[str, tuple[bool | None, int]] = {}

    def is_label(self, name: str) -> bool | None:
        """Whether a file holds a label map; None where it is constant or cannot be read."""
        return self._look(name)[0]

    def is_binary(self, name: str) -> bool:
        """Whether a label map has one value besides 0, or none."""
        found, values = self._look(name)
        return found is None or (found and values == 2)

    def _look(self, name: str) -> tuple[bool | None, int]:
        if name not in self._known:
            try:
                array = read_volume([self._root / name]).array
                found = looks_like_labels(array)
                self._known[name] = (found, len(np.unique(np.rint(array))) if found else 0)
            except (MedclError, OSError, ValueError, RuntimeError):  # told where the file is read in earnest
                self._known[name] = (None, 0)
        return self._known[name]


def labels_by_content(names: Sequence[str], contents: Contents) -> set[str]:
    """Those of the files that hold label maps, by reading a few of each template."""
    found: set[str] = set()
    for same in _alike(names):
        few = same[:: max(1, len(same) // SAMPLED)][:SAMPLED]
        verdicts = {contents.is_label(name) for name in few} - {None}
        if verdicts == {True}:
            found.update(same)
        elif len(verdicts) > 1:
            found.update(name for name in same if contents.is_label(name))
    return found


def _alike(names: Sequence[str]) -> list[list[str]]:
    def grouped(names: Sequence[str], key: Callable[[str], Hashable]) -> list[list[str]]:
        groups: dict[Hashable, list[str]] = defaultdict(list)
        for name in names:
            groups[key(name)].append(name)
        return list(groups.values())

    groups = grouped(names, template)
    alone = [name for group in groups if len(group) == 1 for name in group]
    if len(alone) <= ALONE:
        return groups
    return [group for group in groups if len(group) > 1] + grouped(alone, lambda name: name.rpartition("/")[0])
