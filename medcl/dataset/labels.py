"""Label maps as files: reading them, and the names that a data set gives to their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medcl.dataset.case import Problem
from medcl.errors import MedclError
from medcl.io.geometry import Header, Volume
from medcl.io.volumes import read_header, read_volume


def read_label_header(path: str | Path) -> Header:
    """Reads the header of a label map.

    Raises:
        MedclError: as `medcl.io.volumes.read_header`; or the map has several channels.
    """
    header = read_header([path])
    if len(header.shape) > 3:
        raise MedclError(
            f"is a label map of {header.shape[3]} channels (one for each class?)", path,
            "Write it as one 3D map of class numbers: numpy.argmax over the channels, the background being the first.",
        )  # fmt: skip
    return header


def read_label(path: str | Path) -> Volume:
    """Reads a label map as it is stored; raises as `read_label_header` and `medcl.io.volumes.read_volume`."""
    read_label_header(path)
    return read_volume([path])


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
