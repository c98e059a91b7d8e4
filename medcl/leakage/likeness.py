"""Whether a volume that looks like another is a copy of it, or only as alike as different subjects of its kind are.

Inbred animals, registered brains and phantoms of one template resemble each other as much as elsewhere a copy resembles
its original. So the likeness of a volume with one subject is judged beside its likeness with the others. In the order
of their likeness, a copy stands above a step, and a subject of the same kind stands in a row.

How wide steps get without copies is measured on the data itself by exchanging who is held out: one volume after the
other is compared with other subjects of its own side, seen or held out, where all are known to differ. The same
comparison gives the rate of false alarms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from medcl.leakage.matched import picture_hash, remembered
from medcl.leakage.matching import BEST, HOPELESS, THRESHOLD, scores

EQUAL = 0.995  # likeness from which two pictures are one
HIGHEST = 0.999  # likeness above it is rounding of the thumbnails
FEW = 4  # other subjects, below which there is nothing to judge beside
SAMPLE = 100  # subjects of a side that are compared with each other
MANY = 20  # volumes that say how wide steps are
STEP, STEP_OF_FEW = 0.2, 0.3  # least width, in Fisher's z; docs/results/audit.md
WIDER = 1.75  # times the step that nine in ten volumes of different subjects do not exceed
ROUNDS = 4  # searches for further subjects, where the volumes of one take all places


@dataclass(frozen=True)
class Row:
    """A volume's likeness with other subjects.

    Attributes:
        subject: whose volume it is.
        likeness: the best score with each other subject that it was aligned with.
        others: how many other subjects there are.
        far: whether there are others that were not aligned because they stay below `HOPELESS`.
    """

    subject: str
    likeness: Mapping[str, float]
    others: int
    far: bool

    def without(self, subjects: Collection[str]) -> Row:
        """The row as it were without some of the other subjects."""
        kept = {subject: score for subject, score in self.likeness.items() if subject not in subjects}
        return Row(self.subject, kept, self.others - len(self.likeness) + len(kept), self.far)

    def copies(self, step: float) -> set[str]:
        """The subjects above the last step of this width, among the five most alike; none without such a step."""
        levels = self._levels(_one_of_equal(self.likeness.values()))
        for upper, lower in reversed([*itertools.pairwise(levels)]):
            if upper >= THRESHOLD and _z(upper) - _z(lower) >= step:
                return {subject for subject, score in self.likeness.items() if score >= upper}
        return set()

    def widest_step(self) -> float:
        """The widest step among the five most alike subjects, pictures that are equal to this one left out."""
        levels = self._levels(sorted((score for score in self.likeness.values() if score < EQUAL), reverse=True))
        return max((_z(upper) - _z(lower) for upper, lower in itertools.pairwise(levels)), default=0.0)

    def _levels(self, ranked: list[float]) -> list[float]:
        """The first five; where there are fewer, also the height below which all others stay."""
        return [*ranked, *([HOPELESS] if self.far else [])][:BEST]


def _one_of_equal(likeness: Iterable[float]) -> list[float]:
    """From the highest down; pictures equal to the volume are one."""
    ranked = sorted(likeness, reverse=True)
    equal = sum(score >= EQUAL for score in ranked)
    return ranked[max(0, equal - 1) :]


def _z(score: float) -> float:
    """Fisher's z of a correlation: its spread is about the same at any height."""
    return math.atanh(min(max(score, HOPELESS), HIGHEST))


@dataclass(frozen=True)
class Spread:
    """How alike different subjects of a data set are.

    Attributes:
        rows: of volumes, one a subject, with the other subjects of their own side.
    """

    rows: tuple[Row, ...] = ()

    def step(self, aside: Collection[str] = ()) -> float:
        """How wide the step below a copy must be, in Fisher's z.

        Args:
            aside: subjects in question, who say nothing of how alike different subjects are.
        """
        steps = sorted(row.widest_step() for row in self.without(aside).rows)
        least = STEP if len(steps) >= MANY else STEP_OF_FEW
        # some of a side may be copies of each other: the widest steps do not count
        usual = steps[: max(0, len(steps) - math.ceil(len(steps) / 10) - 1)]
        return max([least, *(WIDER * step for step in usual[-1:])])

    def copies(self, row: Row) -> set[str]:
        """The subjects that a volume is a copy of, by its picture.

        With fewer than four other subjects the threshold alone decides.
        """
        alike = {subject for subject, score in row.likeness.items() if score >= THRESHOLD}
        if not alike or row.others < FEW:
            return alike
        first = max(alike, key=lambda subject: row.likeness[subject])
        return row.copies(self.step({row.subject, first}))

    def without(self, subjects: Collection[str]) -> Spread:
        """The spread without some subjects."""
        return Spread(tuple(row.without(subjects) for row in self.rows if row.subject not in subjects))

    def false_alarms(self) -> dict[str, float | int | str]:
        """How often different subjects would be taken for one.

        Returns:
            `volumes` compared, `pairs` among them, `called` copies, the upper 95% bound `below` of their share (Clopper
            and Pearson 1934), the `highest` likeness of those not called, and a `sentence`. Without enough subjects,
            the sentence alone.
        """
        rows = [row for row in self.rows if row.others >= FEW]
        if not rows:
            return {"sentence": "too few subjects to state a false-alarm rate of pictures that look alike"}
        called = [self.copies(row) for row in rows]
        count, wrong = len(rows), sum(map(bool, called))
        below = 1.0 if wrong == count else float(beta.ppf(0.95, wrong + 1, count - wrong))
        highest = max(
            (score for row, named in zip(rows, called, strict=True) for subject, score in row.likeness.items()
             if subject not in named), default=0.0,
        )  # fmt: skip
        reach = f"reach a likeness of {highest:.2f}" if highest >= HOPELESS else f"stay below a likeness of {HOPELESS}"
        share = f"{100 * below:.1f}%" if below < 0.1 else f"{100 * below:.0f}%"
        sentence = (
            f"false-alarm rate below {share} a volume (95% bound): of {count} volumes, compared with other subjects of "
            f"their own side, {wrong} would be taken for a copy; other subjects {reach}"
        )
        return {
            "volumes": count, "pairs": sum(row.others for row in rows) // 2, "called": wrong, "below": round(below, 4),
            "highest": round(highest, 3), "sentence": sentence,
        }  # fmt: skip


def spread(sides: Sequence[tuple[Sequence[np.ndarray], Sequence[str]]], store: str = "") -> Spread:
    """How alike the different subjects of each side are.

    Up to 100 subjects of a side, chosen by a hash, are compared with each other by one volume each.

    Args:
        sides: thumbnails, uint8 (24, 24, 24) each, and the subject of each.
        store: folder that remembers comparisons; by default `default_store()`.
    """
    rows: list[Row] = []
    for pictures, subjects in sides:
        places: dict[str, int] = {}
        # one picture, seen under two names, is taken once
        for _, place in sorted({picture_hash(picture): place for place, picture in enumerate(pictures)}.items()):
            places.setdefault(subjects[place], place)
        chosen = dict(list(places.items())[:SAMPLE])
        if len(chosen) < 3:  # nobody stands behind the one other
            continue
        some, names = [pictures[place] for place in chosen.values()], list(chosen)
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for match in remembered(some, some, store, names, names, threshold=0.0):
            found[names[match.new]][names[match.known]] = match.score
        others = len(names) - 1
        rows += [Row(name, those, others, len(those) < min(BEST, others)) for name, those in found.items()]
    return Spread(tuple(rows))


def add_subjects(
    found: Sequence[dict[str, float]], known: Sequence[np.ndarray], owners: Sequence[str], new: Sequence[np.ndarray],
    left_out: Sequence[Collection[int]],
) -> list[bool]:  # fmt: skip
    """Adds further subjects to each volume's likeness with subjects, until the five most alike are among them.

    Args:
        found: likeness by subject, of each new volume; added to.
        known, owners: thumbnails, and the subject of each.
        new: of the volumes in question.
        left_out: for each new one, places of known ones that it is not compared with.

    Returns:
        For each new one, whether all that look alike are in `found` by now.
    """
    places: dict[str, list[int]] = {}
    for place, owner in enumerate(owners):
        places.setdefault(owner, []).append(place)
    asked, whole = list(range(len(new))), [False] * len(new)
    for _ in range(ROUNDS):
        without = [{*left_out[q], *(p for owner in found[q] for p in places.get(owner, ()))} for q in asked]
        more = dict.fromkeys(asked, 0)
        for match in scores(known, [new[q] for q in asked], without):
            q, owner = asked[match.new], owners[match.known]
            more[q] += 1
            found[q][owner] = max(match.score, found[q].get(owner, 0.0))
        for q in asked:
            whole[q] = more[q] < BEST
        # the places among the five that were aligned may all have gone to volumes of one subject
        asked = [q for q in asked if not whole[q] and len(_one_of_equal(found[q].values())) < BEST]
    return whole
