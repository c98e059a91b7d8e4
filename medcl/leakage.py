"""Were held-out volumes seen in training? Compares records of volumes, refuses, and says so on every result."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.config import AuditConfig
from medcl.data.matched import remembered
from medcl.data.matching import THRESHOLD
from medcl.data.splits import Split, cases_of
from medcl.data.stage import describe, load_source, tell_problems
from medcl.errors import MedclError
from medcl.files import read_json, write_json
from medcl.run import log, setup_log
from medcl.seen import Seen, SeenVolume, seen_by, seen_in

AUDIT_VERSION = 1
KINDS = {
    "exact": "the same voxels",
    "alike": "the same picture (rescaled, resampled, cropped, flipped or permuted)",
    "subject": "the same subject id, another volume",
}
SHOWN = 20


@dataclass(frozen=True)
class Overlap:
    """A held-out volume that was seen.

    Attributes:
        kind: one of `KINDS`.
        case: the held-out volume.
        seen: the volume that was seen: its case where that is at hand, else the stage and the run that saw it.
        score: correlation of the aligned pictures, for `alike`.
    """

    kind: str
    case: str
    seen: str
    score: float | None = None


def overlaps(seen: Seen, held: Seen, within: bool = False, store: str = "") -> list[Overlap]:
    """Every held-out volume that was seen, with the strongest evidence: equal voxels, else pictures, else the subject.

    Args:
        seen: volumes trained on.
        held: volumes held out.
        within: both are of one folder, in which only what goes under two subjects' names is worth telling.
        store: folder that remembers comparisons; by default `default_store()`.
    """
    by_hash: dict[str, list[SeenVolume]] = {}
    by_subject: dict[str, SeenVolume] = {}
    for volume in seen.volumes:
        for mark in {volume.voxels, volume.values} - {""}:
            by_hash.setdefault(mark, []).append(volume)
        if volume.subject:
            by_subject.setdefault(volume.subject, volume)
    pictures = [(volume, picture) for volume in seen.volumes if (picture := volume.thumbnail) is not None]
    found: dict[int, list[Overlap]] = {}
    rest: list[tuple[int, np.ndarray]] = []
    for number, case in enumerate(held.volumes):
        same = [*by_hash.get(case.voxels, ()), *by_hash.get(case.values, ())]
        same = [volume for volume in same if not (within and volume.subject == case.subject)]
        if same:
            found[number] = [Overlap("exact", case.name, told) for told in dict.fromkeys(map(_told, same))]
        elif (picture := case.thumbnail) is not None:
            rest.append((number, picture))
    # of one folder, a subject's own volumes would take the few places that a new one is aligned with
    known_owners = [volume.subject for volume, _ in pictures] if within else []
    owners = [held.volumes[number].subject for number, _ in rest] if within else []
    known, new = ([picture for _, picture in side] for side in (pictures, rest))
    for match in remembered(known, new, store, known_owners, owners):
        number, volume = rest[match.new][0], pictures[match.known][0]
        told = Overlap("alike", held.volumes[number].name, _told(volume), round(match.score, 3))
        found.setdefault(number, []).append(told)
    for number, case in enumerate(held.volumes):
        if number not in found and not within and case.subject in by_subject:
            found[number] = [Overlap("subject", case.name, _told(by_subject[case.subject]))]
    return [overlap for number in sorted(found) for overlap in found[number]]


def _told(volume: SeenVolume) -> str:
    return volume.name or f"{volume.stage} {volume.run}"


def compared(
    seen: Seen, held: Seen, within: bool = False, store: str = "", twins: Sequence[Overlap] = (),
    what: str = "volumes", how: str = "in training", kinds: Mapping[str, str] = KINDS,
) -> dict[str, Any]:  # fmt: skip
    """The outcome of an audit as JSON holds it: counts, overlaps, gaps, and a sentence where anything overlaps.

    Args:
        seen, held, within, store: as for `overlaps`.
        twins: held-out volumes that were set aside because they equal others.
        what, how, kinds: words of the sentence.
    """
    found = [*twins, *overlaps(seen, held, within, store)]
    return {
        "medcl_audit": AUDIT_VERSION,
        "seen": len({volume.voxels for volume in seen.volumes} - {""}),
        "held_out": len(held.volumes) + len(twins),
        "threshold": THRESHOLD,
        "sentence": _sentence(found, len(held.volumes) + len(twins), what, how, kinds),
        "overlaps": [asdict(each) for each in found],
        "gaps": list(dict.fromkeys(seen.gaps + held.gaps)),
    }


def _sentence(found: list[Overlap], held: int, what: str, how: str, kinds: Mapping[str, str]) -> str:
    if not found:
        return ""
    first = {each.case: each for each in reversed(found)}
    counts = Counter(each.kind for each in first.values())
    told = "; ".join(f"{counts[kind]} with {text}" for kind, text in kinds.items() if counts[kind])
    return (
        f"leakage: {len(first)} of {held} held-out {what} were seen {how}: {told}; "
        f"such as {found[0].case}, seen as {found[0].seen}{_likeness(found[0])}"
    )


def _likeness(overlap: Overlap) -> str:
    return "" if overlap.score is None else f" (likeness {overlap.score:.2f}, told from {THRESHOLD})"


def refuse(result: Mapping[str, Any], allowed: bool, where: object) -> None:
    """Stops at an overlap that the user has not allowed.

    Raises:
        MedclError: held-out volumes were seen.
    """
    for gap in result["gaps"]:
        log.info("Audit: %s", gap)
    if result["sentence"] and not allowed:
        raise MedclError(
            result["sentence"], where,
            "See `medcl audit`; train without these volumes, or add --allow_leakage, which marks every result.",
        )  # fmt: skip


def stamp(result: Mapping[str, Any], run: Path) -> list[str]:
    """What the scores of a run are marked with: overlaps of its test volumes, and of its validation volumes, by which
    its weights were chosen."""
    path = run / "audit.json"
    earlier: dict[str, Any] = read_json(path) if path.exists() else {"sentence": "", "overlaps": []}
    told = {each["case"] for each in result["overlaps"]}
    others = any(each["case"] not in told for each in earlier["overlaps"])
    return [line for line in (result["sentence"], earlier["sentence"] if others else "") if line]


def audit(config: AuditConfig) -> dict[str, Any]:
    """Compares what was trained on with what is tested on.

    Returns:
        As `compared`; also written to `config.out` where that is given.

    Raises:
        MedclError: a side is neither a run, nor scans, nor a manifest; or a run that holds nobody out.
    """
    setup_log()
    first = seen_by(config.seen) if _is_run(config.seen) else _scans(config.seen, config)[0]
    second, twins = (_held_out(Path(config.held), config), []) if _is_run(config.held) else _scans(config.held, config)
    within = not _is_run(config.seen) and Path(config.seen).resolve() == Path(config.held).resolve()
    result = compared(first, second, within, config.store, twins if within else ())
    if config.out:
        write_json(config.out, result)
    return result


def _is_run(path: str) -> bool:
    return (Path(path) / "config.yaml").exists()


def _scans(source: str, config: AuditConfig) -> tuple[Seen, list[Overlap]]:
    """The volumes of a folder, and those that a scan sets aside because they stand there under another subject too."""
    manifest = load_source(source, config.channel)
    log.info("%s: %s.", source, describe(manifest))
    tell_problems(manifest)
    twins = [Overlap("exact", problem.file, problem.twin) for problem in manifest.problems if problem.twin]
    return seen_in(manifest, manifest.cases, store=config.store, workers=config.workers), twins


def _held_out(run: Path, config: AuditConfig) -> Seen:
    from medcl.data.case import Manifest

    split = Split.load(run / "split.json") if (run / "split.json").exists() else None
    if split is None or not (split.val or split.test):
        raise MedclError("holds no subject out", run, "Give the scans that it is tested on.")
    manifest = Manifest.load(run / "manifest.json")
    cases = cases_of(manifest, (*split.val, *split.test))
    if not cases:
        raise MedclError("does not know the volumes that it holds out", run, "Give the scans that it is tested on.")
    return seen_in(manifest, cases, store=config.store, workers=config.workers)


def print_audit(result: Mapping[str, Any]) -> None:
    """Prints the outcome for a person."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=sys.stdout)
    found = result["overlaps"]
    if found:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("held out", "seen", "what is the same", "score"):
            table.add_column(heading)
        for each in found[:SHOWN]:
            score = "" if each["score"] is None else f"{each['score']:.3f}"
            table.add_row(escape(each["case"]), escape(each["seen"]), KINDS[each["kind"]], score)
        console.print(table)
        if len(found) > SHOWN:
            console.print(f"... and {len(found) - SHOWN} more; --out FILE.json lists them all.")
    for gap in result["gaps"]:
        console.print(gap, style="yellow", markup=False, soft_wrap=True)
    sentence = result["sentence"] or (
        f"no overlap: none of {result['held_out']} held-out volumes is among the {result['seen']} seen"
    )
    console.print(f"{sentence[:1].upper()}{sentence[1:]}.", markup=False, highlight=False, soft_wrap=True)
