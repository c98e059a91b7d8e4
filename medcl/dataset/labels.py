"""The label map of a case: one file, or several binary masks that make one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medcl.dataset.case import Case, Manifest
from medcl.dataset.checks import check_grid, check_label_values
from medcl.errors import MedclError
from medcl.io.geometry import Volume
from medcl.io.volumes import read_volume


def read_label(manifest: Manifest, case: Case) -> Volume:
    """Reads a case's label map.

    Of binary masks, every structure takes the value that `manifest.label_names` gives its name. A voxel of several
    masks takes the last of them; `notes` says how many there are.

    Raises:
        MedclError: the case has none, a file cannot be read, or masks differ in grid or are not binary.
    """
    paths = manifest.label_paths(case)
    if paths:
        return read_volume(paths)
    if not case.masks:
        raise MedclError("has no label map", case.id, "Name it in a table.")
    return _merged(case.masks, Path(manifest.root), {name: value for value, name in manifest.label_names.items()})


def _merged(masks: Sequence[tuple[str, str]], root: Path, values: dict[str, int]) -> Volume:
    merged: Volume | None = None
    overlap = 0
    for name, file in masks:
        mask = read_volume([root / file])
        check_label_values(mask.array, root / file)
        inside = np.rint(mask.array) > 0
        if len(np.unique(mask.array[inside])) > 1:
            raise MedclError("is one of several masks of an image, and holds several values", root / file,
                             "Give it alone as the `label` of a table.")  # fmt: skip
        if merged is None:
            largest = max(values.values())
            merged = Volume(np.zeros(mask.shape, np.uint8 if largest < 256 else np.uint16), mask.affine)
        check_grid(mask, merged, root / file)
        overlap += int((merged.array[inside] > 0).sum())
        merged.array[inside] = values[name]
    assert merged is not None
    if overlap:
        merged.notes = (f"masks overlap in {overlap} voxels: each takes the last mask of the list",)
    return merged
