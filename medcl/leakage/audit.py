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
from medcl.dataset.case import Manifest
from medcl.dataset.splits import Split, cases_of
from medcl.errors import MedclError
from medcl.leakage.matched import remembered
from medcl.leakage.matching import THRESHOLD
from medcl.leakage.seen import SELECTION, Seen, SeenVolume, seen_by, seen_in
from medcl.runtime.files import read_json, write_json
from medcl.runtime.run import log, setup_log
from medcl.store.stage import describe, load_source, log_problems

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
        selection: whether it was not trained on, but validated on to choose the weights.
    """

    kind: str
    case: str
    seen: str
    score: float | None = None
    selection: bool = False


def overlaps(seen: Seen, held: Seen, within: bool = False, store: str = "") -> list[Overlap]:
    """Every held-out volume that was seen, with the strongest evidence: equal voxels, else pictures, else the subject.

    Volumes by which weights were chosen count as seen where they are tested on. Where they are validated on again (a
    held volume of the stage `selection`) they do not: that is what they are for.

    Args:
        seen: volumes trained on, or validated on.
        held: volumes held out.
        within: both are of one folder, in which only what goes under two subjects' names is worth telling.
        store: folder that remembers comparisons; by default `default_store()`.
    """
    by_hash: dict[str, list[SeenVolume]] = {}
    by_subject: dict[str, list[SeenVolume]] = {}
    for volume in sorted(seen.volumes, key=lambda volume: volume.stage == SELECTION):  # what was trained on first
        for mark in {volume.voxels, volume.values} - {""}:
            by_hash.setdefault(mark, []).append(volume)
        if volume.subject:
            by_subject.setdefault(volume.subject, []).append(volume)
    pictures = [(volume, picture) for volume in seen.volumes if (picture := volume.thumbnail) is not None]
    found: dict[int, list[Overlap]] = {}
    rest: list[tuple[int, np.ndarray]] = []
    for number, case in enumerate(held.volumes):
        same = [*by_hash.get(case.voxels, ()), *by_hash.get(case.values, ())]
        same = [volume for volume in same if not (within and volume.subject == case.subject)]
        if same := [volume for volume in same if not _validates(volume, case)]:
            found[number] = list(dict.fromkeys(_overlap("exact", case, volume) for volume in same))
        elif (picture := case.thumbnail) is not None:
            rest.append((number, picture))
    # of one folder, a subject's own volumes would take the few places that a new one is aligned with, and so would
    # the validation volumes of those that are validated on
    known_owners = [volume.subject if within else SELECTION * (volume.stage == SELECTION) for volume, _ in pictures]
    cases = [held.volumes[number] for number, _ in rest]
    owners = [case.subject if within else SELECTION if case.stage == SELECTION else "test" for case in cases]
    known, new = ([picture for _, picture in side] for side in (pictures, rest))
    for match in remembered(known, new, store, known_owners, owners):
        overlap = _overlap("alike", cases[match.new], pictures[match.known][0], round(match.score, 3))
        found.setdefault(rest[match.new][0], []).append(overlap)
    for number, case in enumerate(held.volumes):
        if number not in found and not within:
            same = [volume for volume in by_subject.get(case.subject, ()) if not _validates(volume, case)]
            if same:
                found[number] = [_overlap("subject", case, same[0])]
    return [overlap for number in sorted(found) for overlap in found[number]]


def _validates(volume: SeenVolume, case: SeenVolume) -> bool:
    """Whether both are validated on."""
    return volume.stage == case.stage == SELECTION


def _overlap(kind: str, case: SeenVolume, volume: SeenVolume, score: float | None = None) -> Overlap:
    return Overlap(kind, case.name, _describe_seen(volume), score, volume.stage == SELECTION)


def _describe_seen(volume: SeenVolume) -> str:
    return volume.name or f"{'validation' if volume.stage == SELECTION else volume.stage} {volume.run}"


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
    trained, chosen = ({v.voxels for v in seen.volumes if (v.stage == SELECTION) == by} - {""} for by in (False, True))
    return {
        "medcl_audit": AUDIT_VERSION,
        "seen": len(trained),
        "chosen_by": len(chosen),
        "held_out": len(held.volumes) + len(twins),
        "threshold": THRESHOLD,
        "sentence": _sentence(found, len(held.volumes) + len(twins), what, how, kinds),
        "overlaps": [asdict(each) for each in found],
        "gaps": list(dict.fromkeys(seen.gaps + held.gaps)),
    }


def _sentence(found: list[Overlap], held: int, what: str, how: str, kinds: Mapping[str, str]) -> str:
    trained = {each.case: each for each in reversed(found) if not each.selection}
    chosen = {each.case: each for each in reversed(found) if each.case not in trained}
    parts = []
    for first, done in ((trained, f"were seen {how}"), (chosen, "were validated on to choose the weights")):
        counts = Counter(each.kind for each in first.values())
        ways = "; ".join(f"{counts[kind]} with {text}" for kind, text in kinds.items() if counts[kind])
        if first:
            parts.append(f"{len(first)} of {held} held-out {what} {done}: {ways}")
    if not parts:
        return ""
    such = next((each for each in found if not each.selection), found[0])
    return f"leakage: {'; '.join(parts)}; such as {such.case}, seen as {such.seen}{_likeness(such)}"


def _likeness(overlap: Overlap) -> str:
    return "" if overlap.score is None else f" (likeness {overlap.score:.2f}, threshold {THRESHOLD})"


def refuse(
    result: Mapping[str, Any], allowed: bool, where: object, instead: str = "train without these volumes"
) -> None:
    """Stops at an overlap that the user has not allowed.

    Args:
        result: of `compared`.
        allowed: whether the user has.
        where: what to name as the place of the error.
        instead: what to do rather than to allow it.

    Raises:
        MedclError: held-out volumes were seen.
    """
    for gap in result["gaps"]:
        log.info("Audit: %s", gap)
    if result["sentence"] and not allowed:
        raise MedclError(
            result["sentence"], where,
            f"See `medcl audit`; {instead}, or add --allow_leakage, which marks every result.",
        )  # fmt: skip


def stamp(result: Mapping[str, Any], run: Path) -> list[str]:
    """What the scores of a run are marked with.

    Overlaps of its test volumes, and of its validation volumes, by which its weights were chosen.
    """
    path = run / "audit.json"
    earlier: dict[str, Any] = read_json(path) if path.exists() else {"sentence": "", "overlaps": []}
    known = {each["case"] for each in result["overlaps"]}
    others = {each["case"] for each in earlier["overlaps"]} - known
    if others and (run / "manifest.json").exists() and (run / "split.json").exists():
        # those of its test volumes concern their own scores alone
        validated = cases_of(Manifest.load(run / "manifest.json"), Split.load(run / "split.json").val)
        others &= {case.id for case in validated}
    return [line for line in (result["sentence"], earlier["sentence"] if others else "") if line]


def checked(
    results: Sequence[Mapping[str, Any]], marks: Sequence[str] = (), gaps: Sequence[str] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The check that a result has gone through, as it is kept in the result.

    Args:
        results: of `compared`; none where nothing is known of what made the predictions.
        marks: leakage, a sentence each.
        gaps: what could not be checked, a sentence each.
        notes: what else a reader must know, a sentence each.
    """
    return {
        "medcl_audit": AUDIT_VERSION,
        # an empty list says that there is no leakage: not where part of it was not looked for
        "leakage": list(marks) or (None if gaps or not results else []),
        "overlaps": [each for result in results for each in result["overlaps"]],
        "gaps": list(dict.fromkeys([*gaps, *(gap for result in results for gap in result["gaps"])])),
        "notes": list(notes),
    }


def notes_on(result: Mapping[str, Any]) -> list[str]:
    """What must stand beside the numbers of an evaluation: leakage first, then what was not checked for it."""
    leakage = list(result.get("leakage") or ())
    if "audit" not in result:
        return [*leakage, "no check for leakage stands in this result, which an earlier medcl wrote: score it anew"]
    return [*leakage, *result["audit"]["notes"], *result["audit"]["gaps"]]


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
    log_problems(manifest)
    twins = [Overlap("exact", problem.file, problem.twin) for problem in manifest.problems if problem.twin]
    return seen_in(manifest, manifest.cases, store=config.store, workers=config.workers), twins


def _held_out(run: Path, config: AuditConfig) -> Seen:
    split = Split.load(run / "split.json") if (run / "split.json").exists() else None
    if split is None or not (split.val or split.test):
        raise MedclError("holds no subject out", run, "Give the scans that it is tested on.")
    manifest = Manifest.load(run / "manifest.json")
    val, test = cases_of(manifest, split.val), cases_of(manifest, split.test)
    if not (val or test):
        raise MedclError("does not know the volumes that it holds out", run, "Give the scans that it is tested on.")
    parts = (val, SELECTION), (test, "")
    return sum(
        (seen_in(manifest, cases, stage, store=config.store, workers=config.workers) for cases, stage in parts), Seen()
    )


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
