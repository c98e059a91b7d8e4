"""Bags: a table that drives everything, and the feature files that people have.

`bags.csv` has a row a bag: `bag_id`, `path` (or `image`, `slide`, `features`) relative to the table, `label`, `group`
(the patient or slide that bags must not be torn apart from; by default the bag itself).
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.runtime.files import atomic_path

PATH_COLUMNS = ("path", "image", "slide", "features")
FEATURES = ("features", "feats", "feat")  # CLAM and TRIDENT, STAMP, others
COORDINATES = ("coords", "coordinates")
FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".npz", ".npy")


@dataclass(frozen=True)
class Bag:
    """A row of the table.

    Attributes:
        id: unique name.
        path: slide, image, folder of patches, volume or feature file.
        label: name of the class; None where unknown.
        group: bags of one group are never divided between training and test.
    """

    id: str
    path: Path
    label: str | None
    group: str


@dataclass
class Features:
    """The instances of a bag.

    Attributes:
        h: (K, M) float32.
        coordinates: (K, 2 or 3), None where unknown; pixels of the slide's finest level, or voxels.
        encoder: identity of what made them, empty where unknown.
        meta: further attributes of the file, such as the tile's size.
        cells: (K, 2 or 3) places on a grid, once `medcl.mil.places.cells_of` was asked.
    """

    h: np.ndarray
    coordinates: np.ndarray | None = None
    encoder: str = ""
    meta: dict[str, Any] | None = None
    cells: np.ndarray | None = None


def read_bags(path: str | Path) -> tuple[Bag, ...]:
    """Reads `bags.csv`.

    Raises:
        MedclError: a column is missing, a bag occurs twice, or one group of bags that share a file has two labels.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MedclError(f"cannot be read ({type(error).__name__})", path, "Give a table of bags, bags.csv.") from None
    if not rows:
        raise MedclError("holds no bag", path, "Give it a row a bag: bag_id, path, label, group.")
    column = next((name for name in PATH_COLUMNS if name in rows[0]), None)
    if "bag_id" not in rows[0] or column is None:
        raise MedclError(f"has columns {', '.join(rows[0])}", path, "It needs bag_id and path; label and group too.")
    bags = tuple(
        Bag(
            row["bag_id"],
            path.parent / row[column],
            (row.get("label") or "").strip() or None,
            (row.get("group") or "").strip() or row["bag_id"],
        )
        for row in rows
    )
    seen: dict[str, Bag] = {}
    files: dict[Path, Bag] = {}
    for bag in bags:
        if not bag.id:
            raise MedclError("a row has no bag_id", path, "Name every bag.")
        if bag.id in seen:
            first = seen[bag.id]
            what = "in two groups" if first.group != bag.group else "twice"
            labels = f", labelled {first.label} and {bag.label}" if first.label != bag.label else ""
            raise MedclError(f"bag {bag.id} is listed {what}{labels}", path, "Keep one of its rows.")
        twin = files.setdefault(bag.path.resolve(), bag)
        if twin is not bag and twin.group != bag.group:
            raise MedclError(
                f"{twin.id} and {bag.id} are the same file in groups {twin.group} and {bag.group}", path,
                "Give them one group, or it is in training and test at once.",
            )  # fmt: skip
        seen[bag.id] = bag
    return bags


def read_instances(path: str | Path) -> tuple[tuple[Bag, ...], dict[str, Features]]:
    """Reads a table with a row an instance: `bag_id`, `label`, optionally `group`, and numeric feature columns.

    Returns:
        The bags, and their features by bag id.

    Raises:
        MedclError: not such a table, or one bag with two labels or groups.
    """
    import pandas

    path = Path(path)
    try:
        table = pandas.read_csv(path, low_memory=False)  # a column has one type from top to bottom
    except (OSError, ValueError) as error:
        raise MedclError(f"cannot be read ({type(error).__name__})", path, "Give a CSV of instances.") from None
    if "bag_id" not in table:
        raise MedclError(f"has columns {', '.join(map(str, table.columns[:6]))}", path, "It needs bag_id and label.")
    names = [c for c in table.columns if c not in ("bag_id", "label", "group") and table[c].dtype.kind in "iuf"]
    if not names:
        raise MedclError("holds no numeric column", path, "Give every instance its features.")
    bags, features = [], {}
    for bag_id, rows in table.groupby("bag_id", sort=False):
        known = {}
        for column in ("label", "group"):
            values: set[str | None] = set(map(str, rows[column].unique())) if column in table else {None}
            if len(values) > 1:
                raise MedclError(
                    f"bag {bag_id} has {column}s {' and '.join(sorted(map(str, values)))}", path, "A bag has one."
                )
            known[column] = values.pop()
        bags.append(Bag(str(bag_id), path, known["label"], known["group"] or str(bag_id)))
        features[str(bag_id)] = Features(rows[names].to_numpy(np.float32))
    return tuple(bags), features


def read_features(path: Path) -> Features:
    """Reads a feature file: HDF5 as CLAM, TRIDENT and STAMP write it, `.pt` (tensors only), `.npz` or `.npy`.

    Raises:
        MedclError: it cannot be read, is empty, or holds values that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise MedclError("no such file", path, "Check the path column of the table.")
    try:
        found = _READERS[path.suffix.lower()](path)
    except KeyError:
        raise MedclError("is no feature file", path, f"Known: {', '.join(FEATURE_SUFFIXES)}.") from None
    except MedclError:
        raise
    except Exception as error:  # h5py, torch and numpy raise several kinds for a damaged file
        raise MedclError(f"cannot be read ({type(error).__name__})", path, "Extract it again.") from None
    check_features(found, path)
    return found


def check_features(found: Features, where: object) -> None:
    """Refuses what cannot be a bag.

    Raises:
        MedclError: no instances, a wrong shape, or values that are not finite.
    """
    if found.h.ndim != 2:
        raise MedclError(f"features have shape {found.h.shape}", where, "They must be instances x features.")
    if len(found.h) == 0:
        raise MedclError("holds no instance", where, "Loosen the tissue mask, or leave the bag out.")
    if not np.isfinite(found.h).all():
        bad = int((~np.isfinite(found.h)).any(1).sum())
        raise MedclError(f"{bad} of {len(found.h)} instances are not finite", where, "Extract it again.")
    if found.coordinates is not None and len(found.coordinates) != len(found.h):
        raise MedclError(
            f"{len(found.h)} features and {len(found.coordinates)} coordinates", where, "Extract it again."
        )


def _named(source: Any, names: Sequence[str], what: str, where: Path) -> Any:
    for name in names:
        if name in source:
            return source[name]
    if what == "coordinates":
        return None
    raise MedclError(f"holds {', '.join(map(str, source))}", where, f"Expected {' or '.join(names)}.")


def _as_features(h: Any, coordinates: Any, encoder: str = "", meta: dict[str, Any] | None = None) -> Features:
    h = np.asarray(h)
    h = h[0] if h.ndim == 3 and len(h) == 1 else h  # TRIDENT keeps a leading 1
    where = None if coordinates is None else np.asarray(coordinates)
    if where is not None and where.ndim == 3 and len(where) == 1:
        where = where[0]
    return Features(h.astype(np.float32), where, encoder, meta)


def _read_h5(path: Path) -> Features:
    import h5py

    with h5py.File(path, "r") as file:
        features = _named(file, FEATURES, "features", path)[:]
        where = _named(file, COORDINATES, "coordinates", path)
        meta = {key: _plain(value) for key, value in file.attrs.items()}
        if where is not None:
            meta |= {key: _plain(value) for key, value in where.attrs.items()}
        return _as_features(features, None if where is None else where[:], str(meta.get("encoder", "")), meta)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _read_pt(path: Path) -> Features:
    import torch

    data = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(data, torch.Tensor):
        return _as_features(data.float().numpy(), None)
    where = _named(data, COORDINATES, "coordinates", path)
    return _as_features(
        _named(data, FEATURES, "features", path).float().numpy(), None if where is None else where.numpy()
    )


def _read_npz(path: Path) -> Features:
    with np.load(path, allow_pickle=False) as data:
        return _as_features(_named(data, FEATURES, "features", path), _named(data, COORDINATES, "coordinates", path))


def _read_npy(path: Path) -> Features:
    return _as_features(np.load(path, allow_pickle=False), None)


_READERS = {".h5": _read_h5, ".hdf5": _read_h5, ".pt": _read_pt, ".npz": _read_npz, ".npy": _read_npy}


def write_features(path: Path, features: Features) -> None:
    """Writes one HDF5 file a bag, whole or not at all: `features`, `coords` and the encoder's identity."""
    import h5py

    check_features(features, path)
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        file["features"] = features.h.astype(np.float32)
        if features.coordinates is not None:
            file["coords"] = features.coordinates
        for key, value in {**(features.meta or {}), "encoder": features.encoder}.items():
            file.attrs[key] = value


def classes_of(bags: Sequence[Bag]) -> tuple[str, ...]:
    """Names of the classes, sorted; the last of two is the positive one.

    Numbers sort as numbers, and of two names one that says `benign`, `normal`, `negative` or `control` is the first.

    Raises:
        MedclError: fewer than two classes, or a bag without a label.
    """
    missing = [bag.id for bag in bags if bag.label is None]
    if missing:
        raise MedclError(f"{len(missing)} bags have no label, such as {missing[0]}", "bags", "Label or remove them.")
    names = sorted({str(bag.label) for bag in bags}, key=_class_key)
    if len(names) < 2:
        raise MedclError(f"all bags are of class {names[0]}", "bags", "Classification needs two classes.")
    return tuple(names)


def _class_key(name: str) -> tuple[int, float, str]:
    try:
        return (0, float(name), name)
    except ValueError:
        return (1 if name.lower() in ("benign", "normal", "negative", "control") else 2, math.inf, name)


def counts(bags: Sequence[Bag]) -> dict[str, int]:
    """Bags of each class."""
    found: dict[str, int] = defaultdict(int)
    for bag in bags:
        found[str(bag.label)] += 1
    return dict(found)
