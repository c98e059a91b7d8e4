"""Which held-out volumes were seen, by equal voxels, by picture or by the subject's id; and which only look alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medcl.leakage.likeness import Row, Spread, add_subjects, spread
from medcl.leakage.matched import remembered
from medcl.leakage.matching import THRESHOLD
from medcl.leakage.seen import SELECTION, Seen, SeenVolume

KINDS = {
    "exact": "the same voxels",
    "alike": "the same picture (rescaled, resampled, cropped, flipped or permuted)",
    "subject": "the same subject id, another volume",
}
SIMILAR = {"similar": "looks alike, as different subjects do: not decided"}
Pictured = list[tuple[SeenVolume, np.ndarray]]


@dataclass(frozen=True)
class Overlap:
    """A held-out volume that was seen.

    Attributes:
        kind: one of `KINDS`; or of `SIMILAR`, of a volume that looks like a seen one and may be another subject's.
        case: the held-out volume.
        seen: the volume that was seen: its case where that is at hand, else the stage and the run that saw it.
        score: correlation of the aligned pictures, for `alike` and `similar`.
        selection: whether it was not trained on, but validated on to choose the weights.
    """

    kind: str
    case: str
    seen: str
    score: float | None = None
    selection: bool = False


@dataclass(frozen=True)
class Comparison:
    """What comparing held-out volumes with those seen has found.

    Attributes:
        overlaps: of volumes that were seen.
        similar: of volumes that look like a seen one, but no more than different subjects of the data do.
        spread: how alike these are; None where there were no pictures to compare.
    """

    overlaps: list[Overlap] = field(default_factory=list)
    similar: list[Overlap] = field(default_factory=list)
    spread: Spread | None = None


def compare(seen: Seen, held: Seen, within: bool = False, store: str = "") -> Comparison:
    """Every held-out volume that was seen, with the strongest evidence: equal voxels, else pictures, else the subject.

    Volumes by which weights were chosen count as seen where they are tested on. Where they are validated on again (a
    held volume of the stage `selection`) they do not: that is what they are for.

    Args:
        seen: volumes trained on, or validated on.
        held: volumes held out.
        within: both are of one folder, in which only what goes under two subjects' names is worth telling.
        store: folder that remembers comparisons; by default `default_store()`.
    """
    found = _exact(seen, held, within)
    known = [(volume, picture) for volume in seen.volumes if (picture := volume.thumbnail) is not None]
    places = [place for place, case in enumerate(held.volumes) if place not in found]
    new = [(place, picture) for place in places if (picture := held.volumes[place].thumbnail) is not None]
    asked = [(held.volumes[place], picture) for place, picture in new]
    alike, similar, differ = _by_picture(known, asked, within, store)
    found.update({new[number][0]: those for number, those in alike.items()})
    by_subject: dict[str, list[SeenVolume]] = {}
    for volume in _trained_first(seen):
        if volume.subject:
            by_subject.setdefault(volume.subject, []).append(volume)
    for place in places:
        case = held.volumes[place]
        if place not in found and not within:
            same = [volume for volume in by_subject.get(case.subject, ()) if not _validates(volume, case)]
            if same:
                found[place] = [_overlap("subject", case, same[0])]
    undecided = [each for number, those in similar.items() if new[number][0] not in found for each in those]
    return Comparison([overlap for place in sorted(found) for overlap in found[place]], undecided, differ)


def _exact(seen: Seen, held: Seen, within: bool) -> dict[int, list[Overlap]]:
    """By place, the held-out volumes whose voxels were seen."""
    by_hash: dict[str, list[SeenVolume]] = {}
    for volume in _trained_first(seen):
        for mark in {volume.voxels, volume.values} - {""}:
            by_hash.setdefault(mark, []).append(volume)
    found = {}
    for place, case in enumerate(held.volumes):
        same = [*by_hash.get(case.voxels, ()), *by_hash.get(case.values, ())]
        same = [volume for volume in same if not (within and volume.subject == case.subject)]
        if same := [volume for volume in same if not _validates(volume, case)]:
            found[place] = list(dict.fromkeys(_overlap("exact", case, volume) for volume in same))
    return found


def _by_picture(
    known: Pictured, new: Pictured, within: bool, store: str
) -> tuple[dict[int, list[Overlap]], dict[int, list[Overlap]], Spread | None]:
    """The new volumes that copy a known one, by place; those that only look alike; how alike different subjects are."""
    if not known or not new:
        return {}, {}, None
    # of one folder, a subject's own volumes would take the few places that a new one is aligned with, and so would
    # the validation volumes of those that are validated on
    known_owners = [volume.subject if within else SELECTION * (volume.stage == SELECTION) for volume, _ in known]
    owners = [case.subject if within else SELECTION if case.stage == SELECTION else "test" for case, _ in new]
    pictures, asked = [picture for _, picture in known], [picture for _, picture in new]
    found: dict[int, list[tuple[SeenVolume, float]]] = {}
    likeness: list[dict[str, float]] = [{} for _ in new]
    for match in remembered(pictures, asked, store, known_owners, owners, threshold=0.0):
        volume = known[match.known][0]
        likeness[match.new][volume.subject] = max(match.score, likeness[match.new].get(volume.subject, 0.0))
        if match.score >= THRESHOLD:
            found.setdefault(match.new, []).append((volume, match.score))
    rows = _rows(known, new, within, {number: likeness[number] for number in found})
    differ = spread([_side(side) for side in ((known,) if within else (known, new))], store)
    alike: dict[int, list[Overlap]] = {}
    similar: dict[int, list[Overlap]] = {}
    for number, row in rows.items():
        copies = differ.copies(row)
        for volume, score in found[number]:
            kind, those = ("alike", alike) if volume.subject in copies else ("similar", similar)
            those.setdefault(number, []).append(_overlap(kind, new[number][0], volume, round(score, 3)))
    if within:  # what was found is not among those who are known to differ
        differ = differ.without({new[number][0].subject for number in alike})
    return alike, similar, differ


def _rows(known: Pictured, new: Pictured, within: bool, likeness: dict[int, dict[str, float]]) -> dict[int, Row]:
    """Volumes in question beside all other subjects, seen and held out.

    Args:
        likeness: with the subjects that a volume was compared with so far, by its place among the new ones.
    """
    everyone = known if within else [*known, *new]
    subjects = [volume.subject for volume, _ in everyone]
    left_out = []
    for number in likeness:
        case = new[number][0]
        left_out.append({
            place for place, (volume, _) in enumerate(everyone)
            # a seen volume of the same id is in question, a held-out one is this subject's own
            if (volume.subject == case.subject and (within or place >= len(known)))
            or (place < len(known) and _validates(volume, case))
        })  # fmt: skip
    asked = [new[number][1] for number in likeness]
    whole = add_subjects(list(likeness.values()), [picture for _, picture in everyone], subjects, asked, left_out)
    rows = {}
    for (number, those), without, all_alike in zip(likeness.items(), left_out, whole, strict=True):
        others = {subject for place, subject in enumerate(subjects) if place not in without}
        rows[number] = Row(new[number][0].subject, those, len(others), all_alike and len(those) < len(others))
    return rows


def _side(volumes: Pictured) -> tuple[list[np.ndarray], list[str]]:
    return [picture for _, picture in volumes], [volume.subject for volume, _ in volumes]


def _trained_first(seen: Seen) -> list[SeenVolume]:
    return sorted(seen.volumes, key=lambda volume: volume.stage == SELECTION)


def _validates(volume: SeenVolume, case: SeenVolume) -> bool:
    """Whether both are validated on."""
    return volume.stage == case.stage == SELECTION


def _overlap(kind: str, case: SeenVolume, volume: SeenVolume, score: float | None = None) -> Overlap:
    return Overlap(kind, case.name, _describe_seen(volume), score, volume.stage == SELECTION)


def _describe_seen(volume: SeenVolume) -> str:
    return volume.name or f"{'validation' if volume.stage == SELECTION else volume.stage} {volume.run}"
