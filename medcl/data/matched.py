"""Comparisons of thumbnails, remembered in the store: every draw and every scoring of a benchmark asks the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.data.matching import THRESHOLD, Match, matches
from medcl.data.signature import SIGNATURE_VERSION
from medcl.data.store import store_folder
from medcl.errors import MedclError
from medcl.files import read_json, write_json


def remembered(known: Sequence[np.ndarray], new: Sequence[np.ndarray], store: str | Path = "") -> list[Match]:
    """As `medcl.data.matching.matches`; equal pictures among the known ones are compared once."""
    if not known or not new:
        return []
    places: dict[str, list[int]] = {}
    for place, picture in enumerate(known):
        places.setdefault(_hash(picture), []).append(place)
    marks = sorted(places)  # in an order that does not depend on who was named first
    asked = [_hash(picture) for picture in new]
    root = store_folder(store)
    key = hashlib.sha256(repr((SIGNATURE_VERSION, THRESHOLD, marks)).encode()).hexdigest()[:32]
    path = root / "matches" / f"{key}.json"
    answers = _load(path)
    missing = [place for place, mark in enumerate(asked) if mark not in answers]
    if missing:
        fresh: dict[str, list[list[Any]]] = {asked[place]: [] for place in missing}
        for match in matches([known[places[mark][0]] for mark in marks], [new[place] for place in missing]):
            answer = [marks[match.known], match.score]
            if answer not in fresh[asked[missing[match.new]]]:
                fresh[asked[missing[match.new]]].append(answer)
        answers = {**_load(path), **fresh}
        write_json(path, answers)
    return [
        Match(place, number, float(score))
        for number, one in enumerate(asked)
        for mark, score in answers[one]
        for place in places[mark]
    ]


def _hash(picture: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()[:32]


def _load(path: Path) -> dict[str, list[list[Any]]]:
    try:
        return read_json(path) if path.exists() else {}
    except MedclError:
        return {}  # only a cache: a damaged one is rebuilt
