"""The label map of a case, one file or several structures that make one; and the names of its values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.checks import check_grid, check_label_values, values_of
from medcl.errors import MedclError
from medcl.io.contours import is_structure_set, open_structures, spelled_alike, structure_names
from medcl.io.formats import format_of
from medcl.io.geometry import Header, Volume
from medcl.io.volumes import read_header, read_volume


def read_label(manifest: Manifest, case: Case) -> Volume:
    """Reads a case's label map.

    Of binary masks and of an RTSTRUCT object, every structure takes the value that `manifest.label_names` gives its
    name. A voxel of several takes the last of them; `notes` says how many there are.

    Raises:
        MedclError: the case has none, a file cannot be read, or masks differ in grid or are not binary.
    """
    paths = manifest.label_paths(case)
    values = {name: value for value, name in manifest.label_names.items()}
    if not case.is_labelled:
        raise MedclError("has no label map", case.id, "Name it in a table.")
    if not paths:
        return _merged(case.masks, Path(manifest.root), values)
    if _is_structure_set(paths):
        return open_structures(paths[0], paths[1:]).draw(values)
    return read_label_file(*paths)


def structure_values(manifest: Manifest, case: Case) -> dict[str, int | None]:
    """The label value of each structure of a case's RTSTRUCT object; empty where its label map is anything else."""
    paths = manifest.label_paths(case)
    values = {spelled_alike(name): value for value, name in manifest.label_names.items()}
    names = structure_names(paths[0]) if _is_structure_set(paths) else []
    return {name: values.get(spelled_alike(name)) for name in names}


def _is_structure_set(paths: Sequence[Path]) -> bool:
    return bool(paths) and format_of(paths[0]) == "dicom" and is_structure_set(paths[0])


def _merged(masks: Sequence[tuple[str, str]], root: Path, values: dict[str, int]) -> Volume:
    merged: Volume | None = None
    overlap = 0
    for name, file in masks:
        mask = read_label_file(root / file)
        check_label_values(mask.array, root / file)
        if len(values_of(mask.array)) > 1:
            raise MedclError("is one of several masks of an image, and holds several values", root / file,
                             "Give it alone as the `label` of a table.")  # fmt: skip
        if merged is None:
            largest = max(values.values())
            merged = Volume(np.zeros(mask.shape, np.uint8 if largest < 256 else np.uint16), mask.affine)
        inside = np.rint(check_grid(mask, merged, root / file).array) > 0
        overlap += int((merged.array[inside] > 0).sum())
        merged.array[inside] = values[name]
    assert merged is not None
    if overlap:
        merged.notes = (f"masks overlap in {overlap} voxels: each takes the last mask of the list",)
    return merged


def read_label_header(*paths: Path) -> Header:
    """Reads the header of a label map: one file, a header and its file of voxels, or a DICOM object and its series.

    Raises:
        MedclError: as `medcl.io.volumes.read_header`; or the map has several channels.
    """
    header = open_structures(paths[0], paths[1:]).header if _is_structure_set(paths) else read_header(paths)
    if len(header.shape) > 3:
        raise MedclError(
            f"is a label map of {header.shape[3]} channels (one for each class?)", paths[0],
            "Write it as one 3D map of class numbers: numpy.argmax over the channels, the background being the first.",
        )  # fmt: skip
    return header


def read_label_file(*paths: Path) -> Volume:
    """Reads a label map as it is stored; raises as `read_label_header` and `medcl.io.volumes.read_volume`."""
    read_label_header(*paths)
    return read_volume(paths)


def label_names(labels: Any) -> dict[int, str]:
    """The names in the `labels` of a dataset.json: `{"1": "liver"}` as the Decathlon writes it, or `{"liver": 1}`."""
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if str(key).isdigit() and isinstance(value, str):
            names[int(key)] = value
        elif isinstance(value, int) or str(value).isdigit():
            names[int(value)] = str(key)
    return dict(sorted(names.items()))


def unsupported_labels(labels: Any, file: str) -> Problem | None:
    """What in the `labels` of a dataset.json medcl cannot train on: nnU-Net's regions and its ignored label."""
    for key, value in labels.items() if isinstance(labels, dict) else ():
        remedy = "Write 0 where it stands in the label maps, or leave those cases out, and remove the entry."
        if isinstance(value, (list, tuple)):
            what = f"label {key!r} is a region of several values, {list(value)}, as of nnU-Net"
            remedy = 'Name every value by itself, such as "edema": 2; regions can be joined after prediction.'
        elif "ignore" in (str(key).lower(), str(value).lower()):
            what = f"label {key!r}: {value!r} is nnU-Net's ignored label"
        else:
            continue
        return Problem(file, f"{what}, which is not supported: all label maps are left out", remedy)
    return None
