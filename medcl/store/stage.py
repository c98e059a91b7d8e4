"""The stages `scan` and `prepare`, and the way every later stage gets from SOURCE to prepared volumes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medcl.config import PrepareConfig, ScanConfig
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.scan import scan as scan_folder
from medcl.dataset.summary import grouped
from medcl.dataset.table import names_file, write_table
from medcl.errors import MedclError
from medcl.runtime.run import log
from medcl.store.lookalikes import lookalikes
from medcl.store.plan import Plan, derive_plan, growth, sized
from medcl.store.prepare import Stored
from medcl.store.prepare import prepare as prepare_volumes
from medcl.store.volumes import read_meta, store_folder

MEASURED = 32  # volumes prepared to plan sizes
GROWTH = 4.0  # in voxels; less is the ordinary spread of scanners
SHOWN = 5  # problems logged one by one; all are in manifest.json


def scan(config: ScanConfig) -> Manifest:
    """Scans a folder and writes its manifest."""
    if config.source.endswith(".json"):
        raise MedclError("is no folder of scans", config.source, "Scan a folder or a table.")
    manifest = scan_folder(
        config.source, table=config.table, include=config.include, exclude=config.exclude, channel=config.channel,
        voxels=not config.quick, nan=config.nan, workers=config.workers or None, progress=not config.json,
    )  # fmt: skip
    if not config.quick:
        found = lookalikes(manifest, manifest.cases, workers=config.workers)
        manifest = manifest.with_cases(manifest.cases, tuple(found))
    if config.yes:
        manifest = manifest.confirmed()
    _keep_previous(Path(config.out), manifest)
    manifest.save(config.out)
    if config.write_table:
        for path in (Path(config.write_table), names_file(Path(config.write_table))):
            _keep_previous(path)
        write_table(manifest, config.write_table)
    return manifest


def _keep_previous(path: Path, manifest: Manifest | None = None) -> None:
    """Renames what was written before, which may have been edited by hand, so that no scan overwrites it."""
    if not path.exists():
        return
    with contextlib.suppress(MedclError):  # of an earlier version, or damaged: kept all the same
        if manifest is not None and Manifest.load(path) == manifest:
            return
    kept = next(other for n in itertools.count(1) if not (other := path.with_suffix(f".{n}{path.suffix}")).exists())
    path.rename(kept)
    log.info("%s was there before: it is kept as %s.", path, kept.name)


def load_source(source: str, channel: int | None = None, previous_run: Path | None = None) -> Manifest:
    """A manifest, from a folder of scans, a single volume or a file written by `medcl scan`.

    Args:
        source: what the user named.
        channel: of 4D files.
        previous_run: folder of a run that goes on; what it found at its start is taken, whatever the source holds now.
    """
    if previous_run is not None:
        return Manifest.load(previous_run / "manifest.json")
    if source.endswith(".json"):
        return Manifest.load(source)
    return scan_folder(source, channel=channel, voxels=False)


def confirm(manifest: Manifest, source: str, yes: bool) -> Manifest:
    """The manifest with its guesses taken.

    Raises:
        MedclError: something was guessed that a person has to confirm, and `yes` does not.
    """
    questions = manifest.questions
    if questions and not yes:
        first = questions[0]
        more = f" ({len(questions) - 1} more questions: `medcl scan {shlex.quote(source)}`)" if questions[1:] else ""
        raise MedclError(f"{first.file}: {first.what}{more}", source, f"{first.remedy} Or take the guess with --yes.")
    return manifest.confirmed() if questions else manifest


def describe(manifest: Manifest) -> str:
    """One line: volumes, subjects, labelled ones, what is set aside, and how subjects were found."""
    aside = sum(problem.aside for problem in manifest.problems)
    found = f"{len(manifest.cases)} volumes of {len(manifest.subjects)} subjects, {len(manifest.labelled)} labelled"
    return f"{found}, {aside} set aside ({manifest.rule.rstrip('.')})"


def log_problems(manifest: Manifest, before: int = 0) -> None:
    """Logs the first few problems, one line each."""
    lines = grouped(manifest.problems[before:])
    for _, line in lines[:SHOWN]:
        log.warning("%s", line)
    if len(lines) > SHOWN:
        log.warning("... and %d more, all in manifest.json.", len(lines) - SHOWN)


def plan_for(
    manifest: Manifest, plan: str, *, device: str, n4: bool = False, spacing: Any = None, store: str = "",
    workers: int = 0, nan: str = "reject",
) -> Plan:  # fmt: skip
    """The plan a user names, or one derived: spacing from all headers, sizes from what cropping leaves of volumes."""
    if plan:
        named = with_nan(Plan.load(plan), nan)
        tell_growth(manifest, named, plan)
        return named
    derived = with_nan(derive_plan(manifest, spacing=spacing, n4=n4, device=device), nan)
    return measured(manifest, derived, device, store, workers)


def with_nan(plan: Plan, nan: str) -> Plan:
    """The plan with `nan` of the settings, where these ask for 0 in place of NaN."""
    return replace(plan, nan="zero") if nan == "zero" else plan


def tell_growth(manifest: Manifest, plan: Plan, where: object) -> None:
    """Warns where the spacing of a plan that was made for other scans is far from that of these."""
    own, factor = growth(manifest, plan)
    if 1 / GROWTH < factor < GROWTH:
        return
    theirs, ours = (" x ".join(f"{mm:g}" for mm in spacing) for spacing in (plan.spacing, own))
    change = f"grow {factor:.3g} x" if factor > 1 else f"shrink {1 / factor:.3g} x"
    log.warning("%s resamples to %s mm, and these scans have %s mm: they %s in voxels. Better pretrain on scans like "
                "these.", where, theirs, ours, change)  # fmt: skip


def measured(manifest: Manifest, plan: Plan, device: str, store: str = "", workers: int = 0) -> Plan:
    """The plan with sizes for volumes as they are prepared: cropped to the foreground, as nnU-Net plans.

    Up to `MEASURED` volumes, evenly spaced in the manifest, are prepared into the store, where the stage finds them
    again. Their extents enter, and no intensity or label does.
    """
    count = len(manifest.cases)
    some = [manifest.cases[i] for i in sorted({int((k + 0.5) * count / MEASURED) for k in range(MEASURED)})]
    try:
        stored, _ = prepare_volumes(manifest.with_cases(tuple(some)), plan, store=store, workers=workers)
    except MedclError as error:
        if error.__cause__ is not None:  # the store cannot be written
            raise
        log.warning("None of %d volumes could be prepared to measure them: sizes are those of the headers.", len(some))
        return plan
    shapes = np.array([read_meta(item.path)["shape"] for item in stored])
    plan = sized(plan, shapes, device)
    size, patch = (" x ".join(map(str, n)) for n in (plan.volume_size, plan.patch_size))
    log.info("Sizes planned from %d of %d volumes, cropped to the foreground: volumes of %s voxels, patches of %s.",
             len(stored), count, size, patch)  # fmt: skip
    return plan


def prepare_all(
    manifest: Manifest,
    plan: Plan,
    store: str = "",
    workers: int = 0,
    cases: tuple[Case, ...] | None = None,
    dask: str = "",
) -> tuple[list[Stored], Manifest]:
    """Prepares the manifest's cases, or some of them, with a progress bar, and tells what was set aside."""
    chosen = manifest if cases is None else manifest.with_cases(cases)
    stored, left = prepare_volumes(
        chosen, plan, store=store, workers=workers, title="prepare" if sys.stderr.isatty() else None, dask=dask
    )
    left = left.with_cases(left.cases, told(stored, left))
    known = {problem.what for problem in manifest.problems}
    alike = lookalikes(left, left.cases, store, workers)
    left = left.with_cases(left.cases, tuple(replace(p, question=False) for p in alike if p.what not in known))
    log_problems(left, before=len(manifest.problems))
    log_twins(stored)
    return stored, left


def told(stored: list[Stored], manifest: Manifest) -> tuple[Problem, ...]:
    """Warnings that preparation has left beside the volumes, as far as the manifest does not hold them."""
    found = [
        Problem(item.case.image[0], what, remedy, aside=False)
        for item in stored
        for what, remedy in read_meta(item.path).get("told", ())
    ]
    return tuple(problem for problem in found if problem not in manifest.problems)


def log_twins(stored: list[Stored]) -> None:
    """Warns of equal voxels under two subjects' names: compressed anew, they differ as files."""
    owner: dict[str, Case] = {}
    for item in stored:
        first = owner.setdefault(read_meta(item.path)["voxel_hash"], item.case)
        if first.subject != item.case.subject:
            log.warning("%s: holds the same voxels as %s, under another subject's name. Delete one of the two.",
                        item.case.image[0], first.image[0])  # fmt: skip


def bar(items: Iterator[Any], total: int, title: str) -> Iterator[Any]:
    """A progress bar on a terminal, silence elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    yield from track(items, description=title, total=total, console=console, transient=True)


def prepare(config: PrepareConfig) -> tuple[list[Stored], Plan]:
    """Prepares a folder of scans; a derived plan is written into `plans/` of the store.

    Raises:
        MedclError: nothing could be prepared, or a contradiction in the options.
    """
    if config.plan and (config.spacing or config.n4):
        raise MedclError("a plan already says spacing and N4", "--plan", "Edit the plan, or leave it out.")
    manifest = confirm(load_source(config.source, config.channel), config.source, config.yes)
    log.info("%s: %s.", config.source, describe(manifest))
    log_problems(manifest)
    plan = plan_for(
        manifest, config.plan, device="cpu", n4=config.n4, spacing=config.spacing, store=config.store,
        workers=config.workers, nan=config.nan,
    )  # fmt: skip
    stored, _ = prepare_all(manifest, plan, config.store, config.workers, dask=config.dask)
    root = store_folder(config.store)
    if not config.plan:
        # one a source, and anew whenever the derived plan changes: a plan that a person has edited is never overwritten
        digest = hashlib.sha256(f"{Path(config.source).resolve()}{plan}".encode()).hexdigest()[:8]
        path = root / "plans" / f"{Path(config.source).resolve().stem}-{digest}.json"
        if not path.exists():
            plan.save(path)
        scale = "intensities scaled volume by volume"
        if plan.normalise == "ct":
            scale = f"CT window {plan.window[0]:g} to {plan.window[1]:g} HU"
        spacing = " x ".join(f"{s:g}" for s in plan.spacing)
        log.info("Plan: spacing %s mm, %s. Edit %s and pass it with --plan to change it.", spacing, scale, path)
    log.info("%d volumes prepared in %s.", len(stored), root)
    return stored, plan
