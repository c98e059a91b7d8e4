"""Were held-out volumes seen in training? Compares records of volumes, refuses, and says so on every result."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medcl.config import AuditConfig
from medcl.dataset.case import Manifest
from medcl.dataset.splits import Split, cases_of
from medcl.errors import MedclError
from medcl.leakage.matching import THRESHOLD
from medcl.leakage.overlap import KINDS, SIMILAR, Overlap, compare
from medcl.leakage.seen import SELECTION, Seen, SeenVolume, seen_by, seen_in
from medcl.runtime.files import read_json, write_json
from medcl.runtime.run import log, setup_log
from medcl.store.stage import describe, load_source, log_problems

AUDIT_VERSION = 1
SHOWN = 20


def overlaps(seen: Seen, held: Seen, within: bool = False, store: str = "") -> list[Overlap]:
    """Every held-out volume that was seen: the overlaps of `medcl.leakage.overlap.compare`."""
    return compare(seen, held, within, store).overlaps


def compared(
    seen: Seen, held: Seen, within: bool = False, store: str = "", twins: Sequence[Overlap] = (),
    what: str = "volumes", how: str = "in training", kinds: Mapping[str, str] = KINDS,
) -> dict[str, Any]:  # fmt: skip
    """The outcome of an audit as JSON holds it: counts, overlaps, gaps, and a sentence where anything overlaps.

    Args:
        seen, held, within, store: as for `compare`.
        twins: held-out volumes that were set aside because they equal others.
        what, how, kinds: words of the sentence.
    """
    comparison = compare(seen, held, within, store)
    found = [*twins, *comparison.overlaps]
    trained, chosen = (_count([v for v in seen.volumes if (v.stage == SELECTION) == by]) for by in (False, True))
    count = len(held.volumes) + len(twins)
    return {
        "medcl_audit": AUDIT_VERSION,
        "seen": trained,
        "chosen_by": chosen,
        "held_out": count,
        "threshold": THRESHOLD,
        "sentence": _sentence(found, count, what, how, kinds),
        "question": _question(comparison.similar, count, what),
        "overlaps": [asdict(each) for each in found],
        "similar": [asdict(each) for each in comparison.similar],
        "false_alarms": comparison.spread.false_alarms() if comparison.spread else {},
        "gaps": list(dict.fromkeys(seen.gaps + held.gaps)),
    }


def _count(volumes: Sequence[SeenVolume]) -> int:
    """Different volumes; of a record without hashes, different subjects."""
    return len({volume.voxels or volume.subject for volume in volumes} - {""})


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


def _question(similar: Sequence[Overlap], held: int, what: str) -> str:
    if not similar:
        return ""
    cases, most = {each.case for each in similar}, max(similar, key=lambda each: each.score or 0.0)
    return (
        f"{len(cases)} of {held} held-out {what} look like a seen one, though no more than different subjects of this "
        f"data look like each other; such as {most.case} and {most.seen}{_likeness(most)}: whether they are copies was "
        "not decided, so look at them"
    )


def _likeness(overlap: Overlap) -> str:
    return "" if overlap.score is None else f" (likeness {overlap.score:.2f}, threshold {THRESHOLD})"


def refuse(
    result: Mapping[str, Any], allowed: bool, where: object, instead: str = "train without these volumes"
) -> None:
    """Stops at an overlap that the user has not allowed; tells what was not decided or not compared.

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
    if result["question"]:
        log.warning("Audit: %s.", result["question"])
    if result["false_alarms"]:
        log.info("Audit: %s.", result["false_alarms"]["sentence"])
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
    questions = [result["question"] for result in results if result["question"]]
    return {
        "medcl_audit": AUDIT_VERSION,
        # an empty list says that there is no leakage: not where part of it was not looked for, or not decided
        "leakage": list(marks) or (None if gaps or questions or not results else []),
        "overlaps": [each for result in results for each in result["overlaps"]],
        "similar": [each for result in results for each in result["similar"]],
        "gaps": list(dict.fromkeys([*questions, *gaps, *(gap for result in results for gap in result["gaps"])])),
        "false_alarms": [result["false_alarms"] for result in results if result["false_alarms"]],
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
        MedclError: a side is neither a run, nor scans, nor a manifest; or it holds nothing to compare, such as a run
            that holds nobody out.
    """
    setup_log()
    within = not _is_run(config.seen) and Path(config.seen).resolve() == Path(config.held).resolve()
    second, twins = (_held_out(Path(config.held), config), []) if _is_run(config.held) else _scans(config.held, config)
    if _is_run(config.seen):
        first = seen_by(config.seen)
        if not first.volumes:
            raise MedclError("has no record of a volume that it has seen", config.seen, "Give the scans it trained on.")
    else:
        first = second if within else _scans(config.seen, config)[0]
    if within and not twins and len({volume.subject for volume in second.volumes}) == 1:
        raise MedclError("holds one subject, and nobody to compare it with", config.held, "Give two folders.")
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
    seen = seen_in(manifest, manifest.cases, store=config.store, workers=config.workers)
    return _with_signatures(seen, source, "`medcl scan` says what is wrong with them."), twins


def _held_out(run: Path, config: AuditConfig) -> Seen:
    split = Split.load(run / "split.json") if (run / "split.json").exists() else None
    if split is None or not (split.val or split.test):
        raise MedclError("holds no subject out", run, "Give the scans that it is tested on.")
    manifest = Manifest.load(run / "manifest.json")
    val, test = cases_of(manifest, split.val), cases_of(manifest, split.test)
    if not (val or test):
        raise MedclError("does not know the volumes that it holds out", run, "Give the scans that it is tested on.")
    parts = (val, SELECTION), (test, "")
    held = sum(
        (seen_in(manifest, cases, stage, store=config.store, workers=config.workers) for cases, stage in parts), Seen()
    )
    return _with_signatures(held, run, "Put them back, or give the scans that it is tested on.")


def _with_signatures(side: Seen, where: object, remedy: str) -> Seen:
    """The same side, with at least one volume that could be read."""
    if not any(volume.voxels for volume in side.volumes):
        count = len(side.volumes)
        what = f"none of its {count} volumes could be read" if count else "holds no volume"
        raise MedclError(f"{what}: there is nothing to compare", where, remedy)
    return side


def print_audit(result: Mapping[str, Any]) -> None:
    """Prints the outcome for a person."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=sys.stdout)
    found = [*result["overlaps"], *result["similar"]]
    if found:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("held out", "seen", "what is the same", "score"):
            table.add_column(heading)
        for each in found[:SHOWN]:
            score = "" if each["score"] is None else f"{each['score']:.3f}"
            table.add_row(escape(each["case"]), escape(each["seen"]), {**KINDS, **SIMILAR}[each["kind"]], score)
        console.print(table)
        if len(found) > SHOWN:
            console.print(f"... and {len(found) - SHOWN} more; --out FILE.json lists them all.")
    for gap in (*result["gaps"], *([f"{_capital(result['question'])}."] if result["question"] else [])):
        console.print(gap, style="yellow", markup=False, soft_wrap=True)
    if result["false_alarms"]:
        rate = f"By the pictures: {result['false_alarms']['sentence']}."
        console.print(rate, markup=False, highlight=False, soft_wrap=True)
    sentence = result["sentence"] or (
        f"no overlap: none of {result['held_out']} held-out volumes is among the {result['seen']} seen"
    )
    console.print(f"{_capital(sentence)}.", markup=False, highlight=False, soft_wrap=True)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
