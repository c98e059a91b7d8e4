"""Comparisons of thumbnails, remembered in the store: every draw and every scoring of a benchmark asks the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.leakage.matching import THRESHOLD, Match, scores
from medcl.runtime.files import read_json, write_json
from medcl.store.signature import SIGNATURE_VERSION
from medcl.store.volumes import store_folder


def remembered(
    known: Sequence[np.ndarray],
    new: Sequence[np.ndarray],
    store: str | Path = "",
    known_owners: Sequence[str] = (),
    new_owners: Sequence[str] = (),
    threshold: float = THRESHOLD,
) -> list[Match]:
    """Pairs of `medcl.leakage.matching.scores` that look alike; equal pictures among the known ones are compared once.

    Args:
        known: uint8 (24, 24, 24) each.
        new: of the volumes in question.
        store: folder that remembers; by default `default_store()`.
        known_owners: whose each known one is. Two volumes of one owner are not compared; by default all are.
        new_owners: whose each new one is.
        threshold: score from which a pair counts. All scores are remembered.
    """
    if not known or not new:
        return []
    # without owners, no known picture is left out: None owns none
    whose = known_owners or [""] * len(known)
    own: Sequence[str | None] = new_owners or [None] * len(new)
    places: dict[str, list[int]] = {}
    for place, picture in enumerate(known):
        places.setdefault(picture_hash(picture), []).append(place)
    marks = sorted(places)  # in an order that does not depend on who was named first
    # by owner, the pictures that nobody else has: one that another has too must be compared
    sole: dict[str | None, list[int]] = defaultdict(list)
    for number, mark in enumerate(marks):
        owners = {whose[place] for place in places[mark]}
        if len(owners) == 1:
            sole[owners.pop()].append(number)
    # what is left out is part of the question: without owners nothing is, and the picture's mark is all of it
    without = {owner: " " + _digest([marks[number] for number in numbers]) for owner, numbers in sole.items()}
    asked = [picture_hash(picture) + without.get(owner, "") for picture, owner in zip(new, own, strict=True)]
    root = store_folder(store)
    path = root / "matches" / f"{_digest((SIGNATURE_VERSION, 'scores', marks))}.json"
    answers = _load(path)
    missing = [place for place, mark in enumerate(asked) if mark not in answers]
    if missing:
        fresh: dict[str, list[list[Any]]] = {asked[place]: [] for place in missing}
        firsts = [known[places[mark][0]] for mark in marks]
        left_out = [sole.get(own[place], []) for place in missing]
        for match in scores(firsts, [new[place] for place in missing], left_out):
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
        if score >= threshold and whose[place] != own[number]
    ]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def picture_hash(picture: np.ndarray) -> str:
    """Equal for equal thumbnails alone."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()[:32]


def _load(path: Path) -> dict[str, list[list[Any]]]:
    try:
        return read_json(path) if path.exists() else {}
    except MedclError:
        return {}  # only a cache: a damaged one is rebuilt
